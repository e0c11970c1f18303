// Package settings reads flanneld's settings from flags and the environment. flannelctl reads the same settings, to
// check the node without the daemon.
package settings

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
)

// Options are the settings from the command line and the environment. Everything that can be checked without the
// network has been checked.
type Options struct {
	SubnetFile       string
	StatusSocket     string // "": off
	LeaseRenewMargin time.Duration

	EtcdEndpoints                         []string // URLs: http, https or unix; none with DiscoverySRV
	DiscoverySRV, DiscoverySRVName        string
	EtcdPrefix                            string // no trailing slash
	EtcdCAFile, EtcdCertFile, EtcdKeyFile string
	EtcdUsername                          string
	EtcdPassword                          secret

	KubeSubnetMgr              bool
	KubeAPIURL, KubeconfigFile string
	KubeAnnotationPrefix       string // complete: "public-ip" is appended as it is
	NetConfigPath              string
	SetNodeNetworkUnavailable  bool

	Uplink           iface.Selector
	IfaceNodeAddress bool // the uplink holds the Node's InternalIP

	IPMasq          bool
	IPMasqFamilies  family.Pair[bool]
	IPMasqNotRandom bool // without --random-fully
	ForwardRules    bool
	RulesResync     time.Duration
	KernelResync    time.Duration
	BlackholeRoute  bool
	RouteTable      uint32 // 0: the main table
	RulePriority    uint32

	ProbePeers       bool
	ProbeInterval    time.Duration
	ProbePeerMetrics bool

	HealthzIP   netip.Addr // not valid: all addresses of both families
	HealthzPort int        // 0: off
	Profile     bool

	// Warnings are about settings that are ignored, or taken in another way than they are written, one line each.
	Warnings []string

	help, version bool
	settings      []*setting
}

// secret is a text that prints as <redacted>, so that no log shows it by accident.
type secret string

const redacted = "<redacted>"

func (secret) String() string   { return redacted }
func (secret) GoString() string { return redacted }

// ErrHelp and ErrVersion mean that the command line requests a text on standard output, and nothing else.
var (
	ErrHelp    = errors.New("help is requested")
	ErrVersion = errors.New("the version is requested")
)

// A setting is one flag with its current value. It implements pflag.Value.
type setting struct {
	name string
	arg  string // the placeholder of the value in the help; empty: true or false
	def  string // as an operator would type it
	help string
	set  func(text string) error // checks the text and puts it into the options

	repeatable bool
	hidden     bool   // the value is a secret
	manager    string // the subnet manager that has a use for the setting; empty: all

	texts []string // the values that were set, in order; one unless repeatable
	from  string   // "--iface" or "FLANNELD_IFACE"; empty: not set
	err   error    // why the value is refused, or a remark
}

// A remark is an error about a value that is accepted all the same, because flannel runs with it.
type remark string

func (r remark) Error() string { return string(r) }

// A malformed value is not of the type of its flag: no number, or neither true nor false. flannel refuses such a flag,
// and ignores such a variable.
type malformed struct{ error }

// A group is a section of the help.
type group struct {
	title    string
	manager  string // the subnet manager that the group is for; empty: all
	settings []*setting
}

// flags returns the table of all flags, which store into o. Help and documentation list the flags in this order.
func flags(o *Options) []group { return append(leaseFlags(o), hostFlags(o)...) }

func leaseFlags(o *Options) []group {
	return []group{
		{"General", "", []*setting{
			{name: "subnet-file", arg: "PATH", def: defaultSubnetFile, set: into(&o.SubnetFile, subnetFile),
				help: "file with this node's subnet, for CNI, Docker and scripts"},
			{name: "status-socket", arg: "PATH", def: statusBeside, set: into(&o.StatusSocket, anything),
				help: "unix socket for flannelctl, for root only; auto: flanneld.sock beside subnet.env, flanneld-NAME.sock " +
					"beside NAME.env; off: none"},
			{name: "subnet-lease-renew-margin", arg: "MINUTES", def: "60",
				set:  into(&o.LeaseRenewMargin, duration("minutes", time.Minute, 1, 1439, 0)),
				help: "minutes before its end at which the one-day lease is renewed: 1 to 1439"},
			{name: "version", def: "false", set: into(&o.version, boolean), help: "print the version and exit"},
			{name: "help", def: "false", set: into(&o.help, boolean), help: "print this text and exit"},
		}},
		{"Leases in etcd", "etcd", []*setting{
			{name: "etcd-endpoints", arg: "URL[,URL...]", def: "http://127.0.0.1:4001,http://127.0.0.1:2379",
				set: into(&o.EtcdEndpoints, endpoints), help: "URLs of etcd's endpoints: http://, https:// or unix://"},
			{name: "discovery-srv", arg: "DOMAIN", set: into(&o.DiscoverySRV, optional(domain)),
				help: "in place of --etcd-endpoints: domain whose SRV records _etcd-client-ssl._tcp, or else _etcd-client._tcp, name " +
					"the endpoints"},
			{name: "discovery-srv-name", arg: "NAME", set: into(&o.DiscoverySRVName, optional(label)),
				help: "name that the SRV records have in addition: _etcd-client-ssl-NAME, _etcd-client-NAME"},
			{name: "etcd-prefix", arg: "KEY", def: "/coreos.com/network", set: into(&o.EtcdPrefix, etcdPrefix),
				help: "key in etcd under which the network configuration and the leases are stored"},
			{name: "etcd-cafile", arg: "PATH", set: into(&o.EtcdCAFile, anything),
				help: "certificates of the authorities that sign etcd's certificate"},
			{name: "etcd-certfile", arg: "PATH", set: into(&o.EtcdCertFile, anything),
				help: "client certificate for etcd; needs --etcd-keyfile"},
			{name: "etcd-keyfile", arg: "PATH", set: into(&o.EtcdKeyFile, anything),
				help: "private key of the client certificate; needs --etcd-certfile"},
			{name: "etcd-username", arg: "NAME", set: into(&o.EtcdUsername, anything),
				help: "user name for etcd; without effect unless --etcd-password is set"},
			{name: "etcd-password", arg: "PASSWORD", hidden: true, set: into(&o.EtcdPassword, password),
				help: "password of that user; other users of the host cannot see the password if it is set in the environment"},
		}},
		{"Leases in Kubernetes", "kubernetes", []*setting{
			{name: "kube-subnet-mgr", def: "false", set: into(&o.KubeSubnetMgr, boolean),
				help: "use the Node's spec.podCIDRs as the subnet, in place of a lease in etcd"},
			{name: "kube-api-url", arg: "URL", set: into(&o.KubeAPIURL, optional(apiURL)),
				help: "URL of the API server. Without this flag and --kubeconfig-file: the API server of the pod's cluster"},
			{name: "kubeconfig-file", arg: "PATH", set: into(&o.KubeconfigFile, anything),
				help: "kubeconfig file with the API server and the credentials"},
			{name: "kube-annotation-prefix", arg: "PREFIX", def: "flannel.alpha.coreos.com",
				set:  into(&o.KubeAnnotationPrefix, annotationPrefix),
				help: "prefix of the names of the Node's annotations"},
			{name: "net-config-path", arg: "PATH", def: "/etc/kube-flannel/net-conf.json", set: into(&o.NetConfigPath, file),
				help: "file with the network configuration"},
			{name: "set-node-network-unavailable", def: "true", set: into(&o.SetNodeNetworkUnavailable, boolean),
				help: "set the Node's condition NetworkUnavailable to False once the network is up"},
		}},
	}
}

