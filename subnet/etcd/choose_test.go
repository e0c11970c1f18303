package etcd

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// records reads lines of the form "10.5.1.0-24 198.18.0.1", as old as they come.
// "reserved" at the end of a line means no etcd lease, "unreadable" in the place
// of the address a value that makes no sense, "used" behind it that a node has
// written the value.
func records(t *testing.T, text string) []record {
	t.Helper()
	m := &Manager{options: Options{Prefix: "/net"}, records: subnet.NewRecordLog(klog.Background())}
	var all []record
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		revision := int64(len(all) + 1)
		kv := &mvccpb.KeyValue{Key: []byte("/net/subnets/" + f[0]), CreateRevision: revision, ModRevision: revision, Lease: 7}
		if f[1] != "unreadable" {
			var a subnet.Attrs
			if ip := netip.MustParseAddr(f[1]); ip.Is4() {
				a.PublicIP = ip
			} else {
				a.PublicIPv6 = ip
			}
			if len(f) > 2 && f[2] == "used" {
				a.BackendType = "vxlan"
			}
			value, err := json.Marshal(a)
			if err != nil {
				t.Fatal(err)
			}
			kv.Value = value
		}
		if f[len(f)-1] == "reserved" {
			kv.Lease = 0
		}
		r, ok := m.parse(kv)
		if !ok {
			t.Fatalf("bad line %q", line)
		}
		all = append(all, r)
	}
	return all
}

// String returns "drop 10.6.1.0-24, take 10.5.1.0-24", for example.
func (c choice) String() string {
	var parts []string
	name := func(verb string, records ...record) {
		for _, r := range records {
			parts = append(parts, verb+" "+r.subnets.Key())
		}
	}
	name("drop", c.drop...)
	name("unfit", c.unfit...)
	switch {
	case c.take.exists():
		name("take", c.take)
	case len(c.create.Each()) > 0:
		parts = append(parts, "create "+c.create.Key())
	default:
		parts = append(parts, "full")
	}
	return strings.Join(parts, ", ")
}

