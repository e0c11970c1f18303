package cloud

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// AliRegion is where everything of an AliCloud is, and AliVPC its VPC.
const (
	AliRegion = "cn-test"
	AliVPC    = "vpc-t4nvpc"
)

// Look is the action that asks whether instances run.
const Look Action = "look at instances"

// Busy is a fault: another change of the VPC has not ended.
const Busy Fault = "busy"

// AliCloud is Alibaba Cloud's: the RPC APIs of VPC and ECS, and instance metadata.
type AliCloud struct {
	*State

	// Task is how long a change of the VPC takes, by the clock of the clients. The VPC refuses others meanwhile.
	Task time.Duration
	// Secondary has instances use their second network interface, to which routes then lead.
	Secondary bool
	// NoTokens is a metadata service without the hardened mode.
	NoTokens bool
	// NoRole is an instance without a RAM role.
	NoRole bool
	// RoleEnds is when credentials of the role end, by the clock of the clients.
	RoleEnds time.Time
	// Stopped are instances that do not run. Stop adds to them.
	Stopped map[string]bool
	// Hosted are destinations of custom entries that a transit router manages.
	Hosted map[netip.Prefix]bool

	used map[string]bool // AccessKeys, with their tokens
	busy time.Time       // until when the VPC makes a change
}

// NewAliCloud returns an AliCloud whose VPC has a system route table.
func NewAliCloud() *AliCloud {
	s := newState()
	c := &AliCloud{State: s, Task: 3 * time.Second, RoleEnds: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
		Stopped: map[string]bool{}, used: map[string]bool{}}
	s.number = func(kind string) string {
		s.last++
		if kind == "rtb" {
			kind = "vtb"
		}
		return fmt.Sprintf("%s-t4n%017x", kind, s.last)
	}
	s.hop = func(i *instance) string {
		if c.Secondary {
			return i.eni
		}
		return i.id
	}
	s.addMain()
	return c
}

// UsedKeys returns the AccessKeys that the API has seen since the last call, each with its token.
func (c *AliCloud) UsedKeys() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer clear(c.used)
	return slices.Sorted(maps.Keys(c.used))
}

// Stop stops an instance.
func (c *AliCloud) Stop(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Stopped[id] = true
}

// ServeHTTP implements http.Handler, both for the APIs and for the metadata.
func (c *AliCloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost && r.URL.Path == "/" {
		c.serveAPI(w, r)
	} else {
		c.serveMetadata(w, r)
	}
}

// An aliError is an error that the API answers with.
type aliError struct {
	status        int
	code, message string
}

func (e aliError) Error() string { return e.code + ": " + e.message }

// aliFaults are the errors of faults.
var aliFaults = map[Fault]aliError{
	NotPermitted:   {403, "Forbidden.RAM", "User not authorized to operate on the specified resource, or this API doesn't support RAM."},
	Throttled:      {400, "Throttling.User", "Request was denied due to user flow control."},
	Broken:         {500, "InternalError", "The request processing has failed due to some unknown error."},
	BadCredentials: {404, "InvalidAccessKeyId.NotFound", "Specified access key is not found."},
	NoTable:        {404, "InvalidRouteTableId.NotFound", "Specified route table does not exist."},
	Full:           {400, "QuotaExceeded", "Route entry quota exceeded in this route table."},
	Busy:           {400, "TaskConflict", "The operation is too frequent, please wait a moment and try again."},
}

// Errors without a fault.
var (
	aliDuplicate = aliError{400, "RouterEntryConflict.Duplicated", "A route entry already exists, which CIDR is the same."}
	aliNoEntry   = aliError{400, "InvalidRouteEntry.NotFound", "Route entry not exists."}
	aliNoHop     = aliError{404, "InvalidNextHopId.NotFound", "Specified next hop does not exist."}
	aliUnstable  = aliError{400, "IncorrectRouteEntryStatus", "The vpc has NotStable routeEntry status."}
)

