package awsvpc

import (
	"errors"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go"

	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/backend/cloudroute"
)

// What the backend does to route tables, test/cloud tests, with a server.

func TestGolden(t *testing.T)    { backendtest.Golden(t) }
func TestReference(t *testing.T) { backendtest.Keys(t, options{}) }

func TestCommand(t *testing.T) {
	to := func(dst, hop string) cloudroute.Route {
		return cloudroute.Route{Destination: netip.MustParsePrefix(dst), NextHop: hop}
	}
	for want, s := range map[string]cloudroute.Step{
		"aws ec2 create-route --route-table-id rtb-1 --destination-cidr-block 10.5.1.0/24 --network-interface-id eni-1":           {Verb: cloudroute.Create, Table: "rtb-1", Route: to("10.5.1.0/24", "eni-1")},
		"aws ec2 replace-route --route-table-id rtb-1 --destination-ipv6-cidr-block fd05:0:0:1::/64 --network-interface-id eni-1": {Verb: cloudroute.Replace, Table: "rtb-1", Route: to("fd05:0:0:1::/64", "eni-1")},
		"aws ec2 delete-route --route-table-id rtb-1 --destination-cidr-block 10.5.1.0/24":                                        {Verb: cloudroute.Delete, Table: "rtb-1", Route: to("10.5.1.0/24", "eni-1")},
		// What AWS, or who is in its place, answers.
		`aws ec2 create-route --route-table-id 'rtb-1;reboot' --destination-cidr-block 10.5.1.0/24 --network-interface-id $'eni-1\012\033[2J'`: {
			Verb: cloudroute.Create, Table: "rtb-1;reboot", Route: to("10.5.1.0/24", "eni-1\n\x1b[2J")},
	} {
		if got := command(s); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

// TestRoutes: which routes of a table are those of nodes, or may be.
func TestRoutes(t *testing.T) {
	created := types.RouteOriginCreateRoute
	got := routes(types.RouteTable{RouteTableId: aws.String("rtb-1"), Routes: []types.Route{
		{DestinationCidrBlock: aws.String("10.5.1.0/24"), NetworkInterfaceId: aws.String("eni-1"), InstanceId: aws.String("i-1"), Origin: created},
		{DestinationIpv6CidrBlock: aws.String("fd05:0:0:1::/64"), NetworkInterfaceId: aws.String("eni-2"), State: types.RouteStateBlackhole},
		{DestinationCidrBlock: aws.String("10.5.2.0/24"), InstanceId: aws.String("i-1"), Origin: created},
		{DestinationCidrBlock: aws.String("10.5.3.0/24"), GatewayId: aws.String("nat-1"), Origin: created},
		{DestinationCidrBlock: aws.String("10.5.4.0/24"), GatewayId: aws.String("vgw-1"), Origin: types.RouteOriginEnableVgwRoutePropagation},
		{DestinationCidrBlock: aws.String("198.18.0.0/16"), GatewayId: aws.String("local"), Origin: types.RouteOriginCreateRouteTable},
		{DestinationPrefixListId: aws.String("pl-1"), GatewayId: aws.String("vpce-1"), Origin: created},
	}})
	to := func(dst, hop string, blackhole bool) cloudroute.Route {
		return cloudroute.Route{Destination: netip.MustParsePrefix(dst), NextHop: hop, Blackhole: blackhole}
	}
	want := cloudroute.Table{ID: "rtb-1", Routes: []cloudroute.Route{to("10.5.1.0/24", "eni-1", false),
		to("fd05:0:0:1::/64", "eni-2", true), to("10.5.2.0/24", "i-1", false), to("10.5.3.0/24", "", false)}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// TestExplainHostile: what is answered in the place of AWS is one short line.
func TestExplainHostile(t *testing.T) {
	const forged = "\nE0101 00:00:00.000000       1 main.go:1] forged\x1b[2J"
	long := forged + strings.Repeat("x", 1<<20)
	for _, err := range []error{
		&smithy.GenericAPIError{Code: "UnauthorizedOperation", Message: long},
		&smithy.GenericAPIError{Code: long, Message: long},
		errors.New(long),
		&net.OpError{Op: "dial", Err: errors.New(forged)},
	} {
		text := (&cloud{region: "eu-west-1", login: aws.AnonymousCredentials{}}).explain(t.Context(), "CreateRoute", err).Error()
		if len(text) > 1000 || strings.ContainsAny(text, "\n\x1b") {
			t.Errorf("%.100q is explained as %.500q", err, text)
		}
	}
}
