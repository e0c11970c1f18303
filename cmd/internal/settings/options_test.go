package settings

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
)

var update = flag.Bool("update", false, "write testdata")

// defaults are the options of an empty command line.
func defaults() Options {
	return Options{
		SubnetFile:                "/run/flannel/subnet.env",
		StatusSocket:              "/run/flannel/flanneld.sock",
		LeaseRenewMargin:          time.Hour,
		EtcdEndpoints:             []string{"http://127.0.0.1:4001", "http://127.0.0.1:2379"},
		EtcdPrefix:                "/coreos.com/network",
		KubeAnnotationPrefix:      "flannel.alpha.coreos.com/",
		NetConfigPath:             "/etc/kube-flannel/net-conf.json",
		SetNodeNetworkUnavailable: true,
		IPMasqFamilies:            family.Pair[bool]{IPv4: true, IPv6: true},
		RulePriority:              1000,
		ForwardRules:              true,
		RulesResync:               5 * time.Second,
		KernelResync:              time.Minute,
		ProbePeers:                true,
		ProbeInterval:             30 * time.Second,
		HealthzIP:                 netip.IPv4Unspecified(),
	}
}

func regexps(patterns ...string) (out []*regexp.Regexp) {
	for _, p := range patterns {
		out = append(out, regexp.MustCompile(p))
	}
	return out
}

