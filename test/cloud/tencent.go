package cloud

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// TencentRegion is where everything of a Tencent is, and TencentVPC its VPC.
const (
	TencentRegion = "ap-test"
	TencentVPC    = "vpc-0000000a"
)

// What the API of Tencent Cloud is asked for besides.
const (
	Addresses Action = "tell addresses that are in use"
	Enable    Action = "enable a route"
	Publish   Action = "publish a route to the CCN"
)

// Empty is the fault of an answer that has nothing in it.
const Empty Fault = "empty answer"

// tencentVersion is the API's; there is no other.
const tencentVersion = "2017-03-12"

// tencentRole is the instances' role.
const tencentRole = "flanneld"

// Tencent is Tencent Cloud: the API 3.0 of VPC route tables, and instance metadata. A route leads to the private address
// of an instance; a destination may have routes to several.
type Tencent struct {
	*State
	// Expires returns when the credentials of the role expire that are asked for.
	Expires func() time.Time

	disabled, published map[string]bool // routes, by ID
	key                 string          // SecretId of the last request
}

// NewTencent returns a Tencent Cloud whose VPC has a default route table.
func NewTencent() *Tencent {
	s := newState()
	s.number = func(kind string) string {
		s.last++
		kind = map[string]string{"route": "rti", "i": "ins"}[kind] + map[string]string{"rtb": "rtb", "eni": "eni"}[kind]
		return fmt.Sprintf("%s-%08s", kind, strconv.FormatInt(int64(s.last), 36))
	}
	s.hop = func(i *instance) string { return i.four() }
	s.addMain()
	forever := func() time.Time { return time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC) }
	return &Tencent{State: s, Expires: forever, disabled: map[string]bool{}, published: map[string]bool{}}
}

// four returns the IPv4 address of an instance.
func (i *instance) four() string {
	for _, a := range i.addresses {
		if a.Is4() {
			return a.String()
		}
	}
	return ""
}

// Disable disables the routes to a destination in the main table.
func (s *Tencent) Disable(dst netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.tables[0].routes {
		if r.Dst == dst {
			s.disabled[r.Name] = true
		}
	}
}

// Published reports whether the CCN has the route to a destination in the main table.
func (s *Tencent) Published(dst netip.Prefix) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.tables[0].find(dst)
	return i >= 0 && s.published[s.tables[0].routes[i].Name]
}

// Beside puts a route into the main table beside those to the same destination.
func (s *Tencent) Beside(r Route) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(s.tables[0], r)
}

// Key returns the SecretId of the last request.
func (s *Tencent) Key() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.key
}

// ServeHTTP implements http.Handler, both for the API and for the metadata.
func (s *Tencent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost && r.URL.Path == "/" {
		s.serveAPI(w, r)
	} else {
		s.serveMetadata(w, r)
	}
}

// tencentRoute is the API's object Route.
type tencentRoute struct {
	RouteItemID              string  `json:"RouteItemId"`
	RouteID                  *uint64 `json:"RouteId"`
	RouteTableID             string  `json:"RouteTableId"`
	DestinationCidrBlock     string
	DestinationIpv6CidrBlock *string
	GatewayType              string
	GatewayID                string `json:"GatewayId"`
	RouteDescription         string
	Enabled                  *bool
	RouteType                string
	PublishedToVbc           *bool
	CreatedTime              string
}

// tencentAction is an action of the API: its parameters are what do takes.
type tencentAction struct {
	action Action
	do     func(s *Tencent, body []byte) (any, error)
}

// takes returns a function that reads the parameters of an action, and refuses others.
func takes[P any](do func(*Tencent, P) (any, error)) func(*Tencent, []byte) (any, error) {
	return func(s *Tencent, body []byte) (any, error) {
		var p P
		d := json.NewDecoder(bytes.NewReader(body))
		d.DisallowUnknownFields()
		if err := d.Decode(&p); err != nil {
			return nil, refuse("UnknownParameter", "%v", err)
		}
		return do(s, p)
	}
}

