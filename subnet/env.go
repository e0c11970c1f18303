package subnet

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/flanneld/flanneld/pkg/atomicfile"
	"github.com/flanneld/flanneld/pkg/plain"
)

// Env is the content of subnet.env, from which CNI plugins, Docker and scripts learn this node's subnet.
type Env struct {
	Networks Subnets // the whole networks
	Subnets  Subnets // this node's
	MTU      int     // for pods, in bytes
	IPMasq   bool    // traffic that leaves the network is masqueraded by us
}

// Format returns the file's text. A subnet is written with the address that the node's bridge takes, which is its first
// one: 10.5.34.1/24.
func (e Env) Format() []byte {
	var b bytes.Buffer
	for _, f := range []struct {
		infix           string
		network, subnet netip.Prefix
	}{
		{"", e.Networks.IPv4, e.Subnets.IPv4},
		{"IPV6_", e.Networks.IPv6, e.Subnets.IPv6},
	} {
		if !f.subnet.IsValid() {
			continue
		}
		fmt.Fprintf(&b, "FLANNEL_%sNETWORK=%s\n", f.infix, f.network)
		fmt.Fprintf(&b, "FLANNEL_%sSUBNET=%s/%d\n", f.infix, f.subnet.Addr().Next(), f.subnet.Bits())
	}
	fmt.Fprintf(&b, "FLANNEL_MTU=%d\nFLANNEL_IPMASQ=%t\n", e.MTU, e.IPMasq)
	return b.Bytes()
}

// ParseEnv is the inverse of Format. It skips lines that it does not know.
func ParseEnv(text []byte) (Env, error) {
	var e Env
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		key, value, ok := strings.Cut(strings.TrimSpace(lines.Text()), "=")
		if !ok {
			continue
		}
		var err error
		switch key {
		case "FLANNEL_NETWORK":
			e.Networks.IPv4, err = envPrefix(value, netip.Addr.Is4)
		case "FLANNEL_SUBNET":
			e.Subnets.IPv4, err = envPrefix(value, netip.Addr.Is4)
		case "FLANNEL_IPV6_NETWORK":
			e.Networks.IPv6, err = envPrefix(value, isIPv6)
		case "FLANNEL_IPV6_SUBNET":
			e.Subnets.IPv6, err = envPrefix(value, isIPv6)
		case "FLANNEL_MTU":
			e.MTU, err = strconv.Atoi(value)
		case "FLANNEL_IPMASQ":
			e.IPMasq, err = strconv.ParseBool(value)
		}
		if err != nil {
			return Env{}, fmt.Errorf("line %d: %s: %s", n, key, plain.Text(err.Error()))
		}
	}
	return e, lines.Err()
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
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("subnet file: %w", err)
	}
	if err := atomicfile.Write(path, text, 0o644); err != nil {
		return fmt.Errorf("subnet file: %w", err)
	}
	return nil
}

// ReadEnv reads the file that WriteFile, or upstream, wrote.
func ReadEnv(path string) (Env, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Env{}, err
	}
	e, err := ParseEnv(text)
	if err != nil {
		return Env{}, fmt.Errorf("%s: %w", path, err)
	}
	return e, nil
}