func TestParseOptions(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file.pem")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr
	for _, c := range []struct {
		name string
		args []string
		env  []string
		want func(o *Options)
	}{
		{name: "nothing", want: func(*Options) {}},
		{name: "double dash", args: []string{"--iface=eth0", "--ip-masq", "--public-ip", "198.18.0.1"},
			want: func(o *Options) {
				o.Uplink.Names, o.IPMasq, o.Uplink.PublicIP = []string{"eth0"}, true, ip("198.18.0.1")
			}},
		{name: "single dash", args: []string{"-iface=eth0", "-ip-masq", "-public-ip", "198.18.0.1", "-v=4"},
			want: func(o *Options) {
				o.Uplink.Names, o.IPMasq, o.Uplink.PublicIP = []string{"eth0"}, true, ip("198.18.0.1")
			}},
		{name: "a value that looks like a flag", args: []string{"-iface", "-eth0", "--iface-regex", "--x", "-etcd-prefix",
			"-h", "--etcd-username=-u", "-etcd-password", "--"}, want: func(o *Options) {
			o.Uplink.Names, o.Uplink.Regexps = []string{"-eth0"}, regexps("--x")
			o.EtcdPrefix, o.EtcdUsername, o.EtcdPassword = "-h", "-u", "--"
			o.Warnings = []string{`--etcd-prefix: "-h" has no leading slash: the configuration is read from the key "-h/config"`}
		}},
		{name: "the socket is beside the subnet file", args: []string{"--subnet-file=/a/b.env"}, want: func(o *Options) {
			o.SubnetFile, o.StatusSocket = "/a/b.env", "/a/flanneld-b.sock"
		}},
		{name: "no socket", args: []string{"--status-socket="}, want: func(o *Options) { o.StatusSocket = "" }},
		{name: "no socket, by the environment", env: []string{"FLANNELD_STATUS_SOCKET=off"},
			want: func(o *Options) { o.StatusSocket = "" }},
		{name: "another socket", args: []string{"--status-socket=/x.sock"},
			want: func(o *Options) { o.StatusSocket = "/x.sock" }},
		{name: "end of flags", args: []string{"--ip-masq", "--"}, want: func(o *Options) { o.IPMasq = true }},
		{name: "booleans", args: []string{"--ip-masq=T", "--ip-masq-fully-random-disable=1",
			"--iptables-forward-rules=false", "--set-node-network-unavailable=0", "--ip-blackhole-route=TRUE",
			"--kube-subnet-mgr"}, want: func(o *Options) {
			o.IPMasq, o.IPMasqNotRandom, o.ForwardRules = true, true, false
			o.SetNodeNetworkUnavailable, o.BlackholeRoute, o.KubeSubnetMgr = false, true, true
		}},
		{name: "endpoints by DNS", args: []string{"--discovery-srv=etcd.example.com.", "--discovery-srv-name=blue",
			"--etcd-cafile=" + file}, want: func(o *Options) {
			o.EtcdEndpoints, o.EtcdCAFile = nil, file
			o.DiscoverySRV, o.DiscoverySRVName = "etcd.example.com.", "blue"
		}},
		{name: "endpoints by DNS, in the environment", env: []string{"FLANNELD_DISCOVERY_SRV=example.com"},
			want: func(o *Options) { o.EtcdEndpoints, o.DiscoverySRV = nil, "example.com" }},
		{name: "no domain", args: []string{"--discovery-srv=", "--discovery-srv-name=blue", "--etcd-endpoints=http://a:1"},
			want: func(o *Options) {
				o.EtcdEndpoints = []string{"http://a:1"}
				o.Warnings = []string{"--discovery-srv-name is ignored: it has no effect without --discovery-srv"}
			}},
		{name: "another table", args: []string{"--route-table=7070", "--route-rule-priority=500"}, want: func(o *Options) {
			o.RouteTable, o.RulePriority = 7070, 500
		}},
		{name: "families", args: []string{"--ip-masq", "--ip-masq-families=IPv6"}, want: func(o *Options) {
			o.IPMasq, o.IPMasqFamilies = true, family.Pair[bool]{IPv6: true}
		}},
		{name: "the last one counts", args: []string{"--etcd-prefix=/a", "--etcd-prefix=/b", "--ip-masq", "--ip-masq=false"},
			want: func(o *Options) { o.EtcdPrefix = "/b" }},
		{name: "repeatable, and taken whole",
			args: []string{"--iface=eth0,eth1", "--iface=198.18.0.1", "--iface-regex=^10[.]{1,3}", "--iface-regex=b"},
			want: func(o *Options) {
				o.Uplink.Names, o.Uplink.Regexps = []string{"eth0,eth1", "198.18.0.1"}, regexps("^10[.]{1,3}", "b")
			}},
		{name: "IPv6 apart", args: []string{"--iface-v6=eth1", "-iface-v6", "fd18::1", "--iface-regex-v6=^fd",
			"--iface-can-reach-v6=2000::"}, env: []string{"FLANNELD_IFACE=eth0", "FLANNELD_IFACE_V6=eth9"},
			want: func(o *Options) {
				o.Uplink.Names = []string{"eth0"}
				o.Uplink.IPv6 = iface.Criteria{Names: []string{"eth1", "fd18::1"}, Regexps: regexps("^fd"), CanReach: ip("2000::")}
			}},
		{name: "IPv6 apart, in the environment", env: []string{"FLANNELD_IFACE_V6=eth1", "FLANNELD_IFACE_REGEX_V6=^eth",
			"FLANNELD_IFACE_CAN_REACH_V6="},
			want: func(o *Options) { o.Uplink.IPv6 = iface.Criteria{Names: []string{"eth1"}, Regexps: regexps("^eth")} }},
		{name: "empty is not set", args: []string{"--iface=", "--iface-regex=", "--iface-can-reach=", "--public-ip=",
			"--public-ipv6=", "--etcd-cafile=", "--kube-api-url=", "--vmodule="}, want: func(*Options) {}},
		{name: "empty variables are not set",
			env: []string{"FLANNELD_IFACE=", "FLANNELD_ETCD_PREFIX=", "FLANNELD_HEALTHZ_PORT=", "FLANNELD_NONSENSE"},
			want: func(o *Options) {
				o.Warnings = []string{"environment variable FLANNELD_NONSENSE is ignored: there is no such setting"}
			}},
		{name: "environment", env: []string{"FLANNELD_IFACE=eth0,eth1",
			"FLANNELD_ETCD_ENDPOINTS=https://e1:2379,https://e2:2379", "FLANNELD_IP_MASQ=true",
			"FLANNELD_PUBLIC_IPV6=2001:db8::1", "FLANNELD_LOG_BACKTRACE_AT=x.go:1", "PATH=/bin", "IFACE=eth9"},
			want: func(o *Options) {
				o.Uplink.Names, o.IPMasq, o.Uplink.PublicIPv6 = []string{"eth0,eth1"}, true, ip("2001:db8::1")
				o.EtcdEndpoints = []string{"https://e1:2379", "https://e2:2379"}
			}},
		{name: "the command line wins", args: []string{"--iface=eth0", "--ip-masq=false", "--healthz-port=8080"},
			env: []string{"FLANNELD_IFACE=eth1", "FLANNELD_IP_MASQ=true", "FLANNELD_HEALTHZ_PORT=nonsense"},
			want: func(o *Options) {
				o.Uplink.Names, o.HealthzPort = []string{"eth0"}, 8080
			}},
		{name: "unknown variables", env: []string{"FLANNELD_IFCE=eth0", "FLANNELD_ZZZ=secret",
			"FLANNELD_ETCD_PASWORD=secret", "FLANNELD_VERSION=v1", "FLANNELD_HEALTH_PORT=8080"}, want: func(o *Options) {
			o.Warnings = []string{
				"environment variable FLANNELD_ETCD_PASWORD is ignored: there is no such setting, " +
					"did you mean FLANNELD_ETCD_PASSWORD?",
				"environment variable FLANNELD_HEALTH_PORT is ignored: there is no such setting, " +
					"did you mean FLANNELD_HEALTHZ_PORT?",
				"environment variable FLANNELD_IFCE is ignored: there is no such setting, did you mean FLANNELD_IFACE?",
				"environment variable FLANNELD_ZZZ is ignored: there is no such setting",
			}
		}},
		{name: "service links", env: []string{
			"FLANNELD_SERVICE_HOST=10.3.0.7", "FLANNELD_SERVICE_PORT=8080", "FLANNELD_SERVICE_PORT_METRICS=8080",
			"FLANNELD_PORT=tcp://10.3.0.7:8080",
			"FLANNELD_PORT_8285_UDP=udp://10.3.0.7:8285", "FLANNELD_PORT_8285_UDP_PROTO=udp",
			"FLANNELD_PORT_8285_UDP_PORT=8285", "FLANNELD_PORT_8285_UDP_ADDR=10.3.0.7",
			"FLANNELD_HEALTHZ_SERVICE_HOST=10.3.0.8", "FLANNELD_HEALTHZ_PORT=tcp://10.3.0.8:8080",
			"FLANNELD_HEALTHZ_PORT_8080_TCP_ADDR=10.3.0.8",
		}, want: func(*Options) {}},
		{name: "etcd",
			args: []string{"--etcd-endpoints=https://e1.example.com:2379/, http://[2001:db8::1]:2379,unix:///run/etcd.sock",
				"--etcd-prefix=/a/b//", "--etcd-username=u", "--etcd-password=p=:@ w"}, want: func(o *Options) {
				o.EtcdEndpoints = []string{"https://e1.example.com:2379", "http://[2001:db8::1]:2379", "unix:///run/etcd.sock"}
				o.EtcdPrefix, o.EtcdUsername, o.EtcdPassword = "/a/b", "u", "p=:@ w"
			}},
		{name: "files", args: []string{"--etcd-cafile=" + file, "--etcd-keyfile", file},
			env: []string{"FLANNELD_ETCD_CERTFILE=" + file},
			want: func(o *Options) {
				o.EtcdCAFile, o.EtcdKeyFile, o.EtcdCertFile = file, file, file
			}},
		{name: "endpoints without a scheme", args: []string{"--etcd-endpoints=127.0.0.1:2379,[2001:db8::1]:2379"},
			want: func(o *Options) {
				o.EtcdEndpoints = []string{"http://127.0.0.1:2379", "http://[2001:db8::1]:2379"}
			}},
		{name: "the same, with TLS", args: []string{"--etcd-endpoints=etcd.example.com:2379", "--etcd-cafile=" + file},
			want: func(o *Options) {
				o.EtcdEndpoints, o.EtcdCAFile = []string{"https://etcd.example.com:2379"}, file
			}},
		{name: "a CA alone", args: []string{"--etcd-cafile=" + file, "--etcd-endpoints=https://a:1"}, want: func(o *Options) {
			o.EtcdEndpoints, o.EtcdCAFile = []string{"https://a:1"}, file
		}},
		{name: "what Kubernetes does not use is not checked",
			args: []string{"--kube-subnet-mgr", "--etcd-cafile=/nowhere", "--etcd-username=u"},
			want: func(o *Options) {
				o.KubeSubnetMgr, o.EtcdCAFile, o.EtcdUsername = true, "/nowhere", "u"
			}},
		{name: "nor what etcd does not use", args: []string{"--kubeconfig-file=/nowhere"},
			want: func(o *Options) { o.KubeconfigFile = "/nowhere" }},
		{name: "Kubernetes", args: []string{"--kube-subnet-mgr", "--kube-api-url=https://api.example.com/k8s",
			"--kubeconfig-file=" + file, "--net-config-path=/x", "--kube-annotation-prefix=example.com/flannel"},
			want: func(o *Options) {
				o.KubeSubnetMgr, o.KubeAPIURL, o.KubeconfigFile, o.NetConfigPath, o.KubeAnnotationPrefix = true,
					"https://api.example.com/k8s", file, "/x", "example.com/flannel-"
			}},
		{name: "annotation prefix with a dash", args: []string{"--kube-annotation-prefix=example.com/flannel-"},
			want: func(o *Options) { o.KubeAnnotationPrefix = "example.com/flannel-" }},
		{name: "annotation prefix with a slash", args: []string{"--kube-annotation-prefix=example.com/"},
			want: func(o *Options) { o.KubeAnnotationPrefix = "example.com/" }},
		{name: "numbers", args: []string{"--subnet-lease-renew-margin=1439", "--iptables-resync=60", "--kernel-resync=7",
			"--healthz-port=65535", "--healthz-ip=::"}, want: func(o *Options) {
			o.LeaseRenewMargin, o.RulesResync, o.KernelResync, o.HealthzPort, o.HealthzIP = 1439*time.Minute, time.Minute,
				7*time.Second, 65535, netip.IPv6Unspecified()
		}},
		{name: "probes", args: []string{"--probe-peers=false", "--probe-interval=5", "--probe-peer-metrics"},
			want: func(o *Options) {
				o.ProbePeers, o.ProbeInterval, o.ProbePeerMetrics = false, 5*time.Second, true
			}},
		{name: "addresses",
			args: []string{"--public-ip=198.18.0.1", "--public-ipv6=2001:DB8::0001", "--iface-can-reach=2001:db8::2"},
			want: func(o *Options) {
				o.Uplink.PublicIP, o.Uplink.PublicIPv6, o.Uplink.CanReach = ip("198.18.0.1"), ip("2001:db8::1"), ip("2001:db8::2")
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Parse(c.args, c.env)
			if err != nil {
				t.Fatal(err)
			}
			got.settings = nil
			want := defaults()
			c.want(&want)
			if !reflect.DeepEqual(*got, want) {
				t.Errorf("got  %#v\nwant %#v", *got, want)
			}
		})
	}
}

