// Package ec2 is as much of Amazon's EC2 as the aws-vpc backend talks to: the
// Query API of route tables, and instance metadata (IMDSv2). The real SDK
// speaks to it over HTTP. It keeps state, checks parameters, and fails as it is
// told.
package ec2

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"sync"
)

// Region is where everything is.
const Region = "eu-test-1"

// VPC is the only one.
const VPC = "vpc-0a0000000000000a0"

// Server is one account's EC2. Its methods may be called at any time.
type Server struct {
	// Local is the address of the instance that asks from a loopback address.
	Local netip.Addr
	// PageSize is how many route tables an answer has at most.
	PageSize int

	mu         sync.Mutex
	quota      int // of routes, for each table and family
	last       int // number given to a resource
	tables     []*table
	interfaces []*networkInterface
	tokens     map[string]bool // of IMDSv2
	faults     map[string]string
	before     func(action string)
	calls      map[string]int
	forward    func(map[netip.Prefix]netip.Addr)
}

// A table is a route table.
type table struct {
	id      string
	main    bool
	subnets []string // associated
	routes  []Route
}

// A Route is a route of a table.
type Route struct {
	Dst    netip.Prefix
	Target string // eni-…, igw-… or local
	Gone   bool   // the target is: a blackhole
	Origin string // CreateRoute, CreateRouteTable, EnableVgwRoutePropagation
}

// networkInterface is an instance's only one.
type networkInterface struct {
	id, instance, mac, subnet string
	addresses                 []netip.Addr
	checked                   bool // the source/destination check is on
}

// New returns an EC2 whose VPC has a main route table.
func New() *Server {
	s := &Server{quota: 500, PageSize: 100, tokens: map[string]bool{}, faults: map[string]string{},
		calls: map[string]int{}}
	s.AddTable()
	s.tables[0].main = true
	return s
}

// ServeHTTP implements http.Handler, both for the API and for the metadata.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost && r.URL.Path == "/" {
		s.serveAPI(w, r)
	} else {
		s.serveMetadata(w, r)
	}
}

// number returns the ID of a new resource.
func (s *Server) number(kind string) string {
	s.last++
	return fmt.Sprintf("%s-0%016x", kind, s.last)
}

// Main returns the ID of the main route table.
func (s *Server) Main() string { return s.tables[0].id }

// AddTable adds a route table for the subnets, and returns its ID.
func (s *Server) AddTable(subnets ...string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := &table{id: s.number("rtb"), subnets: subnets}
	t.routes = []Route{{Dst: netip.MustParsePrefix("198.18.0.0/16"), Target: "local", Origin: "CreateRouteTable"}}
	s.tables = append(s.tables, t)
	return t.id
}

// Launch starts an instance with these addresses in a subnet, and returns the
// ID of its network interface.
func (s *Server) Launch(subnet string, addresses ...netip.Addr) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := &networkInterface{id: s.number("eni"), instance: s.number("i"), subnet: subnet, addresses: addresses,
		checked: true}
	i.mac = fmt.Sprintf("02:00:00:00:00:%02x", s.last)
	s.interfaces = append(s.interfaces, i)
	return i.id
}

// Terminate ends the instance that has an interface. Routes to it become
// blackholes.
func (s *Server) Terminate(eni string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.interfaces = slices.DeleteFunc(s.interfaces, func(i *networkInterface) bool { return i.id == eni })
	for _, t := range s.tables {
		for i := range t.routes {
			if t.routes[i].Target == eni {
				t.routes[i].Gone = true
			}
		}
	}
	s.change()
}

// Put puts a route into a table, in place of one with the same destination.
func (s *Server) Put(table string, r Route) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.table(table)
	if i := t.find(r.Dst); i >= 0 {
		t.routes = slices.Delete(t.routes, i, i+1)
	}
	t.routes = append(t.routes, r)
	s.change()
}

// Remove removes a route.
func (s *Server) Remove(table string, dst netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.table(table)
	if i := t.find(dst); i >= 0 {
		t.routes = slices.Delete(t.routes, i, i+1)
	}
	s.change()
}

// Routes returns the routes of a table that nodes, or persons, have made, as
// texts such as "10.5.1.0/24 eni-07", in the order of their destinations, with
// " blackhole" where the target is gone.
func (s *Server) Routes(table string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	routes := slices.Clone(s.table(table).routes)
	slices.SortFunc(routes, func(a, b Route) int { return a.Dst.Compare(b.Dst) })
	var texts []string
	for _, r := range routes {
		if r.Origin != "CreateRoute" {
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

// Forward has f do what the VPC's router does: it is called with what the main
// route table says, whenever that changes. The values are interfaces' addresses.
func (s *Server) Forward(f func(map[netip.Prefix]netip.Addr)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forward = f
}

// Checked reports whether an interface's source/destination check is on.
func (s *Server) Checked(eni string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range s.interfaces {
		if i.id == eni {
			return i.checked
		}
	}
	return false
}

// SetQuota sets how many routes each table may have of a family, "Routes per
// route table".
func (s *Server) SetQuota(routes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.quota = routes
}

// Faults that Fail takes besides the API's error codes.
const (
	Hang  = "hang"  // no answer
	Reset = "reset" // the connection is closed
)

// Fail has an action, "*" for all and "metadata" for those, answer with an error
// code or a fault; "" ends that.
func (s *Server) Fail(action, fault string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[action] = fault
}

// Before has f called before each action is taken.
func (s *Server) Before(f func(action string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = f
}

// Calls returns how often an action was asked for.
func (s *Server) Calls(action string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[action]
}

// change is called after a change, with the lock held.
func (s *Server) change() {
	if s.forward == nil {
		return
	}
	gateways := map[netip.Prefix]netip.Addr{}
	for _, r := range s.tables[0].routes {
		i := s.networkInterface(r.Target)
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

func (s *Server) table(id string) *table {
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

// meet has a request meet with the fault that was asked for. It returns the
// error code to answer with, if any.
func (s *Server) meet(r *http.Request, action string) (code string) {
	s.mu.Lock()
	s.calls[action]++
	fault := s.faults[action]
	if fault == "" && action != "metadata" {
		fault = s.faults["*"]
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
		before(action)
	}
	return fault
}