func TestChoose(t *testing.T) {
	const (
		four  = `{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.4.0"}`
		dual  = `{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.4.0", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}`
		six   = `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}`
		self  = "198.18.0.1"
		self6 = "fd18::1"
	)
	for _, c := range []struct {
		name, config, records string
		self                  string
		previous              string // subnets, as a key
		wrote                 string // key of the record that this process wrote
		want                  string
	}{
		{name: "the first free one", config: four, self: self, want: "create 10.5.1.0-24"},
		{name: "others are left alone", config: four, self: self, records: `
			10.5.1.0-24 198.18.0.2
			10.5.3.0-24 198.18.0.3 reserved`, want: "create 10.5.2.0-24"},
		{name: "an unreadable record occupies its subnet", config: four, self: self, records: "10.5.1.0-24 unreadable",
			want: "create 10.5.2.0-24"},
		{name: "another length occupies too", config: four, self: self, records: `
			10.5.0.0-22 198.18.0.2`, want: "create 10.5.4.0-24"},
		{name: "full", config: four, self: self, records: `
			10.5.0.0-22 198.18.0.2
			10.5.4.128-25 198.18.0.3`, want: "full"},
		{name: "what no node can have occupies nothing", config: dual, self: self, records: `
			10.5.0.0-16 198.18.0.2
			8.0.0.0-5 198.18.0.3
			0.0.0.0-0&8000::-1 fd18::3
			0.0.0.0-1 unreadable
			10.5.0.0-17&fd00:5:0:1::-64 198.18.0.4
			10.5.0.0-16 198.18.0.1 reserved`, want: "unfit 10.5.0.0-16, create 10.5.1.0-24&fd00:5:0:1::-64"},
		{name: "full in one family", config: dual, self: self, records: `
			10.5.0.0-21 198.18.0.2`, want: "full"},

		{name: "own", config: four, self: self, records: `
			10.5.1.0-24 198.18.0.2
			10.5.3.0-24 198.18.0.1`, want: "take 10.5.3.0-24"},
		{name: "own before the previous one", config: four, self: self, previous: "10.5.2.0-24",
			records: "10.5.3.0-24 198.18.0.1", want: "take 10.5.3.0-24"},
		{name: "own in a full network", config: four, self: self, records: `
			10.5.0.0-22 198.18.0.2
			10.5.4.0-24 198.18.0.1`, want: "take 10.5.4.0-24"},
		{name: "of several own the oldest", config: four, self: self, records: `
			10.5.3.0-24 198.18.0.1
			10.5.2.0-24 198.18.0.1`, want: "drop 10.5.2.0-24, take 10.5.3.0-24"},
		{name: "of several own the previous", config: four, self: self, previous: "10.5.2.0-24", records: `
			10.5.3.0-24 198.18.0.1
			10.5.2.0-24 198.18.0.1`, want: "drop 10.5.3.0-24, take 10.5.2.0-24"},
		{name: "of several own the reservation", config: four, self: self, previous: "10.5.3.0-24", records: `
			10.5.3.0-24 198.18.0.1
			10.5.2.0-24 198.18.0.1 reserved`, want: "drop 10.5.3.0-24, take 10.5.2.0-24"},
		{name: "of several reservations the oldest", config: four, self: self, records: `
			10.5.3.0-24 198.18.0.1 reserved
			10.5.2.0-24 198.18.0.1 reserved`, want: "take 10.5.3.0-24"},

		{name: "own outside the network", config: four, self: self, records: "10.6.1.0-24 198.18.0.1",
			want: "drop 10.6.1.0-24, create 10.5.1.0-24"},
		{name: "own of another length", config: four, self: self, records: "10.5.1.0-25 198.18.0.1",
			want: "drop 10.5.1.0-25, create 10.5.2.0-24"},
		{name: "own of the wrong families", config: four, self: self, records: "10.5.1.0-24&fd00:5:0:1::-64 198.18.0.1",
			want: "drop 10.5.1.0-24&fd00:5:0:1::-64, create 10.5.2.0-24"},
		{name: "a reservation outside the network", config: four, self: self, records: "10.6.1.0-24 198.18.0.1 reserved",
			want: "unfit 10.6.1.0-24, create 10.5.1.0-24"},

		{name: "previous", config: four, self: self, previous: "10.5.3.0-24", want: "create 10.5.3.0-24"},
		{name: "previous is taken", config: four, self: self, previous: "10.5.3.0-24", records: "10.5.3.0-24 198.18.0.2",
			want: "create 10.5.1.0-24"},
		{name: "previous is taken in part", config: four, self: self, previous: "10.5.3.0-24",
			records: "10.5.3.64-26 198.18.0.2", want: "create 10.5.1.0-24"},
		{name: "previous does not fit", config: four, self: self, previous: "10.5.9.0-24", want: "create 10.5.1.0-24"},
		{name: "previous has one family", config: dual, self: self, previous: "10.5.3.0-24",
			want: "create 10.5.1.0-24&fd00:5:0:1::-64"},

		{name: "dual stack", config: dual, self: self, records: `
			10.5.1.0-24&fd00:5:0:3::-64 198.18.0.2
			10.5.9.0-24&fd00:5:0:1::-64 198.18.0.3`, want: "create 10.5.2.0-24&fd00:5:0:2::-64"},
		{name: "an older lease overlaps in IPv4", config: dual, self: self, records: `
			10.5.1.0-24&fd00:5:0:1::-64 198.18.0.2
			10.5.1.0-24&fd00:5:0:2::-64 198.18.0.1`, want: "drop 10.5.1.0-24&fd00:5:0:2::-64, create 10.5.2.0-24&fd00:5:0:3::-64"},
		{name: "an older lease overlaps in IPv6", config: dual, self: self, records: `
			10.5.1.0-24&fd00:5:0:1::-64 198.18.0.2
			10.5.2.0-24&fd00:5:0:1::-64 198.18.0.1`, want: "drop 10.5.2.0-24&fd00:5:0:1::-64, create 10.5.3.0-24&fd00:5:0:2::-64"},
		{name: "a younger lease overlaps", config: dual, self: self, records: `
			10.5.1.0-24&fd00:5:0:2::-64 198.18.0.1
			10.5.1.0-24&fd00:5:0:1::-64 198.18.0.2`, want: "take 10.5.1.0-24&fd00:5:0:2::-64"},
		{name: "an older own lease overlaps", config: four, self: self, records: `
			10.5.0.0-22 198.18.0.1
			10.5.1.0-24 198.18.0.1`, want: "drop 10.5.0.0-22, take 10.5.1.0-24"},
		{name: "an older lease overlaps a reservation", config: four, self: self, records: `
			10.5.0.0-22 198.18.0.2
			10.5.1.0-24 198.18.0.1 reserved`, want: "unfit 10.5.1.0-24, create 10.5.4.0-24"},

		{name: "IPv6 alone", config: six, self: self6, want: "create 0.0.0.0-0&fd00:5:0:1::-64"},
		{name: "IPv6 alone, own", config: six, self: self6, records: `
			0.0.0.0-0&fd00:5:0:1::-64 fd18::2
			0.0.0.0-0&fd00:5:0:2::-64 fd18::1`, want: "take 0.0.0.0-0&fd00:5:0:2::-64"},
		{name: "no IPv6 address is not the same address", config: four, self: self, records: "10.5.1.0-24 fd18::2",
			want: "create 10.5.2.0-24"},

		{name: "written under an earlier address", config: four, self: self, wrote: "10.5.3.0-24",
			records: "10.5.3.0-24 198.18.0.2", want: "take 10.5.3.0-24"},
		{name: "written, and then by another", config: four, self: self, previous: "10.5.3.0-24", wrote: "10.5.3.0-24 then",
			records: "10.5.3.0-24 198.18.0.2", want: "create 10.5.1.0-24"},
		{name: "written, and a younger one at the new address", config: four, self: self, wrote: "10.5.3.0-24", records: `
			10.5.3.0-24 198.18.0.2
			10.5.2.0-24 198.18.0.1`, want: "take 10.5.3.0-24"},
		{name: "written, and an older one at the new address", config: four, self: self, wrote: "10.5.3.0-24", records: `
			10.5.2.0-24 198.18.0.1
			10.5.3.0-24 198.18.0.2`, want: "drop 10.5.2.0-24, take 10.5.3.0-24"},
		{name: "written and gone, and another at the new address", config: four, self: self, wrote: "10.5.3.0-24 gone",
			previous: "10.5.3.0-24", records: `10.5.2.0-24 198.18.0.1`, want: "drop 10.5.2.0-24, create 10.5.3.0-24"},
		{name: "written, and a reservation of the new address", config: four, self: self, wrote: "10.5.3.0-24", records: `
			10.5.2.0-24 198.18.0.1 reserved
			10.5.3.0-24 198.18.0.2`, want: "drop 10.5.3.0-24, take 10.5.2.0-24"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, err := subnet.ParseConfig([]byte(c.config))
			if err == nil {
				err = cfg.Divide()
			}
			if err != nil {
				t.Fatal(err)
			}
			want := subnet.Lease{}
			if ip := netip.MustParseAddr(c.self); ip.Is4() {
				want.Attrs.PublicIP, want.Attrs.PublicIPv6 = ip, netip.MustParseAddr(self6)
			} else {
				want.Attrs.PublicIPv6 = ip
			}
			if c.previous != "" {
				if want.Subnets, err = subnet.ParseKey(c.previous); err != nil {
					t.Fatal(err)
				}
			}
			all := records(t, c.records)
			var wrote record
			key, changed, _ := strings.Cut(c.wrote, " ")
			for _, r := range all {
				if r.subnets.Key() == key {
					wrote = r
					if changed != "" {
						wrote.changed = r.changed + 1
					}
				}
			}
			if changed == "gone" {
				wrote = record{key: "/net/subnets/" + key}
			}
			got := choose(all, cfg, want, wrote, freeEnough, func(n int) int { return 0 })
			if got.String() != c.want {
				t.Errorf("got %s\nwant %s", got, c.want)
			}
		})
	}
}

