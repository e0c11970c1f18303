package host

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	ipv4Env = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
	dualEnv = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_IPV6_SUBNET=fd05:0:0:22::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
	ipv6Env = "FLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_IPV6_SUBNET=fd05:0:0:22::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
)

// TestDockerOptions: without -6, the script writes, byte by byte, what flannel's script writes.
func TestDockerOptions(t *testing.T) {
	const ipv4 = `DOCKER_OPT_BIP="--bip=10.5.34.1/24"
DOCKER_OPT_IPMASQ="--ip-masq=true"
DOCKER_OPT_MTU="--mtu=1450"
`
	const ipv4All = `" --bip=10.5.34.1/24 --ip-masq=true --mtu=1450"` + "\n"
	const noFile = "/nowhere/subnet.env"
	for _, c := range []struct {
		name, file string
		args, env  []string
		want       string
	}{
		{name: "IPv4", file: ipv4Env, want: ipv4 + "DOCKER_OPTS=" + ipv4All},
		{name: "without a last newline", file: strings.TrimSpace(ipv4Env), want: ipv4 + "DOCKER_OPTS=" + ipv4All},
		{name: "each", file: ipv4Env, args: []string{"-i"}, want: ipv4},
		{name: "all", file: ipv4Env, args: []string{"-c"}, want: "DOCKER_OPTS=" + ipv4All},
		{name: "both", file: ipv4Env, args: []string{"-ci"}, want: ipv4 + "DOCKER_OPTS=" + ipv4All},
		{name: "another name", file: ipv4Env, args: []string{"-ick", "OTHER"}, want: ipv4 + "OTHER=" + ipv4All},
		{name: "masquerading is Docker's", file: ipv4Env, args: []string{"-m"}, want: `DOCKER_OPT_BIP="--bip=10.5.34.1/24"
DOCKER_OPT_MTU="--mtu=1450"
DOCKER_OPTS=" --bip=10.5.34.1/24 --mtu=1450"
`},
		{name: "with nothing about masquerading", file: "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=\n", args: []string{"-c"},
			want: `DOCKER_OPTS=" --mtu=1450"` + "\n"},
		{name: "from the environment", file: ipv4Env, args: []string{"-c"},
			env:  []string{"DOCKER_OPTS=--debug", "DOCKER_OPT_LOG=--log-level info"},
			want: `DOCKER_OPTS="--debug  --bip=10.5.34.1/24 --ip-masq=true --log-level info --mtu=1450"` + "\n"},
		{name: "masquerading is neither on nor off", file: "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=maybe\n", args: []string{"-c"},
			want: `DOCKER_OPTS=" --mtu=1450"` + "\n"},
		{name: "no file", args: []string{"-f", noFile}, want: `DOCKER_OPTS=""` + "\n"},
		{name: "no file, and something in the environment", args: []string{"-f", noFile},
			env: []string{"DOCKER_OPTS=--debug", "FLANNEL_SUBNET=10.5.34.1/24"},
			want: `DOCKER_OPT_BIP="--bip=10.5.34.1/24"` + "\n" +
				`DOCKER_OPTS="--debug  --bip=10.5.34.1/24"` + "\n"},
		{name: "no file, each", args: []string{"-i", "-f", noFile}, want: ""},
		{name: "several networks, quotes, a remark", args: []string{"-c"},
			file: "# of this node\nFLANNEL_NETWORK=10.5.0.0/16,10.6.0.0/16\nFLANNEL_SUBNET=\"10.5.34.1/24\"\n",
			want: `DOCKER_OPTS=" --bip=10.5.34.1/24"` + "\n"},
		{name: "dual stack", file: dualEnv, args: []string{"-c"},
			want: `DOCKER_OPTS=" --bip=10.5.34.1/24 --ip-masq=false --mtu=1430"` + "\n"},
		{name: "dual stack, with IPv6", file: dualEnv, args: []string{"-6"}, want: `DOCKER_OPT_BIP="--bip=10.5.34.1/24"
DOCKER_OPT_FIXED_CIDR_V6="--fixed-cidr-v6=fd05:0:0:22::1/64"
DOCKER_OPT_IPMASQ="--ip-masq=false"
DOCKER_OPT_IPV6="--ipv6"
DOCKER_OPT_MTU="--mtu=1430"
DOCKER_OPTS=" --bip=10.5.34.1/24 --fixed-cidr-v6=fd05:0:0:22::1/64 --ip-masq=false --ipv6 --mtu=1430"
`},
		{name: "IPv6", file: ipv6Env, args: []string{"-c6"},
			want: `DOCKER_OPTS=" --fixed-cidr-v6=fd05:0:0:22::1/64 --ip-masq=false --ipv6 --mtu=1430"` + "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, shell := range shells() {
				got, out, err := dockerOptions(t, shell, c.file, c.args, c.env)
				if err != nil {
					t.Fatalf("%v: %v: %s", shell, err, out)
				}
				if got != c.want {
					t.Errorf("%v: got\n%s\nwant\n%s", shell, got, c.want)
				}
			}
		})
	}
}