var tencentActions = map[string]tencentAction{
	"DescribeRouteTables":           {Read, takes((*Tencent).describeRouteTables)},
	"DescribeVpcPrivateIpAddresses": {Addresses, takes((*Tencent).describeAddresses)},
	"CreateRoutes":                  {Create, takes((*Tencent).createRoutes)},
	"ReplaceRoutes":                 {Replace, takes((*Tencent).replaceRoutes)},
	"DeleteRoutes":                  {Delete, takes((*Tencent).deleteRoutes)},
	"EnableRoutes":                  {Enable, takes((*Tencent).enableRoutes)},
	"NotifyRoutes":                  {Publish, takes((*Tencent).notifyRoutes)},
	"WithdrawNotifyRoutes":          {Publish, takes((*Tencent).withdrawRoutes)},
}

// tencentFaults are the errors of faults; "%s" is the name of the action.
var tencentFaults = map[Fault]refusal{
	NotPermitted: {"UnauthorizedOperation", "[request id:%[2]s]you are not authorized to perform operation (vpc:%[1]s)\n" +
		"resource (qcs::vpc:ap-test:uin/100000000001:rtb/*) has no permission\n"},
	Throttled: {"RequestLimitExceeded.UinLimitExceeded", "Your current request times equals to `21` in a second."},
	Broken:    {"InternalError", "An internal error has occurred: %[2]s."},
	BadCredentials: {"AuthFailure.SecretIdNotFound",
		"The SecretId is not found, please ensure that your SecretId is correct."},
	NoTable: {"ResourceNotFound", "The specified route table does not exist."},
	Full:    {"LimitExceeded", "Quota limit is exceeded."},
}

// tencentCredential matches a signature (TC3), which is not checked.
var tencentCredential = regexp.MustCompile(`^TC3-HMAC-SHA256 Credential=([^/]+)/\d{4}-\d\d-\d\d/vpc/tc3_request, SignedHeaders=[^,]*host[^,]*, Signature=[0-9a-f]{64}$`)

func (s *Tencent) serveAPI(w http.ResponseWriter, r *http.Request) {
	name := r.Header.Get("X-TC-Action")
	action, known := tencentActions[name]
	body, err := io.ReadAll(r.Body) // only then is it noticed that the client has gone
	fault := s.meet(r, action.action)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	request := fmt.Sprintf("%08x-0000-4000-8000-000000000000", s.last)
	var answer any
	media, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	seconds, _ := strconv.ParseInt(r.Header.Get("X-TC-Timestamp"), 10, 64)
	if m := tencentCredential.FindStringSubmatch(r.Header.Get("Authorization")); m != nil {
		s.key = m[1]
	}
	switch {
	case err != nil || media != "application/json":
		err = refuse("InvalidParameter", "the body is no JSON: %v, %s", err, media)
	case fault == Empty:
	case fault != "":
		f := tencentFaults[fault]
		err = refusal{f.code, strings.NewReplacer("%[1]s", name, "%[2]s", request).Replace(f.message)}
	case !tencentCredential.MatchString(r.Header.Get("Authorization")) || seconds == 0:
		err = refuse("AuthFailure.InvalidAuthorization", "%s", r.Header.Get("Authorization"))
	case expired(r.Header.Get("X-TC-Token"), seconds):
		err = refuse("AuthFailure.TokenFailure", "The token is expired.")
	case !known || r.Header.Get("X-TC-Version") != tencentVersion:
		err = refuse("InvalidAction", "The action %s is not valid.", name)
	case r.Header.Get("X-TC-Region") != TencentRegion:
		err = refuse("UnsupportedRegion", "The region is not supported.")
	default:
		answer, err = action.do(s, body)
	}
	w.Header().Set("Content-Type", "application/json")
	response := map[string]any{"RequestId": request}
	if err != nil {
		no, ok := err.(refusal)
		if !ok {
			no = refusal{"InternalError", err.Error()}
		}
		if r.Header.Get("X-TC-Language") != "en-US" {
			no.message = "\u9519\u8bef" // as in Chinese, which is the default
		}
		response["Error"] = map[string]string{"Code": no.code, "Message": no.message}
	} else if m, ok := answer.(map[string]any); ok {
		for key, value := range m {
			response[key] = value
		}
	}
	json.NewEncoder(w).Encode(map[string]any{"Response": response})
}

