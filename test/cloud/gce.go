package cloud

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Where everything of a GCE is. The network is that of gceHost where it is shared.
const (
	gceProject = "flannel-test"
	gceNumber  = "111111111111" // of gceProject
	gceHost    = "flannel-host"
	gceZone    = "europe-test1-b"
)

// WaitOperation is the action to wait for an operation of a GCE, and NotReady its fault that another operation on the
// same route has not ended.
const (
	WaitOperation Action = "wait for an operation"
	NotReady      Fault  = "another operation"
)

// GCE is Google's: Compute Engine's API of routes, and the metadata server.
type GCE struct {
	*State
	*gceState
}

type gceState struct {
	shared     bool             // the network is another project's
	network    string           // its name
	waits      int              // requests to wait for an operation until it ends
	lifetime   int              // of tokens, in seconds; 0: instances have no service account
	others     []map[string]any // routes as the API has them, which the State has not
	operations map[string]*gceOperation
	mux        http.ServeMux
}

// A gceOperation takes effect when somebody has waited for it often enough: until then, the answer is that it runs.
type gceOperation struct {
	Name   string `json:"name"`
	Kind   string `json:"operationType"`
	Status string `json:"status"`
	Error  any    `json:"error,omitempty"`

	waits int
	do    func() error
}

// NewGCE returns a GCE with one network. A network that is shared is that of another project.
func NewGCE(network string, shared bool) GCE {
	s := GCE{newState(), &gceState{shared: shared, network: network, lifetime: 7200, waits: 2, operations: map[string]*gceOperation{}}}
	number := s.number
	s.number = func(kind string) string {
		if kind == "rtb" {
			return s.networkPath()
		}
		return number(kind)
	}
	s.hop = s.hopOf
	s.name = func(dst netip.Prefix) string { return s.routeName(dst) }
	s.forwards = true
	s.addMain()
	const global, zonal = "/compute/v1/projects/{project}/global/", "/compute/v1/projects/{project}/zones/"
	for pattern, m := range map[string]gceMethod{
		"GET " + global + "routes":           {Read, "compute.routes.list", "filter pageToken maxResults", s.listRoutes},
		"GET " + global + "routes/{name}":    {Read, "compute.routes.get", "", s.getRoute},
		"POST " + global + "routes":          {Create, "compute.routes.create", "requestId", s.insertRoute},
		"DELETE " + global + "routes/{name}": {Delete, "compute.routes.delete", "requestId", s.deleteRoute},
		"POST " + global + "operations/{name}/wait": {WaitOperation, "compute.globalOperations.get", "",
			s.waitOperation},
		"GET " + zonal + "{zone}/instances/{name}": {Forward, "compute.instances.get", "", s.getInstance},
	} {
		s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, m) })
	}
	s.mux.HandleFunc("GET /computeMetadata/v1/", s.serveMetadata)
	return s
}

// ServeHTTP implements http.Handler, both for the API and for the metadata.
func (s GCE) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

func (s GCE) networkPath() string {
	if s.shared {
		return "projects/" + gceHost + "/global/networks/" + s.network
	}
	return "projects/" + gceProject + "/global/networks/" + s.network
}

// hopOf returns the path of an instance, or its addresses, where the network is shared.
func (s GCE) hopOf(i *instance) string {
	if !s.shared {
		return "projects/" + gceProject + "/zones/" + gceZone + "/instances/" + i.id
	}
	var texts []string
	for _, a := range i.addresses {
		texts = append(texts, a.String())
	}
	return strings.Join(texts, ",")
}

// routeName returns the name that a node gives to the route to a subnet.
func (s GCE) routeName(dst netip.Prefix) string {
	name := "flannel-" + strings.Map(func(c rune) rune {
		if strings.ContainsRune(".:/", c) {
			return '-'
		}
		return c
	}, dst.String())
	if s.network != "default" {
		name += "-" + s.network
	}
	return name
}