func hostFlags(o *Options) []group {
	return []group{
		{"Uplink (the interface that peers reach this node on)", "", []*setting{
			{name: "iface", arg: "NAME|IP", repeatable: true, set: appendTo(&o.Uplink.Names, anything),
				help: "name or address of the interface; the first match is used"},
			{name: "iface-regex", arg: "REGEX", repeatable: true, set: appendTo(&o.Uplink.Regexps, pattern),
				help: "used if no --iface matches: regular expression, compared with addresses first, then with names"},
			{name: "iface-can-reach", arg: "IP", set: into(&o.Uplink.CanReach, optional(address)),
				help: "used last: the interface of the route to this address. Without any of the three flags: " +
					"the interface of the default route"},
			{name: "iface-v6", arg: "NAME|IP", repeatable: true, set: appendTo(&o.Uplink.IPv6.Names, anything),
				help: "the same as --iface, for IPv6 alone; the flags above then choose the interface of IPv4 alone. Without " +
					"this flag and the next two: one interface for both"},
			{name: "iface-regex-v6", arg: "REGEX", repeatable: true, set: appendTo(&o.Uplink.IPv6.Regexps, pattern),
				help: "the same as --iface-regex, for IPv6 alone"},
			{name: "iface-can-reach-v6", arg: "IP", set: into(&o.Uplink.IPv6.CanReach, optional(address)),
				help: "the same as --iface-can-reach, for IPv6 alone: 2000:: is the interface of the IPv6 default route"},
			{name: "iface-node-address", def: "false", set: into(&o.IfaceNodeAddress, boolean),
				help: "with --kube-subnet-mgr: use the interface that has the Node's InternalIP, in place of --iface; with InternalIPs of " +
					"both families, the interface of each"},
			{name: "public-ip", arg: "IP", set: into(&o.Uplink.PublicIP, optional(publicIP("IPv4", netip.Addr.Is4))),
				help: "address at which peers reach this node. Without any of the three flags: its interface is the uplink"},
			{name: "public-ipv6", arg: "IP", set: into(&o.Uplink.PublicIPv6, optional(publicIP("IPv6", netip.Addr.Is6))),
				help: "the same as --public-ip, for IPv6"},
		}},
		{"Rules and routes", "", []*setting{
			{name: "ip-masq", def: "false", set: into(&o.IPMasq, boolean),
				help: "masquerade traffic that leaves the overlay"},
			{name: "ip-masq-families", arg: "FAMILIES", def: "ipv4,ipv6", set: into(&o.IPMasqFamilies, families),
				help: "the families that --ip-masq is for: ipv4, ipv6, or both separated by a comma"},
			{name: "ip-masq-fully-random-disable", def: "false", set: into(&o.IPMasqNotRandom, boolean),
				help: "masquerade without --random-fully, so that the source port is kept where possible"},
			{name: "iptables-forward-rules", def: "true", set: into(&o.ForwardRules, boolean),
				help: "add rules that accept forwarded packets from and to the overlay"},
			{name: "iptables-resync", arg: "SECONDS", def: "5",
				set:  into(&o.RulesResync, duration("seconds", time.Second, 1, math.MaxInt32, 5)),
				help: "seconds between two checks of the firewall rules: 1 or more"},
			{name: "kernel-resync", arg: "SECONDS", def: "60",
				set: into(&o.KernelResync, duration("seconds", time.Second, 1, math.MaxInt32, 0)),
				help: "seconds between two checks of devices and routes, which are also restored at once " +
					"when the kernel announces a change: 1 or more"},
			{name: "ip-blackhole-route", def: "false", set: into(&o.BlackholeRoute, boolean),
				help: "drop packets to pods that no longer exist, by a blackhole route for the node's own subnet"},
			{name: "route-table", arg: "TABLE", set: into(&o.RouteTable, optional(routeTable)),
				help: "number of the routing table for the routes to other nodes, which rules lead to; " +
					"without this flag, they are in the main table"},
			{name: "route-rule-priority", arg: "PRIORITY", def: "1000", set: into(&o.RulePriority, rulePriority),
				help: "with --route-table: priority of the rule for this node's own subnet; the rule that leads to the " +
					"table has the next one"},
			{name: "probe-peers", def: "true", set: into(&o.ProbePeers, boolean),
				help: "find out whether packets arrive at the other nodes, by at most ten ICMP echo requests a second"},
			{name: "probe-interval", arg: "SECONDS", def: "30",
				set: into(&o.ProbeInterval, duration("seconds", time.Second, 1, math.MaxInt32, 0)),
				help: "seconds in which each node is probed, while there are few enough nodes (up to 300 with the default): " +
					"1 or more"},
			{name: "probe-peer-metrics", def: "false", set: into(&o.ProbePeerMetrics, boolean),
				help: "metrics of each other node, too, not only of all together"},
		}},
		{"Health", "", []*setting{
			{name: "healthz-ip", arg: "IP", def: "0.0.0.0", set: func(string) error { return nil }, // see healthz
				help: "address on which /healthz, /readyz and /metrics are served"},
			{name: "healthz-port", arg: "PORT", def: "0", set: into(&o.HealthzPort, port),
				help: "port for --healthz-ip; 0 disables the health server"},
			{name: "pprof", def: "false", set: into(&o.Profile, boolean), help: "also serve /debug/pprof on that port"},
		}},
		{"Logging (to standard error)", "", []*setting{
			{name: "v", arg: "LEVEL", def: "0", set: logFlag("v", "a log level: 0 or more"), help: "log level: 0 to 4"},
			{name: "vmodule", arg: "FILE=LEVEL[,...]",
				set:  logFlag("vmodule", "a list of files and log levels such as vxlan=4,kube*=2"),
				help: "log levels for source files, by their names without .go"},
			{name: "log_backtrace_at", arg: "FILE:LINE",
				set:  logFlag("log_backtrace_at", "a line of a source file such as main.go:42"),
				help: "log a stack trace with each message that this line of the source logs"},
		}},
	}
}