// aliActions are those that there are, with their product's version and their parameters: those that must be, and,
// after a comma, those that may be.
var aliActions = map[string]struct {
	action               Action
	version              string
	required, parameters string
	do                   func(*AliCloud, url.Values, time.Time) (any, error)
}{
	"DescribeRouteTableList": {Read, aliVPCVersion, "RegionId", "VpcId PageNumber PageSize RouteTableId RouterId", (*AliCloud).routeTables},
	"DescribeRouteEntryList": {Read, aliVPCVersion, "RegionId RouteTableId", "RouteEntryType MaxResult NextToken IpVersion", (*AliCloud).entries},
	"CreateRouteEntry":       {Create, aliVPCVersion, "RouteTableId DestinationCidrBlock NextHopId", "RegionId NextHopType ClientToken", (*AliCloud).create},
	"ModifyRouteEntry":       {Replace, aliVPCVersion, "RegionId RouteTableId DestinationCidrBlock", "NewNextHopType NewNextHopId", (*AliCloud).modify},
	"DeleteRouteEntry":       {Delete, aliVPCVersion, "RouteTableId DestinationCidrBlock NextHopId", "RegionId", (*AliCloud).delete},
	"DescribeInstanceStatus": {Look, aliECSVersion, "RegionId", "PageNumber PageSize InstanceId", (*AliCloud).instanceStatus},
	"DescribeNetworkInterfaces": {Forward, aliECSVersion, "RegionId", "MaxResults NextToken NetworkInterfaceId",
		(*AliCloud).networkInterfaces},
	"ModifyNetworkInterfaceAttribute": {Forward, aliECSVersion, "RegionId NetworkInterfaceId", "SourceDestCheck",
		(*AliCloud).modifyInterface},
}

const (
	aliVPCVersion = "2016-04-28"
	aliECSVersion = "2014-05-26"
)

// aliCredential matches a signature. The signature itself is not checked.
var aliCredential = regexp.MustCompile(`^ACS3-HMAC-SHA256 Credential=([^,]+),SignedHeaders=([^,]+),Signature=[0-9a-f]{64}$`)

func (c *AliCloud) serveAPI(w http.ResponseWriter, r *http.Request) {
	name := r.Header.Get("x-acs-action")
	action, known := aliActions[name]
	fault := c.meet(r, action.action)
	now, timeErr := time.Parse(time.RFC3339, r.Header.Get("x-acs-date"))
	signed := aliCredential.FindStringSubmatch(r.Header.Get("Authorization"))
	q := r.URL.Query()
	var answer any = map[string]any{}
	var err error
	switch {
	case fault != "":
		err = aliFaults[fault]
	case !known || r.Header.Get("x-acs-version") != action.version:
		err = aliError{404, "InvalidAction.NotFound", "Specified api is not found, please check your url and method."}
	case signed == nil || timeErr != nil || r.Header.Get("x-acs-signature-nonce") == "":
		err = aliError{400, "IncompleteSignature", "The request signature does not conform to Aliyun standards."}
	default:
		if err = checkParameters(q, strings.Fields(action.required), strings.Fields(action.parameters)); err == nil {
			c.mu.Lock()
			c.used[signed[1]+" "+r.Header.Get("x-acs-security-token")] = true
			answer, err = action.do(c, q, now)
			c.mu.Unlock()
		}
	}
	c.mu.Lock()
	c.last++
	request := fmt.Sprintf("%08X-0000-4000-8000-000000000000", c.last)
	c.mu.Unlock()
	w.Header().Set("Content-Type", "application/json;charset=utf-8")
	if err != nil {
		no := err.(aliError)
		w.WriteHeader(no.status)
		answer = map[string]any{"Code": no.code, "Message": no.message, "HostId": r.Host,
			"Recommend": "https://api.aliyun.com/troubleshoot?q=" + no.code + "&requestId=" + request}
	}
	fields, _ := json.Marshal(answer)
	all := map[string]any{"RequestId": request}
	json.Unmarshal(fields, &all)
	json.NewEncoder(w).Encode(all)
}

// item is the number at the end of the name of a parameter that is a list.
var item = regexp.MustCompile(`\.\d+$`)