// SetForwards sets whether an instance may forward packets.
func (s GCE) SetForwards(hop string, on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.instance(hop).forwards = on
}

// AddRoute adds a route as the API has it, which Routes does not show.
func (s GCE) AddRoute(route map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.others = append(s.others, route)
}

// Others returns the names of the routes that were added with AddRoute.
func (s GCE) Others() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for _, r := range s.others {
		names = append(names, r["name"].(string))
	}
	return names
}

// A gceMethod is a method of the API.
type gceMethod struct {
	action     Action
	permission string
	parameters string // names, besides those that all methods have
	do         func(*http.Request) (any, error)
}

// A gceError is an error that the API answers with.
type gceError struct {
	status          int
	reason, message string
}

func (e gceError) Error() string { return e.message }

// serve answers one request.
func (s GCE) serve(w http.ResponseWriter, r *http.Request, m gceMethod) {
	answer, err := s.answer(r, m)
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	if err != nil {
		var refusal gceError
		if !errors.As(err, &refusal) {
			refusal = gceError{http.StatusBadRequest, "invalid", err.Error()}
		}
		w.WriteHeader(refusal.status)
		answer = map[string]any{"error": map[string]any{"code": refusal.status, "message": refusal.message,
			"errors": []any{map[string]any{"domain": "global", "reason": refusal.reason, "message": refusal.message}}}}
	}
	json.NewEncoder(w).Encode(answer)
}

func (s GCE) answer(r *http.Request, m gceMethod) (any, error) {
	if fault := s.meet(r, m.action); fault != "" {
		return nil, s.faultOf(fault, m)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	query := r.URL.Query()
	for key, values := range query {
		if len(values) != 1 || !slices.Contains(strings.Fields("alt prettyPrint fields "+m.parameters), key) {
			return nil, fmt.Errorf("Invalid JSON payload received. Unknown name %q: Cannot bind query parameter.", key)
		}
	}
	if token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); !ok || !s.tokens[token] {
		return nil, s.faultOf(BadCredentials, m)
	}
	answer, err := m.do(r)
	if err != nil || !query.Has("fields") {
		return answer, err
	}
	return partial(answer, query.Get("fields"))
}

// faultOf returns the error of a fault.
func (s GCE) faultOf(f Fault, m gceMethod) error {
	switch f {
	case NotPermitted:
		return gceError{http.StatusForbidden, "forbidden", fmt.Sprintf("Required '%s' permission for '%s'", m.permission,
			s.networkPath())}
	case BadCredentials:
		return gceError{http.StatusUnauthorized, "authError", "Request had invalid authentication credentials."}
	case Throttled:
		return gceError{http.StatusForbidden, "rateLimitExceeded", "Quota exceeded for quota metric 'Read requests' and " +
			"limit 'Read requests per minute' of service 'compute.googleapis.com' for consumer 'project_number:" + gceNumber + "'."}
	case NoTable:
		return gceError{http.StatusNotFound, "notFound", "The resource '" + s.networkPath() + "' was not found"}
	case Full:
		return gceError{http.StatusForbidden, "quotaExceeded", gceFull}
	case NotReady:
		return gceError{http.StatusBadRequest, "resourceNotReady", "The resource is not ready"}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return gceError{http.StatusServiceUnavailable, "backendError", "Internal error. Please try again or contact Google " +
		"Support. (Code: '" + s.number("code") + "')"}
}

const gceFull = "Quota 'STATIC_ROUTES_PER_NETWORK' exceeded.  Limit: 200.0 globally."

// partial returns the fields of an answer that a request wants: "items(name,warnings/code),nextPageToken".
func partial(answer any, fields string) (any, error) {
	text, err := json.Marshal(answer)
	if err != nil {
		return nil, err
	}
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		return nil, err
	}
	return masked(value, fields), nil
}