// expired reports whether a token of the role is no longer valid. It ends in the second in which it expires.
func expired(token string, now int64) bool {
	text, ok := strings.CutPrefix(token, "session-")
	until, err := strconv.ParseInt(text, 10, 64)
	return ok && (err != nil || now >= until)
}

// Offset and Limit of DescribeRouteTables are texts.
type describeRouteTables struct {
	Filters []struct {
		Name   string
		Values []string
	}
	RouteTableIDs  []string `json:"RouteTableIds"`
	Offset, Limit  string
	NeedRouterInfo *bool
}

func (s *Tencent) describeRouteTables(p describeRouteTables) (any, error) {
	if len(p.Filters) > 0 && len(p.RouteTableIDs) > 0 {
		return nil, refuse("InvalidParameter.Coexist", "RouteTableIds and Filters cannot be specified at the same time.")
	}
	matches := slices.Clone(s.tables)
	for _, f := range p.Filters {
		var has func(*table) string
		switch f.Name {
		case "route-table-id":
			has = func(t *table) string { return t.id }
		case "vpc-id":
			has = func(*table) string { return TencentVPC }
		case "association.main":
			has = func(t *table) string { return strconv.FormatBool(t.main) }
		default:
			return nil, refuse("InvalidParameter.FilterInvalidKey", "The filter `%s` is invalid", f.Name)
		}
		matches = slices.DeleteFunc(matches, func(t *table) bool { return !slices.Contains(f.Values, has(t)) })
	}
	from, limit := 0, 20
	for text, into := range map[string]*int{p.Offset: &from, p.Limit: &limit} {
		if n, err := strconv.Atoi(text); err == nil && n >= 0 {
			*into = n
		} else if text != "" {
			return nil, refuse("InvalidParameterValue.Malformed", "%q is no number", text)
		}
	}
	total := len(matches)
	if limit > 100 {
		return nil, refuse("InvalidParameterValue.Range", "Limit is at most 100.")
	}
	matches = matches[min(from, total):]
	var tables []any
	for _, t := range matches[:min(len(matches), limit, s.PageSize)] {
		tables = append(tables, s.describe(t))
	}
	return map[string]any{"TotalCount": total, "RouteTableSet": tables}, nil
}

// describe returns the object RouteTable.
func (s *Tencent) describe(t *table) any {
	routes := []any{}
	for _, r := range t.routes {
		on, published := !s.disabled[r.Name], s.published[r.Name]
		x := tencentRoute{RouteItemID: r.Name, RouteTableID: t.id, GatewayType: "NAT", GatewayID: r.Target, Enabled: &on,
			RouteType: "USER", PublishedToVbc: &published, CreatedTime: "2020-09-22 00:00:00"}
		switch {
		case r.Target == "local":
			x.GatewayType, x.DestinationCidrBlock = "LOCAL", "Local"
		case r.Dst.Addr().Is4():
			x.DestinationCidrBlock = r.Dst.String()
		default:
			text := r.Dst.String()
			x.DestinationIpv6CidrBlock = &text
		}
		if r.Foreign {
			x.RouteType, x.GatewayType = "CCN", "CCN"
		}
		if _, err := netip.ParseAddr(r.Target); err == nil {
			x.GatewayType = "NORMAL_CVM"
		}
		routes = append(routes, x)
	}
	associations := []any{}
	for _, subnet := range t.subnets {
		associations = append(associations, map[string]string{"RouteTableId": t.id, "SubnetId": subnet})
	}
	return map[string]any{"RouteTableId": t.id, "VpcId": TencentVPC, "RouteTableName": "table", "Main": t.main,
		"RouteSet": routes, "AssociationSet": associations, "CreatedTime": "2020-09-22 00:00:00"}
}