// Parse reads the command line, and takes all other settings from the environment, whose lines are as os.Environ
// returns them. An error is one line for the operator: where a value is wrong, and what is allowed. ErrHelp and
// ErrVersion win over errors in the environment.
func Parse(args, env []string) (*Options, error) {
	fs := pflag.NewFlagSet("flanneld", pflag.ContinueOnError)
	o, err := Flags(fs)
	if err != nil {
		return nil, err
	}
	fs.SetInterspersed(false) // as in flannel, a word ends the flags
	if err := fs.Parse(doubleDashes(fs, args)); err != nil {
		return nil, o.explain(err)
	}
	at := len(args) - fs.NArg()
	switch {
	case o.help, fs.Arg(0) == "help" && at == 0:
		return nil, ErrHelp
	case o.version:
		return nil, ErrVersion
	case fs.NArg() > 0 && at == 0:
		return nil, fmt.Errorf("%q belongs to no flag: flanneld has only flags, see --help", args[0])
	case fs.NArg() > 0:
		o.Warnings = append(o.Warnings, o.unexpected(args, at))
	}
	return o, o.Complete(env)
}

// Flags adds the flags to a flag set. The caller parses the flag set, and then calls Complete.
func Flags(fs *pflag.FlagSet) (*Options, error) {
	o := &Options{}
	for _, g := range flags(o) {
		for _, s := range g.settings {
			if s.def != "" {
				if err := s.set(s.def); err != nil {
					return nil, fmt.Errorf("default of --%s: %w", s.name, err)
				}
			}
			if s.name != "kube-subnet-mgr" {
				s.manager = g.manager
			}
			o.settings = append(o.settings, s)
			f := fs.VarPF(s, s.name, "", s.help)
			if s.arg == "" {
				f.NoOptDefVal = "true"
			}
		}
	}
	return o, nil
}

// Complete takes the settings without a flag from the environment, and checks all settings.
func (o *Options) Complete(env []string) error {
	o.environment(env)
	for _, s := range o.settings {
		var odd remark
		switch {
		case s.err == nil:
		case s.manager != "" && s.manager != o.manager():
			o.warn("%s is ignored, since leases are in %s: %v", s.from, o.manager(), s.err)
		case errors.As(s.err, &odd):
			o.warn("%s: %v", s.from, odd)
		case o.needless(s):
			o.warn("%s: %v; it is left out, since other flags choose the uplink", s.from, s.err)
		default:
			return fmt.Errorf("%s: %w", s.from, s.err)
		}
	}
	switch o.StatusSocket {
	case statusBeside:
		name := "flanneld"
		if network := o.NetworkName(); network != "" {
			name += "-" + network
		}
		o.StatusSocket = filepath.Join(filepath.Dir(o.SubnetFile), name+".sock")
	case statusOff:
		o.StatusSocket = ""
	}
	return o.check()
}

// needless reports whether the uplink is chosen by other flags than this one: flannel reads its flags for the uplink one
// after the other, until one finds an interface.
func (o *Options) needless(s *setting) bool {
	switch s.name {
	case "iface-regex", "iface-can-reach":
		return len(o.Uplink.Names)+len(o.Uplink.Regexps) > 0
	case "iface-regex-v6", "iface-can-reach-v6":
		return len(o.Uplink.IPv6.Names)+len(o.Uplink.IPv6.Regexps) > 0
	}
	return false
}

