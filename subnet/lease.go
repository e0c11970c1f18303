// Package subnet, which other programs may import, holds what nodes agree on: the network's configuration, the leases
// that give each node its subnet, and subnet.env, the file by which the rest of the node learns its subnet.
package subnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/flanneld/flanneld/pkg/plain"
)

// Subnets are the subnets that one lease grants. They identify the lease. The Prefix of an address family that is off
// is zero.
type Subnets struct {
	IPv4, IPv6 netip.Prefix
}

// Each returns the subnets of the families that are on, IPv4 first.
func (s Subnets) Each() []netip.Prefix { return valid(s.IPv4, s.IPv6) }

// String returns "10.5.34.0/24" or "10.5.34.0/24,fc00:0:0:22::/64".
func (s Subnets) String() string {
	var parts []string
	for _, p := range s.Each() {
		parts = append(parts, p.String())
	}
	return strings.Join(parts, ",")
}

// A Lease gives a node its subnets, and holds what the node publishes for its peers.
type Lease struct {
	Subnets
	Attrs   Attrs
	Expires time.Time // zero: never

	// Created orders leases by age: the older of two has the smaller number. It is the store's, such as a revision of
	// etcd or seconds, so that two leases may have the same. Only leases that Manager.Watch sends have it.
	Created int64
}

// Attrs are what a node publishes with its lease. Their JSON is the value of the lease's record in etcd, the same as
// upstream's.
type Attrs struct {
	PublicIP      netip.Addr // invalid where IPv4 is off; "0.0.0.0" in JSON
	PublicIPv6    netip.Addr // invalid where IPv6 is off; null in JSON
	BackendType   string
	BackendData   json.RawMessage // the backend's own, for IPv4
	BackendV6Data json.RawMessage // the same for IPv6
}

// PublicIPs returns the public addresses of the families that are on, IPv4 first.
func (a Attrs) PublicIPs() []netip.Addr {
	var ips []netip.Addr
	for _, ip := range []netip.Addr{a.PublicIP, a.PublicIPv6} {
		if ip.IsValid() {
			ips = append(ips, ip)
		}
	}
	return ips
}

// Equal tells whether a and b are the same. Backend data is compared byte for byte.
func (a Attrs) Equal(b Attrs) bool {
	return a.PublicIP == b.PublicIP && a.PublicIPv6 == b.PublicIPv6 && a.BackendType == b.BackendType &&
		string(a.BackendData) == string(b.BackendData) && string(a.BackendV6Data) == string(b.BackendV6Data)
}

const (
	// MaxData is how large backend data may be, in bytes, unless LimitData allows more. The data of most backends have
	// less than 100 bytes.
	MaxData = 4 << 10

	// maxType is the length of the longest name of a backend, in bytes.
	maxType = 64
)

// dataLimits are how large backend data may be, in bytes, by the backend's name, where this is not MaxData.
var dataLimits = map[string]int{}

// LimitData sets how large the data of a type of backend may be, in bytes. Data of more than MaxData bytes must be one
// text in quotes. LimitData is called from init.
func LimitData(backendType string, bytes int) { dataLimits[backendType] = bytes }

// sharing are the types of backends whose nodes may share a public address.
var sharing = map[string]bool{}

// ShareAddresses lets nodes with a type of backend have the same public address. It is called from init.
func ShareAddresses(backendType string) { sharing[backendType] = true }

// SharesAddresses reports whether other nodes may have the public addresses, too, as behind NAT: the backend does not
// know nodes by them.
func (a Attrs) SharesAddresses() bool { return sharing[a.BackendType] }

// maxRecord returns the size of the largest record that is read, in bytes: two large data, and as much as small data
// for the rest.
func maxRecord() int {
	largest := MaxData
	for _, limit := range dataLimits {
		largest = max(largest, limit)
	}
	return 2*largest + MaxData
}

// ParseAttrs reads a record: the JSON of Attrs. It does not look into a record that is too large. The text of its
// errors is fit to be shown.
func ParseAttrs(record []byte) (Attrs, error) {
	if most := maxRecord(); len(record) > most {
		return Attrs{}, fmt.Errorf("the record has %d bytes: more than %d are not read", len(record), most)
	}
	var a Attrs
	if err := json.Unmarshal(record, &a); err != nil {
		return Attrs{}, errors.New(plain.Text(err.Error()))
	}
	return a, nil
}

// CheckSize returns an error if the backend data, or the name of the backend, are too large to be read.
func (a Attrs) CheckSize() error {
	if len(a.BackendType) > maxType {
		return fmt.Errorf("the backend's name has %d bytes: more than %d are not read", len(a.BackendType), maxType)
	}
	for _, data := range []json.RawMessage{a.BackendData, a.BackendV6Data} {
		most := max(MaxData, dataLimits[a.BackendType])
		switch {
		case len(data) > most:
			return fmt.Errorf("the backend data have %d bytes: more than %d are not read", len(data), most)
		case len(data) > MaxData && data[0] != '"': // JSON may be nested deeper than a reader of the status can read
			return fmt.Errorf("the backend data have %d bytes: more than %d are not read, unless they are a text in quotes",
				len(data), MaxData)
		}
	}
	return nil
}