func TestDockerOptionsErrors(t *testing.T) {
	for _, c := range []struct {
		file, want string
		args       []string
	}{
		{file: "FLANNEL_SUBNET=$(touch /tmp/x)\n", want: "is nothing that flanneld writes"},
		{file: ipv4Env, want: "is no name of a variable", args: []string{"-k", "A;B"}},
		{file: ipv4Env, want: "Usage: ", args: []string{"-x"}},
	} {
		for _, shell := range shells() {
			got, out, err := dockerOptions(t, shell, c.file, c.args, nil)
			if err == nil || !strings.Contains(out, c.want) || got != "" {
				t.Errorf("%v: %q %v: %v, prints %q, want %q; writes %q", shell, c.file, c.args, err, out, c.want, got)
			}
		}
	}
}

// TestDockerOptionsFile: a file is replaced as a whole; a symbolic link and a pipe are written to. No
// other file is left.
func TestDockerOptionsFile(t *testing.T) {
	const want = "DOCKER_OPTS=\" --bip=10.5.34.1/24 --ip-masq=true --mtu=1450\"\n"
	for _, shell := range shells() {
		dir := t.TempDir()
		at := func(name string) string { return filepath.Join(dir, name) }
		write(t, at("subnet.env"), ipv4Env)
		write(t, at("old"), "old")
		write(t, at("target"), "old")
		if err := errors.Join(os.Link(at("old"), at("replaced")), os.Symlink("target", at("link"))); err != nil {
			t.Fatal(err)
		}
		run := func(to string) string {
			t.Helper()
			line := append(slices.Clone(shell), "../../dist/mk-docker-opts.sh", "-c", "-f", at("subnet.env"), "-d", to)
			out, err := exec.Command(line[0], line[1:]...).Output()
			if err != nil {
				t.Fatalf("%v: %s: %v", shell, to, err)
			}
			return string(out)
		}
		run(at("replaced"))
		run(at("link"))
		run(at("subnet.env"))
		for name, want := range map[string]string{"replaced": want, "old": "old", "target": want, "subnet.env": want} {
			if got, err := os.ReadFile(at(name)); err != nil || string(got) != want {
				t.Errorf("%v: %s has %q, %v", shell, name, got, err)
			}
		}
		write(t, at("subnet.env"), ipv4Env)
		if got := run("/dev/stdout"); got != want {
			t.Errorf("%v: to a pipe: %q", shell, got)
		}
		if files, err := os.ReadDir(dir); err != nil || len(files) != 5 {
			t.Errorf("%v: %v, %v", shell, files, err)
		}
	}
}

// shells returns the shells that are there, of those that may be sh.
func shells() [][]string {
	found := [][]string{{"sh"}}
	for _, s := range [][]string{{"dash"}, {"bash"}, {"bash", "--posix"}, {"busybox", "sh"}} {
		if _, err := exec.LookPath(s[0]); err == nil {
			found = append(found, s)
		}
	}
	return found
}

// dockerOptions runs the script, and returns what it writes and what it prints.
func dockerOptions(t *testing.T, shell []string, file string, args, env []string) (written, printed string, err error) {
	t.Helper()
	from, to := filepath.Join(t.TempDir(), "subnet.env"), filepath.Join(t.TempDir(), "docker.env")
	write(t, from, file)
	line := slices.Concat(shell, []string{"../../dist/mk-docker-opts.sh", "-f", from, "-d", to}, args)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	out, err := cmd.CombinedOutput()
	text, _ := os.ReadFile(to) // none, where it fails
	return string(text), string(out), err
}