// checkParameters returns an error if a parameter is missing, or unknown. The true API ignores what it does not know.
func checkParameters(q url.Values, required, others []string) error {
	for _, name := range required {
		if q.Get(name) == "" {
			return aliError{400, "MissingParameter", "Miss mandatory parameter " + name + "."}
		}
	}
	for key := range q {
		if !slices.Contains(append(required, others...), item.ReplaceAllString(key, "")) {
			return aliError{400, "UnknownParameter", "There is no parameter " + key + "."}
		}
	}
	if region := q.Get("RegionId"); region != "" && region != AliRegion {
		return aliError{404, "InvalidRegionId.NotFound", "The RegionId provided does not exist in our records."}
	}
	return nil
}

// number returns a number between 1 and most.
func aliNumber(q url.Values, name string, most int) (int, error) {
	n, err := strconv.Atoi(q.Get(name))
	if err != nil || n < 1 || n > most {
		return 0, aliError{400, "InvalidParameter", "The specified parameter " + name + " is not valid."}
	}
	return n, nil
}

// list returns the values of a parameter that is a list.
func list(q url.Values, name string, most int) ([]string, error) {
	var all []string
	for i := 1; q.Has(fmt.Sprintf("%s.%d", name, i)); i++ {
		all = append(all, q.Get(fmt.Sprintf("%s.%d", name, i)))
	}
	if len(all) > most {
		return nil, aliError{400, "InvalidParameter", "Too many values of " + name + "."}
	}
	return all, nil
}

func (c *AliCloud) routeTables(q url.Values, _ time.Time) (any, error) {
	page, err := aliNumber(q, "PageNumber", 1000)
	if err != nil {
		return nil, err
	}
	size, err := aliNumber(q, "PageSize", 50)
	if err != nil {
		return nil, err
	}
	size = min(size, c.PageSize)
	type table = map[string]any
	var tables []table
	for _, t := range c.tables {
		x := table{"RouteTableId": t.id, "RouteTableType": "Custom", "VpcId": AliVPC, "Status": "Available", "RouterType": "VRouter",
			"VSwitchIds": map[string]any{"VSwitchId": append([]string{}, t.subnets...)}}
		if t.main {
			x["RouteTableType"] = "System"
		}
		tables = append(tables, x)
	}
	if q.Get("VpcId") != AliVPC {
		tables = nil
	}
	from, to := min((page-1)*size, len(tables)), min(page*size, len(tables))
	return table{"TotalCount": len(tables), "PageNumber": page, "PageSize": size,
		"RouterTableList": table{"RouterTableListType": append([]table{}, tables[from:to]...)}}, nil
}

func (c *AliCloud) entries(q url.Values, now time.Time) (any, error) {
	t := c.State.table(q.Get("RouteTableId"))
	if t == nil {
		return nil, aliFaults[NoTable]
	}
	size, err := aliNumber(q, "MaxResult", 100)
	if err != nil {
		return nil, err
	}
	size = min(size, c.PageSize)
	from := 0
	if token := q.Get("NextToken"); token != "" {
		if from, err = strconv.Atoi(strings.TrimPrefix(token, "token")); err != nil {
			return nil, aliError{400, "InvalidNextToken", "The token is not valid."}
		}
	}
	type object = map[string]any
	var all []object
	for i, r := range t.routes {
		x := object{"RouteEntryId": r.Name, "DestinationCidrBlock": r.Dst.String(), "Type": "Custom", "Status": "Available",
			"RouteTableId": t.id, "Origin": "CustomCreate", "ServiceType": "", "IpVersion": "IPv4"}
		hop := object{"NextHopId": r.Target, "NextHopType": aliHopType(r.Target)}
		if r.Foreign {
			x["Type"], x["Origin"] = "System", "SystemCreate"
		}
		if c.Hosted[r.Dst] {
			x["ServiceType"] = "TR"
		}
		if r.Dst.Addr().Is6() {
			x["IpVersion"] = "IPv6"
		}
		if i == len(t.routes)-1 && now.Before(c.busy) {
			x["Status"] = "Pending"
		}
		x["NextHops"] = object{"NextHop": []object{hop}}
		if want := q.Get("RouteEntryType"); want == "" || want == x["Type"] {
			all = append(all, x)
		}
	}
	to := min(from+size, len(all))
	answer := object{"RouteEntrys": object{"RouteEntry": append([]object{}, all[min(from, to):to]...)}}
	if to < len(all) {
		answer["NextToken"] = fmt.Sprintf("token%d", to)
	}
	return answer, nil
}