func masked(value any, fields string) any {
	switch v := value.(type) {
	case []any:
		for i := range v {
			v[i] = masked(v[i], fields)
		}
	case map[string]any:
		out := map[string]any{}
		for _, field := range splitFields(fields) {
			name, rest := field, ""
			if i := strings.IndexAny(field, "(/"); i >= 0 {
				name, rest = field[:i], strings.TrimSuffix(field[i+1:], ")")
			}
			if inner, ok := v[name]; ok {
				out[name] = inner
				if rest != "" {
					out[name] = masked(inner, rest)
				}
			}
		}
		return out
	}
	return value
}

// splitFields splits at the commas that are not in parentheses.
func splitFields(fields string) []string {
	depth := 0
	return strings.FieldsFunc(fields, func(c rune) bool {
		switch c {
		case '(':
			depth++
		case ')':
			depth--
		}
		return c == ',' && depth == 0
	})
}

const gceURL = "https://www.googleapis.com/compute/v1/"

// routes returns all routes of the project that the network is in, as the API has them.
func (s GCE) routes() []map[string]any {
	var all []map[string]any
	for _, r := range s.tables[0].routes {
		route := map[string]any{"name": r.Name, "destRange": r.Dst.String(), "network": gceURL + s.networkPath(),
			"priority": 1000}
		switch i := s.addressTo(r); {
		case strings.HasPrefix(r.Target, "projects/"):
			route["nextHopInstance"] = gceURL + r.Target
		case i.IsValid():
			route["nextHopIp"] = i.String()
		case r.Foreign:
			route["nextHopNetwork"], route["priority"] = gceURL+s.networkPath(), 0
		default:
			route["nextHopGateway"] = gceURL + "projects/" + gceProject + "/global/gateways/default-internet-gateway"
		}
		if r.Gone {
			code := "NEXT_HOP_INSTANCE_NOT_FOUND"
			if route["nextHopIp"] != nil {
				code = "NEXT_HOP_ADDRESS_NOT_ASSIGNED"
			}
			route["warnings"] = []any{map[string]any{"code": code, "message": "The next hop is gone."}}
		}
		all = append(all, route)
	}
	return append(all, s.others...)
}

// addressTo returns the address that a route leads to, where the network is shared.
func (s GCE) addressTo(r Route) netip.Addr {
	for text := range strings.SplitSeq(r.Target, ",") {
		if a, err := netip.ParseAddr(text); err == nil && a.Is4() == r.Dst.Addr().Is4() {
			return a
		}
	}
	return netip.Addr{}
}

// check refuses requests for another project than that of the network.
func (s GCE) check(r *http.Request) error {
	if project := r.PathValue("project"); !strings.HasPrefix(s.networkPath(), "projects/"+project+"/") {
		return gceError{http.StatusNotFound, "notFound", "The resource 'projects/" + project + "' was not found"}
	}
	return nil
}

var gceFilter = regexp.MustCompile(`^network eq "([^"]+)"$`)

func (s GCE) listRoutes(r *http.Request) (any, error) {
	if err := s.check(r); err != nil {
		return nil, err
	}
	all := s.routes()
	if filter := r.URL.Query().Get("filter"); filter != "" {
		m := gceFilter.FindStringSubmatch(filter)
		if m == nil {
			return nil, fmt.Errorf("Invalid value for field 'filter': '%s'. Invalid list filter expression.", filter)
		}
		whole, err := regexp.Compile("^(?:" + m[1] + ")$")
		if err != nil {
			return nil, err
		}
		all = slices.DeleteFunc(all, func(route map[string]any) bool { return !whole.MatchString(route["network"].(string)) })
	}
	from := 0
	if token := r.URL.Query().Get("pageToken"); token != "" {
		var err error
		if from, err = strconv.Atoi(token); err != nil || from > len(all) {
			return nil, fmt.Errorf("Invalid value for field 'pageToken': '%s'.", token)
		}
	}
	to := min(from+s.PageSize, len(all))
	answer := map[string]any{"kind": "compute#routeList", "items": all[from:to]}
	if to < len(all) {
		answer["nextPageToken"] = strconv.Itoa(to)
	}
	return answer, nil
}

