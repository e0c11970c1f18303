package subnet

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write testdata, and the documentation's list of keys")

var (
	env4 = Env{
		Networks: NetworksOf(netip.MustParsePrefix("10.5.0.0/16")),
		Subnets:  Subnets{IPv4: netip.MustParsePrefix("10.5.34.0/24")},
		MTU:      1450, IPMasq: true,
	}
	envDual = Env{
		Networks: NetworksOf(netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fc00::/48")),
		Subnets:  Subnets{netip.MustParsePrefix("10.5.34.0/24"), netip.MustParsePrefix("fc00:0:0:22::/64")},
		MTU:      1430,
	}
	envTwo = Env{
		Networks: NetworksOf(netip.MustParsePrefix("10.4.0.0/16"), netip.MustParsePrefix("10.5.0.0/16")),
		Subnets:  Subnets{IPv4: netip.MustParsePrefix("10.5.34.0/24")},
		MTU:      1450, IPMasq: true,
	}
	env6 = Env{
		Networks: NetworksOf(netip.MustParsePrefix("fc00::/48")),
		Subnets:  Subnets{IPv6: netip.MustParsePrefix("fc00:0:0:22::/64")},
		MTU:      1430, IPMasq: true,
	}
)

func TestEnv(t *testing.T) {
	for name, e := range map[string]Env{"ipv4.env": env4, "two.env": envTwo, "dual.env": envDual, "ipv6.env": env6} {
		golden := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(golden, e.Format(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(e.Format()); got != string(want) {
			t.Errorf("%s:\n%swant:\n%s", name, got, want)
		}
		if got, err := ReadEnv(golden); err != nil || !got.Equal(e) {
			t.Errorf("%s reads as %+v, %v", name, got, err)
		}
	}
}

// A subnet file that another program wrote may have other content.
func TestParseEnv(t *testing.T) {
	for _, c := range []struct {
		text string
		want Env
	}{
		{"", Env{}},
		{"FLANNEL_NETWORK=10.5.0.0/16\r\nFLANNEL_SUBNET=10.5.34.1/24\r\nFLANNEL_MTU=1450\r\nFLANNEL_IPMASQ=true\r\n", env4},
		{"FLANNEL_NETWORK=10.4.0.0/16,10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n", envTwo},
		{"FLANNEL_IPMASQ=true", Env{IPMasq: true}},
		{"FLANNEL_IPMASQ=yes", Env{}},
		{"FLANNEL_IPMASQ=1", Env{}},
		{"FLANNEL_IPMASQ=", Env{}},
		{"# old\nFLANNEL_MTU=1472\n\nPATH=/bin\nrubbish\n  FLANNEL_IPMASQ=false", Env{MTU: 1472}},
	} {
		if got, err := ParseEnv([]byte(c.text)); err != nil || !got.Equal(c.want) {
			t.Errorf("%q: got %+v, %v", c.text, got, err)
		}
	}
}

// TestParseEnvFile: several networks, and what a CNI plugin would miss.
func TestParseEnvFile(t *testing.T) {
	for _, c := range []struct{ text, networks, missing string }{
		{"", "", "[FLANNEL_NETWORK FLANNEL_IPV6_NETWORK FLANNEL_SUBNET FLANNEL_IPV6_SUBNET FLANNEL_MTU FLANNEL_IPMASQ]"},
		{"FLANNEL_IPV6_NETWORK=fd04::/48,fd05::/48\nFLANNEL_NETWORK=10.6.0.0/16,10.5.0.0/16,10.6.0.1/16\n" +
			"FLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=0\nFLANNEL_IPMASQ=false\n",
			"10.6.0.0/16,10.5.0.0/16,fd04::/48,fd05::/48", "[]"},
		{"FLANNEL_NETWORK=10.6.0.0/16,10.5.0.0/16\nFLANNEL_NETWORK=10.7.0.0/16\nFLANNEL_IPV6_SUBNET=fd05::1/64\n",
			"10.7.0.0/16", "[FLANNEL_IPV6_NETWORK FLANNEL_MTU FLANNEL_IPMASQ]"},
	} {
		f, err := ParseEnvFile([]byte(c.text))
		if err != nil {
			t.Errorf("%q: %v", c.text, err)
		}
		got := []string{f.Networks.String(), fmt.Sprint(f.Missing)}
		if want := []string{c.networks, c.missing}; !slices.Equal(got, want) {
			t.Errorf("%q:\n got %q\nwant %q", c.text, got, want)
		}
	}
}

func TestParseEnvErrors(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1\n",
			`line 2: FLANNEL_SUBNET: netip.ParsePrefix("10.5.34.1"): no '/'`},
		{"FLANNEL_SUBNET=", `line 1: FLANNEL_SUBNET: netip.ParsePrefix(""): no '/'`},
		{"FLANNEL_SUBNET=fc00:0:0:22::1/64", `line 1: FLANNEL_SUBNET: fc00:0:0:22::1/64 is of the wrong address family`},
		{"FLANNEL_IPV6_SUBNET=10.5.34.1/24", `line 1: FLANNEL_IPV6_SUBNET: 10.5.34.1/24 is of the wrong address family`},
		{"FLANNEL_IPV6_NETWORK=::ffff:10.5.0.0/112",
			`line 1: FLANNEL_IPV6_NETWORK: ::ffff:10.5.0.0/112 is of the wrong address family`},
		{"FLANNEL_NETWORK=10.5.0.0/16,", `line 1: FLANNEL_NETWORK: netip.ParsePrefix(""): no '/'`},
		{"FLANNEL_NETWORK=10.5.0.0/16,fc00::/48", `line 1: FLANNEL_NETWORK: fc00::/48 is of the wrong address family`},
		{"FLANNEL_MTU=-1", `line 1: FLANNEL_MTU: -1 is less than 0`},
		{"FLANNEL_MTU=many", `line 1: FLANNEL_MTU: strconv.Atoi: parsing "many": invalid syntax`},
		{"FLANNEL_MTU=1\x1b[2J\u009b", `line 1: FLANNEL_MTU: strconv.Atoi: parsing "1\x1b[2J\u009b": invalid syntax`},
		{"FLANNEL_MTU=" + strings.Repeat("x", 60000),
			`line 1: FLANNEL_MTU: strconv.Atoi: parsing "` + strings.Repeat("x", 200-len(`strconv.Atoi: parsing "`)) + "…"},
	} {
		got, err := ParseEnv([]byte(c.text))
		if err == nil {
			t.Errorf("%q: no error, but %+v", c.text, got)
		} else if err.Error() != c.want {
			t.Errorf("%q:\n got %s\nwant %s", c.text, err, c.want)
		}
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "flannel", "subnet.env")
	if _, err := ReadEnv(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := env4.WriteFile(path); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadEnv(path); err != nil || !got.Equal(env4) {
		t.Errorf("read %+v, %v", got, err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}

	// The same again leaves the file alone, another replaces it.
	old := time.Unix(1, 0)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	if err := env4.WriteFile(path); err != nil {
		t.Fatal(err)
	}
	if info, err = os.Stat(path); err != nil || !info.ModTime().Equal(old) {
		t.Errorf("touched at %v, %v", info.ModTime(), err)
	}
	if err := env6.WriteFile(path); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadEnv(path); err != nil || !got.Equal(env6) {
		t.Errorf("read %+v, %v", got, err)
	}
	if now, err := os.Stat(path); err != nil || os.SameFile(now, info) {
		t.Errorf("the file was written in place, where a reader may see half of it; %v", err)
	}
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 1 {
		t.Errorf("left behind: %v, %v", files, err)
	}

	// A broken file is an error that names it, and can be written over.
	if err := os.WriteFile(path, []byte("FLANNEL_MTU=\x00\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadEnv(path); err == nil ||
		err.Error() != path+`: line 1: FLANNEL_MTU: strconv.Atoi: parsing "\x00": invalid syntax` {
		t.Errorf("broken file: %v", err)
	}
	if err := env4.WriteFile(path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// TestRestoreFile: lines that set other variables stay. A file without our lines stays the same file, since another
// program may have opened it for writing.
func TestRestoreFile(t *testing.T) {
	right := string(env4.Format())
	for _, c := range []struct {
		name, before, want string
		same               bool // the same file
	}{
		{"right", right, right, true},
		{"with other variables", "DOCKER_OPTS=\" --bip\"\n" + right, "DOCKER_OPTS=\" --bip\"\n" + right, true},
		{"emptied", "", right, true},
		{"other variables alone", "DOCKER_OPTS=x\nA=1\n", "DOCKER_OPTS=x\nA=1\n" + right, true},
		{"without a last newline", "DOCKER_OPTS=x", "DOCKER_OPTS=x\n" + right, true},
		{"a wrong line", strings.Replace(right, "1450", "1400", 1) + "DOCKER_OPTS=x\n", right + "DOCKER_OPTS=x\n", false},
		{"a missing line", strings.Replace(right, "FLANNEL_MTU=1450\n", "A=1\n# B=2\n", 1), right + "A=1\n", false},
		{"no values", "FLANNEL_MTU=\x00\nA=1\n", right, false},
		{"no assignments", "FLANNEL_MTU=1\n\x00=1\n=\n 2=3\n", right, false},
	} {
		path := filepath.Join(t.TempDir(), "subnet.env")
		if err := os.WriteFile(path, []byte(c.before), 0o644); err != nil {
			t.Fatal(err)
		}
		before, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := env4.RestoreFile(path); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		text, err := os.ReadFile(path)
		if err != nil || string(text) != c.want {
			t.Errorf("%s: %v\n%s\nwant\n%s", c.name, err, text, c.want)
		}
		if after, err := os.Stat(path); err != nil || os.SameFile(before, after) != c.same {
			t.Errorf("%s: is the same file: %t, want %t; %v", c.name, !c.same, c.same, err)
		}
	}
	// What a symbolic link points to is not written to.
	dir := t.TempDir()
	path, other := filepath.Join(dir, "subnet.env"), filepath.Join(dir, "other")
	if err := errors.Join(os.WriteFile(other, nil, 0o644), os.Symlink(other, path), env4.RestoreFile(path)); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(other); err != nil || len(text) > 0 {
		t.Errorf("the other file: %q, %v", text, err)
	}
	if got, err := ReadEnv(path); err != nil || !got.Equal(env4) {
		t.Errorf("read %+v, %v", got, err)
	}
	// The file's directory is created.
	path = filepath.Join(dir, "run", "subnet.env")
	if err := env4.RestoreFile(path); err != nil {
		t.Error(err)
	}
}

func FuzzEnv(f *testing.F) {
	for _, e := range []Env{env4, envDual, envTwo, env6} {
		f.Add(e.Format())
	}
	f.Add([]byte("FLANNEL_SUBNET=255.255.255.255/32\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		e, err := ParseEnv(text)
		if err != nil {
			return
		}
		for _, f := range []struct {
			networks *[]netip.Prefix
			subnet   netip.Prefix
			longest  int
		}{{&e.Networks.IPv4, e.Subnets.IPv4, 30}, {&e.Networks.IPv6, e.Subnets.IPv6, 126}} {
			switch {
			case f.subnet.IsValid() && len(*f.networks) == 0, f.subnet.Bits() > f.longest:
				return // no lease is like that
			case !f.subnet.IsValid():
				*f.networks = nil // is not written
			}
		}
		if again, err := ParseEnv(e.Format()); err != nil || !again.Equal(e) {
			t.Errorf("%q:\n read %+v\nagain %+v, %v", text, e, again, err)
		}
	})
}