func aliHopType(id string) string {
	switch kind, _, _ := strings.Cut(id, "-"); kind {
	case "i":
		return "Instance"
	case "eni":
		return "NetworkInterface"
	case "local":
		return "local"
	}
	return "NatGateway"
}

// change returns the table and the destination that a change is about, or that the VPC makes another change.
func (c *AliCloud) changeOf(q url.Values, now time.Time) (*table, netip.Prefix, error) {
	t := c.State.table(q.Get("RouteTableId"))
	if t == nil {
		return nil, netip.Prefix{}, aliFaults[NoTable]
	}
	dst, err := netip.ParsePrefix(q.Get("DestinationCidrBlock"))
	if err != nil || dst != dst.Masked() {
		return nil, dst, aliError{400, "InvalidCidrBlock.Malformed", "Specified CIDR block is not valid."}
	}
	if now.Before(c.busy) {
		return nil, dst, aliUnstable
	}
	return t, dst, nil
}

// target returns the next hop of parameters.
func (c *AliCloud) target(id, kind string) (string, error) {
	if c.instance(id) == nil || kind != aliHopType(id) {
		return "", aliNoHop
	}
	return id, nil
}

func (c *AliCloud) create(q url.Values, now time.Time) (any, error) {
	t, dst, err := c.changeOf(q, now)
	if err != nil {
		return nil, err
	}
	target, err := c.target(q.Get("NextHopId"), q.Get("NextHopType"))
	switch {
	case err != nil:
		return nil, err
	case t.find(dst) >= 0:
		return nil, aliDuplicate
	case c.full(t, dst):
		return nil, aliFaults[Full]
	}
	c.add(t, Route{Dst: dst, Target: target})
	c.busy = now.Add(c.Task)
	return map[string]any{"RouteEntryId": t.routes[len(t.routes)-1].Name}, nil
}

func (c *AliCloud) modify(q url.Values, now time.Time) (any, error) {
	t, dst, err := c.changeOf(q, now)
	if err != nil {
		return nil, err
	}
	target, err := c.target(q.Get("NewNextHopId"), q.Get("NewNextHopType"))
	if err != nil {
		return nil, err
	}
	i := t.find(dst)
	if i < 0 || t.routes[i].Foreign {
		return nil, aliError{400, "InvalidRouteEntryId.NotFound", "The specified routeEntry does not exist."}
	}
	t.routes[i].Target, t.routes[i].Gone = target, false
	c.change()
	c.busy = now.Add(c.Task)
	return map[string]any{}, nil
}

func (c *AliCloud) delete(q url.Values, now time.Time) (any, error) {
	t, dst, err := c.changeOf(q, now)
	if err != nil {
		return nil, err
	}
	i := t.find(dst)
	if i < 0 || t.routes[i].Foreign || t.routes[i].Target != q.Get("NextHopId") {
		return nil, aliNoEntry
	}
	t.routes = slices.Delete(t.routes, i, i+1)
	c.change()
	c.busy = now.Add(c.Task)
	return map[string]any{}, nil
}

func (c *AliCloud) instanceStatus(q url.Values, _ time.Time) (any, error) {
	ids, err := list(q, "InstanceId", 100)
	if err != nil {
		return nil, err
	}
	size, err := aliNumber(q, "PageSize", 50)
	if err != nil {
		return nil, err
	}
	all := []map[string]any{}
	for _, i := range c.instances {
		if slices.Contains(ids, i.id) && len(all) < size {
			status := "Running"
			if c.Stopped[i.id] {
				status = "Stopped"
			}
			all = append(all, map[string]any{"InstanceId": i.id, "Status": status})
		}
	}
	return map[string]any{"TotalCount": len(all), "InstanceStatuses": map[string]any{"InstanceStatus": all}}, nil
}