// named returns a route.
func (s GCE) named(name string) (map[string]any, error) {
	for _, route := range s.routes() {
		if route["name"] == name {
			return route, nil
		}
	}
	return nil, gceError{http.StatusNotFound, "notFound", "The resource 'global/routes/" + name + "' was not found"}
}

func (s GCE) getRoute(r *http.Request) (any, error) {
	if err := s.check(r); err != nil {
		return nil, err
	}
	return s.named(r.PathValue("name"))
}

// operate starts an operation.
func (s GCE) operate(kind string, do func() error) *gceOperation {
	o := &gceOperation{Name: s.number("operation"), Kind: kind, Status: "PENDING", do: do}
	s.operations[o.Name] = o
	return o
}

func (s GCE) waitOperation(r *http.Request) (any, error) {
	o := s.operations[r.PathValue("name")]
	if o == nil {
		return nil, gceError{http.StatusNotFound, "notFound", "The resource of the operation was not found"}
	}
	o.Status = "RUNNING"
	if o.waits++; o.waits < s.waits {
		return o, nil
	}
	o.Status = "DONE"
	if o.do != nil {
		if err := o.do(); err != nil {
			code := map[bool]string{true: "QUOTA_EXCEEDED", false: "RESOURCE_ALREADY_EXISTS"}[err.Error() == gceFull]
			o.Error = map[string]any{"errors": []any{map[string]any{"code": code, "message": err.Error()}}}
		}
		o.do = nil
	}
	return o, nil
}

var gceName = regexp.MustCompile(`^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$`)

func (s GCE) insertRoute(r *http.Request) (any, error) {
	if err := s.check(r); err != nil {
		return nil, err
	}
	var in struct {
		Name, Description, DestRange, Network, NextHopInstance, NextHopIP string
		Priority                                                          int
	}
	decoder := json.NewDecoder(r.Body)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&in); err != nil {
		return nil, err
	}
	dst, err := netip.ParsePrefix(in.DestRange)
	switch {
	case !gceName.MatchString(in.Name):
		return nil, fmt.Errorf("Invalid value for field 'resource.name': '%s'. Must be a match of regex '%s'", in.Name, gceName)
	case err != nil || dst != dst.Masked():
		return nil, fmt.Errorf("Invalid value for field 'resource.destRange': '%s'.", in.DestRange)
	case netip.MustParsePrefix("198.18.0.0/16").Contains(dst.Addr()):
		return nil, fmt.Errorf("Invalid value for field 'resource.destRange': '%s'. %s hides the address space of the "+
			"network %s. Cannot change the routing of packets destined for the network.", dst, dst, s.network)
	case strings.TrimPrefix(in.Network, gceURL) != s.networkPath():
		return nil, fmt.Errorf("Invalid value for field 'resource.network': '%s'.", in.Network)
	case in.Priority != 1000:
		return nil, fmt.Errorf("Invalid value for field 'resource.priority': '%d'.", in.Priority)
	}
	target, err := s.target(in.NextHopInstance, in.NextHopIP, dst)
	if err != nil {
		return nil, err
	}
	taken := func() error {
		if _, err := s.named(in.Name); err == nil {
			return gceError{http.StatusConflict, "alreadyExists", "The resource 'global/routes/" + in.Name + "' already exists"}
		}
		return nil
	}
	if err := taken(); err != nil {
		return nil, err
	}
	return s.operate("insert", func() error {
		if err := taken(); err != nil {
			return err
		}
		if s.full(s.tables[0], dst) {
			return errors.New(gceFull)
		}
		s.add(s.tables[0], Route{Name: in.Name, Dst: dst, Target: target})
		return nil
	}), nil
}

