package etcd_test

import (
	"encoding/json"
	"fmt"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/subnettest"
)

// The Manager passes the suite of all subnet managers.
func TestConformance(t *testing.T) {
	subnettest.Run(t, func(t *testing.T) subnettest.Harness {
		s := newOwnSite(t)
		s.up()
		return subnettest.Harness{
			Manager: func(node int) subnet.Manager { return s.manager(fmt.Sprint("machine ", node)) },
			Configure: func(text string) {
				if text == "" {
					s.delete("config")
				} else {
					s.put("config", text)
				}
			},
			SetLease: func(_ int, l subnet.Lease) {
				value, err := json.Marshal(l.Attrs)
				if err != nil {
					t.Fatal(err)
				}
				s.putLeased("subnets/"+l.Key(), string(value))
			},
			DeleteLease: func(_ int, l subnet.Subnets) { s.delete("subnets/" + l.Key()) },
			Fail: func() func() {
				s.relay.cut()
				return func() { s.relay.point(s.server.addr()) }
			},
			Gap: func(change func()) {
				s.relay.cut()
				change()
				got, err := s.client.Get(s.ctx(), "x")
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.client.Compact(s.ctx(), got.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
					t.Fatal(err)
				}
				s.relay.point(s.server.addr())
			},
		}
	})
}
