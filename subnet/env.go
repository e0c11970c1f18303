package subnet

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/atomicfile"
	"github.com/flanneld/flanneld/pkg/plain"
)

// Env is the content of subnet.env, from which CNI plugins, Docker and scripts learn this node's subnet.
type Env struct {
	Networks Networks // the whole networks, without repetitions
	Subnets  Subnets  // this node's
	MTU      int      // for pods, in bytes
	IPMasq   bool     // traffic that leaves the network is masqueraded by us
}

// Equal tells whether both are the same.
func (e Env) Equal(o Env) bool {
	return e.Networks.Equal(o.Networks) && e.Subnets == o.Subnets && e.MTU == o.MTU && e.IPMasq == o.IPMasq
}

// Format returns the file's text. Several networks of a family are separated by commas, as flannel's CNI plugin takes
// them. A subnet is written with the address that the node's bridge takes, which is its first
// one: 10.5.34.1/24.
func (e Env) Format() []byte {
	var b bytes.Buffer
	for _, f := range []struct {
		infix    string
		networks []netip.Prefix
		subnet   netip.Prefix
	}{
		{"", e.Networks.IPv4, e.Subnets.IPv4},
		{"IPV6_", e.Networks.IPv6, e.Subnets.IPv6},
	} {
		if !f.subnet.IsValid() {
			continue
		}
		fmt.Fprintf(&b, "FLANNEL_%sNETWORK=%s\n", f.infix, Networks{IPv4: f.networks})
		fmt.Fprintf(&b, "FLANNEL_%sSUBNET=%s/%d\n", f.infix, f.subnet.Addr().Next(), f.subnet.Bits())
	}
	fmt.Fprintf(&b, "FLANNEL_MTU=%d\nFLANNEL_IPMASQ=%t\n", e.MTU, e.IPMasq)
	return b.Bytes()
}

// An EnvFile is subnet.env as another program may have written it.
type EnvFile struct {
	Env
	Missing []string // names of variables that a CNI plugin needs and that are not there
	Others  []string // lines that set other variables, such as Docker's options
}

// Has reports whether the file has what WriteFile writes, beside lines that set other variables.
func (f EnvFile) Has(e Env) bool { return f.Equal(e) && len(f.Missing) == 0 }

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// ParseEnv is the inverse of Format. It skips lines that it does not know.
func ParseEnv(text []byte) (Env, error) {
	f, err := ParseEnvFile(text)
	return f.Env, err
}

// ParseEnvFile parses the text of a subnet file. It skips lines that it does not know.
func ParseEnvFile(text []byte) (EnvFile, error) {
	var e Env
	var others []string
	found := map[string]bool{}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			continue
		}
		var err error
		switch key {
		case "FLANNEL_NETWORK":
			e.Networks.IPv4, err = envPrefixes(value, netip.Addr.Is4)
		case "FLANNEL_SUBNET":
			e.Subnets.IPv4, err = envPrefix(value, netip.Addr.Is4)
		case "FLANNEL_IPV6_NETWORK":
			e.Networks.IPv6, err = envPrefixes(value, isIPv6)
		case "FLANNEL_IPV6_SUBNET":
			e.Subnets.IPv6, err = envPrefix(value, isIPv6)
		case "FLANNEL_MTU":
			if e.MTU, err = strconv.Atoi(value); e.MTU < 0 {
				err = fmt.Errorf("%d is less than 0", e.MTU)
			}
		case "FLANNEL_IPMASQ":
			e.IPMasq = value == "true" // as flannel's plugin reads it
		default:
			if variableName.MatchString(key) {
				others = append(others, line)
			}
		}
		if err != nil {
			return EnvFile{}, fmt.Errorf("line %d: %s: %s", n, key, plain.Text(err.Error()))
		}
		found[key] = true
	}
	f := EnvFile{Env: e, Others: others}
	const network4, network6, subnet4, subnet6 = "FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK", "FLANNEL_SUBNET",
		"FLANNEL_IPV6_SUBNET"
	need := func(names ...string) {
		if !slices.ContainsFunc(names, func(name string) bool { return found[name] }) {
			f.Missing = append(f.Missing, names...)
		}
	}
	switch {
	case found[subnet4] && found[network6]:
		need(network4)
	case found[subnet6] && found[network4]:
		need(network6)
	default:
		need(network4, network6)
	}
	need(subnet4, subnet6)
	need("FLANNEL_MTU")
	need("FLANNEL_IPMASQ")
	return f, lines.Err()
}

// envPrefixes parses networks that are separated by commas.
func envPrefixes(text string, family func(netip.Addr) bool) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for part := range strings.SplitSeq(text, ",") {
		p, err := envPrefix(part, family)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out, nil
}

func envPrefix(text string, family func(netip.Addr) bool) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return p, err
	}
	if !family(p.Addr()) {
		return netip.Prefix{}, fmt.Errorf("%s is of the wrong address family", p)
	}
	return p.Masked(), nil
}

// WriteFile replaces the file atomically, with mode 0644, and creates its directory where needed. A file that already
// has this content is left alone.
func (e Env) WriteFile(path string) error {
	text := e.Format()
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, text) {
		return nil
	}
	return replaceFile(path, text)
}

// RestoreFile is WriteFile for a file in which another program may have written variables for this subnet, and which it
// may be writing now: RestoreFile keeps the lines that set other variables. mk-docker-opts.sh, with this file as its
// output, empties the file and then opens it for each of Docker's options. A file that has nothing of an Env therefore
// stays the same file, and gets the missing lines at its end.
func (e Env) RestoreFile(path string) error {
	text := e.Format()
	old, err := os.ReadFile(path)
	if err != nil {
		return replaceFile(path, text)
	}
	f, err := ParseEnvFile(old)
	switch {
	case err != nil:
	case f.Has(e):
		return nil
	case f.Equal(Env{}):
		if len(old) > 0 && !bytes.HasSuffix(old, []byte("\n")) {
			text = append([]byte("\n"), text...)
		}
		if appendTo(path, text) == nil {
			return nil
		}
	}
	for _, line := range f.Others {
		text = append(text, line+"\n"...)
	}
	return replaceFile(path, text)
}

// appendTo writes a text to the end of a file that exists.
func appendTo(path string, text []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	return errors.Join(err, file.Close())
}

// replaceFile writes a file, and creates its directory where needed.
func replaceFile(path string, text []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("subnet file: %w", err)
	}
	if err := atomicfile.Write(path, text, 0o644); err != nil {
		return fmt.Errorf("subnet file: %w", err)
	}
	return nil
}

// ReadEnv reads the file that WriteFile, or flannel, wrote.
func ReadEnv(path string) (Env, error) {
	f, err := ReadEnvFile(path)
	return f.Env, err
}

// ReadEnvFile reads a subnet file.
func ReadEnvFile(path string) (EnvFile, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return EnvFile{}, err
	}
	f, err := ParseEnvFile(text)
	if err != nil {
		return EnvFile{}, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}
