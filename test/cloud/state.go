// Package cloud has servers that speak as much of the APIs of clouds, and of their metadata services, as the backends
// on backend/cloudroute use. The real SDKs talk to them over HTTP. The servers keep state, check parameters, and fail
// as they are told.
package cloud

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
)

// A State is one account of a cloud, with one VPC: what the servers of all clouds have in common. Its methods may be
// called at any time.
type State struct {
	// Local is the address of the instance that asks from a loopback address.
	Local netip.Addr
	// PageSize is how many items an answer has at most.
	PageSize int

	// What differs by cloud: the ID of a new resource of a kind, what routes to an instance lead to, the name of a route
	// for which Put has none, and whether instances forward packets of pods from the start.
	number   func(kind string) string
	hop      func(*instance) string
	name     func(dst netip.Prefix) string
	forwards bool

	mu        sync.Mutex
	quota     int // of routes, for each table and family
	last      int // number given to a resource
	tables    []*table
	instances []*instance
	tokens    map[string]bool // of the metadata service
	faults    map[Action]Fault
	before    func(Action)
	calls     map[Action]int
	forward   func(map[netip.Prefix]netip.Addr)
}

// An Action is what the API is asked for.
type Action string

// What backends ask for. An API may have several calls for one of these.
const (
	Read     Action = "read the routes"
	Create   Action = "create a route"
	Replace  Action = "replace a route"
	Delete   Action = "delete a route"
	Forward  Action = "allow forwarding"
	Metadata Action = "metadata"
	All      Action = "all but the metadata"
)

// A Fault is how an action fails. Each API has its own error for it.
type Fault string

// Faults.
const (
	Hang           Fault = "no answer"
	Reset          Fault = "the connection is closed"
	NotPermitted   Fault = "not permitted"
	BadCredentials Fault = "bad credentials"
	Throttled      Fault = "throttled"
	Broken         Fault = "internal error"
	NoTable        Fault = "no such route table"
	Full           Fault = "no room for a route"
)

// A table is a route table.
type table struct {
	id      string
	main    bool
	subnets []string // associated
	routes  []Route
}

// A Route is a route of a table.
type Route struct {
	Name    string // that the API gives it, if it does
	Dst     netip.Prefix
	Target  string // a next hop that Launch has returned, or a gateway such as igw-1
	Gone    bool   // the target is: a blackhole
	Foreign bool   // made by the cloud or a gateway, rather than by a call of the API
}

// An instance has one network interface.
type instance struct {
	id, eni, mac, subnet string
	addresses            []netip.Addr
	forwards             bool // packets of pods
}

// newState returns a VPC that has a main route table.
func newState() *State {
	s := &State{quota: 500, PageSize: 100, tokens: map[string]bool{}, faults: map[Action]Fault{}, calls: map[Action]int{}}
	s.number = func(kind string) string {
		s.last++
		return fmt.Sprintf("%s-0%016x", kind, s.last)
	}
	s.hop = func(i *instance) string { return i.eni }
	s.name = func(netip.Prefix) string { return s.number("route") }
	return s
}

// addMain adds the main route table, once the functions are set.
func (s *State) addMain() {
	s.AddTable()
	s.tables[0].main = true
}

// Main returns the ID of the main route table.
func (s *State) Main() string { return s.tables[0].id }

// AddTable adds a route table for the subnets, and returns its ID.
func (s *State) AddTable(subnets ...string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := &table{id: s.number("rtb"), subnets: subnets}
	t.routes = []Route{{Dst: netip.MustParsePrefix("198.18.0.0/16"), Target: "local", Foreign: true}}
	s.tables = append(s.tables, t)
	return t.id
}

// Launch starts an instance with these addresses in a subnet, and returns the next hop of routes to it.
func (s *State) Launch(subnet string, addresses ...netip.Addr) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := &instance{id: s.number("i"), eni: s.number("eni"), subnet: subnet, addresses: addresses,
		forwards: s.forwards}
	i.mac = fmt.Sprintf("02:00:00:00:00:%02x", s.last)
	s.instances = append(s.instances, i)
	return s.hop(i)
}

// Terminate ends the instance that a next hop stands for, the first if there are several. Routes to it become
// blackholes if there is no other.
func (s *State) Terminate(hop string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.IndexFunc(s.instances, func(i *instance) bool { return s.hop(i) == hop }); i >= 0 {
		s.instances = slices.Delete(s.instances, i, i+1)
	}
	gone := s.instance(hop) == nil
	for _, t := range s.tables {
		for i := range t.routes {
			if t.routes[i].Target == hop {
				t.routes[i].Gone = gone
			}
		}
	}
	s.change()
}

