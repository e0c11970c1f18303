package ec2

import (
	"encoding/xml"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// version is the API's; there is no other.
const version = "2016-11-15"

// A refusal is an error that the API answers with.
type refusal struct{ code, message string }

func (e refusal) Error() string { return e.code + ": " + e.message }

func refuse(code, format string, args ...any) error {
	return refusal{code, fmt.Sprintf(format, args...)}
}

// status returns the HTTP status that goes with an error code.
func status(code string) int {
	switch code {
	case "RequestLimitExceeded", "Unavailable":
		return http.StatusServiceUnavailable
	case "InternalError":
		return http.StatusInternalServerError
	case "UnauthorizedOperation", "AuthFailure":
		return http.StatusForbidden
	}
	return http.StatusBadRequest
}

// Messages that some errors come with.
var messages = map[string]string{
	"UnauthorizedOperation": "You are not authorized to perform this operation. Encoded authorization failure message: 9hYb0-",
	"RequestLimitExceeded":  "Request limit exceeded.",
	"InternalError":         "An internal error has occurred",
	"AuthFailure":           "AWS was not able to validate the provided access credentials",
}

// actions are those that there are, with their parameters.
var actions = map[string]struct {
	do         func(*Server, url.Values) (any, error)
	parameters *regexp.Regexp
}{
	"DescribeRouteTables":             {(*Server).describeRouteTables, regexp.MustCompile(`^(Filter\.\d+\.(Name|Value\.\d+)|RouteTableId\.\d+|MaxResults|NextToken)$`)},
	"CreateRoute":                     {(*Server).createRoute, routeParameters},
	"ReplaceRoute":                    {(*Server).replaceRoute, routeParameters},
	"DeleteRoute":                     {(*Server).deleteRoute, regexp.MustCompile(`^(RouteTableId|DestinationCidrBlock|DestinationIpv6CidrBlock)$`)},
	"ModifyNetworkInterfaceAttribute": {(*Server).modifyNetworkInterface, regexp.MustCompile(`^(NetworkInterfaceId|SourceDestCheck\.Value)$`)},
}

var routeParameters = regexp.MustCompile(`^(RouteTableId|DestinationCidrBlock|DestinationIpv6CidrBlock|NetworkInterfaceId)$`)

// credential matches the scope of a signature (SigV4). The signature itself is
// not checked.
var credential = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/` + Region + `/ec2/aws4_request, SignedHeaders=[^,]+, Signature=[0-9a-f]{64}$`)

func (s *Server) serveAPI(w http.ResponseWriter, r *http.Request) {
	err := r.ParseForm()
	name := r.PostForm.Get("Action")
	code := s.meet(r, name)
	action, known := actions[name]
	var answer any
	switch {
	case err != nil:
		err = refuse("MalformedQueryString", "%v", err)
	case code != "":
		err = refusal{code, messages[code]}
	case !credential.MatchString(r.Header.Get("Authorization")):
		err = refuse("AuthFailure", "AWS was not able to validate the provided access credentials")
	case !known || r.PostForm.Get("Version") != version:
		err = refuse("InvalidAction", "The action %s is not valid for this web service.", name)
	default:
		for key, values := range r.PostForm {
			if key != "Action" && key != "Version" && (!action.parameters.MatchString(key) || len(values) != 1) {
				err = refuse("UnknownParameter", "The parameter %s is not recognized", key)
			}
		}
		if err == nil {
			s.mu.Lock()
			answer, err = action.do(s, r.PostForm)
			s.mu.Unlock()
		}
	}
	w.Header().Set("Content-Type", "text/xml;charset=UTF-8")
	s.mu.Lock()
	s.last++
	request := fmt.Sprintf("%08x-0000-4000-8000-000000000000", s.last)
	s.mu.Unlock()
	if err != nil {
		no, ok := err.(refusal)
		if !ok {
			no = refusal{"InternalError", err.Error()}
		}
		w.WriteHeader(status(no.code))
		xml.NewEncoder(w).Encode(struct {
			XMLName   xml.Name `xml:"Response"`
			Code      string   `xml:"Errors>Error>Code"`
			Message   string   `xml:"Errors>Error>Message"`
			RequestID string
		}{Code: no.code, Message: no.message, RequestID: request})
		return
	}
	xml.NewEncoder(w).EncodeElement(struct {
		Xmlns     string `xml:"xmlns,attr"`
		RequestID string `xml:"requestId"`
		Answer    any
	}{"http://ec2.amazonaws.com/doc/" + version + "/", request, answer}, xml.StartElement{Name: xml.Name{Local: name +
		"Response"}})
}

// XML of the answers.
type (
	yes struct {
		XMLName xml.Name `xml:"return"`
		Text    bool     `xml:",chardata"`
	}
	tablesXML struct {
		XMLName xml.Name
		Tables  []tableXML `xml:"item"`
	}
	tableXML struct {
		ID           string           `xml:"routeTableId"`
		VPC          string           `xml:"vpcId"`
		Routes       []routeXML       `xml:"routeSet>item"`
		Associations []associationXML `xml:"associationSet>item"`
	}
	routeXML struct {
		IPv4     string `xml:"destinationCidrBlock,omitempty"`
		IPv6     string `xml:"destinationIpv6CidrBlock,omitempty"`
		Gateway  string `xml:"gatewayId,omitempty"`
		ENI      string `xml:"networkInterfaceId,omitempty"`
		Instance string `xml:"instanceId,omitempty"`
		State    string `xml:"state"`
		Origin   string `xml:"origin"`
	}
	associationXML struct {
		Table  string `xml:"routeTableId"`
		Subnet string `xml:"subnetId,omitempty"`
		Main   bool   `xml:"main"`
		State  string `xml:"associationState>state"`
	}
)

// A page is the route tables of one answer.
type page struct {
	tables tablesXML
	next   string // token of the next one; "": this is the last
}

// MarshalXML writes two elements, without one around them.
func (p page) MarshalXML(e *xml.Encoder, _ xml.StartElement) error {
	if err := e.EncodeElement(p.tables, xml.StartElement{Name: xml.Name{Local: "routeTableSet"}}); err != nil ||
		p.next == "" {
		return err
	}
	return e.EncodeElement(p.next, xml.StartElement{Name: xml.Name{Local: "nextToken"}})
}

func (s *Server) describeRouteTables(q url.Values) (any, error) {
	for i := 1; q.Has(fmt.Sprintf("RouteTableId.%d", i)); i++ {
		if _, err := s.existing(q.Get(fmt.Sprintf("RouteTableId.%d", i))); err != nil {
			return nil, err
		}
	}
	matches := slices.Clone(s.tables)
	for i := 1; q.Has(fmt.Sprintf("Filter.%d.Name", i)); i++ {
		name := q.Get(fmt.Sprintf("Filter.%d.Name", i))
		var values []string
		for j := 1; q.Has(fmt.Sprintf("Filter.%d.Value.%d", i, j)); j++ {
			values = append(values, q.Get(fmt.Sprintf("Filter.%d.Value.%d", i, j)))
		}
		if len(values) == 0 {
			return nil, refuse("InvalidParameterValue", "The filter '%s' has no values", name)
		}
		var has func(*table) []string
		switch name {
		case "route-table-id":
			has = func(t *table) []string { return []string{t.id} }
		case "vpc-id":
			has = func(*table) []string { return []string{VPC} }
		case "association.subnet-id":
			has = func(t *table) []string { return t.subnets }
		case "association.main":
			has = func(t *table) []string { return []string{strconv.FormatBool(t.main)} }
		default:
			return nil, refuse("InvalidParameterValue", "The filter '%s' is invalid", name)
		}
		matches = slices.DeleteFunc(matches, func(t *table) bool {
			return !slices.ContainsFunc(has(t), func(v string) bool { return slices.Contains(values, v) })
		})
	}
	from := 0
	if token := q.Get("NextToken"); token != "" {
		var err error
		if from, err = strconv.Atoi(token); err != nil || from > len(matches) {
			return nil, refuse("InvalidNextToken", "The token is not valid")
		}
	}
	var p page
	to := min(from+s.PageSize, len(matches))
	for _, t := range matches[from:to] {
		p.tables.Tables = append(p.tables.Tables, s.tableXML(t))
	}
	if to < len(matches) {
		p.next = strconv.Itoa(to)
	}
	return p, nil
}

func (s *Server) tableXML(t *table) tableXML {
	x := tableXML{ID: t.id, VPC: VPC}
	for _, r := range t.routes {
		y := routeXML{State: "active", Origin: r.Origin}
		if r.Gone {
			y.State = "blackhole"
		}
		if r.Dst.Addr().Is4() {
			y.IPv4 = r.Dst.String()
		} else {
			y.IPv6 = r.Dst.String()
		}
		if !strings.HasPrefix(r.Target, "eni-") {
			y.Gateway = r.Target
		} else {
			y.ENI = r.Target
			if i := s.networkInterface(r.Target); i != nil {
				y.Instance = i.instance
			}
		}
		x.Routes = append(x.Routes, y)
	}
	for _, subnet := range t.subnets {
		x.Associations = append(x.Associations, associationXML{Table: t.id, Subnet: subnet, State: "associated"})
	}
	if t.main {
		x.Associations = append(x.Associations, associationXML{Table: t.id, Main: true, State: "associated"})
	}
	return x
}

func (s *Server) createRoute(q url.Values) (any, error) {
	t, dst, err := s.routeOf(q)
	if err != nil {
		return nil, err
	}
	target, err := s.target(q)
	if err != nil {
		return nil, err
	}
	if t.find(dst) >= 0 {
		return nil, refuse("RouteAlreadyExists", "The route identified by %s already exists.", dst)
	}
	family := 0
	for _, r := range t.routes {
		if r.Dst.Addr().Is4() == dst.Addr().Is4() && r.Origin == "CreateRoute" {
			family++
		}
	}
	if family >= s.quota {
		return nil, refuse("RouteLimitExceeded", "The maximum number of routes has been reached.")
	}
	t.routes = append(t.routes, Route{Dst: dst, Target: target, Origin: "CreateRoute"})
	s.change()
	return yes{Text: true}, nil
}

func (s *Server) replaceRoute(q url.Values) (any, error) {
	t, dst, err := s.routeOf(q)
	if err != nil {
		return nil, err
	}
	target, err := s.target(q)
	if err != nil {
		return nil, err
	}
	i := t.find(dst)
	if i < 0 {
		return nil, refuse("InvalidParameterValue", "There is no route defined for '%s' in the route table. Use CreateRoute instead.", dst)
	}
	t.routes[i] = Route{Dst: dst, Target: target, Origin: "CreateRoute"}
	s.change()
	return yes{Text: true}, nil
}

func (s *Server) deleteRoute(q url.Values) (any, error) {
	t, dst, err := s.routeOf(q)
	if err != nil {
		return nil, err
	}
	i := t.find(dst)
	if i < 0 {
		return nil, refuse("InvalidRoute.NotFound", "no route with destination-cidr-block %s in route table %s", dst, t.id)
	}
	if t.routes[i].Origin != "CreateRoute" {
		return nil, refuse("InvalidParameterValue", "cannot remove the route %s", dst)
	}
	t.routes = slices.Delete(t.routes, i, i+1)
	s.change()
	return yes{Text: true}, nil
}

func (s *Server) modifyNetworkInterface(q url.Values) (any, error) {
	i := s.networkInterface(q.Get("NetworkInterfaceId"))
	if i == nil {
		return nil, refuse("InvalidNetworkInterfaceID.NotFound", "The networkInterface ID '%s' does not exist",
			q.Get("NetworkInterfaceId"))
	}
	on, err := strconv.ParseBool(q.Get("SourceDestCheck.Value"))
	if err != nil {
		return nil, refuse("InvalidParameterValue", "Value (%s) for parameter value is invalid.",
			q.Get("SourceDestCheck.Value"))
	}
	i.checked = on
	return yes{Text: true}, nil
}

var tableID = regexp.MustCompile(`^rtb-[0-9a-f]{17}$`)

// existing returns the table with an ID.
func (s *Server) existing(id string) (*table, error) {
	if t := s.table(id); t != nil {
		return t, nil
	}
	if !tableID.MatchString(id) {
		return nil, refuse("InvalidRouteTableID.Malformed", "Invalid id: \"%s\"", id)
	}
	return nil, refuse("InvalidRouteTableID.NotFound", "The routeTable ID '%s' does not exist", id)
}

// routeOf returns which route of which table a call is about.
func (s *Server) routeOf(q url.Values) (*table, netip.Prefix, error) {
	four, six := q.Get("DestinationCidrBlock"), q.Get("DestinationIpv6CidrBlock")
	switch {
	case q.Get("RouteTableId") == "":
		return nil, netip.Prefix{}, refuse("MissingParameter", "The request must contain the parameter routeTableId")
	case (four == "") == (six == ""):
		return nil, netip.Prefix{}, refuse("InvalidParameterCombination", "Exactly one destination must be given")
	}
	dst, err := netip.ParsePrefix(four + six)
	if err != nil || dst.Addr().Is4() != (four != "") || dst != dst.Masked() {
		return nil, netip.Prefix{}, refuse("InvalidParameterValue",
			"Value (%s) for parameter destinationCidrBlock is invalid. This is not a valid CIDR block.", four+six)
	}
	t, err := s.existing(q.Get("RouteTableId"))
	return t, dst, err
}

// target returns the interface that a route is to lead to.
func (s *Server) target(q url.Values) (string, error) {
	id := q.Get("NetworkInterfaceId")
	if s.networkInterface(id) == nil {
		return "", refuse("InvalidNetworkInterfaceID.NotFound", "The networkInterface ID '%s' does not exist", id)
	}
	return id, nil
}

func (s *Server) networkInterface(id string) *networkInterface {
	for _, i := range s.interfaces {
		if i.id == id {
			return i
		}
	}
	return nil
}