func (o *Options) warn(format string, args ...any) {
	o.Warnings = append(o.Warnings, fmt.Sprintf(format, args...))
}

// Values of --status-socket that are not paths.
const (
	statusBeside = "auto"
	statusOff    = "off"
)

// doubleDashes rewrites -name as --name. It does not change values, nor what follows "--" or a word.
func doubleDashes(fs *pflag.FlagSet, args []string) []string {
	out := slices.Clone(args)
	for i := 0; i < len(out) && out[i] != "--"; i++ {
		if len(out[i]) < 2 || out[i][0] != '-' {
			break
		}
		name, _, joined := strings.Cut(strings.TrimPrefix(out[i][1:], "-"), "=")
		if name == "h" {
			name, out[i] = "help", "--help"
		}
		if out[i][1] != '-' {
			out[i] = "-" + out[i]
		}
		if f := fs.Lookup(name); f != nil && f.NoOptDefVal == "" && !joined {
			i++ // its value
		}
	}
	return out
}

// explain rewrites pflag's errors for the operator.
func (o *Options) explain(err error) error {
	var unknown *pflag.NotExistError
	var noValue *pflag.ValueRequiredError
	var malformed *pflag.InvalidSyntaxError
	switch {
	case errors.As(err, &unknown):
		name := unknown.GetSpecifiedName()
		if instead, former := formerFlags[name]; former {
			return fmt.Errorf("--%s is a flag of flannel before 0.8: %s", name, instead)
		}
		hint := ""
		if near := o.nearest(name); near != "" {
			hint = fmt.Sprintf(" did you mean --%s?", near)
		}
		return fmt.Errorf("unknown flag --%s:%s --help lists the flags", name, hint)
	case errors.As(err, &malformed):
		name, _, _ := strings.Cut(malformed.GetSpecifiedFlag(), "=")
		return fmt.Errorf("%s is not a flag: --help lists the flags", name)
	case errors.As(err, &noValue):
		s := noValue.GetFlag().Value.(*setting)
		return fmt.Errorf("--%s needs a value: --%s=%s", s.name, s.name, s.arg)
	}
	return err
}

// What took the place of the flags that flannel had before 0.8.
const (
	noServer   = "there is no server between nodes and store; each node has --etcd-endpoints or --kube-subnet-mgr"
	oneNetwork = "run one flanneld for each network, each with its own --etcd-prefix and --subnet-file"
	logsOnly   = "flanneld always logs to standard error"
)

var formerFlags = map[string]string{
	"listen": noServer, "remote": noServer,
	"remote-keyfile": noServer, "remote-certfile": noServer, "remote-cafile": noServer,
	"networks": oneNetwork, "watch-networks": oneNetwork, "subnet-dir": oneNetwork,
	"logtostderr": logsOnly, "alsologtostderr": logsOnly, "stderrthreshold": logsOnly, "log_dir": logsOnly,
}

// unexpected returns the warning about a word that belongs to no flag, which is the argument at an index. The word is
// redacted if it may be the rest of a password with spaces.
func (o *Options) unexpected(args []string, at int) string {
	word, before := args[at], strings.TrimLeft(args[at-1], "-")
	text := strconv.Quote(word)
	for _, arg := range slices.Backward(args[:at]) {
		if strings.HasPrefix(arg, "-") {
			if strings.Contains(arg, "password") {
				text = redacted
			}
			break
		}
	}
	text += " belongs to no flag, and is ignored: give values as --name=value, and values with spaces in quotes"
	if s := o.setting(before); s != nil && s.arg == "" && (word == "true" || word == "false") {
		text = fmt.Sprintf("%q after --%s is ignored, and --%[2]s without a value means true: write --%[2]s=%[1]s",
			word, before)
	}
	var names []string
	for _, arg := range args[at+1:] {
		name, _, _ := strings.Cut(arg, "=")
		if strings.HasPrefix(name, "-") && o.setting(strings.TrimLeft(name, "-")) != nil {
			names = append(names, name)
		}
	}
	if names != nil {
		text += "; as in flannel, what follows is ignored, too: " + strings.Join(names, " ")
	}
	return text
}

const envPrefix = "FLANNELD_"

// ClearEnvironment removes the settings, one of which is a password, from the environment of this process once they have
// been read: libraries that start programs pass the environment on.
func ClearEnvironment() {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, envPrefix) {
			_ = os.Unsetenv(name) // fails for no name that is in the environment
		}
	}
}

func (s *setting) env() string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(s.name, "-", "_"))
}

var (
	serviceLinkName = regexp.MustCompile(
		`_SERVICE_HOST$|_SERVICE_PORT(_|$)|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$`)
	serviceLinkValue = regexp.MustCompile(`^(tcp|udp|sctp)://`)
)

// serviceLink reports whether a variable is a service link. Kubernetes sets service links in every container of a
// namespace that has a service called flanneld, or flanneld-something: FLANNELD_HEALTHZ_PORT=tcp://10.3.0.7:8080.
func serviceLink(name, value string) bool {
	return serviceLinkName.MatchString(name) || strings.HasSuffix(name, "_PORT") && serviceLinkValue.MatchString(value)
}

