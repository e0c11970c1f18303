package subnet

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/pkg/plain"
)

// Config is the network's configuration, the same for all nodes but for Obstacles.
type Config struct {
	IPv4, IPv6         Pool
	NonMasqueradeCIDRs []netip.Prefix  // destinations outside the networks that see pods' own addresses
	EnableNFTables     bool            // rules go to nftables instead of iptables
	BackendType        string          // Backend's Type in lower case; "udp" where there is no Backend
	Backend            json.RawMessage // the whole Backend object; nil where there is none

	// Obstacles are parts of the networks that this host uses for something else: see Around.
	Obstacles []Obstacle

	// Warnings are remarks on a configuration that works, such as unknown keys, one line each.
	Warnings []string
}

// Each returns the pools of the families that are on, IPv4 first.
func (c *Config) Each() []Pool {
	var on []Pool
	for _, p := range c.Pools().Each() {
		if p.Enabled() {
			on = append(on, p)
		}
	}
	return on
}

// Networks returns the networks of each family, those that are retired too.
func (c *Config) Networks() Networks { return Networks{c.IPv4.Networks(), c.IPv6.Networks()} }

// Fits tells whether this node may have the subnets under this configuration: one of each family that is on, and none
// of any other, which no obstacle hinders.
func (c *Config) Fits(s Subnets) bool {
	_, hindered := c.Hinders(s)
	return !hindered && c.IPv4.Fits(s.IPv4) && c.IPv6.Fits(s.IPv6)
}

// configJSON is the document as operators write it. make docs copies the comments of the keys to
// Documentation/configuration.md.
type configJSON struct {
	// pods have IPv4 addresses
	EnableIPv4 bool

	// the IPv4 network that nodes' subnets are taken from; /28 is the smallest
	Network string

	// prefix length of a node's subnet: the network's + 2 at least, 30 at most
	SubnetLen int `default:"24, or the network's length + 2 past /22"`

	// base of the first subnet handed out
	SubnetMin string `default:"the second subnet"`

	// base of the last subnet handed out
	SubnetMax string `default:"the last subnet"`

	// pods have IPv6 addresses
	EnableIPv6 bool

	// as `Network`; /124 is the smallest
	IPv6Network string

	// as `SubnetLen`; 126 at most
	IPv6SubnetLen int `default:"64, or the network's length + 2 past /62"`

	// as `SubnetMin`, `SubnetMax`
	IPv6SubnetMin, IPv6SubnetMax string `default:"the second, the last"`

	// more networks, of both families, in a list: `["10.6.0.0/16"]`. Subnets are taken from them when those before are full
	Networks []string

	// destinations that see pods' own addresses in spite of `--ip-masq`, in a list: `["172.16.0.0/12"]`
	NonMasqueradeCIDRs []string

	// rules go to nftables rather than iptables
	EnableNFTables bool

	// how packets travel: `Type`, and the [backend's](backends.md) own keys
	Backend json.RawMessage `default:"{\"Type\": \"udp\"}"`
}

// defaults are the keys' values where they are left out.
var defaults = configJSON{EnableIPv4: true}

// familyRules is what the rules for IPv4 and IPv6 differ in.
type familyRules struct {
	name       string
	prefix     string // of the keys: "" or "IPv6"
	is         func(netip.Addr) bool
	defaultLen int // the usual length of a subnet
	maxLen     int // the longest: two addresses for hosts must remain
	example    string
}

var (
	familyIPv4 = familyRules{"IPv4", "", netip.Addr.Is4, 24, 30, "10.5.0.0/16"}
	familyIPv6 = familyRules{"IPv6", "IPv6", isIPv6, 64, 126, "fd00:5::/48"}
)

// network parses one of a family's networks. In messages, key is what the text is the value of.
func (f familyRules) network(key, text string) (netip.Prefix, error) {
	n, err := netip.ParsePrefix(text)
	if err != nil || !f.is(n.Addr()) || n.Bits() == 0 {
		return n, fmt.Errorf("%s %s is not an %s network such as %s", key, plain.Quote(text), f.name, f.example)
	}
	return n, nil
}

// isIPv6 excludes addresses that are IPv6 in form only: IPv4-mapped addresses, and addresses with a zone, which are
// valid on one link alone.
func isIPv6(a netip.Addr) bool { return a.Is6() && !a.Is4In6() && a.Zone() == "" }

