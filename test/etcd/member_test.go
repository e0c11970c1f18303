package etcd_test

import (
	"context"
	"fmt"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Of two endpoints, one is a learner, which serves nobody.
func TestLearnerAmongTheEndpoints(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s := newProgramSite(t, path)
		s.up()
		s.configure(small)
		learner := newProgram(t, path, "--initial-cluster-state=existing")
		learner.members = []*program{s.program}
		must(s, func(ctx context.Context) (*clientv3.MemberAddResponse, error) {
			return s.client.MemberAddAsLearner(ctx, []string{learner.peers()})
		})
		learner.launch(t)
		s.servesBeside(learner)
	})
}

// Of two endpoints, one is a member that is cut off from the others.
func TestMemberThatIsCutOff(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s := newProgramSite(t, path)
		s.up()
		s.configure(small)
		s.servesBeside(s.cutOff())
	})
}

// Behind the only endpoint, or behind one that is given twice, new connections lead to another member, and the old ones
// stay with one that is cut off from the others.
func TestMemberThatIsCutOffBehindABalancer(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s := newProgramSite(t, path)
		s.up()
		s.configure(small)
		s.relay.point(s.cutOff().addr())
		once, twice := s.options("a"), s.options("b")
		twice.Endpoints = append(twice.Endpoints, twice.Endpoints...)
		views := []*view{
			newView(t, s.managerWith(once).Watch(t.Context())), newView(t, s.managerWith(twice).Watch(t.Context())),
		}
		log.await(t, 2, "cannot be used", "etcd at "+once.Endpoints[0])
		s.relay.divert(s.program.addr())
		for _, v := range views {
			v.until("")
		}
	})
}

// cutOff returns a member that is cut off from the others. It seems so to a node as well where that member is one of
// another cluster, of two, of which the other one is gone.
func (s *programSite) cutOff() *program {
	s.t.Helper()
	alone, gone := newProgram(s.t, s.program.path), newProgram(s.t, s.program.path)
	alone.members = []*program{alone, gone}
	gone.members = alone.members
	other := &programSite{site: &site{t: s.t, prefix: s.prefix}, program: alone}
	other.start()
	gone.kill()
	return alone
}

// servesBeside checks that nodes find the server beside one that cannot serve. Each node connects to one of the two at
// random.
func (s *programSite) servesBeside(unable *program) {
	s.t.Helper()
	var views []*view
	for i := range 6 {
		o := s.options(fmt.Sprint("node", i))
		o.Endpoints = []string{"http://" + unable.addr(), "http://" + s.program.addr()}
		views = append(views, newView(s.t, s.managerWith(o).Watch(s.t.Context())))
	}
	for _, v := range views {
		v.until("")
	}
}