// environment takes the settings that the command line does not have from env. An empty variable counts as not set.
func (o *Options) environment(env []string) {
	vars := map[string]string{}
	for _, line := range env {
		if name, value, _ := strings.Cut(line, "="); strings.HasPrefix(name, envPrefix) {
			vars[name] = value
		}
	}
	for _, s := range o.settings {
		text := vars[s.env()]
		delete(vars, s.env())
		if s.name == "help" || s.name == "version" {
			continue // commands rather than settings; an image may have its own version in FLANNELD_VERSION
		}
		if text == "" || s.from != "" || serviceLink(s.env(), text) {
			continue
		}
		_ = s.Set(text)
		s.from = s.env()
		if wrong := (malformed{}); errors.As(s.err, &wrong) {
			o.warn("environment variable %s is ignored: %v", s.from, wrong)
			s.texts, s.from, s.err = nil, "", nil
		}
	}
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		if serviceLink(name, vars[name]) {
			continue
		}
		like := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, envPrefix), "_", "-"))
		hint := ""
		if instead, former := formerFlags[like]; former {
			hint = "; flannel had it before 0.8: " + instead
		} else if near := o.nearest(like); near != "" {
			hint = fmt.Sprintf(", did you mean %s?", o.setting(near).env())
		}
		o.warn("environment variable %s is ignored: there is no such setting%s", name, hint)
	}
}

// check checks settings that depend on each other, and the files that settings name.
func (o *Options) check() error {
	// alone reports whether one setting is there without the other. As in flannel, it has no effect then.
	alone := func(a, b string) bool {
		x, y := o.setting(a), o.setting(b)
		if x.value() == "" {
			x, y = y, x
		}
		if x.value() == "" || y.value() != "" {
			return false
		}
		o.warn("%s is ignored: it has no effect without --%s", x.from, y.name)
		return true
	}
	readable := func(name, file string) error {
		s := o.setting(name)
		if file == "" {
			return nil
		}
		f, err := os.Open(file)
		if err != nil {
			return fmt.Errorf("%s: cannot read the file: %w", s.from, err)
		}
		defer f.Close()
		if info, err := f.Stat(); err == nil && info.IsDir() {
			return fmt.Errorf("%s: %s is a directory, not a file", s.from, file)
		}
		return nil
	}
	nodeAddress := o.setting("iface-node-address")
	apart := func(name string) error {
		if s := o.setting(name); o.IfaceNodeAddress && strings.Join(s.texts, "") != "" {
			return fmt.Errorf("%s and %s both choose the uplink: give only one of them", s.from, nodeAddress.from)
		}
		return nil
	}
	if err := o.healthz(); err != nil {
		return err
	}
	if s := o.setting("ip-masq-families"); s.from != "" && !o.IPMasq {
		o.warn("%s is ignored: it has no effect without --ip-masq", s.from)
	}
	if s := o.setting("route-rule-priority"); s.from != "" && o.RouteTable == 0 {
		o.warn("%s is ignored: it has no effect without --route-table", s.from)
	}
	if o.Profile && o.HealthzPort == 0 {
		return fmt.Errorf("%s needs --healthz-port, which is 0 (disabled): set both", o.setting("pprof").from)
	}
	if o.KubeSubnetMgr {
		return cmp.Or(apart("iface"), apart("iface-regex"), apart("iface-can-reach"),
			apart("iface-v6"), apart("iface-regex-v6"), apart("iface-can-reach-v6"),
			readable("kubeconfig-file", o.KubeconfigFile))
	}
	if o.IfaceNodeAddress {
		return fmt.Errorf("%s works only with --kube-subnet-mgr: use --iface instead", nodeAddress.from)
	}
	if alone("etcd-keyfile", "etcd-certfile") {
		o.EtcdKeyFile, o.EtcdCertFile = "", ""
	}
	if alone("etcd-username", "etcd-password") {
		o.EtcdUsername, o.EtcdPassword = "", ""
	}
	if err := o.discovery(); err != nil {
		return err
	}
	for i, e := range o.EtcdEndpoints {
		switch {
		case strings.Contains(e, "://"):
		case o.EtcdCAFile+o.EtcdCertFile == "":
			o.EtcdEndpoints[i] = "http://" + e
		default:
			o.EtcdEndpoints[i] = "https://" + e
		}
	}
	secure := func(e string) bool { return strings.HasPrefix(e, "https://") }
	if o.DiscoverySRV == "" && o.EtcdCAFile != "" && o.EtcdCertFile == "" &&
		!slices.ContainsFunc(o.EtcdEndpoints, secure) {
		o.warn("%s is ignored: no endpoint begins with https://", o.setting("etcd-cafile").from)
		o.EtcdCAFile = ""
	}
	return cmp.Or(
		readable("etcd-cafile", o.EtcdCAFile),
		readable("etcd-certfile", o.EtcdCertFile),
		readable("etcd-keyfile", o.EtcdKeyFile),
	)
}

// discovery checks that only one flag sets where etcd is.
func (o *Options) discovery() error {
	given, name := o.setting("etcd-endpoints"), o.setting("discovery-srv-name")
	switch {
	case o.DiscoverySRV != "" && given.from != "":
		return fmt.Errorf("%s and %s both set where etcd is: give only one of them", given.from,
			o.setting("discovery-srv").from)
	case o.DiscoverySRV != "":
		o.EtcdEndpoints = nil
	case o.DiscoverySRVName != "":
		o.warn("%s is ignored: it has no effect without --discovery-srv", name.from)
		o.DiscoverySRVName = ""
	}
	return nil
}

// lookupLimit is how long the lookup of a name may take.
const lookupLimit = 5 * time.Second