// Put puts a route into a table, in place of those to the same destination.
func (s *State) Put(table string, r Route) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.table(table)
	t.routes = slices.DeleteFunc(t.routes, func(other Route) bool { return other.Dst == r.Dst })
	s.add(t, r)
}

// add adds a route to a table. The lock is held.
func (s *State) add(t *table, r Route) {
	if r.Name == "" {
		r.Name = s.name(r.Dst)
	}
	t.routes = append(t.routes, r)
	s.change()
}

// Remove removes the routes to a destination.
func (s *State) Remove(table string, dst netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.table(table)
	t.routes = slices.DeleteFunc(t.routes, func(r Route) bool { return r.Dst == dst })
	s.change()
}

// Routes returns the routes of a table that nodes, or persons, have made, as texts such as "10.5.1.0/24 eni-07", in the
// order of their destinations, with " blackhole" where the target is gone.
func (s *State) Routes(table string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	routes := slices.Clone(s.table(table).routes)
	slices.SortStableFunc(routes, func(a, b Route) int { return a.Dst.Compare(b.Dst) })
	var texts []string
	for _, r := range routes {
		if r.Foreign {
			continue
		}
		text := r.Dst.String() + " " + r.Target
		if r.Gone {
			text += " blackhole"
		}
		texts = append(texts, text)
	}
	return texts
}

// Forward has f do what the VPC's router does: it is called with what the main route table says, whenever that changes.
// The values are addresses of instances.
func (s *State) Forward(f func(map[netip.Prefix]netip.Addr)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forward = f
}

// Forwards reports whether the cloud takes packets of pods from and to a next hop.
func (s *State) Forwards(hop string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.instance(hop)
	return i != nil && i.forwards
}

// SetQuota sets how many routes each table may have of a family.
func (s *State) SetQuota(routes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.quota = routes
}

// full reports whether a table has no room for another route of a family. The lock is held.
func (s *State) full(t *table, dst netip.Prefix) bool {
	same := 0
	for _, r := range t.routes {
		if !r.Foreign && r.Dst.Addr().Is4() == dst.Addr().Is4() {
			same++
		}
	}
	return same >= s.quota
}

// Fail has an action fail; "" ends that.
func (s *State) Fail(a Action, f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[a] = f
}

// Before has f called before each action is taken.
func (s *State) Before(f func(Action)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = f
}

// Calls returns how often an action was asked for.
func (s *State) Calls(a Action) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[a]
}

// change is called after a change, with the lock held.
func (s *State) change() {
	if s.forward == nil {
		return
	}
	gateways := map[netip.Prefix]netip.Addr{}
	for _, r := range s.tables[0].routes {
		i := s.instance(r.Target)
		if i == nil {
			continue
		}
		for _, a := range i.addresses {
			if a.Is4() == r.Dst.Addr().Is4() {
				gateways[r.Dst] = a
			}
		}
	}
	s.forward(gateways)
}

func (s *State) table(id string) *table {
	for _, t := range s.tables {
		if t.id == id {
			return t
		}
	}
	return nil
}

func (t *table) find(dst netip.Prefix) int {
	return slices.IndexFunc(t.routes, func(r Route) bool { return r.Dst == dst })
}

// instance returns the instance that a next hop stands for, or nil. The lock is held.
func (s *State) instance(hop string) *instance {
	for _, i := range s.instances {
		if s.hop(i) == hop {
			return i
		}
	}
	return nil
}

// caller returns the instance that a request comes from, or nil. The lock is held.
func (s *State) caller(r *http.Request) *instance {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return nil
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return nil
	}
	if ip = ip.Unmap(); ip.IsLoopback() {
		ip = s.Local
	}
	for _, i := range slices.Backward(s.instances) { // the latest with the address
		if slices.Contains(i.addresses, ip) {
			return i
		}
	}
	return nil
}

// meet counts a request, and has it meet with the fault that was asked for. It returns the fault if it takes an answer.
func (s *State) meet(r *http.Request, a Action) Fault {
	s.mu.Lock()
	s.calls[a]++
	fault := s.faults[a]
	if fault == "" && a != Metadata {
		fault = s.faults[All]
	}
	before := s.before
	s.mu.Unlock()
	switch fault {
	case Hang:
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	case Reset:
		panic(http.ErrAbortHandler)
	}
	if before != nil {
		before(a)
	}
	return fault
}
