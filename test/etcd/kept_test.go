package etcd_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
)

// stopped is a node that has had a lease at 198.18.0.1, and whose daemon has been stopped.
func stopped(s *site) (cfg *subnet.Config, had subnet.Lease, o etcd.Options) {
	s.t.Helper()
	cfg = s.configure(small)
	o = s.options("a")
	dir := filepath.Join(s.t.TempDir(), "flannel") // which flanneld makes
	o.LeaseFile = filepath.Join(dir, "subnet.env.lease")
	m := s.managerWith(o)
	w := want("198.18.0.1")
	w.Attrs.BackendData = []byte(`{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}`)
	had = s.acquire(m, cfg, w)
	m.Close()
	return cfg, had, o
}

// TestFileOfAnotherMachine: a machine that was made from the image of a node takes nothing of that node along, whether
// the node lives or its daemon has been gone for long; not even what peers know it by.
func TestFileOfAnotherMachine(t *testing.T) {
	s := newSite(t)
	cfg, had, o := stopped(s)
	before := s.get("subnets/" + had.Key())
	o.Identity = "b"
	m := s.managerWith(o)
	// The node may be the same one under another host name: where it has the address, it keeps that.
	if sel := <-m.Select(s.ctx(), iface.Selector{}); len(sel.Prefer) != 1 || sel.Prefer[0] != had.Attrs.PublicIP {
		t.Errorf("prefers %v", sel.Prefer)
	}
	w := want("198.18.0.2")
	w.Subnets = had.Subnets // of the subnet file
	if previous, err := m.Previous(s.ctx(), w.Attrs); err != nil || !previous.Equal(subnet.Attrs{}) {
		t.Errorf("published before: %+v, %v", previous, err)
	}
	l := s.acquire(m, cfg, w)
	if after := s.get("subnets/" + had.Key()); l.Subnets == had.Subnets || after != before {
		t.Errorf("took %v; the lease was %+v and is %+v", l.Subnets, before, after)
	}
	// From now on, the file is the copy's.
	m.Close()
	if again := s.acquire(s.managerWith(o), cfg, want("198.18.0.3")); again.Subnets != l.Subnets {
		t.Errorf("after another change of the address: %v, had %v", again.Subnets, l.Subnets)
	}
}

// TestAddressThatChangedOverARestart: the node takes its lease, and what it published, along.
func TestAddressThatChangedOverARestart(t *testing.T) {
	s := newSite(t)
	cfg, had, o := stopped(s)
	if info, err := os.Stat(o.LeaseFile); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%s: %v, %v", o.LeaseFile, info.Mode(), err)
	}
	m := s.managerWith(o)
	known := netip.MustParseAddr("198.18.0.1")
	if sel := <-m.Select(s.ctx(), iface.Selector{}); len(sel.Prefer) != 1 || sel.Prefer[0] != known {
		t.Errorf("prefers %v", sel.Prefer)
	}
	w := want("198.18.0.2")
	previous, err := m.Previous(s.ctx(), w.Attrs)
	if err != nil || string(previous.BackendData) != string(had.Attrs.BackendData) {
		t.Errorf("published before: %+v, %v", previous, err)
	}
	w.Attrs.BackendData = previous.BackendData
	if l := s.acquire(m, cfg, w); l.Subnets != had.Subnets {
		t.Errorf("got %v, had %v", l.Subnets, had.Subnets)
	}
	if e := s.list("subnets/"); len(e) != 1 || e[0].value != `{"PublicIP":"198.18.0.2","PublicIPv6":null,"BackendType":"vxlan",`+
		`"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}` {
		t.Errorf("etcd has %+v", e)
	}
	// And once more: the file has what was written last.
	m.Close()
	w = want("198.18.0.3")
	if l := s.acquire(s.managerWith(o), cfg, w); l.Subnets != had.Subnets {
		t.Errorf("the second time: got %v, had %v", l.Subnets, had.Subnets)
	}
}