// healthz sets HealthzIP. It looks up a name, of whose addresses the first IPv4 address is used, as net.Listen does.
func (o *Options) healthz() error {
	s := o.setting("healthz-ip")
	text := s.value()
	ip, err := netip.ParseAddr(text)
	switch {
	case err == nil:
		o.HealthzIP = ip.Unmap()
		return nil
	case text == "":
		o.HealthzIP = netip.Addr{}
		o.warn("%s is empty: all addresses of both families are used", s.from)
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupLimit)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", text)
	switch {
	case err == nil && len(ips) > 0:
		o.HealthzIP = ips[max(0, slices.IndexFunc(ips, func(ip netip.Addr) bool { return ip.Unmap().Is4() }))].Unmap()
		o.warn("%s: %q is a name, and its address is looked up only now: %s is used", s.from, text, o.HealthzIP)
	case o.HealthzPort == 0:
		o.HealthzIP = netip.IPv4Unspecified()
		o.warn("%s is ignored: --healthz-port is 0 (disabled), and %q is neither an IP address nor a name", s.from, text)
	default:
		return fmt.Errorf("%s: %q is not an IP address such as 192.0.2.7 or 2001:db8::7, nor a name that has one: %w",
			s.from, text, err)
	}
	return nil
}

// setting returns the setting of a flag, nil if there is no such flag.
func (o *Options) setting(name string) *setting {
	if i := slices.IndexFunc(o.settings, func(s *setting) bool { return s.name == name }); i >= 0 {
		return o.settings[i]
	}
	return nil
}

// Redacted returns the settings that differ from their defaults, as flags that an operator could type. A secret is
// redacted; if it was set in the environment, its variable is returned, as the command line does not have it.
func (o *Options) Redacted() []string {
	var out []string
	for _, s := range o.settings {
		name := "--" + s.name
		if s.hidden {
			name = s.from
		}
		for _, text := range s.texts {
			if text != s.def {
				out = append(out, name+"="+text)
			}
		}
	}
	return out
}

func (o *Options) String() string { return strings.Join(o.Redacted(), " ") }

// nearest returns the flag whose name is most similar to name, "" if no flag's name is similar.
func (o *Options) nearest(name string) string {
	best, found := 1+len(name)/4, ""
	for _, s := range o.settings {
		if d := distance(strings.ToLower(name), s.name); d < best || d == best && found == "" {
			best, found = d, s.name
		}
	}
	return found
}

// distance returns the Levenshtein distance: the number of letters to insert, delete or replace.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// Set implements pflag.Value. An empty text counts as not set where there is no default: units have lines such as
// --iface=$IFACE.
//
// Set returns no error: Complete returns it, unless the setting has no use.
func (s *setting) Set(text string) error {
	err := s.set(text)
	switch {
	case s.hidden && text != "":
		text = redacted
	case strings.Contains(text, "://"):
		text = withoutUser(text)
	}
	if !s.repeatable {
		s.texts, s.err = nil, nil
	}
	s.texts, s.from, s.err = append(s.texts, text), "--"+s.name, cmp.Or(s.err, err)
	return nil
}

func (s *setting) value() string {
	if len(s.texts) == 0 {
		return s.def
	}
	return s.texts[len(s.texts)-1]
}

func (s *setting) String() string { return s.value() }
func (s *setting) Type() string   { return s.arg }

// Help returns the text for --help.
func Help() string {
	var b strings.Builder
	b.WriteString(`Usage: flanneld [flags]

flanneld leases a subnet for this node, and connects the subnet with the subnets of the other nodes.

Each flag can also be set in the environment. The variable is FLANNELD_ and the flag's name in upper case,
with _ for -: FLANNELD_ETCD_ENDPOINTS for --etcd-endpoints. The command line wins over the environment.
For flags without a value, --name means true, and --name=false means false.
`)
	for _, g := range flags(&Options{}) {
		fmt.Fprintf(&b, "\n%s:\n", g.title)
		for _, s := range g.settings {
			fmt.Fprintf(&b, "  --%s", s.name)
			if s.arg != "" {
				b.WriteString("=" + s.arg)
			}
			if s.repeatable {
				b.WriteString(" (repeatable)")
			}
			if s.def != "" && s.def != "false" {
				fmt.Fprintf(&b, " (default %s)", s.def)
			}
			fmt.Fprintf(&b, "\n        %s\n", s.help)
		}
	}
	return b.String()
}

// into returns the set function of a flag whose parsed value is stored in p.
func into[T any](p *T, parse func(string) (T, error)) func(string) error {
	return func(text string) error {
		v, err := parse(text)
		if _, odd := err.(remark); err == nil || odd {
			*p = v
		}
		return err
	}
}

// appendTo is like into, for flags that may be repeated. Empty texts are skipped.
func appendTo[T any](p *[]T, parse func(string) (T, error)) func(string) error {
	return func(text string) error {
		if text == "" {
			return nil
		}
		v, err := parse(text)
		if err == nil {
			*p = append(*p, v)
		}
		return err
	}
}

// optional returns a parser that parses an empty text as the zero value.
func optional[T any](parse func(string) (T, error)) func(string) (T, error) {
	return func(text string) (T, error) {
		if text == "" {
			var zero T
			return zero, nil
		}
		return parse(text)
	}
}

func anything(text string) (string, error) { return text, nil }
func password(text string) (secret, error) { return secret(text), nil }

func boolean(text string) (bool, error) {
	v, err := strconv.ParseBool(text)
	if err != nil {
		return false, malformed{fmt.Errorf("%q is not true or false", text)}
	}
	return v, nil
}