func (c *AliCloud) networkInterfaces(q url.Values, _ time.Time) (any, error) {
	ids, err := list(q, "NetworkInterfaceId", 100)
	if err != nil {
		return nil, err
	}
	all := []map[string]any{}
	for _, i := range c.instances {
		if slices.Contains(ids, i.eni) {
			all = append(all, map[string]any{"NetworkInterfaceId": i.eni, "InstanceId": i.id, "Status": "InUse",
				"SourceDestCheck": !i.forwards})
		}
	}
	return map[string]any{"NetworkInterfaceSets": map[string]any{"NetworkInterfaceSet": all}}, nil
}

func (c *AliCloud) modifyInterface(q url.Values, _ time.Time) (any, error) {
	on, err := strconv.ParseBool(q.Get("SourceDestCheck"))
	for _, i := range c.instances {
		if i.eni == q.Get("NetworkInterfaceId") && err == nil {
			i.forwards = !on
			return map[string]any{}, nil
		}
	}
	return nil, aliError{404, "InvalidEniId.NotFound", "The specified EniId does not exist."}
}

// serveMetadata answers what an instance asks about itself. Which instance it is, its address tells.
func (c *AliCloud) serveMetadata(w http.ResponseWriter, r *http.Request) {
	if fault := c.meet(r, Metadata); fault != "" {
		http.Error(w, string(fault), http.StatusServiceUnavailable)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	self := c.caller(r)
	if self == nil {
		http.Error(w, "no such instance", http.StatusNotFound)
		return
	}
	if r.URL.Path == "/latest/api/token" && !c.NoTokens {
		seconds, err := strconv.Atoi(r.Header.Get("X-aliyun-ecs-metadata-token-ttl-seconds"))
		if r.Method != http.MethodPut || err != nil || seconds < 1 || seconds > 21600 {
			http.Error(w, "Bad Request", http.StatusBadRequest)
			return
		}
		token := c.number("token")
		c.tokens[token+self.id] = true
		io.WriteString(w, token)
		return
	}
	if r.Method != http.MethodGet || !c.NoTokens && !c.tokens[r.Header.Get("X-aliyun-ecs-metadata-token")+self.id] {
		http.Error(w, "Forbidden", http.StatusForbidden)
		return
	}
	text, ok := c.metadata(self)[strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/latest/meta-data/"), "/")]
	if !ok {
		http.NotFound(w, r)
		return
	}
	io.WriteString(w, text)
}

// aliRole is the instances' role.
const aliRole = "flanneld"

// metadata returns all that there is to know of an instance, by path.
func (c *AliCloud) metadata(i *instance) map[string]string {
	role, _ := json.Marshal(map[string]any{"Code": "Success", "AccessKeyId": "STS.EXAMPLE", "AccessKeySecret": "secret",
		"SecurityToken": fmt.Sprintf("session%d", c.RoleEnds.Unix()), "LastUpdated": "2000-01-01T00:00:00Z",
		"Expiration": c.RoleEnds.UTC().Format(time.RFC3339)})
	var four, six []string
	for _, a := range i.addresses {
		if a.Is4() {
			four = append(four, strconv.Quote(a.String()))
		} else {
			six = append(six, a.String())
		}
	}
	all := map[string]string{
		"instance-id": i.id, "region-id": AliRegion, "mac": i.mac, "vpc-id": AliVPC,
		"ram/security-credentials":            aliRole,
		"ram/security-credentials/" + aliRole: string(role),
		"network/interfaces/macs":             i.mac + "/",
	}
	if c.NoRole {
		delete(all, "ram/security-credentials")
	}
	if c.Secondary {
		all["mac"] = "02:00:00:00:01:00"
	}
	for key, value := range map[string]string{"network-interface-id": i.eni, "vswitch-id": i.subnet, "vpc-id": AliVPC,
		"private-ipv4s": "[" + strings.Join(four, ",") + "]"} {
		all["network/interfaces/macs/"+i.mac+"/"+key] = value
	}
	if len(six) > 0 {
		all["network/interfaces/macs/"+i.mac+"/ipv6s"] = "[" + strings.Join(six, ",") + "]"
	}
	return all
}
