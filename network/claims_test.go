package network

import (
	"fmt"
	"testing"

	"github.com/flanneld/flanneld/backend"
	_ "github.com/flanneld/flanneld/backend/all"
	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/subnet"
)

// TestManyRivals: leases that all claim the same, or parts of the same, cost no more each than others. A decision about
// one takes a look at few of its rivals, and a change of one that counts for nothing has none of them planned again.
func TestManyRivals(t *testing.T) {
	const many = 300
	for name, record := range map[string]func(i int) (key, ip, mac string){
		"one MAC":            func(i int) (string, string, string) { return subnetKey(i), publicIP(i), "0e:00:00:00:00:01" },
		"one public address": func(i int) (string, string, string) { return subnetKey(i), "198.18.0.9", mac(i) },
		"one IPv4 subnet": func(i int) (string, string, string) {
			return fmt.Sprintf("10.5.1.0-24&fd05:0:0:%x::-64", i+1), publicIP(i), mac(i)
		},
		"the subnet of another": func(i int) (string, string, string) {
			if i == 0 {
				return "10.5.0.0-17", publicIP(i), mac(i)
			}
			return subnetKey(i), publicIP(i), mac(i)
		},
		"many public addresses in a subnet": func(i int) (string, string, string) {
			if i == 0 {
				return "10.5.128.0-18", publicIP(i), mac(i)
			}
			return subnetKey(i), fmt.Sprintf("10.5.%d.%d", 128+i/200, 1+i%200), mac(i)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := &state{}
			var err error
			s.cfg, err = subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd05::/48", "Backend": {"Type": "vxlan"}}`))
			if err != nil {
				t.Fatal(err)
			}
			if s.uplink, err = backendtest.ParseUplink("eth0 1500 198.18.0.1/15 fd18::1/64"); err != nil {
				t.Fatal(err)
			}
			if s.backend, err = backend.New(s.cfg, s.uplink); err != nil {
				t.Fatal(err)
			}
			lease := func(key, ip, mac string) subnet.Lease {
				l, err := backendtest.ParseLease(fmt.Sprintf(
					`%s {"PublicIP":"%s","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"%s"}}`, key, ip, mac))
				if err != nil {
					t.Fatal(err)
				}
				return l
			}
			own := lease("10.5.255.0-24&fd05:0:0:ffff::-64", "198.18.0.1", "0e:ff:00:00:00:01")
			s.own = &own
			u := subnet.Update{Snapshot: true}
			for i := range many {
				l := lease(record(i))
				l.Created = int64(i + 1)
				u.Put(&l)
			}
			if p := s.applyUpdate(u); len(p.problems) != many-1 {
				t.Errorf("%d leases are left out, want all but the oldest of %d", len(p.problems), many)
			}
			looked := 0
			for n := range s.claims.leases.All() {
				for range s.claims.rivals(n, oldest) {
					looked++
				}
			}
			if looked > 3*many {
				t.Errorf("%d decisions take a look at %d rivals", many, looked)
			}
			var change subnet.Update
			youngest := lease(record(many - 1))
			youngest.Created = many
			change.Put(&youngest)
			if p := s.applyUpdate(change); len(p.objects) > 2 { // with the one that it is a part of
				t.Errorf("a change of the youngest has %d leases planned again", len(p.objects))
			}
			change = subnet.Update{}
			change.Delete(lease(record(0)).Subnets)
			if p := s.applyUpdate(change); len(p.objects) != many {
				t.Errorf("the end of the oldest has %d leases planned again, want %d", len(p.objects), many)
			}
		})
	}
}

func subnetKey(i int) string { return fmt.Sprintf("10.5.%d.%d-28", i/16, i%16*16) }
func publicIP(i int) string  { return fmt.Sprintf("198.19.%d.%d", i/200, 1+i%200) }
func mac(i int) string       { return fmt.Sprintf("0e:00:00:00:%02x:%02x", i>>8, i&255) }