// TestParseWhatFlannelAccepts: flannel runs with these settings, and so do we, in the same way. Each has one warning.
func TestParseWhatFlannelAccepts(t *testing.T) {
	for _, c := range []struct {
		args, env string // split at |
		want      func(o *Options)
		warning   string
	}{
		{args: "--ip-masq|true", want: func(o *Options) { o.IPMasq = true },
			warning: `"true" after --ip-masq is ignored, and --ip-masq without a value means true: write --ip-masq=true`},
		{args: "-ip-masq|false", want: func(o *Options) { o.IPMasq = true },
			warning: `"false" after --ip-masq is ignored, and --ip-masq without a value means true: write --ip-masq=false`},
		{args: "--iface=eth0|--kube-subnet-mgr|true|--ip-masq|-iface=eth1|--no-such-flag|eth2", want: func(o *Options) {
			o.Uplink.Names, o.KubeSubnetMgr = []string{"eth0"}, true
		}, warning: `"true" after --kube-subnet-mgr is ignored, and --kube-subnet-mgr without a value means true: ` +
			`write --kube-subnet-mgr=true; as in flannel, what follows is ignored, too: --ip-masq -iface`},
		{args: "--iface|eth0|eth1", want: func(o *Options) { o.Uplink.Names = []string{"eth0"} },
			warning: `"eth1" belongs to no flag, and is ignored: give values as --name=value, and values with spaces in quotes`},
		{args: "--ip-masq|--|--iface=eth0", want: func(o *Options) { o.IPMasq = true },
			warning: `"--iface=eth0" belongs to no flag, and is ignored: ` +
				`give values as --name=value, and values with spaces in quotes`},
		{args: "--etcd-username=u|-etcd-password|my|own|-hunter2|--ip-masq", want: func(o *Options) {
			o.EtcdUsername, o.EtcdPassword = "u", "my"
		}, warning: "<redacted> belongs to no flag, and is ignored: give values as --name=value, and values with spaces in " +
			"quotes; as in flannel, what follows is ignored, too: --ip-masq"},
		{args: "--healthz-ip=localhost|--healthz-port=8080", want: func(o *Options) {
			o.HealthzIP, o.HealthzPort = netip.MustParseAddr("127.0.0.1"), 8080
		}, warning: `--healthz-ip: "localhost" is a name, and its address is looked up only now: 127.0.0.1 is used`},
		{args: "--healthz-ip=", want: func(o *Options) { o.HealthzIP = netip.Addr{} },
			warning: "--healthz-ip is empty: all addresses of both families are used"},
		{args: "--healthz-ip=no name", want: func(*Options) {}, warning: "--healthz-ip is ignored: " +
			`--healthz-port is 0 (disabled), and "no name" is neither an IP address nor a name`},
		{args: "--healthz-port=-1", want: func(*Options) {},
			warning: `--healthz-port: "-1" is not a port number: 0 (disabled) to 65535; 0 is used`},
		{args: "--iptables-resync=0", want: func(*Options) {},
			warning: `--iptables-resync: "0" is not a number of seconds: 1 or more; 5 is used`},
		{args: "--iptables-resync=-3", want: func(*Options) {},
			warning: `--iptables-resync: "-3" is not a number of seconds: 1 or more; 5 is used`},
		{args: "--iptables-resync=99999999999", want: func(*Options) {},
			warning: `--iptables-resync: "99999999999" is not a number of seconds: 1 or more; 5 is used`},
		{args: "--iface=eth0|--iface-can-reach=example.com",
			want: func(o *Options) { o.Uplink.Names = []string{"eth0"} },
			warning: `--iface-can-reach: "example.com" is not an IP address such as 192.0.2.7 or 2001:db8::7; ` +
				"it is left out, since other flags choose the uplink"},
		{args: "--iface-regex=eth[0|--iface-regex=eth1", want: func(o *Options) { o.Uplink.Regexps = regexps("eth1") },
			warning: `--iface-regex: "eth[0" is not a regular expression in RE2 syntax: missing closing ]; ` +
				"it is left out, since other flags choose the uplink"},
		{args: "--iface-v6=eth0|--iface-can-reach-v6=example.com",
			want: func(o *Options) { o.Uplink.IPv6.Names = []string{"eth0"} },
			warning: `--iface-can-reach-v6: "example.com" is not an IP address such as 192.0.2.7 or 2001:db8::7; ` +
				"it is left out, since other flags choose the uplink"},
		{args: "-v=-1", want: func(*Options) {}, warning: `--v: "-1" is not a log level: 0 or more; 0 is used`},
		{args: "--subnet-file=", want: func(*Options) {},
			warning: "--subnet-file: the value is empty: /run/flannel/subnet.env is used"},
		{args: "--etcd-username=u", want: func(*Options) {},
			warning: "--etcd-username is ignored: it has no effect without --etcd-password"},
		{env: "FLANNELD_ETCD_PASSWORD=hunter2", want: func(*Options) {},
			warning: "FLANNELD_ETCD_PASSWORD is ignored: it has no effect without --etcd-username"},
		{args: "--etcd-keyfile=/nowhere", want: func(*Options) {},
			warning: "--etcd-keyfile is ignored: it has no effect without --etcd-certfile"},
		{env: "FLANNELD_ETCD_CERTFILE=/nowhere", want: func(*Options) {},
			warning: "FLANNELD_ETCD_CERTFILE is ignored: it has no effect without --etcd-keyfile"},
		{args: "--etcd-cafile=/nowhere", want: func(*Options) {},
			warning: "--etcd-cafile is ignored: no endpoint begins with https://"},
		{args: "--etcd-endpoints=http://a:1,", want: func(o *Options) { o.EtcdEndpoints = []string{"http://a:1"} },
			warning: "--etcd-endpoints: an empty URL is left out"},
		{args: "--etcd-endpoints=ftp://a:1,http://b:1,http://c:1/v2", want: func(o *Options) {
			o.EtcdEndpoints = []string{"http://b:1", "http://c:1"}
		}, warning: `--etcd-endpoints: "ftp://a:1" is not a URL: http://HOST:PORT, https://HOST:PORT or unix:///PATH; ` +
			`it is left out; "http://c:1/v2" has more after the port, which is not used: http://c:1 is used`},
		{args: "--etcd-endpoints=http://u:hunter2@a:1", want: func(o *Options) { o.EtcdEndpoints = []string{"http://a:1"} },
			warning: `--etcd-endpoints: "...@a:1" contains a user name, which is not used: ` +
				`use --etcd-username and --etcd-password`},
		{args: "--etcd-prefix=", want: func(o *Options) { o.EtcdPrefix = "" },
			warning: `--etcd-prefix: "" has no leading slash: the configuration is read from the key "config"`},
		{args: "--etcd-prefix=coreos.com/network/", want: func(o *Options) { o.EtcdPrefix = "coreos.com/network" },
			warning: `--etcd-prefix: "coreos.com/network/" has no leading slash: ` +
				`the configuration is read from the key "coreos.com/network/config"`},
		{args: "--kube-subnet-mgr|--kube-api-url=192.0.2.1:8080", want: func(o *Options) {
			o.KubeSubnetMgr, o.KubeAPIURL = true, "192.0.2.1:8080"
		}, warning: `--kube-api-url: "192.0.2.1:8080" has no scheme: ` +
			`http:// is used, or https:// if the kubeconfig file has certificates`},
		{args: "--kube-subnet-mgr|--etcd-endpoints=", want: func(o *Options) { o.KubeSubnetMgr = true },
			warning: `--etcd-endpoints is ignored, since leases are in kubernetes: "" has no URL: ` +
				`give one or more URLs such as http://127.0.0.1:2379, separated by commas`},
		{args: "--net-config-path=", want: func(*Options) {},
			warning: "--net-config-path is ignored, since leases are in etcd: the value must be the path of a file"},
		{args: "--ip-masq-families=ipv4", want: func(o *Options) { o.IPMasqFamilies = family.Pair[bool]{IPv4: true} },
			warning: "--ip-masq-families is ignored: it has no effect without --ip-masq"},
		{env: "FLANNELD_ROUTE_RULE_PRIORITY=500", want: func(o *Options) { o.RulePriority = 500 },
			warning: "FLANNELD_ROUTE_RULE_PRIORITY is ignored: it has no effect without --route-table"},
		{env: "FLANNELD_IP_MASQ=yes", want: func(*Options) {},
			warning: `environment variable FLANNELD_IP_MASQ is ignored: "yes" is not true or false`},
		{env: "FLANNELD_HEALTHZ_PORT=abc", want: func(*Options) {}, warning: "environment variable FLANNELD_HEALTHZ_PORT " +
			`is ignored: "abc" is not a port number: 0 (disabled) to 65535`},
		{env: "FLANNELD_V=abc", want: func(*Options) {},
			warning: `environment variable FLANNELD_V is ignored: "abc" is not a log level: 0 or more`},
		{env: "FLANNELD_REMOTE=hunter2", want: func(*Options) {}, warning: "environment variable FLANNELD_REMOTE is " +
			"ignored: there is no such setting; flannel had it before 0.8: " + noServer},
	} {
		t.Run(c.args+c.env, func(t *testing.T) {
			got, err := Parse(split(c.args), split(c.env))
			if err != nil {
				t.Fatal(err)
			}
			if text := got.String() + c.warning; strings.Contains(text, "hunter2") {
				t.Errorf("a secret gets out: %s", text)
			}
			got.settings = nil
			want := defaults()
			c.want(&want)
			want.Warnings = []string{c.warning}
			if !reflect.DeepEqual(*got, want) {
				t.Errorf("got  %#v\nwant %#v", *got, want)
			}
		})
	}
}

