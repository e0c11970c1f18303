package tencentvpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common"
	tchttp "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/http"
	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/profile"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/retry"
)

const (
	// version is the version of the VPC API.
	version = "2017-03-12"
	// apiTimeout is for how long a call waits for its answer, in seconds.
	apiTimeout = 20
	// pageSize is how many route tables an answer may have.
	pageSize = 100
	// maxAddresses is about how many addresses DescribeVpcPrivateIpAddresses may be called.
	maxAddresses = 10
)

// A cloud is Tencent Cloud for this node: the metadata of its instance, and the VPC API of its region. It implements
// cloudroute.Cloud.
type cloud struct {
	options
	networks []netip.Prefix
	metadata *metadata
	api      *common.Client
	region   string
	expires  time.Time // zero: the credentials do not expire

	lastErrors retry.LastErrors[string]
}

var regionForm = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// connect finds the region and credentials.
func (o options) connect(ctx context.Context, networks []netip.Prefix) (cloudroute.Cloud, error) {
	c := &cloud{options: o, networks: networks, metadata: newMetadata(), region: os.Getenv("TENCENTCLOUD_REGION"),
		lastErrors: retry.LastErrors[string]{}}
	if c.region == "" {
		var err error
		if c.region, err = c.metadata.get(ctx, "placement/region"); err != nil {
			return nil, noMetadata(err)
		}
	}
	if !regionForm.MatchString(c.region) {
		return nil, fmt.Errorf("%s is no region, such as ap-guangzhou: correct TENCENTCLOUD_REGION, or leave it out",
			plain.Quote(c.region))
	}
	c.api = common.NewCommonClient(nil, c.region, clientProfile(c.region, os.Getenv("TENCENTCLOUD_ENDPOINT")))
	if err := c.logIn(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// clientProfile returns the settings of the SDK. The endpoint is a host name, or a URL; "": Tencent Cloud's own.
func clientProfile(region, endpoint string) *profile.ClientProfile {
	p := profile.NewClientProfile()
	p.Language = "en-US"
	p.HttpProfile.ReqTimeout = apiTimeout
	p.DisableRegionBreaker = true // which would send requests to another region
	if endpoint == "" && strings.HasSuffix(region, "-fsi") {
		endpoint = "vpc." + region + ".tencentcloudapi.com" // financial regions have an API of their own
	}
	if scheme, rest, ok := strings.Cut(endpoint, "://"); ok {
		p.HttpProfile.Scheme, endpoint = scheme, rest
	}
	p.HttpProfile.Endpoint = endpoint
	return p
}

// AllowForwarding implements cloudroute.Cloud: a VPC has no check of source and destination.
func (c *cloud) AllowForwarding(context.Context, cloudroute.NextHop) error { return nil }

// answer is what the API answers. The SDK fills in Response.
type answer struct {
	*tchttp.BaseResponse
	Response any
}

// call calls an action of the API, and returns the code of the API's error, if there is one. Neither the SDK nor call
// repeats a call: cloudroute does.
func (c *cloud) call(ctx context.Context, action string, parameters, into any) (code string, err error) {
	if err := c.logIn(ctx); err != nil {
		return "", err
	}
	body, err := json.Marshal(parameters)
	if err != nil {
		return "", err
	}
	request := tchttp.NewCommonRequest("vpc", version, action)
	request.SetContext(ctx)
	if err := request.SetActionParameters(body); err != nil {
		return "", err
	}
	return c.explain(action, c.api.Send(request, &answer{&tchttp.BaseResponse{}, into}))
}

// A routeTable is the API's object RouteTable.
type routeTable struct {
	ID           string  `json:"RouteTableId"`
	Main         bool    // the default table of the VPC
	Routes       []route `json:"RouteSet"`
	Associations []struct {
		SubnetID string `json:"SubnetId"`
	} `json:"AssociationSet"`
}

// describe returns the route tables of a VPC.
func (c *cloud) describe(ctx context.Context, vpc string) ([]routeTable, error) {
	type filter struct {
		Name   string
		Values []string
	}
	var tables []routeTable
	for {
		var page struct {
			TotalCount int
			Tables     []routeTable `json:"RouteTableSet"`
		}
		if _, err := c.call(ctx, "DescribeRouteTables", struct {
			Filters       []filter
			Offset, Limit string
		}{[]filter{{"vpc-id", []string{vpc}}}, strconv.Itoa(len(tables)), strconv.Itoa(pageSize)}, &page); err != nil {
			return nil, err
		}
		tables = append(tables, page.Tables...)
		if len(page.Tables) == 0 || len(tables) >= page.TotalCount {
			return tables, nil
		}
	}
}

// Tables implements cloudroute.Cloud.
func (c *cloud) Tables(ctx context.Context, hop cloudroute.NextHop) ([]cloudroute.Table, error) {
	found, err := c.describe(ctx, hop.VPC)
	if err != nil {
		return nil, err
	}
	ids := c.RouteTableID
	if len(ids) == 0 {
		t := used(found, hop.Subnet)
		if t == nil {
			return nil, errors.New("the VPC " + plain.Text(hop.VPC) + " shows no route table: does it belong to another account?")
		}
		ids = cloudroute.TableIDs{t.ID}
	}
	var tables []cloudroute.Table
	for _, id := range ids {
		t := cloudroute.Table{ID: id}
		i := slices.IndexFunc(found, func(t routeTable) bool { return t.ID == id })
		if i < 0 {
			t.Err = noTable(hop.VPC)
		} else {
			t.Routes = c.routes(found[i], hop)
		}
		tables = append(tables, t)
	}
	c.findGone(ctx, hop, tables)
	return tables, nil
}

// used returns the table that a subnet uses.
func used(tables []routeTable, subnet string) *routeTable {
	var main *routeTable
	for i, t := range tables {
		for _, a := range t.Associations {
			if a.SubnetID == subnet {
				return &tables[i]
			}
		}
		if t.Main {
			main = &tables[i]
		}
	}
	return main
}

// routes returns the IPv4 routes of a table that users have created.
func (c *cloud) routes(t routeTable, hop cloudroute.NextHop) []cloudroute.Route {
	var routes []cloudroute.Route
	for _, r := range t.Routes {
		destination, err := netip.ParsePrefix(r.Destination)
		if err != nil || r.Type != "USER" && r.Type != "" {
			continue // IPv6, or Tencent Cloud's own
		}
		to := cloudroute.Route{Name: r.name(), Destination: destination.Masked()}
		if r.GatewayType == gatewayType {
			to.NextHop = r.GatewayID
		}
		switch {
		case to.NextHop != hop.ID:
		case r.Enabled != nil && !*r.Enabled:
			to.NextHop += disabled
		case c.PublishToCCN && !r.Published && r.ItemID != "":
			to.NextHop += unpublished
		}
		routes = append(routes, to)
	}
	return routes
}

// findGone marks routes in the networks whose next hop no instance has any more. The API does not say so of a route,
// but which addresses of the VPC are in use. One call asks about few addresses: where there are more, each node asks
// about some of them, chosen at random, and all nodes together ask about all. The address of this node is among them:
// where the answer does not have it, the answer tells nothing of the others.
func (c *cloud) findGone(ctx context.Context, hop cloudroute.NextHop, tables []cloudroute.Table) {
	routes := map[string][]*cloudroute.Route{} // by next hop
	for _, t := range tables {
		for i, r := range t.Routes {
			a, err := netip.ParseAddr(r.NextHop)
			if err == nil && a.Is4() && r.NextHop != hop.ID && c.inside(r.Destination) {
				routes[r.NextHop] = append(routes[r.NextHop], &t.Routes[i])
			}
		}
	}
	if len(routes) == 0 {
		return
	}
	var asked []string
	for a := range routes {
		asked = append(asked, a)
	}
	rand.Shuffle(len(asked), func(i, j int) { asked[i], asked[j] = asked[j], asked[i] })
	asked = append([]string{hop.ID}, asked...)
	asked = asked[:min(len(asked), maxAddresses)]
	var answer struct {
		Addresses []struct {
			Address string `json:"PrivateIpAddress"`
		} `json:"VpcPrivateIpAddressSet"`
	}
	_, err := c.call(ctx, "DescribeVpcPrivateIpAddresses", struct {
		VpcID     string   `json:"VpcId"`
		Addresses []string `json:"PrivateIpAddresses"`
	}{hop.VPC, asked}, &answer)
	if ctx.Err() != context.Canceled {
		c.lastErrors.Log(klog.FromContext(ctx), "Routes of instances that are gone", err)
	}
	inUse := map[string]bool{}
	for _, a := range answer.Addresses {
		inUse[a.Address] = true
	}
	if err != nil || !inUse[hop.ID] {
		return
	}
	for _, a := range asked {
		for _, r := range routes[a] {
			r.Blackhole = !inUse[a]
		}
	}
}

// inside reports whether a prefix is a part of one of the networks.
func (c *cloud) inside(p netip.Prefix) bool {
	return slices.ContainsFunc(c.networks, func(n netip.Prefix) bool {
		return n.Bits() < p.Bits() && n.Contains(p.Addr())
	})
}

// Apply implements cloudroute.Cloud.
func (c *cloud) Apply(ctx context.Context, s cloudroute.Step) (done bool, err error) {
	action, parameters := changeOf(s)
	code, err := c.call(ctx, action, parameters, nil)
	if code == "UnsupportedOperation.DisabledNotifyCcn" { // a route must not be deleted while the CCN has it
		withdrawn := change{RouteTableID: s.Table, RouteItemIDs: []string{s.Route.Name}}
		if code, err = c.call(ctx, "WithdrawNotifyRoutes", withdrawn, nil); err == nil {
			code, err = c.call(ctx, action, parameters, nil)
		}
	}
	if outdated(s.Verb, code) {
		return false, nil
	}
	return err == nil, err
}