func (s *Tencent) describeAddresses(p struct {
	VpcID              string   `json:"VpcId"`
	PrivateIPAddresses []string `json:"PrivateIpAddresses"`
}) (any, error) {
	if p.VpcID != TencentVPC {
		return nil, refuse("ResourceNotFound", "The VPC `%s` is not found", p.VpcID)
	}
	if len(p.PrivateIPAddresses) == 0 || len(p.PrivateIPAddresses) > 10 {
		return nil, refuse("InvalidParameterValue.LimitExceeded", "there are %d addresses", len(p.PrivateIPAddresses))
	}
	var all []any
	for _, i := range s.instances {
		if slices.Contains(p.PrivateIPAddresses, i.four()) {
			all = append(all, map[string]string{"PrivateIpAddress": i.four(), "PrivateIpAddressType": "CVM",
				"CidrBlock": "198.18.0.0/16", "CreatedTime": "2020-09-22 00:00:00"})
		}
	}
	return map[string]any{"VpcPrivateIpAddressSet": all}, nil
}

// changeRoutes are the parameters of CreateRoutes, ReplaceRoutes and DeleteRoutes.
type changeRoutes struct {
	RouteTableID string `json:"RouteTableId"`
	Routes       []tencentRoute
}

// nameRoutes are the parameters of actions that take IDs of routes.
type nameRoutes struct {
	RouteTableID string   `json:"RouteTableId"`
	RouteIDs     []uint64 `json:"RouteIds"`
	RouteItemIDs []string `json:"RouteItemIds"`
}

// one returns the table of a call, and the only one of its routes.
func one[R any](s *Tencent, id string, routes []R) (*table, R, error) {
	var none R
	t := s.table(id)
	switch {
	case id == "" || len(routes) == 0:
		return nil, none, refuse("MissingParameter", "RouteTableId and routes are required")
	case t == nil:
		return nil, none, refuse("ResourceNotFound", "The route table `%s` is not found", id)
	case len(routes) > 1:
		return nil, none, refuse("InvalidParameter", "this server takes one route a call")
	}
	return t, routes[0], nil
}

// named returns the index of a route in a table.
func (t *table) named(id string) (int, error) {
	i := slices.IndexFunc(t.routes, func(r Route) bool { return r.Name == id })
	switch {
	case i < 0:
		return i, refuse("ResourceNotFound", "The route `%s` is not found", id)
	case t.routes[i].Foreign:
		return i, refuse("UnsupportedOperation.SystemRoute", "system routes cannot be changed")
	}
	return i, nil
}

// wanted returns the destination that a call wants a route to have.
func (s *Tencent) wanted(r tencentRoute) (netip.Prefix, error) {
	dst, err := netip.ParsePrefix(r.DestinationCidrBlock)
	switch {
	case err != nil || dst != dst.Masked() || !dst.Addr().Is4() || r.DestinationIpv6CidrBlock != nil:
		return dst, refuse("InvalidParameterValue.Malformed", "DestinationCidrBlock `%s`", r.DestinationCidrBlock)
	case dst.Overlaps(netip.MustParsePrefix("198.18.0.0/16")):
		return dst, refuse("InvalidParameterValue.VpcCidrConflict", "`%s` conflicts with the VPC", dst)
	case r.GatewayType != "NORMAL_CVM" || s.instance(r.GatewayID) == nil:
		return dst, refuse("InvalidParameter.NextHopMismatch", "%s `%s`", r.GatewayType, r.GatewayID)
	case r.RouteType != "" || r.PublishedToVbc != nil || r.CreatedTime != "":
		return dst, refuse("InvalidParameter", "this is for answers")
	}
	return dst, nil
}

func (s *Tencent) createRoutes(p changeRoutes) (any, error) {
	t, r, err := one(s, p.RouteTableID, p.Routes)
	if err != nil {
		return nil, err
	}
	dst, err := s.wanted(r)
	if err != nil {
		return nil, err
	}
	same := 0
	for _, other := range t.routes {
		_, notAddress := netip.ParseAddr(other.Target)
		switch {
		case other.Dst != dst:
		case other.Foreign:
			return nil, refuse("UnsupportedOperation.EcmpWithCcnRoute", "Form an ECMP with the CCN route.")
		case notAddress != nil:
			return nil, refuse("UnsupportedOperation.EcmpWithUserRoute", "Form an ECMP with the user's custom routes.")
		case other.Target == r.GatewayID:
			return nil, refuse("InvalidParameterValue.Duplicate", "`%s` is duplicate", dst)
		default:
			same++
		}
	}
	if same >= 8 {
		return nil, refuse("UnsupportedOperation.Ecmp", "ECMP is not supported.")
	}
	if s.full(t, dst) {
		return nil, tencentFaults[Full]
	}
	s.add(t, Route{Dst: dst, Target: r.GatewayID})
	name := t.routes[len(t.routes)-1].Name
	s.disabled[name] = r.Enabled != nil && !*r.Enabled
	return map[string]any{"TotalCount": 1, "RouteTableSet": []any{s.describe(t)}}, nil
}