// TestIntegers: integers are taken as flannel takes them.
func TestIntegers(t *testing.T) {
	for text, want := range map[string]int{"0x1F90": 8080, "017620": 8080, "8_080": 8080, "+8080": 8080} {
		o, err := Parse([]string{"--healthz-port", text}, nil)
		if err != nil || o.HealthzPort != want {
			t.Errorf("%s: %+v, %v", text, o, err)
		}
	}
}

// split returns the words between bars.
func split(s string) []string {
	return slices.DeleteFunc(strings.Split(s, "|"), func(w string) bool { return w == "" })
}

func TestParseOptionsError(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file.pem")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const (
		giveURLs      = ": give one or more URLs such as http://127.0.0.1:2379, separated by commas"
		lists         = " --help lists the flags"
		ofAnnotations = " of annotations: DOMAIN or DOMAIN/NAME, such as flannel.alpha.coreos.com or example.com/flannel"
	)
	for _, c := range []struct{ args, env, want string }{ // args and env are split at |
		{args: "--ifce=eth0", want: "unknown flag --ifce: did you mean --iface?" + lists},
		{args: "-ip_masq", want: "unknown flag --ip_masq: did you mean --ip-masq?" + lists},
		{args: "--kube-subnet-manager", want: "unknown flag --kube-subnet-manager: did you mean --kube-subnet-mgr?" + lists},
		{args: "--remote=hunter2", want: "--remote is a flag of flannel before 0.8: " +
			"there is no server between nodes and store; each node has --etcd-endpoints or --kube-subnet-mgr"},
		{args: "-listen|:8080", want: "--listen is a flag of flannel before 0.8: " +
			"there is no server between nodes and store; each node has --etcd-endpoints or --kube-subnet-mgr"},
		{args: "--networks=a,b", want: "--networks is a flag of flannel before 0.8: " +
			"run one flanneld for each network, each with its own --etcd-prefix and --subnet-file"},
		{args: "--subnet-dir=/run/flannel/networks", want: "--subnet-dir is a flag of flannel before 0.8: " +
			"run one flanneld for each network, each with its own --etcd-prefix and --subnet-file"},
		{args: "--kube-subnet-mgr=yes", want: `--kube-subnet-mgr: "yes" is not true or false`},
		{args: "-v4", want: "unknown flag --v4: did you mean --v?" + lists},
		{args: "---etcd-password=hunter2", want: "---etcd-password is not a flag:" + lists},
		{args: "--iface", want: "--iface needs a value: --iface=NAME|IP"},
		{args: "-iface", want: "--iface needs a value: --iface=NAME|IP"},
		{args: "status", want: `"status" belongs to no flag: flanneld has only flags, see --help`},
		{args: "--route-table=main", want: `--route-table: "main" is not the number of a routing table: 1 to 4294967295`},
		{args: "--route-table=254", want: `--route-table: 254 is a table that the kernel uses itself: take another one, such as 7070`},
		{args: "--route-rule-priority=32766", want: `--route-rule-priority: "32766" is not a priority before the main table's rule: 1 to 32764`},
		{args: "--ip-masq-families=", want: `--ip-masq-families: "" is not ipv4, ipv6 or ipv4,ipv6`},
		{args: "--ip-masq-families=ipv4,ip6", want: `--ip-masq-families: "ipv4,ip6" is not ipv4, ipv6 or ipv4,ipv6`},
		{args: "--ip-masq=yes", want: `--ip-masq: "yes" is not true or false`},
		{args: "--healthz-port=abc", want: `--healthz-port: "abc" is not a port number: 0 (disabled) to 65535`},
		{args: "-healthz-port=65536", want: `--healthz-port: "65536" is not a port number: 0 (disabled) to 65535`},
		{args: "--healthz-port=", want: `--healthz-port: "" is not a port number: 0 (disabled) to 65535`},
		{env: "FLANNELD_HEALTHZ_PORT=70000",
			want: `FLANNELD_HEALTHZ_PORT: "70000" is not a port number: 0 (disabled) to 65535`},
		{args: "--healthz-ip=no name|--healthz-port=1",
			want: `--healthz-ip: "no name" is not an IP address such as 192.0.2.7 or 2001:db8::7, nor a name that has one: ` +
				`lookup no name: no such host`},
		{args: "--subnet-lease-renew-margin=0",
			want: `--subnet-lease-renew-margin: "0" is not a number of minutes: 1 to 1439`},
		{args: "--subnet-lease-renew-margin=1440",
			want: `--subnet-lease-renew-margin: "1440" is not a number of minutes: 1 to 1439`},
		{args: "--subnet-lease-renew-margin=60m",
			want: `--subnet-lease-renew-margin: "60m" is not a number of minutes: 1 to 1439`},
		{args: "--iptables-resync=0s", want: `--iptables-resync: "0s" is not a number of seconds: 1 or more`},
		{args: "--probe-interval=0", want: `--probe-interval: "0" is not a number of seconds: 1 or more`},
		{args: "--kernel-resync=0", want: `--kernel-resync: "0" is not a number of seconds: 1 or more`},
		{args: "--public-ip=2001:db8::1", want: `--public-ip: "2001:db8::1" is not an IPv4 address`},
		{args: "--public-ip=0.0.0.0", want: `--public-ip: "0.0.0.0" is not an address that peers can reach this node at`},
		{args: "--public-ipv6=198.18.0.1", want: `--public-ipv6: "198.18.0.1" is not an IPv6 address`},
		{args: "--public-ipv6=::ffff:198.18.0.1", want: `--public-ipv6: "::ffff:198.18.0.1" is not an IPv6 address`},
		{args: "--public-ipv6=fe80::1", want: `--public-ipv6: "fe80::1" is not an address that peers can reach this node at`},
		{args: "--iface-can-reach=example.com",
			want: `--iface-can-reach: "example.com" is not an IP address such as 192.0.2.7 or 2001:db8::7`},
		{args: "--iface-regex=eth[0",
			want: `--iface-regex: "eth[0" is not a regular expression in RE2 syntax: missing closing ]`},
		{env: "FLANNELD_IFACE_REGEX=(?!x)",
			want: `FLANNELD_IFACE_REGEX: "(?!x)" is not a regular expression in RE2 syntax: invalid or unsupported Perl syntax`},
		{args: "--etcd-endpoints=localhost",
			want: `--etcd-endpoints: "localhost" is not a URL: http://HOST:PORT, https://HOST:PORT or unix:///PATH`},
		{args: "--etcd-endpoints=ftp://h:1",
			want: `--etcd-endpoints: "ftp://h:1" is not a URL: http://HOST:PORT, https://HOST:PORT or unix:///PATH`},
		{args: "--etcd-endpoints=",
			want: `--etcd-endpoints: "" has no URL` + giveURLs},
		{args: "--etcd-endpoints= ,", want: `--etcd-endpoints: " ," has no URL` + giveURLs},
		{args: "--etcd-endpoints=https://etcd,ftp://a:1",
			want: `--etcd-endpoints: "https://etcd" has no host or no port: https://127.0.0.1:2379, for example`},
		{args: "--etcd-endpoints=http://a:70000", want: `--etcd-endpoints: "http://a:70000" has no valid port: 1 to 65535`},
		{args: "--etcd-endpoints=http://u:hunter2%zz@a:1",
			want: `--etcd-endpoints: "...@a:1" is not a URL: http://HOST:PORT, https://HOST:PORT or unix:///PATH`},
		{args: "--discovery-srv=http://example.com", want: `--discovery-srv: "http://example.com" is not the name of a ` +
			`domain such as example.com`},
		{args: "--discovery-srv=a..b", want: `--discovery-srv: "a..b" is not the name of a domain such as example.com`},
		{args: "--discovery-srv=.", want: `--discovery-srv: "." is not the name of a domain such as example.com`},
		{args: "--discovery-srv=example.com|--discovery-srv-name=a.b",
			want: `--discovery-srv-name: "a.b" is not a part of a name in DNS such as blue`},
		{args: "--discovery-srv=example.com", env: "FLANNELD_ETCD_ENDPOINTS=http://a:1",
			want: "FLANNELD_ETCD_ENDPOINTS and --discovery-srv both set where etcd is: give only one of them"},
		{args: "--etcd-endpoints=http://a:1", env: "FLANNELD_DISCOVERY_SRV=example.com",
			want: "--etcd-endpoints and FLANNELD_DISCOVERY_SRV both set where etcd is: give only one of them"},
		{args: "--discovery-srv=example.com|--etcd-cafile=/nowhere/ca.pem",
			want: "--etcd-cafile: cannot read the file: open /nowhere/ca.pem: no such file or directory"},
		{args: "--etcd-cafile=/nowhere/ca.pem|--etcd-endpoints=https://a:1",
			want: "--etcd-cafile: cannot read the file: open /nowhere/ca.pem: no such file or directory"},
		{args: "--etcd-certfile=/nowhere/c.pem|--etcd-keyfile=" + file,
			want: "--etcd-certfile: cannot read the file: open /nowhere/c.pem: no such file or directory"},
		{args: "--etcd-keyfile=/nowhere/k.pem|--etcd-certfile=" + file,
			want: "--etcd-keyfile: cannot read the file: open /nowhere/k.pem: no such file or directory"},
		{args: "--etcd-endpoints=https://a:1", env: "FLANNELD_ETCD_CAFILE=/", want: "FLANNELD_ETCD_CAFILE: / is a directory, not a file"},
		{args: "--kube-subnet-mgr|--kubeconfig-file=/nowhere/k",
			want: "--kubeconfig-file: cannot read the file: open /nowhere/k: no such file or directory"},
		{args: "--pprof", want: `--pprof needs --healthz-port, which is 0 (disabled): set both`},
		{args: "--iface-node-address", want: `--iface-node-address works only with --kube-subnet-mgr: use --iface instead`},
		{args: "--kube-subnet-mgr|--iface-node-address|--iface=eth0",
			want: `--iface and --iface-node-address both choose the uplink: give only one of them`},
		{args: "--kube-subnet-mgr|--iface-node-address", env: "FLANNELD_IFACE_REGEX=^eth",
			want: `FLANNELD_IFACE_REGEX and --iface-node-address both choose the uplink: give only one of them`},
		{args: "--kube-subnet-mgr|--iface-can-reach=192.0.2.1", env: "FLANNELD_IFACE_NODE_ADDRESS=true",
			want: `--iface-can-reach and FLANNELD_IFACE_NODE_ADDRESS both choose the uplink: give only one of them`},
		{args: "--kube-subnet-mgr|--iface-node-address|--iface-regex-v6=^fd",
			want: `--iface-regex-v6 and --iface-node-address both choose the uplink: give only one of them`},
		{args: "--iface=eth0|--iface-can-reach-v6=example.com",
			want: `--iface-can-reach-v6: "example.com" is not an IP address such as 192.0.2.7 or 2001:db8::7`},
		{args: "--iface-ipv6=eth0", want: "unknown flag --iface-ipv6: did you mean --iface-v6?" + lists},
		{args: "--kube-subnet-mgr|--kube-api-url=ftp://api.example.com",
			want: `--kube-api-url: "ftp://api.example.com" is not a URL: https://HOST:PORT or http://HOST:PORT`},
		{args: "--kube-subnet-mgr|--kube-api-url=https://u:hunter2@api",
			want: `--kube-api-url: "...@api" contains a user name: use --kubeconfig-file for credentials`},
		{args: "--kube-subnet-mgr|--kube-annotation-prefix=a/b/c", want: `--kube-annotation-prefix: "a/b/c" is not a prefix` + ofAnnotations},
		{args: "--kube-subnet-mgr|--kube-annotation-prefix=/x", want: `--kube-annotation-prefix: "/x" is not a prefix` + ofAnnotations},
		{args: "--kube-subnet-mgr|--kube-annotation-prefix=Example.com",
			want: `--kube-annotation-prefix: "Example.com" is not a prefix` + ofAnnotations},
		{args: "--kube-subnet-mgr|--kube-annotation-prefix=a/" + strings.Repeat("x", 43),
			want: `--kube-annotation-prefix: "a/` + strings.Repeat("x", 43) + `" is not a prefix` + ofAnnotations},
		{args: "--kube-subnet-mgr|--net-config-path=", want: "--net-config-path: the value must be the path of a file"},
		{args: "-v=abc", want: `--v: "abc" is not a log level: 0 or more`},
		{args: "--vmodule=x", want: `--vmodule: "x" is not a list of files and log levels such as vxlan=4,kube*=2`},
		{args: "--log_backtrace_at=x", want: `--log_backtrace_at: "x" is not a line of a source file such as main.go:42`},
		{args: "--logtostderr",
			want: "--logtostderr is a flag of flannel before 0.8: flanneld always logs to standard error"},
	} {
		t.Run(c.args+c.env, func(t *testing.T) {
			_, err := Parse(split(c.args), split(c.env))
			if err == nil {
				t.Fatal("no error")
			}
			if err.Error() != c.want {
				t.Errorf("got  %s\nwant %s", err, c.want)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Error("a secret gets out")
			}
		})
	}
}

