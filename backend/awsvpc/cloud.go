package awsvpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go/logging"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
)

// mainInterval is the interval of checks whether the subnet of the uplink still uses the main route table of the VPC. A
// check takes two more calls than reading the table.
const mainInterval = 10 * time.Minute

// A cloud is AWS for this node: the metadata of its instance, and the EC2 API of its region.
type cloud struct {
	options
	metadata *imds.Client
	api      *ec2.Client
	region   string
	login    aws.CredentialsProvider

	main   string // the main table of the VPC, if the uplink's subnet uses it
	mainAt time.Time
}

// connect finds the region and credentials. They and all other settings come from where all AWS tools find them.
func (o options) connect(ctx context.Context) (cloudroute.Cloud, error) {
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRetryer(retryer), config.WithLogger(logging.Nop{}))
	if err != nil {
		return nil, fmt.Errorf("AWS configuration: %w", err)
	}
	c := &cloud{options: o, metadata: imds.NewFromConfig(cfg)}
	if cfg.Region == "" {
		answer, err := c.metadata.GetRegion(ctx, nil)
		if err != nil {
			return nil, noMetadata(err)
		}
		cfg.Region = answer.Region
	}
	c.api, c.region, c.login = ec2.NewFromConfig(cfg), cfg.Region, cfg.Credentials
	if _, err := c.login.Retrieve(ctx); err != nil {
		return nil, noCredentials(err)
	}
	return c, nil
}

// retryer sends fewer requests while EC2 throttles. It has no quota of retries, which an outage would use up: the
// interval of reconciliations limits the requests.
func retryer() aws.Retryer {
	return retry.NewAdaptiveMode(func(o *retry.AdaptiveModeOptions) {
		o.StandardOptions = append(o.StandardOptions, func(o *retry.StandardOptions) { o.RateLimiter = ratelimit.None })
	})
}

// NextHop implements cloudroute.Cloud: it is the network interface that has the address of the uplink.
func (c *cloud) NextHop(ctx context.Context, uplink iface.Uplink) (cloudroute.NextHop, error) {
	var none cloudroute.NextHop
	macs, err := c.list(ctx, "")
	if err != nil {
		return none, err
	}
	var others []string
	for _, mac := range macs {
		mac = strings.TrimSuffix(mac, "/")
		four, err := c.list(ctx, mac+"/local-ipv4s")
		if err != nil {
			return none, err
		}
		six, err := c.list(ctx, mac+"/ipv6s")
		if err != nil {
			return none, err
		}
		if !holds(append(four, six...), uplink.IPv4.Addr) && !holds(append(four, six...), uplink.IPv6.Addr) {
			others = append(append(others, four...), six...)
			continue
		}
		var found cloudroute.NextHop
		for _, f := range []struct {
			key  string
			into *string
		}{{"interface-id", &found.ID}, {"subnet-id", &found.Subnet}, {"vpc-id", &found.VPC}} {
			values, err := c.list(ctx, mac+"/"+f.key)
			if err != nil {
				return none, err
			}
			if len(values) != 1 {
				return none, fmt.Errorf("the instance metadata has no %s for the interface %s: is it in a VPC?", f.key, mac)
			}
			*f.into = values[0]
		}
		return found, nil
	}
	return none, fmt.Errorf("no network interface of this instance has the address of the uplink %s; they have %s: "+
		"have --iface name one that has, or restart flanneld once it is attached", uplink, strings.Join(others, ", "))
}

func holds(texts []string, ip netip.Addr) bool {
	return ip.IsValid() && slices.ContainsFunc(texts, func(text string) bool {
		a, err := netip.ParseAddr(text)
		return err == nil && a == ip
	})
}

// list returns the lines of the metadata under a key of the interfaces; none, if the key does not exist.
func (c *cloud) list(ctx context.Context, key string) ([]string, error) {
	answer, err := c.metadata.GetMetadata(ctx, &imds.GetMetadataInput{Path: "network/interfaces/macs/" + key})
	var refusal *smithyhttp.ResponseError
	if errors.As(err, &refusal) && refusal.HTTPStatusCode() == http.StatusNotFound {
		return nil, nil
	}
	if err != nil {
		return nil, noMetadata(err)
	}
	defer answer.Content.Close()
	text, err := io.ReadAll(answer.Content)
	if err != nil {
		return nil, noMetadata(err)
	}
	return strings.Fields(string(text)), nil
}

// AllowForwarding implements cloudroute.Cloud: it turns the source/destination check of the interface off.
func (c *cloud) AllowForwarding(ctx context.Context, eni cloudroute.NextHop) error {
	_, err := c.api.ModifyNetworkInterfaceAttribute(ctx, &ec2.ModifyNetworkInterfaceAttributeInput{
		NetworkInterfaceId: &eni.ID,
		SourceDestCheck:    &types.AttributeBooleanValue{Value: aws.Bool(false)},
	})
	explained := c.explain(ctx, "ModifyNetworkInterfaceAttribute", err)
	if code(err) == "UnauthorizedOperation" {
		return &cloudroute.CannotForward{Err: explained, Fix: "aws ec2 modify-network-interface-attribute " +
			"--no-source-dest-check --network-interface-id " + plain.Shell(eni.ID)}
	}
	return explained
}