// ParseConfig reads the configuration, a JSON object. Its errors name the key, the value and what is allowed. Divide
// checks how the networks are divided into subnets.
func ParseConfig(data []byte) (*Config, error) {
	doc := defaults
	unknown, err := Decode(data, &doc)
	if err != nil {
		return nil, err
	}
	c := &Config{EnableNFTables: doc.EnableNFTables}
	for _, key := range unknown {
		c.Warnings = append(c.Warnings,
			fmt.Sprintf("unknown key %s is ignored: known are %s", plain.Quote(key), strings.Join(Keys(&doc), ", ")))
	}
	if !doc.EnableIPv4 && !doc.EnableIPv6 {
		return nil, errors.New("EnableIPv4 and EnableIPv6 are both false: at least one must be true")
	}
	for _, f := range []struct {
		familyRules
		on                bool
		network, min, max string
		len               int
		pool              *Pool
	}{
		{familyIPv4, doc.EnableIPv4, doc.Network, doc.SubnetMin, doc.SubnetMax, doc.SubnetLen, &c.IPv4},
		{familyIPv6, doc.EnableIPv6, doc.IPv6Network, doc.IPv6SubnetMin, doc.IPv6SubnetMax, doc.IPv6SubnetLen, &c.IPv6},
	} {
		if !f.on {
			if f.network != "" && !strings.HasSuffix(f.network, "/0") { // 0.0.0.0/0 and ::/0 are for "none"
				c.Warnings = append(c.Warnings,
					fmt.Sprintf("%sNetwork %s is ignored: Enable%s is false", f.prefix, plain.Quote(f.network), f.name))
			}
			continue
		}
		if f.network == "" {
			return nil, fmt.Errorf("%sNetwork is missing: an %s network such as %s", f.prefix, f.name, f.example)
		}
		n, err := f.familyRules.network(f.prefix+"Network", f.network)
		if err != nil {
			return nil, err
		}
		if n != n.Masked() {
			c.Warnings = append(c.Warnings, fmt.Sprintf("%sNetwork %s is taken as %s", f.prefix, n, n.Masked()))
		}
		first := Range{Network: n.Masked()}
		for _, bound := range []struct {
			key, text string
			addr      *netip.Addr
		}{{"SubnetMin", f.min, &first.Min}, {"SubnetMax", f.max, &first.Max}} {
			if bound.text == "" {
				continue
			}
			a, err := netip.ParseAddr(bound.text)
			if err != nil || !f.is(a) {
				return nil, fmt.Errorf("%s%s %s is not an %s address", f.prefix, bound.key, plain.Quote(bound.text), f.name)
			}
			if !a.IsUnspecified() { // which upstream takes for "not set"
				*bound.addr = a
			}
		}
		*f.pool = Pool{Ranges: []Range{first}, SubnetLen: f.len}
	}
	if err := c.addNetworks(doc.Networks); err != nil {
		return nil, err
	}
	if err := c.addNonMasqueradeCIDRs(doc.NonMasqueradeCIDRs); err != nil {
		return nil, err
	}
	if c.BackendType, err = backendType(doc.Backend); err != nil {
		return nil, err
	}
	c.Backend = present(doc.Backend)
	return c, nil
}

// addNetworks adds the networks of the key Networks.
func (c *Config) addNetworks(texts []string) error {
	for _, text := range texts {
		f, pool := familyIPv4, &c.IPv4
		if strings.Contains(text, ":") {
			f, pool = familyIPv6, &c.IPv6
		}
		n, err := f.network("Networks", text)
		if err != nil {
			return err
		}
		if !pool.Enabled() {
			c.Warnings = append(c.Warnings, fmt.Sprintf("Networks %s is ignored: Enable%s is false", n, f.name))
			continue
		}
		if n != n.Masked() {
			c.Warnings = append(c.Warnings, fmt.Sprintf("Networks %s is taken as %s", n, n.Masked()))
		}
		for _, r := range pool.Ranges {
			if r.Network.Overlaps(n) {
				return fmt.Errorf("Networks %s overlaps %s: each network must be apart from the others", n, r.Network)
			}
		}
		pool.Ranges = append(pool.Ranges, Range{Network: n.Masked()})
	}
	return nil
}

// addNonMasqueradeCIDRs takes the key NonMasqueradeCIDRs.
func (c *Config) addNonMasqueradeCIDRs(texts []string) error {
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil || !p.Addr().Is4() && !isIPv6(p.Addr()) {
			return fmt.Errorf("NonMasqueradeCIDRs %s is not a prefix such as 172.16.0.0/12 or fd00::/8", plain.Quote(text))
		}
		if p != p.Masked() {
			c.Warnings = append(c.Warnings, fmt.Sprintf("NonMasqueradeCIDRs %s is taken as %s", p, p.Masked()))
		}
		if p = p.Masked(); !slices.Contains(c.NonMasqueradeCIDRs, p) {
			c.NonMasqueradeCIDRs = append(c.NonMasqueradeCIDRs, p)
		}
	}
	return nil
}

func backendType(backend json.RawMessage) (string, error) {
	if present(backend) == nil {
		return "udp", nil
	}
	var b struct{ Type string }
	if _, err := Decode(backend, &b); err != nil {
		return "", fmt.Errorf("Backend: %w", err)
	}
	if b.Type == "" {
		return "", errors.New(`Backend has no Type: {"Type": "vxlan"}, for example`)
	}
	return strings.ToLower(b.Type), nil // as flannel does
}