// families parses the names of families, separated by commas.
func families(text string) (on family.Pair[bool], err error) {
	for name := range strings.SplitSeq(text, ",") {
		switch strings.ToLower(strings.TrimSpace(name)) {
		case "ipv4":
			on.IPv4 = true
		case "ipv6":
			on.IPv6 = true
		default:
			return on, malformed{fmt.Errorf("%q is not ipv4, ipv6 or ipv4,ipv6", text)}
		}
	}
	return on, nil
}

func file(text string) (string, error) {
	if text == "" {
		return "", errors.New("the value must be the path of a file")
	}
	return text, nil
}

const defaultSubnetFile = "/run/flannel/subnet.env"

func subnetFile(text string) (string, error) {
	if text == "" {
		return defaultSubnetFile, remark("the value is empty: " + defaultSubnetFile + " is used")
	}
	return text, nil
}

func pattern(text string) (*regexp.Regexp, error) {
	re, err := regexp.Compile(text)
	var wrong *syntax.Error
	if errors.As(err, &wrong) {
		return nil, fmt.Errorf("%q is not a regular expression in RE2 syntax: %s", text, wrong.Code)
	}
	return re, err
}

// number parses an integer as flannel does, which takes 0x10, 0o20, 020 and 0b10000 for 16.
func number(text string) (int64, error) { return strconv.ParseInt(text, 0, strconv.IntSize) }

func routeTable(text string) (uint32, error) {
	n, err := number(text)
	switch {
	case err != nil || n < 1 || n > math.MaxUint32:
		return 0, malformed{fmt.Errorf("%q is not the number of a routing table: 1 to %d", text, uint32(math.MaxUint32))}
	case n >= unix.RT_TABLE_DEFAULT && n <= unix.RT_TABLE_LOCAL:
		return 0, fmt.Errorf("%d is a table that the kernel uses itself: take another one, such as 7070", n)
	}
	return uint32(n), nil
}

func rulePriority(text string) (uint32, error) {
	n, err := number(text)
	if err != nil || n < 1 || n > mainPriority-2 {
		return 0, malformed{fmt.Errorf("%q is not a priority before the main table's rule: 1 to %d", text, mainPriority-2)}
	}
	return uint32(n), nil
}

// mainPriority is the priority of the rule that leads to the main table (fib_default_rules_init, net/ipv4/fib_rules.c).
const mainPriority = 32766

func port(text string) (int, error) {
	n, err := number(text)
	want := fmt.Errorf("%q is not a port number: 0 (disabled) to 65535", text)
	switch {
	case err != nil:
		return 0, malformed{want}
	case n < 0:
		return 0, remark(want.Error() + "; 0 is used")
	case n > math.MaxUint16:
		return 0, want
	}
	return int(n), nil
}

// duration returns a parser of a number of units. A number out of range is an error, unless there is a number to use
// instead.
func duration(units string, unit time.Duration, low, high, instead int) func(string) (time.Duration, error) {
	allowed := fmt.Sprintf("%d to %d", low, high)
	if high == math.MaxInt32 {
		allowed = fmt.Sprintf("%d or more", low)
	}
	return func(text string) (time.Duration, error) {
		n, err := number(text)
		want := fmt.Errorf("%q is not a number of %s: %s", text, units, allowed)
		switch {
		case err != nil:
			return 0, malformed{want}
		case int64(low) <= n && n <= int64(high):
			return time.Duration(n) * unit, nil
		case instead != 0:
			return time.Duration(instead) * unit, remark(fmt.Sprintf("%v; %d is used", want, instead))
		}
		return 0, want
	}
}

func address(text string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(text)
	if err != nil || ip.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is not an IP address such as 192.0.2.7 or 2001:db8::7", text)
	}
	return ip.Unmap(), nil
}

func publicIP(family string, is func(netip.Addr) bool) func(string) (netip.Addr, error) {
	return func(text string) (netip.Addr, error) {
		ip, err := address(text)
		switch {
		case err != nil || !is(ip):
			return netip.Addr{}, fmt.Errorf("%q is not an %s address", text, family)
		case ip.IsUnspecified() || ip.IsMulticast() || ip.Is6() && ip.IsLinkLocalUnicast():
			return netip.Addr{}, fmt.Errorf("%q is not an address that peers can reach this node at", text)
		}
		return ip, nil
	}
}

// endpoints parses etcd's comma-separated URLs. An entry that cannot work is left out if there are others.
func endpoints(text string) ([]string, error) {
	var out, remarks []string
	var failed error
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part == "" {
			remarks = append(remarks, "an empty URL is left out")
			continue
		}
		e, err := endpoint(part)
		if _, odd := err.(remark); err == nil || odd {
			out = append(out, e)
		} else {
			failed = cmp.Or(failed, err)
			err = fmt.Errorf("%w; it is left out", err)
		}
		if err != nil {
			remarks = append(remarks, err.Error())
		}
	}
	switch {
	case failed != nil && out == nil:
		return nil, failed
	case out == nil:
		return nil, fmt.Errorf("%q has no URL: give one or more URLs such as http://127.0.0.1:2379, separated by commas",
			text)
	case remarks != nil:
		return out, remark(strings.Join(remarks, "; "))
	}
	return out, nil
}