// A node picks among the first hundred free subnets, and among more when other nodes pick, too.
func TestChooseAmongTheFirst(t *testing.T) {
	cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.0.0.0/8", "SubnetLen": 24}`))
	if err == nil {
		err = cfg.Divide()
	}
	if err != nil {
		t.Fatal(err)
	}
	want := subnet.Lease{Attrs: subnet.Attrs{PublicIP: netip.MustParseAddr("198.18.0.1")}}
	for enough, last := range map[int]string{
		freeEnough: "create 10.0.100.0-24", freeEnough * freeMore: "create 10.25.0.0-24", freeMost: "create 10.255.255.0-24",
	} {
		got := choose(nil, cfg, want, record{}, enough, func(n int) int {
			if want := min(enough, 1<<16-1); n != want { // a /8 has no more /24
				t.Errorf("picked among %d, want %d", n, want)
			}
			return n - 1
		})
		if got.String() != last {
			t.Errorf("among %d: got %v, want %s", enough, got, last)
		}
	}
}

func TestFate(t *testing.T) {
	own := subnet.Attrs{PublicIP: netip.MustParseAddr("198.18.0.1"), BackendType: "vxlan"}
	value, err := json.Marshal(own)
	if err != nil {
		t.Fatal(err)
	}
	is := func(attrs subnet.Attrs) record {
		value, err := json.Marshal(attrs)
		if err != nil {
			t.Fatal(err)
		}
		return record{value: value, attrs: attrs, valid: true, created: 1, lease: clientv3.LeaseID(7)}
	}
	other, twin := own, own
	other.PublicIP = other.PublicIP.Next()
	twin.BackendType = "host-gw"
	for name, c := range map[string]struct {
		now  record
		want recordState
	}{
		"gone":           {record{}, deleted},
		"as it was":      {is(own), intact},
		"of another":     {is(other), taken},
		"in our name":    {is(twin), overwritten},
		"not a record":   {record{value: []byte("nonsense"), created: 1}, overwritten},
		"an empty value": {record{created: 1}, overwritten},
	} {
		if got := stateOf(c.now, own, value); got != c.want {
			t.Errorf("%s: got %d, want %d", name, got, c.want)
		}
	}
}

// Reading the records of a large cluster must not be what takes time.
func BenchmarkParse20000(b *testing.B) {
	m := &Manager{options: Options{Prefix: "/coreos.com/network"}, records: subnet.NewRecordLog(klog.Background())}
	var kvs []*mvccpb.KeyValue
	for i := range 20000 {
		kvs = append(kvs, &mvccpb.KeyValue{
			Key:         fmt.Appendf(nil, "/coreos.com/network/subnets/10.%d.%d.0-24&fd00:5:0:%x::-64", i>>8, i&255, i+1),
			Value:       fmt.Appendf(nil, `{"PublicIP":"198.18.%d.%d","PublicIPv6":"fd18::%x","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:aa:bb:cc:dd:ee"},"BackendV6Data":{"VNI":1,"VtepMAC":"0e:aa:bb:cc:dd:ee"}}`, i>>8, i&255, i+1),
			ModRevision: 1,
		})
	}
	for b.Loop() {
		for _, kv := range kvs {
			if r, ok := m.parse(kv); !ok || !r.valid {
				b.Fatalf("%s is not a record", kv.Key)
			}
		}
	}
}