// Divide checks how the networks are divided into subnets, and fills in what the configuration leaves open. It is for
// managers that choose subnets themselves: where the store assigns subnets, SubnetLen, SubnetMin and SubnetMax have no
// effect.
func (c *Config) Divide() error {
	if c.IPv4.Enabled() {
		if err := c.IPv4.divide(familyIPv4); err != nil {
			return err
		}
	}
	if c.IPv6.Enabled() {
		return c.IPv6.divide(familyIPv6)
	}
	return nil
}

// fourSubnets is how many bits a subnet is longer than its network, at least. The first subnet is not handed out, since its
// base is the network's own address.
const fourSubnets = 2

func (p *Pool) divide(f familyRules) error {
	if p.SubnetLen == 0 {
		p.SubnetLen = min(f.maxLen, max(f.defaultLen, p.Ranges[0].Network.Bits()+fourSubnets))
	}
	for i := range p.Ranges {
		key := f.prefix + "Network"
		if i > 0 {
			key = "Networks"
		}
		if err := p.Ranges[i].divide(f, key, p.SubnetLen); err != nil {
			return err
		}
	}
	p.divided = true
	return nil
}

// divide divides one network. The key is that of the network.
func (r *Range) divide(f familyRules, key string, subnetLen int) error {
	shortest := r.Network.Bits() + fourSubnets
	switch {
	case shortest > f.maxLen:
		return fmt.Errorf("%s %s is too small: /%d is the longest that can be divided", key, r.Network, f.maxLen-2)
	case subnetLen < shortest || subnetLen > f.maxLen:
		return fmt.Errorf("%sSubnetLen %d does not suit %s %s: %d to %d are allowed",
			f.prefix, subnetLen, key, r.Network, shortest, f.maxLen)
	}
	if !r.Min.IsValid() {
		r.Min = last(netip.PrefixFrom(r.Network.Addr(), subnetLen)).Next()
	}
	if !r.Max.IsValid() {
		r.Max = netip.PrefixFrom(last(r.Network), subnetLen).Masked().Addr()
	}
	for _, bound := range []struct {
		key  string
		addr netip.Addr
	}{{"SubnetMin", r.Min}, {"SubnetMax", r.Max}} {
		if !r.Network.Contains(bound.addr) {
			return fmt.Errorf("%s%s %s is outside %s %s", f.prefix, bound.key, bound.addr, key, r.Network)
		}
		if s := netip.PrefixFrom(bound.addr, subnetLen).Masked(); s.Addr() != bound.addr {
			return fmt.Errorf("%s%s %s is not the base of a /%d subnet: should it be %s?",
				f.prefix, bound.key, bound.addr, subnetLen, s.Addr())
		}
	}
	if r.Max.Less(r.Min) {
		return fmt.Errorf("%sSubnetMin %s is above %sSubnetMax %s", f.prefix, r.Min, f.prefix, r.Max)
	}
	return nil
}

// Decode reads a JSON object into the struct that into points to. It returns the object's keys that the struct does not
// have, sorted. Its errors are for the person who wrote the document. As in encoding/json, the case of a key does not
// matter.
func Decode(data []byte, into any) (unknown []string, err error) {
	if err := json.Unmarshal(data, into); err != nil {
		var syntax *json.SyntaxError
		var mismatch *json.UnmarshalTypeError
		switch {
		case errors.As(err, &syntax):
			before := data[:min(syntax.Offset, int64(len(data)))]
			line := 1 + bytes.Count(before, []byte("\n"))
			column := len(before) - 1 - bytes.LastIndexByte(before, '\n')
			return nil, fmt.Errorf("not valid JSON at line %d, column %d: %w", line, column, err)
		case errors.As(err, &mismatch) && mismatch.Field != "":
			return nil, fmt.Errorf("%s: got a %s, want %s", mismatch.Field, plain.Text(mismatch.Value), kind(mismatch.Type))
		case errors.As(err, &mismatch):
			return nil, fmt.Errorf("got a %s, want an object {…}", plain.Text(mismatch.Value))
		}
		return nil, err
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(data, &object); err != nil {
		return nil, err
	}
	if object == nil {
		return nil, errors.New("got null, want an object {…}")
	}
	known := Keys(into)
	for _, key := range slices.Sorted(maps.Keys(object)) {
		if !slices.ContainsFunc(known, func(k string) bool { return strings.EqualFold(k, key) }) {
			unknown = append(unknown, key)
		}
	}
	return unknown, nil
}

// Keys returns the names of the keys that Decode knows for a struct.
func Keys(into any) []string {
	var names []string
	for _, f := range reflect.VisibleFields(reflect.TypeOf(into).Elem()) {
		names = append(names, f.Name)
	}
	return names
}

func kind(t reflect.Type) string {
	if reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
		return "a string"
	}
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a text in quotes"
	case reflect.Int:
		return "a whole number"
	case reflect.Slice:
		return "a list of texts in quotes"
	}
	return t.String()
}
