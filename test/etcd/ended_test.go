package etcd_test

import (
	"context"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Each etcd lease may end between its grant and the write that needs it: in an outage, or when etcd loses its data.
func TestEtcdLeaseEndsBeforeItIsUsed(t *testing.T) {
	t.Parallel()
	const address = "198.18.0.1"
	for _, test := range []struct {
		name     string
		writable string // what the node may write: what it writes next is refused
		refused  string // that, in the log
		holder   string // of the address before, whose own etcd lease does not end
	}{
		{"a claim", "subnets/", "claim the public address", ""},
		{"a lease", "nodes/", "write the lease", ""},
		{"a question to another holder", "subnets/", "ask whether the holder", `{"Identity":"dead","Hostname":"one"}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			ofEachVersion(t, func(t *testing.T, path string) {
				s := newProgramSite(t, path)
				s.up()
				cfg := s.configure(small)
				var holder clientv3.LeaseID
				if test.holder != "" {
					holder = s.putLeased("nodes/"+address, test.holder)
				}
				s.withUsers()
				s.authentication(true)
				s.allow(test.writable)
				m := s.managerWith(s.user("http://" + s.program.addr()))
				got := s.acquireLater(s.ctx(), m, cfg, want(address))
				log.await(t, 1, "cannot be used", "etcd at http://"+s.program.addr(), test.refused)
				s.endLeases(holder)
				s.allow("")
				if r := receive(t, got); r.err != nil {
					t.Fatal(r.err)
				}
			})
		})
	}
}

// allow lets the user flannel read all under the prefix, and write what is under a part of it.
func (s *programSite) allow(writable string) {
	s.t.Helper()
	grant := func(prefix string, allowed clientv3.PermissionType) {
		must(s, func(ctx context.Context) (*clientv3.AuthRoleGrantPermissionResponse, error) {
			return s.client.RoleGrantPermission(ctx, "flannel", prefix, clientv3.GetPrefixRangeEnd(prefix), allowed)
		})
	}
	grant(s.prefix+"/", clientv3.PermissionType(clientv3.PermRead))
	grant(s.prefix+"/"+writable, clientv3.PermissionType(clientv3.PermReadWrite))
}

// endLeases ends all etcd leases but one.
func (s *programSite) endLeases(but clientv3.LeaseID) {
	s.t.Helper()
	all, err := s.client.Leases(s.ctx())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, l := range all.Leases {
		if l.ID != but {
			must(s, func(ctx context.Context) (*clientv3.LeaseRevokeResponse, error) { return s.client.Revoke(ctx, l.ID) })
		}
	}
}
