package cloud

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

// EC2Region is where everything of an EC2 is, and EC2VPC its VPC.
const (
	EC2Region = "eu-test-1"
	EC2VPC    = "vpc-0a0000000000000a0"
)

// ec2Version is the API's; there is no other.
const ec2Version = "2016-11-15"

// EC2 is Amazon's: the Query API of route tables, and instance metadata (IMDSv2).
type EC2 struct{ *State }

// NewEC2 returns an EC2 whose VPC has a main route table.
func NewEC2() EC2 {
	s := newState()
	s.addMain()
	return EC2{s}
}

// ServeHTTP implements http.Handler, both for the API and for the metadata.
func (s EC2) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost && r.URL.Path == "/" {
		s.serveAPI(w, r)
	} else {
		s.serveMetadata(w, r)
	}
}

// A refusal is an error that the API answers with.
type refusal struct{ code, message string }

func (e refusal) Error() string { return e.code + ": " + e.message }

func refuse(code, format string, args ...any) error {
	return refusal{code, fmt.Sprintf(format, args...)}
}

// ec2Status returns the HTTP status that goes with an error code.
func ec2Status(code string) int {
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

// ec2Faults are the errors of faults.
var ec2Faults = map[Fault]refusal{
	NotPermitted: {"UnauthorizedOperation",
		"You are not authorized to perform this operation. Encoded authorization failure message: 9hYb0-"},
	Throttled:      {"RequestLimitExceeded", "Request limit exceeded."},
	Broken:         {"InternalError", "An internal error has occurred"},
	BadCredentials: {"AuthFailure", "AWS was not able to validate the provided access credentials"},
	NoTable:        {"InvalidRouteTableID.NotFound", "The routeTable ID does not exist"},
	Full:           {"RouteLimitExceeded", "The maximum number of routes has been reached."},
}

// ec2Actions are those that there are, with their parameters.
var ec2Actions = map[string]struct {
	action     Action
	do         func(EC2, url.Values) (any, error)
	parameters *regexp.Regexp
}{
	"DescribeRouteTables":             {Read, EC2.describeRouteTables, regexp.MustCompile(`^(Filter\.\d+\.(Name|Value\.\d+)|RouteTableId\.\d+|MaxResults|NextToken)$`)},
	"CreateRoute":                     {Create, EC2.createRoute, routeParameters},
	"ReplaceRoute":                    {Replace, EC2.replaceRoute, routeParameters},
	"DeleteRoute":                     {Delete, EC2.deleteRoute, regexp.MustCompile(`^(RouteTableId|DestinationCidrBlock|DestinationIpv6CidrBlock)$`)},
	"ModifyNetworkInterfaceAttribute": {Forward, EC2.modifyNetworkInterface, regexp.MustCompile(`^(NetworkInterfaceId|SourceDestCheck\.Value)$`)},
}

var routeParameters = regexp.MustCompile(`^(RouteTableId|DestinationCidrBlock|DestinationIpv6CidrBlock|NetworkInterfaceId)$`)

// ec2Credential matches the scope of a signature (SigV4). The signature itself is
// not checked.
var ec2Credential = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/` + EC2Region + `/ec2/aws4_request, SignedHeaders=[^,]+, Signature=[0-9a-f]{64}$`)

func (s EC2) serveAPI(w http.ResponseWriter, r *http.Request) {
	err := r.ParseForm()
	name := r.PostForm.Get("Action")
	action, known := ec2Actions[name]
	fault := s.meet(r, action.action)
	var answer any
	switch {
	case err != nil:
		err = refuse("MalformedQueryString", "%v", err)
	case fault != "":
		err = ec2Faults[fault]
	case !ec2Credential.MatchString(r.Header.Get("Authorization")):
		err = refuse("AuthFailure", "AWS was not able to validate the provided access credentials")
	case !known || r.PostForm.Get("Version") != ec2Version:
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
		w.WriteHeader(ec2Status(no.code))
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
	}{"http://ec2.amazonaws.com/doc/" + ec2Version + "/", request, answer}, xml.StartElement{Name: xml.Name{Local: name +
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

func (s EC2) describeRouteTables(q url.Values) (any, error) {
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
			has = func(*table) []string { return []string{EC2VPC} }
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

func (s EC2) tableXML(t *table) tableXML {
	x := tableXML{ID: t.id, VPC: EC2VPC}
	for _, r := range t.routes {
		y := routeXML{State: "active", Origin: "CreateRoute"}
		if r.Foreign {
			y.Origin = "EnableVgwRoutePropagation"
		}
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
			if i := s.instance(r.Target); i != nil {
				y.Instance = i.id
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

func (s EC2) createRoute(q url.Values) (any, error) {
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
	if s.full(t, dst) {
		return nil, ec2Faults[Full]
	}
	s.add(t, Route{Dst: dst, Target: target})
	return yes{Text: true}, nil
}

func (s EC2) replaceRoute(q url.Values) (any, error) {
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
	t.routes[i] = Route{Dst: dst, Target: target}
	s.change()
	return yes{Text: true}, nil
}

func (s EC2) deleteRoute(q url.Values) (any, error) {
	t, dst, err := s.routeOf(q)
	if err != nil {
		return nil, err
	}
	i := t.find(dst)
	if i < 0 {
		return nil, refuse("InvalidRoute.NotFound", "no route with destination-cidr-block %s in route table %s", dst, t.id)
	}
	if t.routes[i].Foreign {
		return nil, refuse("InvalidParameterValue", "cannot remove the route %s", dst)
	}
	t.routes = slices.Delete(t.routes, i, i+1)
	s.change()
	return yes{Text: true}, nil
}

func (s EC2) modifyNetworkInterface(q url.Values) (any, error) {
	i := s.instance(q.Get("NetworkInterfaceId"))
	if i == nil {
		return nil, refuse("InvalidNetworkInterfaceID.NotFound", "The networkInterface ID '%s' does not exist",
			q.Get("NetworkInterfaceId"))
	}
	on, err := strconv.ParseBool(q.Get("SourceDestCheck.Value"))
	if err != nil {
		return nil, refuse("InvalidParameterValue", "Value (%s) for parameter value is invalid.",
			q.Get("SourceDestCheck.Value"))
	}
	i.forwards = !on
	return yes{Text: true}, nil
}

var tableID = regexp.MustCompile(`^rtb-[0-9a-f]{17}$`)

// existing returns the table with an ID.
func (s EC2) existing(id string) (*table, error) {
	if t := s.table(id); t != nil {
		return t, nil
	}
	if !tableID.MatchString(id) {
		return nil, refuse("InvalidRouteTableID.Malformed", "Invalid id: \"%s\"", id)
	}
	return nil, refuse("InvalidRouteTableID.NotFound", "The routeTable ID '%s' does not exist", id)
}

// routeOf returns which route of which table a call is about.
func (s EC2) routeOf(q url.Values) (*table, netip.Prefix, error) {
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
func (s EC2) target(q url.Values) (string, error) {
	id := q.Get("NetworkInterfaceId")
	if s.instance(id) == nil {
		return "", refuse("InvalidNetworkInterfaceID.NotFound", "The networkInterface ID '%s' does not exist", id)
	}
	return id, nil
}
