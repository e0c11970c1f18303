package subnet

import (
	"encoding/json"
	"net/netip"

	"github.com/flanneld/flanneld/pkg/family"
)

// Of returns the subnet of one family.
func (s Subnets) Of(f family.Family) netip.Prefix { return family.Pair[netip.Prefix](s).Of(f) }

// PublicIPOf returns the public address of one family.
func (a Attrs) PublicIPOf(f family.Family) netip.Addr {
	return family.Pair[netip.Addr]{IPv4: a.PublicIP, IPv6: a.PublicIPv6}.Of(f)
}

// DataOf returns the backend data of one family.
func (a Attrs) DataOf(f family.Family) json.RawMessage {
	return family.Pair[json.RawMessage]{IPv4: a.BackendData, IPv6: a.BackendV6Data}.Of(f)
}

// SetData sets the backend data of one family.
func (a *Attrs) SetData(f family.Family, data json.RawMessage) {
	if f == family.IPv4 {
		a.BackendData = data
	} else {
		a.BackendV6Data = data
	}
}

// Pools returns both families' shares of the configuration.
func (c *Config) Pools() family.Pair[Pool] { return family.Pair[Pool]{IPv4: c.IPv4, IPv6: c.IPv6} }