// TestLeaseThatIsNoLongerOurs: the file alone is no proof.
func TestLeaseThatIsNoLongerOurs(t *testing.T) {
	for name, meanwhile := range map[string]func(s *site, cfg *subnet.Config, had subnet.Lease, file string){
		"another program wrote the record": func(s *site, _ *subnet.Config, had subnet.Lease, _ string) {
			key := "subnets/" + had.Key()
			s.putLeased(key, s.get(key).value)
		},
		"a node lives at the former address": func(s *site, cfg *subnet.Config, had subnet.Lease, _ string) {
			o := s.options("b")
			o.LeaseFile = filepath.Join(s.t.TempDir(), "subnet.env.lease")
			b := s.managerWith(o)
			s.keep(b, s.acquire(b, cfg, subnet.Lease{Attrs: had.Attrs}))
		},
		"the original of this copy lives": func(s *site, cfg *subnet.Config, had subnet.Lease, _ string) {
			original := s.manager("a")
			s.keep(original, s.acquire(original, cfg, subnet.Lease{Attrs: had.Attrs}))
		},
		"others may write to the file": func(s *site, _ *subnet.Config, _ subnet.Lease, file string) {
			if err := os.Chmod(file, 0o666); err != nil {
				s.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			cfg, had, o := stopped(s)
			meanwhile(s, cfg, had, o.LeaseFile)
			before := s.get("subnets/" + had.Key())
			m := s.managerWith(o)
			w := want("198.18.0.2")
			if previous, err := m.Previous(s.ctx(), w.Attrs); err != nil || !previous.Equal(subnet.Attrs{}) {
				t.Errorf("published before: %+v, %v", previous, err)
			}
			if l := s.acquire(m, cfg, w); l.Subnets == had.Subnets {
				t.Errorf("took %v", l.Subnets)
			}
			if after := s.get("subnets/" + had.Key()); after != before {
				t.Errorf("the lease was %+v and is %+v", before, after)
			}
		})
	}
}

// TestKilledAtAnyInstant: a daemon was killed while it took its lease along from 198.18.0.1 to 198.18.0.2. The next
// one, whose address is 198.18.0.3 by then, has the lease, and publishes what peers know.
func TestKilledAtAnyInstant(t *testing.T) {
	const claim, question = `{"Identity":"a","Hostname":"here"}`, `{"Identity":"a","Hostname":"here","AskedBy":"here"}`
	for name, killed := range map[string]func(s *site, cfg *subnet.Config, o etcd.Options){
		"before the question": func(s *site, _ *subnet.Config, _ etcd.Options) {
			s.putLeased("nodes/198.18.0.1", claim)
		},
		"after the question": func(s *site, _ *subnet.Config, _ etcd.Options) {
			s.putLeased("nodes/198.18.0.1", question)
		},
		"long after the question, which ends meanwhile": func(s *site, _ *subnet.Config, _ etcd.Options) {
			id := s.putLeased("nodes/198.18.0.1", question)
			time.AfterFunc(time.Second, func() { s.client.Revoke(s.t.Context(), id) }) // any time within the 5 s will do
		},
		"after the claim": func(s *site, _ *subnet.Config, _ etcd.Options) {
			s.putLeased("nodes/198.18.0.2", claim)
		},
		"after the record, before the file": func(s *site, cfg *subnet.Config, o etcd.Options) {
			// The file is as it was just before the record was written.
			m := s.managerWith(o)
			before := readLeaseFile(s.t, o.LeaseFile)
			if _, err := m.Previous(s.ctx(), want("198.18.0.2").Attrs); err != nil {
				s.t.Fatal(err)
			}
			m.Close()
			before["Next"] = readLeaseFile(s.t, o.LeaseFile)["Value"]
			text, err := json.Marshal(before)
			if err == nil {
				err = os.WriteFile(o.LeaseFile, text, 0o600)
			}
			if err != nil {
				s.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			cfg, had, o := stopped(s)
			killed(s, cfg, o)
			m := s.managerWith(o)
			w := want("198.18.0.3")
			previous, err := m.Previous(s.ctx(), w.Attrs)
			if err != nil || string(previous.BackendData) != string(had.Attrs.BackendData) {
				t.Errorf("published before: %+v, %v", previous, err)
			}
			w.Attrs.BackendData = previous.BackendData
			if l := s.acquire(m, cfg, w); l.Subnets != had.Subnets {
				t.Errorf("got %v, had %v", l.Subnets, had.Subnets)
			}
			if all := s.list("subnets/"); len(all) != 1 {
				t.Errorf("etcd has %+v", all)
			}
		})
	}
}

// TestAddressOfAnotherFamily: a node that gets an IPv4 address beside its IPv6 address keeps its lease.
func TestAddressOfAnotherFamily(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(`{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}`)
	o := s.options("a")
	o.LeaseFile = filepath.Join(t.TempDir(), "subnet.env.lease")
	m := s.managerWith(o)
	had := s.acquire(m, cfg, want("fd18::1"))
	m.Close()
	w := want("fd18::1")
	w.Attrs.PublicIP = netip.MustParseAddr("198.18.0.1")
	if l := s.acquire(s.managerWith(o), cfg, w); l.Subnets != had.Subnets {
		t.Errorf("got %v, had %v", l.Subnets, had.Subnets)
	}
}

