package etcd

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/subnet"
)

// String returns "drop 10.5.1.0-24, put {…} leased; CUTS", for example.
func (c *Change) String() string {
	var parts []string
	for _, r := range c.drop {
		parts = append(parts, "drop "+r.subnets.Key())
	}
	if c.put.value != nil {
		lease := ""
		if c.leased {
			lease = " leased"
		}
		parts = append(parts, fmt.Sprintf("put %s%s after %d", c.put.value, lease, c.put.changed))
	}
	if parts == nil {
		parts = []string{"nothing"}
	}
	return strings.Join(parts, ", ") + "; " + strings.Join(append(c.Cuts, c.Effect), "; ")
}

// TestLedger: what reserving and releasing change, whom that cuts off, and what is refused.
func TestLedger(t *testing.T) {
	const (
		four = `{"Network": "10.5.0.0/16"}`
		six  = `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}`
		dual = `{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}`

		taken = "10.5.9.0/24 is reserved for 198.18.0.1, which takes it when flanneld starts there the next time."
	)
	for _, c := range []struct {
		name, config, alive, records string
		reserve, release             string // subnets, and addresses
		want                         string // the change, or what the error has
	}{
		{name: "free", config: four, records: "10.5.1.0-24 198.18.0.2", reserve: "10.5.9.0/24 198.18.0.1",
			want: `put {"PublicIP":"198.18.0.1","Unused":true} after 0; ` + taken},
		{name: "free, IPv6", config: six, reserve: "fd00:5:0:9::/64 fd18::1",
			want: `put {"PublicIPv6":"fd18::1","Unused":true} after 0; fd00:5:0:9::/64 is reserved for fd18::1, which`},
		{name: "free, both", config: dual, reserve: "10.5.9.0/24,fd00:5:0:9::/64 198.18.0.1,fd18::1",
			want: `put {"PublicIP":"198.18.0.1","PublicIPv6":"fd18::1","Unused":true} after 0; 10.5.9.0/24,fd00:5:0:9::/64 is reserved`},
		{name: "its own lease", config: four, alive: "198.18.0.1 n1", records: "10.5.9.0-24 198.18.0.1",
			reserve: "10.5.9.0/24 198.18.0.1",
			want: `put {"PublicIP":"198.18.0.1","PublicIPv6":null} after 1; ` +
				"10.5.9.0/24, which 198.18.0.1 (n1) has, is reserved for it: the lease does not end any more."},
		{name: "it has another lease", config: four, records: "10.5.1.0-24 198.18.0.1", reserve: "10.5.9.0/24 198.18.0.1",
			want: `put {"PublicIP":"198.18.0.1","Unused":true} after 0; 198.18.0.1 has the lease of 10.5.1.0/24: when flanneld starts there ` +
				`the next time, the node takes 10.5.9.0/24, and its pods are cut off until they are started again; ` + taken},
		{name: "another node's lease", config: four, alive: "198.18.0.2 n2", records: "10.5.9.0-24 198.18.0.2",
			reserve: "10.5.9.0/24 198.18.0.1", want: `drop 10.5.9.0-24, put {"PublicIP":"198.18.0.1","Unused":true} after 1; ` +
				`198.18.0.2 (n2) has the lease of 10.5.9.0/24: it loses the subnet, and its pods are cut off until they are ` +
				`started again; ` + taken},
		{name: "other nodes' leases that overlap", config: dual,
			records: "10.5.9.0-24&fd00:5:0:1::-64 198.18.0.2\n10.5.1.0-24&fd00:5:0:9::-64 unreadable",
			reserve: "10.5.9.0/24,fd00:5:0:9::/64 198.18.0.1",
			want:    "drop 10.5.9.0-24&fd00:5:0:1::-64, drop 10.5.1.0-24&fd00:5:0:9::-64, put"},
		{name: "a host name that paints", config: four, alive: "198.18.0.2 \x1b[31m", records: "10.5.9.0-24 198.18.0.2",
			reserve: "10.5.9.0/24 198.18.0.1", want: `198.18.0.2 (\x1b[31m) has the lease`},
		{name: "reserved already", config: four, records: "10.5.9.0-24 198.18.0.1 reserved", reserve: "10.5.9.0/24 198.18.0.1",
			want: "nothing; 10.5.9.0/24 is reserved for 198.18.0.1 already."},
		{name: "reserved for another node", config: four, records: "10.5.9.0-24 198.18.0.2 reserved",
			reserve: "10.5.9.0/24 198.18.0.1",
			want:    "10.5.9.0/24 is reserved for 198.18.0.2: release it first (flannelctl leases release 10.5.9.0/24)"},
		{name: "another reservation", config: four, records: "10.5.1.0-24 198.18.0.1 reserved",
			reserve: "10.5.9.0/24 198.18.0.1", want: "10.5.1.0/24 is reserved for 198.18.0.1, and a node takes one reservation"},
		{name: "too long", config: four, reserve: "10.5.9.0/25 198.18.0.1", want: "10.5.9.0/25 is not what a node can have: " +
			"the configuration has /24 from 10.5.1.0 to 10.5.255.0"},
		{name: "one family of two", config: dual, reserve: "10.5.9.0/24 198.18.0.1", want: "10.5.9.0/24 is not what a node " +
			"can have: the configuration has /24 from 10.5.1.0 to 10.5.255.0, /64 from fd00:5:0:1:: to"},
		{name: "no IPv4 address", config: dual, reserve: "10.5.9.0/24,fd00:5:0:9::/64 fd18::1",
			want: "a node is known by its IPv4 address, since the network has IPv4: give that address, too"},
		{name: "no IPv6 in the network", config: four, reserve: "10.5.9.0/24 198.18.0.1,fd18::1",
			want: "fd18::1 is an IPv6 address, and the network has no IPv6"},
		{name: "inside itself", config: four, reserve: "10.5.9.0/24 10.5.9.7",
			want: "the public address 10.5.9.7 is in the subnet 10.5.9.0/24 itself"},

		{name: "release what is unused", config: four, records: "10.5.9.0-24 198.18.0.1 reserved", release: "10.5.9.0/24",
			want: "drop 10.5.9.0-24; 10.5.9.0/24 is free."},
		{name: "release what is unused, of a node that lives", config: four, alive: "198.18.0.1 n1",
			records: "10.5.1.0-24 198.18.0.1\n10.5.9.0-24 198.18.0.1 reserved", release: "10.5.9.0/24",
			want: "drop 10.5.9.0-24; 10.5.9.0/24 is free."},
		{name: "release what a node uses", config: four, alive: "198.18.0.1 n1", records: "10.5.9.0-24 198.18.0.1 used reserved",
			release: "10.5.9.0/24", want: `put {"PublicIP":"198.18.0.1","PublicIPv6":null,"BackendType":"vxlan"} leased after 1; ` +
				"10.5.9.0/24 is not reserved any more: 198.18.0.1 (n1) has it as a lease"},
		{name: "release what a node does not use any more", config: four, alive: "198.18.0.1 n1",
			records: "10.6.9.0-24 198.18.0.1 used reserved", release: "10.6.9.0/24",
			want: "drop 10.6.9.0-24; 198.18.0.1 (n1) has the reservation of 10.6.9.0/24: if the node still works"},
		{name: "release what may be used", config: four, records: "10.5.9.0-24 198.18.0.1 used reserved",
			release: "10.5.9.0/24", want: "drop 10.5.9.0-24; 198.18.0.1 has the reservation of 10.5.9.0/24: if the node still " +
				"works, another node may get the subnet, and its pods are cut off"},
		{name: "release the lease of a node that is gone", config: four, records: "10.5.9.0-24 198.18.0.1",
			release: "10.5.9.0/24", want: "drop 10.5.9.0-24; 198.18.0.1 has the lease of 10.5.9.0/24: if the node still works"},
		{name: "release the lease of a node that lives", config: four, alive: "198.18.0.1 n1",
			records: "10.5.9.0-24 198.18.0.1", release: "10.5.9.0/24",
			want: "flanneld runs on 198.18.0.1 (n1), and would write its lease of 10.5.9.0/24 again at once"},
		{name: "release one of two leases of a node", config: four, alive: "198.18.0.1 n1",
			records: "10.5.9.0-24 198.18.0.1\n10.5.1.0-24 198.18.0.1", release: "10.5.9.0/24",
			want: "drop 10.5.9.0-24; 198.18.0.1 (n1) has the lease of 10.5.9.0/24: if the node still works"},
		{name: "release what cannot be read", config: four, records: "10.5.9.0-24 unreadable", release: "10.5.9.0/24",
			want: "drop 10.5.9.0-24; a node whose record cannot be read has the lease of 10.5.9.0/24"},
		{name: "release by one family", config: dual, records: "10.5.9.0-24&fd00:5:0:9::-64 198.18.0.1 reserved",
			release: "fd00:5:0:9::/64", want: "drop 10.5.9.0-24&fd00:5:0:9::-64; 10.5.9.0/24,fd00:5:0:9::/64 is free."},
		{name: "release what two have", config: dual,
			records: "10.5.9.0-24&fd00:5:0:9::-64 198.18.0.1\n10.5.9.0-24 198.18.0.2", release: "10.5.9.0/24",
			want: "both 10.5.9.0/24,fd00:5:0:9::/64 and 10.5.9.0/24 have that subnet: give both subnets of one of them"},
		{name: "release what is free", config: four, release: "10.5.9.0/24",
			want: "no node has 10.5.9.0/24, and it is not reserved: flannelctl leases list shows what there is"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, err := subnet.ParseConfig([]byte(c.config))
			if err == nil {
				err = cfg.Divide()
			}
			if err != nil {
				t.Fatal(err)
			}
			l := ledger{cfg: cfg, records: records(t, c.records), alive: living{}}
			if ip, name, is := strings.Cut(c.alive, " "); is {
				l.alive[netip.MustParseAddr(ip)] = holder{Hostname: name}
			}
			change, err := decide(l, c.reserve, c.release)
			got := fmt.Sprint(err)
			if err == nil {
				got = change.String()
			}
			if !strings.Contains(got, c.want) {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func decide(l ledger, reserve, release string) (*Change, error) {
	prefixes, ips, _ := strings.Cut(reserve+release, " ")
	var s family.Pair[netip.Prefix]
	for p := range strings.SplitSeq(prefixes, ",") {
		p := netip.MustParsePrefix(p)
		*s.At(family.Of(p.Addr())) = p
	}
	if release != "" {
		return l.release(subnet.Subnets(s))
	}
	var a family.Pair[netip.Addr]
	for ip := range strings.SplitSeq(ips, ",") {
		ip := netip.MustParseAddr(ip)
		*a.At(family.Of(ip)) = ip
	}
	self := subnet.Attrs{PublicIP: a.IPv4, PublicIPv6: a.IPv6}
	if err := l.check(subnet.Subnets(s), self); err != nil {
		return nil, err
	}
	return l.reserve(subnet.Subnets(s), self)
}
