package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const (
	ipv4Env = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
	dualEnv = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_IPV6_SUBNET=fd05:0:0:22::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
	ipv6Env = "FLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_IPV6_SUBNET=fd05:0:0:22::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
)

func TestDockerOptions(t *testing.T) {
	const ipv4 = `DOCKER_OPT_BIP="--bip=10.5.34.1/24"
DOCKER_OPT_IPMASQ="--ip-masq=true"
DOCKER_OPT_MTU="--mtu=1450"
`
	const ipv4All = `" --bip=10.5.34.1/24 --ip-masq=true --mtu=1450 "` + "\n"
	for _, c := range []struct {
		name, file string
		args, env  []string
		want       string
	}{
		{name: "IPv4", file: ipv4Env, want: ipv4 + "DOCKER_OPTS=" + ipv4All},
		{name: "without a last newline", file: strings.TrimSpace(ipv4Env), want: ipv4 + "DOCKER_OPTS=" + ipv4All},
		{name: "each", file: ipv4Env, args: []string{"-i"}, want: ipv4},
		{name: "all", file: ipv4Env, args: []string{"-c"}, want: "DOCKER_OPTS=" + ipv4All},
		{name: "another name", file: ipv4Env, args: []string{"-ick", "OTHER"}, want: ipv4 + "OTHER=" + ipv4All},
		{name: "masquerading is Docker's", file: ipv4Env, args: []string{"-m", "-c"},
			want: `DOCKER_OPTS=" --bip=10.5.34.1/24 --mtu=1450 "` + "\n"},
		{name: "from the environment", file: ipv4Env, args: []string{"-c"},
			env:  []string{"DOCKER_OPTS=--debug", "DOCKER_OPT_LOG=--log-level info"},
			want: `DOCKER_OPTS="--debug --bip=10.5.34.1/24 --ip-masq=true --log-level info --mtu=1450 "` + "\n"},
		{name: "dual stack", file: dualEnv, want: `DOCKER_OPT_BIP="--bip=10.5.34.1/24"
DOCKER_OPT_FIXED_CIDR_V6="--fixed-cidr-v6=fd05:0:0:22::1/64"
DOCKER_OPT_IPMASQ="--ip-masq=false"
DOCKER_OPT_IPV6="--ipv6"
DOCKER_OPT_MTU="--mtu=1430"
DOCKER_OPTS=" --bip=10.5.34.1/24 --fixed-cidr-v6=fd05:0:0:22::1/64 --ip-masq=false --ipv6 --mtu=1430 "
`},
		{name: "IPv6", file: ipv6Env, args: []string{"-c"},
			want: `DOCKER_OPTS=" --fixed-cidr-v6=fd05:0:0:22::1/64 --ip-masq=false --ipv6 --mtu=1430 "` + "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, out, err := dockerOptions(t, c.file, c.args, c.env)
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if got != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
		})
	}
}

func TestDockerOptionsErrors(t *testing.T) {
	for _, c := range []struct {
		file, want string
		args       []string
	}{
		{want: "flanneld writes it once it is ready", args: []string{"-f", "/nowhere/subnet.env"}},
		{file: "FLANNEL_SUBNET=$(touch /tmp/x)\n", want: "is nothing that flanneld writes"},
		{file: "FLANNEL_IPMASQ=maybe\n", want: "is neither true nor false"},
		{file: ipv4Env, want: "is no name of a variable", args: []string{"-k", "A;B"}},
		{file: ipv4Env, want: "Usage: ", args: []string{"-x"}},
	} {
		if got, out, err := dockerOptions(t, c.file, c.args, nil); err == nil || !strings.Contains(out, c.want) || got != "" {
			t.Errorf("%q %v: %v, says %q, want %q; writes %q", c.file, c.args, err, out, c.want, got)
		}
	}
}

// dockerOptions runs the script, and returns what it writes and what it prints.
func dockerOptions(t *testing.T, file string, args, env []string) (written, said string, err error) {
	t.Helper()
	from, to := filepath.Join(t.TempDir(), "subnet.env"), filepath.Join(t.TempDir(), "docker.env")
	write(t, from, file)
	cmd := exec.Command("sh", append([]string{"../../dist/mk-docker-opts.sh", "-f", from, "-d", to}, args...)...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	out, err := cmd.CombinedOutput()
	text, _ := os.ReadFile(to) // none, where it fails
	return string(text), string(out), err
}