// TestFileBeforeTheRecord: a daemon that is killed right after it has written its record finds in the file what it
// wrote.
func TestFileBeforeTheRecord(t *testing.T) {
	s := newOwnSite(t)
	s.up()
	// A reservation needs no etcd lease, which etcd would refuse to renew.
	s.put("subnets/10.5.40.0-24", `{"PublicIP": "198.18.0.1"}`)
	_, _, o := stopped(s)
	// etcd lets the node do all but write its record.
	everything := func(prefix string) string { return clientv3.GetPrefixRangeEnd(prefix) }
	read, write := clientv3.PermissionType(clientv3.PermRead), clientv3.PermissionType(clientv3.PermReadWrite)
	nodes := s.prefix + "/nodes/"
	for _, err := range []error{
		second(s.client.RoleAdd(s.ctx(), "node")),
		second(s.client.RoleGrantPermission(s.ctx(), "node", s.prefix, everything(s.prefix), read)),
		second(s.client.RoleGrantPermission(s.ctx(), "node", nodes, everything(nodes), write)),
		second(s.client.UserAdd(s.ctx(), "node", "secret")),
		second(s.client.UserGrantRole(s.ctx(), "node", "node")),
		second(s.client.UserAdd(s.ctx(), "root", "secret")),
		second(s.client.UserGrantRole(s.ctx(), "root", "root")),
		second(s.client.AuthEnable(s.ctx())),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	o.Username, o.Password = "node", "secret"
	m := s.managerWith(o)
	ctx, cancel := context.WithCancel(s.ctx())
	done := make(chan error, 1)
	go func() { _, err := m.Previous(ctx, want("198.18.0.2").Attrs); done <- err }()
	log.await(t, 1, "cannot be used", "write the lease", "etcd at "+o.Endpoints[0])
	file := readLeaseFile(t, o.LeaseFile)
	cancel()
	if err := receive(t, done); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	const value = `{"PublicIP":"198.18.0.%d","PublicIPv6":null,"BackendType":"vxlan",` +
		`"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}`
	if file["Value"] != fmt.Sprintf(value, 1) || file["Next"] != fmt.Sprintf(value, 2) {
		t.Errorf("the file has %v", file)
	}
}

func second[T any](_ T, err error) error { return err }

func readLeaseFile(t *testing.T, path string) (file map[string]any) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &file)
	}
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// TestAddressesThatChangedPlaces: each of three nodes has the former address of the next one. All start together; or
// one after the other, in several orders, when the former address of a node may be alive. Each has its subnet again. No
// record is left that keeps peers from a node, because it is older and has that node's address.
func TestAddressesThatChangedPlaces(t *testing.T) {
	for name, order := range map[string][]int{
		"together": nil, "the oldest first": {0, 1, 2}, "the youngest first": {2, 1, 0}, "the oldest second": {2, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			cfg := s.configure(small)
			const nodes = 3
			var had [nodes]subnet.Subnets
			var options [nodes]etcd.Options
			wish := func(node, address int) subnet.Lease {
				w := want(fmt.Sprintf("198.18.0.%d", 1+address%nodes))
				w.Attrs.BackendData = fmt.Appendf(nil, `{"VNI":1,"VtepMAC":"02:00:00:00:00:%02d"}`, node)
				return w
			}
			for i := range nodes {
				options[i] = s.options(fmt.Sprint("machine ", i))
				options[i].LeaseFile = filepath.Join(t.TempDir(), "subnet.env.lease")
				m := s.managerWith(options[i])
				had[i] = s.acquire(m, cfg, wish(i, i)).Subnets
				m.Close()
				if order == nil { // without power, no claim is given up
					s.putLeased(fmt.Sprintf("nodes/198.18.0.%d", 1+i), fmt.Sprintf(`{"Identity":"machine %d"}`, i))
				}
			}
			start := func(i int) {
				m := s.managerWith(options[i])
				w := wish(i, i+1)
				w.Subnets = had[i] // of the subnet file
				previous, err := m.Previous(s.ctx(), w.Attrs)
				if data := string(previous.BackendData); err != nil || data != "" && data != string(w.Attrs.BackendData) {
					t.Errorf("node %d published what another one did before: %+v, %v", i, previous, err)
				}
				l, err := m.Acquire(s.ctx(), cfg, w)
				if err != nil || l.Subnets != had[i] {
					t.Errorf("node %d has %v, had %v: %v", i, l.Subnets, had[i], err)
					return
				}
				s.keep(m, l)
			}
			for _, i := range order {
				start(i)
				at := fmt.Sprintf(`"PublicIP":"198.18.0.%d"`, 1+(i+1)%nodes)
				own := s.get("subnets/" + had[i].Key())
				for _, r := range s.list("subnets/") {
					if strings.Contains(r.value, at) && r.created < own.created {
						t.Errorf("node %d has %+v, and there is the older %+v", i, own, r)
					}
				}
			}
			var all sync.WaitGroup
			for i := range nodes - len(order) {
				all.Go(func() { start(i) })
			}
			all.Wait()
			if records := s.list("subnets/"); len(records) != nodes {
				t.Errorf("etcd has %+v", records)
			}
		})
	}
}