func TestHelpAndVersion(t *testing.T) {
	for _, c := range []struct {
		args string
		want error
	}{
		{"--help", ErrHelp}, {"-help", ErrHelp}, {"-h", ErrHelp}, {"--ip-masq -h", ErrHelp}, {"--help --version", ErrHelp},
		{"help --help", ErrHelp},
		{"--version", ErrVersion}, {"-version", ErrVersion}, {"--version=true", ErrVersion}, {"--version=false", nil},
	} {
		// A broken environment must not be in the way.
		env := []string{"FLANNELD_HEALTHZ_PORT=nonsense"}
		if c.want == nil {
			env = nil
		}
		if _, err := Parse(strings.Fields(c.args), env); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.args, err, c.want)
		}
	}
}

func TestHelpText(t *testing.T) {
	const golden = "testdata/help.txt"
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, []byte(Help()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got := Help(); got != string(want) {
		t.Errorf("not as in %s (go test -update writes it):\n%s", golden, got)
	}
}

func TestRedacted(t *testing.T) {
	o, err := Parse(
		[]string{"--iface=eth0", "--iface=eth1", "-ip-masq", "--healthz-port=0", "--etcd-username=u", "--etcd-prefix=/c",
			"--etcd-prefix=/a", "--iface-regex="},
		[]string{"FLANNELD_ETCD_PASSWORD=hunter2", "FLANNELD_IPTABLES_RESYNC=60", "FLANNELD_ETCD_PREFIX=/b"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"--etcd-prefix=/a", "--etcd-username=u", "FLANNELD_ETCD_PASSWORD=<redacted>", "--iface=eth0",
		"--iface=eth1", "--ip-masq=true", "--iptables-resync=60"}
	if got := o.Redacted(); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	o2, err := Parse([]string{"--etcd-username=u", "--etcd-password=hunter2"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := o2.Redacted(); !slices.Equal(got, []string{"--etcd-username=u", "--etcd-password=<redacted>"}) {
		t.Errorf("with a password on the command line: %q", got)
	}
	if o.EtcdPassword != "hunter2" {
		t.Error("the password itself is lost")
	}
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		for _, v := range []any{o, *o, o.EtcdPassword, o.settings} {
			if text := fmt.Sprintf(format, v); strings.Contains(text, "hunter2") {
				t.Errorf("%s of %T shows the password: %s", format, v, text)
			}
		}
	}
}

func TestLogFlags(t *testing.T) {
	t.Cleanup(func() {
		if _, err := Parse(nil, nil); err != nil { // back to the defaults
			t.Error(err)
		}
	})
	if _, err := Parse([]string{"-v=4"}, []string{"FLANNELD_V=9"}); err != nil {
		t.Fatal(err)
	}
	if !klog.V(4).Enabled() || klog.V(5).Enabled() {
		t.Error("-v=4 does not set the log level to 4")
	}
	if _, err := Parse(nil, []string{"FLANNELD_V=9", "FLANNELD_VMODULE=options_test=10"}); err != nil {
		t.Fatal(err)
	}
	if !klog.V(10).Enabled() {
		t.Error("vmodule is without effect")
	}
	if _, err := Parse([]string{"--vmodule="}, nil); err != nil {
		t.Fatal(err)
	}
	if klog.V(1).Enabled() {
		t.Error("the default is not quiet")
	}
}

// Names and defaults are what units and manifests rely on.
func TestTable(t *testing.T) {
	const want = `
discovery-srv
discovery-srv-name
etcd-cafile
etcd-certfile
etcd-endpoints http://127.0.0.1:4001,http://127.0.0.1:2379
etcd-keyfile
etcd-password
etcd-prefix /coreos.com/network
etcd-username
healthz-ip 0.0.0.0
healthz-port 0
help false
iface
iface-can-reach
iface-can-reach-v6
iface-node-address false
iface-regex
iface-regex-v6
iface-v6
ip-blackhole-route false
ip-masq false
ip-masq-families ipv4,ipv6
ip-masq-fully-random-disable false
iptables-forward-rules true
iptables-resync 5
kernel-resync 60
kube-annotation-prefix flannel.alpha.coreos.com
kube-api-url
kube-subnet-mgr false
kubeconfig-file
log_backtrace_at
net-config-path /etc/kube-flannel/net-conf.json
pprof false
probe-interval 30
probe-peer-metrics false
probe-peers true
public-ip
public-ipv6
route-rule-priority 1000
route-table
set-node-network-unavailable true
status-socket auto
subnet-file /run/flannel/subnet.env
subnet-lease-renew-margin 60
v 0
version false
vmodule
`
	var lines []string
	for _, g := range flags(&Options{}) {
		for _, s := range g.settings {
			lines = append(lines, strings.TrimSpace(s.name+" "+s.def))
			if s.help == "" || strings.Contains(s.help, "\n") {
				t.Errorf("--%s: help is one line", s.name)
			}
			if (s.arg == "") != (s.def == "true" || s.def == "false") {
				t.Errorf("--%s: booleans take no value, and are false or true", s.name)
			}
		}
	}
	slices.Sort(lines)
	if got := "\n" + strings.Join(lines, "\n") + "\n"; got != want {
		t.Errorf("got %s", got)
	}
}

func TestClearEnvironment(t *testing.T) {
	t.Setenv("FLANNELD_ETCD_PASSWORD", "hunter2")
	t.Setenv("FLANNELD_IFACE", "")
	t.Setenv("NODE_NAME", "n1")
	ClearEnvironment()
	env := strings.Join(os.Environ(), "\n")
	if strings.Contains(env, "FLANNELD_") || !strings.Contains(env, "NODE_NAME=n1") {
		t.Errorf("got\n%s", env)
	}
}