func (s *Tencent) replaceRoutes(p changeRoutes) (any, error) {
	t, r, err := one(s, p.RouteTableID, p.Routes)
	if err != nil {
		return nil, err
	}
	dst, err := s.wanted(r)
	if err != nil {
		return nil, err
	}
	i, err := t.named(r.RouteItemID)
	if err != nil {
		return nil, err
	}
	t.routes[i] = Route{Name: r.RouteItemID, Dst: dst, Target: r.GatewayID}
	s.disabled[r.RouteItemID] = r.Enabled != nil && !*r.Enabled
	s.change()
	return nil, nil
}

func (s *Tencent) deleteRoutes(p changeRoutes) (any, error) {
	t, r, err := one(s, p.RouteTableID, p.Routes)
	if err != nil {
		return nil, err
	}
	i, err := t.named(r.RouteItemID)
	if err != nil {
		return nil, err
	}
	if s.published[r.RouteItemID] {
		return nil, refuse("UnsupportedOperation.DisabledNotifyCcn", "Please first withdraw it from CCN.")
	}
	t.routes = slices.Delete(t.routes, i, i+1)
	s.change()
	return nil, nil
}

func (s *Tencent) enableRoutes(p nameRoutes) (any, error) {
	if len(p.RouteIDs) > 0 {
		return nil, refuse("InvalidParameter", "this server takes RouteItemIds")
	}
	return s.mark(p, s.disabled, false)
}

func (s *Tencent) notifyRoutes(p nameRoutes) (any, error)   { return s.mark(p, s.published, true) }
func (s *Tencent) withdrawRoutes(p nameRoutes) (any, error) { return s.mark(p, s.published, false) }

func (s *Tencent) mark(p nameRoutes, marks map[string]bool, value bool) (any, error) {
	t, id, err := one(s, p.RouteTableID, p.RouteItemIDs)
	if err != nil {
		return nil, err
	}
	if _, err := t.named(id); err != nil {
		return nil, err
	}
	marks[id] = value
	return nil, nil
}

// serveMetadata answers what an instance asks about itself. Which instance it is, its address tells.
func (s *Tencent) serveMetadata(w http.ResponseWriter, r *http.Request) {
	if fault := s.meet(r, Metadata); fault != "" {
		http.Error(w, string(fault), http.StatusServiceUnavailable)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	self := s.caller(r)
	if self == nil || r.Method != http.MethodGet {
		http.Error(w, "no such instance", http.StatusBadRequest)
		return
	}
	mac := strings.ToUpper(self.mac)
	var credentials []byte
	if strings.HasSuffix(r.URL.Path, tencentRole) {
		until := s.Expires()
		credentials, _ = json.Marshal(map[string]any{
			"TmpSecretId": "AKIDrole", "TmpSecretKey": "secret", "Token": fmt.Sprintf("session-%d", until.Unix()),
			"ExpiredTime": until.Unix(), "Expiration": until.UTC().Format(time.RFC3339), "Code": "Success",
		})
	}
	text, ok := map[string]string{
		"instance-id":                                      self.id,
		"placement/region":                                 TencentRegion,
		"cam/security-credentials/":                        tencentRole,
		"cam/security-credentials/" + tencentRole:          string(credentials),
		"network/interfaces/macs/":                         mac + "/",
		"network/interfaces/macs/" + mac + "/local-ipv4s/": self.four() + "/",
		"network/interfaces/macs/" + mac + "/vpc-id":       TencentVPC,
		"network/interfaces/macs/" + mac + "/subnet-id":    self.subnet,
	}[strings.TrimPrefix(r.URL.Path, "/latest/meta-data/")]
	if !ok {
		http.NotFound(w, r)
		return
	}
	io.WriteString(w, text)
}