// TestCopiesWithOneIdentity: copies that cannot be told from the original start together, while it is off. One takes
// the lease along; no other publishes what that one does.
func TestCopiesWithOneIdentity(t *testing.T) {
	for name, gone := range map[string]bool{"the lease is there": false, "the lease is gone": true} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			cfg, had, o := stopped(s)
			if gone {
				s.delete("subnets/" + had.Key())
			}
			file, err := os.ReadFile(o.LeaseFile)
			if err != nil {
				t.Fatal(err)
			}
			var managers []*etcd.Manager
			for i := range 3 {
				o.LeaseFile = filepath.Join(t.TempDir(), "subnet.env.lease")
				if err := os.WriteFile(o.LeaseFile, file, 0o600); err != nil {
					t.Fatal(i, err)
				}
				managers = append(managers, s.managerWith(o))
			}
			took, kept := 0, map[subnet.Subnets]bool{}
			for i, m := range managers { // each knows what to publish before any has a lease
				previous, err := m.Previous(s.ctx(), want(fmt.Sprintf("198.18.0.%d", 2+i)).Attrs)
				if err != nil {
					t.Fatal(err)
				}
				if len(previous.BackendData) > 0 {
					took++
				}
			}
			for i, m := range managers {
				w := want(fmt.Sprintf("198.18.0.%d", 2+i))
				w.Subnets = had.Subnets
				kept[s.acquire(m, cfg, w).Subnets] = true
			}
			if most := map[bool]int{false: 1, true: 0}[gone]; took != most || len(kept) != len(managers) {
				t.Errorf("%d copies publish what the original did; the subnets are %v", took, kept)
			}
		})
	}
}

// TestFileIsRestored: the file comes back when it was removed, and when it could not be written; another daemon's
// stays.
func TestFileIsRestored(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	o := s.options("a")
	dir := filepath.Join(t.TempDir(), "flannel")
	o.LeaseFile = filepath.Join(dir, "subnet.env.lease")
	if err := os.WriteFile(dir, nil, 0o600); err != nil { // where the directory is to be
		t.Fatal(err)
	}
	m := s.managerWith(o)
	m.RestoreFile()
	l := s.acquire(m, cfg, want("198.18.0.1"))
	log.await(t, 1, "Cannot keep this node's lease in a file", dir)
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		m.RestoreFile()
		if file := readLeaseFile(t, o.LeaseFile); file["Key"] != s.prefix+"/subnets/"+l.Key() {
			t.Errorf("the file has %v", file)
		}
		if err := os.Remove(o.LeaseFile); err != nil {
			t.Fatal(err)
		}
	}
	const others = `{"Key":"another"}`
	if err := os.WriteFile(o.LeaseFile, []byte(others), 0o600); err != nil {
		t.Fatal(err)
	}
	m.RestoreFile()
	if text, err := os.ReadFile(o.LeaseFile); err != nil || string(text) != others {
		t.Errorf("another daemon's file has %s, %v", text, err)
	}
}

// TestRecordThatIsGone: peers know the node by the same data even after etcd has lost everything.
func TestRecordThatIsGone(t *testing.T) {
	s := newSite(t)
	_, had, o := stopped(s)
	s.delete("subnets/" + had.Key())
	previous, err := s.managerWith(o).Previous(s.ctx(), want("198.18.0.1").Attrs)
	if err != nil || !previous.Equal(had.Attrs) {
		t.Errorf("published before: %+v, %v", previous, err)
	}
}