// Tables implements cloudroute.Cloud.
func (c *cloud) Tables(ctx context.Context, eni cloudroute.NextHop) ([]cloudroute.Table, error) {
	found, err := c.read(ctx, eni)
	if err != nil {
		return nil, err
	}
	var tables []cloudroute.Table
	missing := slices.Clone(c.RouteTableID)
	for _, t := range found {
		table := routes(t)
		tables = append(tables, table)
		missing = slices.DeleteFunc(missing, func(id string) bool { return id == table.ID })
	}
	for _, id := range missing {
		tables = append(tables, cloudroute.Table{ID: id, Err: c.noTable()})
	}
	return tables, nil
}

// read returns the tables of the configuration, or that of the subnet, or the main one.
func (c *cloud) read(ctx context.Context, eni cloudroute.NextHop) ([]types.RouteTable, error) {
	if len(c.RouteTableID) > 0 {
		return c.describe(ctx, append([]string{"route-table-id"}, c.RouteTableID...))
	}
	if c.main != "" && time.Since(c.mainAt) < mainInterval {
		if found, err := c.describe(ctx, []string{"route-table-id", c.main}); err != nil || len(found) > 0 {
			return found, err
		}
	}
	c.main = ""
	found, err := c.describe(ctx, []string{"association.subnet-id", eni.Subnet})
	if err != nil || len(found) > 0 {
		return found, err
	}
	found, err = c.describe(ctx, []string{"vpc-id", eni.VPC}, []string{"association.main", "true"})
	if err == nil && len(found) == 0 {
		err = errors.New("neither the subnet " + eni.Subnet + " nor the VPC " + eni.VPC + " shows a route table: " +
			"is the VPC shared by another account? Only its owner can change its routes")
	}
	if err == nil {
		c.main, c.mainAt = aws.ToString(found[0].RouteTableId), time.Now()
	}
	return found, err
}

// routes returns the routes of a table that were created by a call of the API. Routes that a gateway propagates come
// and go with the gateway.
func routes(table types.RouteTable) cloudroute.Table {
	t := cloudroute.Table{ID: aws.ToString(table.RouteTableId)}
	for _, route := range table.Routes {
		if route.Origin != types.RouteOriginCreateRoute && route.Origin != "" {
			continue
		}
		text := aws.ToString(route.DestinationCidrBlock)
		if text == "" {
			text = aws.ToString(route.DestinationIpv6CidrBlock)
		}
		dst, err := netip.ParsePrefix(text)
		if err != nil { // a prefix list
			continue
		}
		t.Routes = append(t.Routes, cloudroute.Route{
			Destination: dst.Masked(),
			NextHop:     cmp.Or(aws.ToString(route.NetworkInterfaceId), aws.ToString(route.InstanceId)),
			Blackhole:   route.State == types.RouteStateBlackhole,
		})
	}
	return t
}

// describe returns the route tables that match all filters: name, value, value, and so on. It does not use the
// paginator of the SDK, with which the linker keeps all of the client's hundreds of calls: 34 MB.
func (c *cloud) describe(ctx context.Context, filters ...[]string) ([]types.RouteTable, error) {
	in := &ec2.DescribeRouteTablesInput{}
	for _, f := range filters {
		in.Filters = append(in.Filters, types.Filter{Name: &f[0], Values: f[1:]})
	}
	var tables []types.RouteTable
	for {
		page, err := c.api.DescribeRouteTables(ctx, in)
		if err != nil {
			return nil, c.explain(ctx, "DescribeRouteTables", err)
		}
		tables = append(tables, page.RouteTables...)
		if aws.ToString(page.NextToken) == "" {
			return tables, nil
		}
		in.NextToken = page.NextToken
	}
}

// Apply implements cloudroute.Cloud.
func (c *cloud) Apply(ctx context.Context, s cloudroute.Step) (done bool, err error) {
	var four, six *string
	text := s.Route.Destination.String()
	if s.Route.Destination.Addr().Is4() {
		four = &text
	} else {
		six = &text
	}
	var action string
	switch s.Verb {
	case cloudroute.Create:
		action = "CreateRoute"
		_, err = c.api.CreateRoute(ctx, &ec2.CreateRouteInput{RouteTableId: &s.Table,
			DestinationCidrBlock: four, DestinationIpv6CidrBlock: six, NetworkInterfaceId: &s.Route.NextHop})
	case cloudroute.Replace:
		action = "ReplaceRoute"
		_, err = c.api.ReplaceRoute(ctx, &ec2.ReplaceRouteInput{RouteTableId: &s.Table,
			DestinationCidrBlock: four, DestinationIpv6CidrBlock: six, NetworkInterfaceId: &s.Route.NextHop})
	case cloudroute.Delete:
		action = "DeleteRoute"
		_, err = c.api.DeleteRoute(ctx, &ec2.DeleteRouteInput{RouteTableId: &s.Table,
			DestinationCidrBlock: four, DestinationIpv6CidrBlock: six})
	}
	if outdated(err) {
		return false, nil
	}
	return err == nil, c.explain(ctx, action, err)
}