// endpoint parses one of etcd's URLs. Old units have HOST:PORT alone, which stays without a scheme here: check chooses
// the scheme. What flannel's client ignores in a URL is ignored, with a remark.
func endpoint(part string) (string, error) {
	quoted := strconv.Quote(withoutUser(part))
	bare := false
	if _, _, err := net.SplitHostPort(part); err == nil && !strings.Contains(part, "/") {
		bare, part = true, "http://"+part
	}
	u, err := url.Parse(part)
	switch {
	case err == nil && u.Scheme == "unix" && u.Host+u.Path+u.Opaque != "":
		return part, nil
	case err != nil || u.Scheme != "http" && u.Scheme != "https":
		return "", fmt.Errorf("%s is not a URL: http://HOST:PORT, https://HOST:PORT or unix:///PATH", quoted)
	case u.Hostname() == "" || u.Port() == "":
		return "", fmt.Errorf("%s has no host or no port: %s://127.0.0.1:2379, for example", quoted, u.Scheme)
	}
	if _, err := strconv.ParseUint(u.Port(), 10, 16); err != nil {
		return "", fmt.Errorf("%s has no valid port: 1 to 65535", quoted)
	}
	out := u.Scheme + "://" + u.Host
	if bare {
		out = u.Host
	}
	switch {
	case u.User != nil:
		return out, remark(quoted + " contains a user name, which is not used: " +
			"use --etcd-username and --etcd-password")
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return out, remark(fmt.Sprintf("%s has more after the port, which is not used: %s is used", quoted, out))
	}
	return out, nil
}

var dnsLabel = regexp.MustCompile(`^[A-Za-z0-9_]([-A-Za-z0-9_]*[A-Za-z0-9_])?$`)

// domain parses the name of a domain, which may end in a dot.
func domain(text string) (string, error) {
	for part := range strings.SplitSeq(strings.TrimSuffix(text, "."), ".") {
		if len(text) > maxDomain || len(part) > maxLabel || !dnsLabel.MatchString(part) {
			return "", fmt.Errorf("%q is not the name of a domain such as example.com", withoutUser(text))
		}
	}
	return text, nil
}

// label parses what is appended to the names of SRV records.
func label(text string) (string, error) {
	if len("_etcd-client-ssl-"+text) > maxLabel || !dnsLabel.MatchString(text) {
		return "", fmt.Errorf("%q is not a part of a name in DNS such as blue", text)
	}
	return text, nil
}

// How long the name of a domain and its parts may be in DNS; with maxDomain, the name of an SRV record fits, too.
const (
	maxDomain = 180
	maxLabel  = 63
)

// apiURL checks the URL of the API server. A URL without a scheme is left to client-go, as in flannel.
func apiURL(text string) (string, error) {
	bare := !strings.Contains(text, "://")
	full := text
	if bare {
		full = "http://" + text
	}
	u, err := url.Parse(full)
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
		return "", fmt.Errorf("%q is not a URL: https://HOST:PORT or http://HOST:PORT", withoutUser(text))
	case u.User != nil:
		return "", fmt.Errorf("%q contains a user name: use --kubeconfig-file for credentials", withoutUser(text))
	case bare:
		return text, remark(fmt.Sprintf("%q has no scheme: "+
			"http:// is used, or https:// if the kubeconfig file has certificates", text))
	}
	return text, nil
}

// withoutUser returns a URL, well-formed or not, without user name and password.
func withoutUser(text string) string {
	if i := strings.LastIndexByte(text, '@'); i >= 0 {
		return "..." + text[i:]
	}
	return text
}

// etcdPrefix returns the key without a trailing slash. flannel joins it with "config" and "subnets" as it is: without a
// leading slash, the key is another one.
func etcdPrefix(text string) (string, error) {
	if strings.HasPrefix(text, "/") {
		return path.Clean(text), nil
	}
	key := path.Join(text)
	return key, remark(fmt.Sprintf("%q has no leading slash: the configuration is read from the key %q", text,
		path.Join(key, "config")))
}

// The name of an annotation is an optional DNS name with a slash, then at most 63 letters, digits, '-', '_' and '.',
// of which the first is a letter or digit (k8s.io/apimachinery, IsQualifiedName). The longest word that follows the
// prefix is "public-ipv6-overwrite".
var (
	annotationDomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	annotationName   = regexp.MustCompile(`^([A-Za-z0-9][-A-Za-z0-9_.]*)?$`)
)

const (
	maxAnnotationDomain = 253
	maxAnnotationName   = 63 - len("public-ipv6-overwrite")
)

// annotationPrefix completes the prefix as upstream does: it appends a slash if the prefix has none, else a dash
// unless the prefix ends in a slash or a dash.
func annotationPrefix(text string) (string, error) {
	prefix := text
	switch {
	case !strings.Contains(prefix, "/"):
		prefix += "/"
	case !strings.HasSuffix(prefix, "/") && !strings.HasSuffix(prefix, "-"):
		prefix += "-"
	}
	domain, name, _ := strings.Cut(prefix, "/")
	if len(domain) > maxAnnotationDomain || !annotationDomain.MatchString(domain) ||
		len(name) > maxAnnotationName || !annotationName.MatchString(name) {
		return "", fmt.Errorf("%q is not a prefix of annotations: DOMAIN or DOMAIN/NAME, "+
			"such as flannel.alpha.coreos.com or example.com/flannel", text)
	}
	return prefix, nil
}

// logFlag returns the set function of one of klog's flags.
func logFlag(name, want string) func(string) error {
	fs := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(fs)
	return func(text string) error {
		wrong := fmt.Errorf("%q is not %s", text, want)
		if n, err := strconv.Atoi(text); err == nil && n < 0 && fs.Set(name, "0") == nil {
			return remark(wrong.Error() + "; 0 is used")
		}
		if strings.HasPrefix(text, "-") || fs.Set(name, text) != nil {
			return malformed{wrong}
		}
		return nil
	}
}
