package awsvpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/flanneld/flanneld/pkg/iface"
)

// A cloud is AWS for this node: the metadata of its instance, and the EC2 API of its region. The errors of a cloud say
// what to do about them.
type cloud struct {
	metadata *imds.Client
	api      *ec2.Client
	region   string
	login    aws.CredentialsProvider
}

// connect finds the region. Credentials and all other settings come from where all AWS tools find them.
func connect(ctx context.Context) (*cloud, error) {
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRetryer(retryer))
	if err != nil {
		return nil, fmt.Errorf("AWS configuration: %w", err)
	}
	c := &cloud{metadata: imds.NewFromConfig(cfg)}
	if cfg.Region == "" {
		answer, err := c.metadata.GetRegion(ctx, nil)
		if err != nil {
			return nil, noMetadata(err)
		}
		cfg.Region = answer.Region
	}
	c.api, c.region, c.login = ec2.NewFromConfig(cfg), cfg.Region, cfg.Credentials
	return c, nil
}

// retryer sends fewer requests while EC2 throttles. It has no quota of retries, which an outage would use up: the
// interval of reconciliations limits the requests.
func retryer() aws.Retryer {
	return retry.NewAdaptiveMode(func(o *retry.AdaptiveModeOptions) {
		o.StandardOptions = append(o.StandardOptions, func(o *retry.StandardOptions) { o.RateLimiter = ratelimit.None })
	})
}

// An eni is a network interface of this instance.
type eni struct{ id, subnet, vpc string }

// find returns the network interface that has the address of the uplink.
func (c *cloud) find(ctx context.Context, uplink iface.Uplink) (eni, error) {
	macs, err := c.list(ctx, "")
	if err != nil {
		return eni{}, err
	}
	var others []string
	for _, mac := range macs {
		mac = strings.TrimSuffix(mac, "/")
		four, err := c.list(ctx, mac+"/local-ipv4s")
		if err != nil {
			return eni{}, err
		}
		six, err := c.list(ctx, mac+"/ipv6s")
		if err != nil {
			return eni{}, err
		}
		if !holds(append(four, six...), uplink.IPv4) && !holds(append(four, six...), uplink.IPv6) {
			others = append(append(others, four...), six...)
			continue
		}
		var found eni
		for _, f := range []struct {
			key  string
			into *string
		}{{"interface-id", &found.id}, {"subnet-id", &found.subnet}, {"vpc-id", &found.vpc}} {
			values, err := c.list(ctx, mac+"/"+f.key)
			if err != nil {
				return eni{}, err
			}
			if len(values) != 1 {
				return eni{}, fmt.Errorf("the instance metadata has no %s for the interface %s: is it in a VPC?", f.key, mac)
			}
			*f.into = values[0]
		}
		return found, nil
	}
	return eni{}, fmt.Errorf("no network interface of this instance has the address of the uplink %s; they have %s: "+
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

// disableCheck turns the source/destination check of an interface off, and reports whether this node has the
// permission.
func (c *cloud) disableCheck(ctx context.Context, eni string) (permitted bool, err error) {
	_, err = c.api.ModifyNetworkInterfaceAttribute(ctx, &ec2.ModifyNetworkInterfaceAttributeInput{
		NetworkInterfaceId: &eni,
		SourceDestCheck:    &types.AttributeBooleanValue{Value: aws.Bool(false)},
	})
	return code(err) != "UnauthorizedOperation", c.explain("ModifyNetworkInterfaceAttribute", err)
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
			return nil, c.explain("DescribeRouteTables", err)
		}
		tables = append(tables, page.RouteTables...)
		if aws.ToString(page.NextToken) == "" {
			return tables, nil
		}
		in.NextToken = page.NextToken
	}
}

// apply makes the call of a step. If another program has changed the same route meanwhile, done is false, without an
// error.
func (c *cloud) apply(ctx context.Context, s step) (done bool, err error) {
	var four, six *string
	text := s.dst.String()
	if s.dst.Addr().Is4() {
		four = &text
	} else {
		six = &text
	}
	var action string
	switch s.verb {
	case createRoute:
		action = "CreateRoute"
		_, err = c.api.CreateRoute(ctx, &ec2.CreateRouteInput{
			RouteTableId: &s.table, DestinationCidrBlock: four, DestinationIpv6CidrBlock: six, NetworkInterfaceId: &s.eni,
		})
	case replaceRoute:
		action = "ReplaceRoute"
		_, err = c.api.ReplaceRoute(ctx, &ec2.ReplaceRouteInput{
			RouteTableId: &s.table, DestinationCidrBlock: four, DestinationIpv6CidrBlock: six, NetworkInterfaceId: &s.eni,
		})
	case deleteRoute:
		action = "DeleteRoute"
		_, err = c.api.DeleteRoute(ctx, &ec2.DeleteRouteInput{
			RouteTableId: &s.table, DestinationCidrBlock: four, DestinationIpv6CidrBlock: six,
		})
	}
	if outdated(err) {
		return false, nil
	}
	return err == nil, c.explain(action, err)
}