// target returns the next hop that a route is to lead to: an instance of the same project, or an address.
func (s GCE) target(path, address string, dst netip.Prefix) (string, error) {
	switch i := s.instance(path); {
	case (path == "") == (address == ""):
		return "", errors.New("Invalid value for field 'resource': ''. Exactly one next hop must be specified.")
	case path != "" && (i == nil || s.shared):
		return "", gceError{http.StatusNotFound, "notFound", "The resource '" + path + "' was not found"}
	case path != "":
		return path, nil
	}
	a, err := netip.ParseAddr(address)
	for _, i := range s.instances {
		if err == nil && slices.Contains(i.addresses, a) && a.Is4() == dst.Addr().Is4() {
			return s.hop(i), nil
		}
	}
	return "", fmt.Errorf("Invalid value for field 'resource.nextHopIp': '%s'.", address)
}

func (s GCE) deleteRoute(r *http.Request) (any, error) {
	if err := s.check(r); err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	if _, err := s.named(name); err != nil {
		return nil, err
	}
	return s.operate("delete", func() error {
		t := s.tables[0]
		t.routes = slices.DeleteFunc(t.routes, func(r Route) bool { return r.Name == name })
		s.others = slices.DeleteFunc(s.others, func(r map[string]any) bool { return r["name"] == name })
		s.change()
		return nil
	}), nil
}

func (s GCE) getInstance(r *http.Request) (any, error) {
	for _, i := range s.instances {
		if r.PathValue("project") == gceProject && r.PathValue("zone") == gceZone && r.PathValue("name") == i.id {
			return map[string]any{"name": i.id, "canIpForward": i.forwards,
				"networkInterfaces": []any{map[string]any{"network": gceURL + s.networkPath()}}}, nil
		}
	}
	return nil, gceError{http.StatusNotFound, "notFound", "The resource '" + r.URL.Path + "' was not found"}
}

// serveMetadata answers what an instance asks about itself. Which instance it is, its address tells.
func (s GCE) serveMetadata(w http.ResponseWriter, r *http.Request) {
	if fault := s.meet(r, Metadata); fault != "" {
		http.Error(w, string(fault), http.StatusServiceUnavailable)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	self := s.caller(r)
	if r.Header.Get("Metadata-Flavor") != "Google" || self == nil {
		http.Error(w, "Missing Metadata-Flavor:Google header.", http.StatusForbidden)
		return
	}
	w.Header().Set("Metadata-Flavor", "Google")
	path := strings.TrimPrefix(r.URL.Path, "/computeMetadata/v1/")
	if path == "instance/service-accounts/default/token" && s.lifetime > 0 {
		if r.URL.Query().Get("scopes") != "https://www.googleapis.com/auth/compute" {
			http.Error(w, "Bad Request", http.StatusBadRequest)
			return
		}
		token := s.number("token")
		s.tokens[token] = true
		json.NewEncoder(w).Encode(map[string]any{"access_token": token, "expires_in": s.lifetime, "token_type": "Bearer"})
		return
	}
	text, ok := s.metadata(self)[path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	io.WriteString(w, text)
}

// metadata returns all that there is to know of an instance, by path.
func (s GCE) metadata(i *instance) map[string]string {
	number := gceNumber
	if s.shared {
		number = "222222222222"
	}
	all := map[string]string{
		"project/project-id":                    gceProject,
		"project/numeric-project-id":            gceNumber,
		"instance/name":                         i.id,
		"instance/zone":                         "projects/" + gceNumber + "/zones/" + gceZone,
		"instance/network-interfaces/":          "0/\n",
		"instance/network-interfaces/0/network": "projects/" + number + "/networks/" + s.network,
		"universe/universe-domain":              "googleapis.com",
	}
	for _, a := range i.addresses {
		if a.Is4() {
			all["instance/network-interfaces/0/ip"] = a.String()
		} else {
			all["instance/network-interfaces/0/ipv6s"] += a.StringExpanded() + "\n"
		}
	}
	return all
}