// record is the wire form of Attrs.
type record struct {
	PublicIP      string
	PublicIPv6    *string
	BackendType   string          `json:",omitempty"`
	BackendData   json.RawMessage `json:",omitempty"`
	BackendV6Data json.RawMessage `json:",omitempty"`
}

// MarshalJSON writes the one-line record that upstream writes.
func (a Attrs) MarshalJSON() ([]byte, error) {
	r := record{
		PublicIP:      netip.IPv4Unspecified().String(),
		BackendType:   a.BackendType,
		BackendData:   a.BackendData,
		BackendV6Data: a.BackendV6Data,
	}
	if a.PublicIP.IsValid() {
		r.PublicIP = a.PublicIP.String()
	}
	if a.PublicIPv6.IsValid() {
		v6 := a.PublicIPv6.String()
		r.PublicIPv6 = &v6
	}
	return json.Marshal(r)
}

// UnmarshalJSON reads a record. An address of the wrong family is an error, and so are data that are too large, and a
// record without an address: such a record cannot be used.
func (a *Attrs) UnmarshalJSON(data []byte) error {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return err
	}
	v6 := ""
	if r.PublicIPv6 != nil {
		v6 = *r.PublicIPv6
	}
	got := Attrs{BackendType: r.BackendType, BackendData: present(r.BackendData), BackendV6Data: present(r.BackendV6Data)}
	err := got.CheckSize()
	if err != nil {
		return err
	}
	if got.PublicIP, err = publicIP("PublicIP", r.PublicIP, familyIPv4); err != nil {
		return err
	}
	if got.PublicIPv6, err = publicIP("PublicIPv6", v6, familyIPv6); err != nil {
		return err
	}
	if len(got.PublicIPs()) == 0 {
		return fmt.Errorf("neither PublicIP nor PublicIPv6 is set")
	}
	*a = got
	return nil
}

// publicIP parses an address of a record; an empty or unspecified one means none.
func publicIP(key, text string, f familyRules) (netip.Addr, error) {
	if text == "" {
		return netip.Addr{}, nil
	}
	ip, err := netip.ParseAddr(text)
	if err != nil || !f.is(ip) {
		return netip.Addr{}, fmt.Errorf("%s %s is not an %s address", key, plain.Quote(text), f.name)
	}
	if ip.IsUnspecified() {
		return netip.Addr{}, nil
	}
	return ip, nil
}

// present maps JSON's null to nothing.
func present(m json.RawMessage) json.RawMessage {
	if string(m) == "null" {
		return nil
	}
	return m
}

// noIPv4 stands for the absent IPv4 half of a key, as upstream writes it.
const noIPv4 = "0.0.0.0-0"

// Key returns the last element of the lease's etcd key: "10.5.34.0-24",
// "10.5.34.0-24&fc00:0:0:22::-64" with both families, "0.0.0.0-0&fc00:0:0:22::-64"
// with IPv6 alone.
func (s Subnets) Key() string {
	key := noIPv4
	if s.IPv4.IsValid() {
		key = dashed(s.IPv4)
	}
	if s.IPv6.IsValid() {
		key += "&" + dashed(s.IPv6)
	}
	return key
}

func dashed(p netip.Prefix) string {
	return p.Addr().String() + "-" + strconv.Itoa(p.Bits())
}

var keyForm = regexp.MustCompile(`^([0-9.]+)-([0-9]+)(?:&([0-9a-fA-F:]+)-([0-9]+))?$`)

// ParseKey is the inverse of Key.
func ParseKey(key string) (Subnets, error) {
	m := keyForm.FindStringSubmatch(key)
	if m == nil {
		return Subnets{}, fmt.Errorf("%s is not of the form 10.5.34.0-24 or 10.5.34.0-24&fc00:0:0:22::-64", plain.Quote(key))
	}
	var s Subnets
	var err error
	if m[1]+"-"+m[2] != noIPv4 {
		if s.IPv4, err = subnetOf(m[1] + "/" + m[2]); err != nil {
			return Subnets{}, err
		}
	}
	if m[3] != "" {
		if s.IPv6, err = subnetOf(m[3] + "/" + m[4]); err != nil {
			return Subnets{}, err
		}
	}
	if len(s.Each()) == 0 {
		return Subnets{}, fmt.Errorf("%s names no subnet", plain.Quote(key))
	}
	return s, nil
}

// subnetOf parses a prefix that can be a node's subnet.
func subnetOf(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		return p, fmt.Errorf("%s is not a subnet", plain.Quote(text))
	case p.Bits() == 0 || p.Addr().Is4In6():
		return p, fmt.Errorf("%s cannot be a node's subnet", p)
	case p != p.Masked():
		return p, fmt.Errorf("%s has host bits set: should it be %s?", p, p.Masked())
	}
	return p, nil
}

// valid returns the prefixes that are not zero.
func valid(prefixes ...netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range prefixes {
		if p.IsValid() {
			out = append(out, p)
		}
	}
	return out
}
