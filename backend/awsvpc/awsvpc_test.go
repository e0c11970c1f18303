package awsvpc

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go"

	"github.com/flanneld/flanneld/backend/backendtest"
)

// What the backend does to route tables, test/ec2 tests, with a server.

func TestGolden(t *testing.T)    { backendtest.Golden(t) }
func TestReference(t *testing.T) { backendtest.Keys(t, options{}) }

// table makes a route table of lines: destination, target, and "blackhole" or an
// origin other than CreateRoute.
func table(lines ...string) types.RouteTable {
	t := types.RouteTable{RouteTableId: aws.String("rtb-1")}
	for _, line := range lines {
		f := strings.Fields(line + " active")
		r := types.Route{Origin: types.RouteOriginCreateRoute, State: types.RouteState("active")}
		switch {
		case strings.HasPrefix(f[0], "pl-"):
			r.DestinationPrefixListId = &f[0]
		case strings.Contains(f[0], ":"):
			r.DestinationIpv6CidrBlock = &f[0]
		default:
			r.DestinationCidrBlock = &f[0]
		}
		if strings.HasPrefix(f[1], "eni-") {
			r.NetworkInterfaceId = &f[1]
		} else {
			r.GatewayId = &f[1]
		}
		switch f[2] {
		case "active":
		case "blackhole":
			r.State = types.RouteStateBlackhole
		default:
			r.Origin = types.RouteOrigin(f[2])
		}
		t.Routes = append(t.Routes, r)
	}
	return t
}

func prefixes(texts ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

func TestPlan(t *testing.T) {
	four := desired{eni: "eni-1", own: prefixes("10.5.1.0/24"), networks: prefixes("10.5.0.0/16"), known: true}
	dual := desired{eni: "eni-1", own: prefixes("10.5.1.0/24", "fd05:0:0:1::/64"),
		networks: prefixes("10.5.0.0/16", "fd05::/48"), known: true}
	unknown := four
	unknown.known = false
	peer := four
	peer.peers = prefixes("10.5.2.0/24")
	for _, test := range []struct {
		name    string
		desired desired
		table   types.RouteTable
		want    string
		waits   bool
	}{
		{"an empty table", dual, table(), "create-route 10.5.1.0/24 eni-1, create-route fd05:0:0:1::/64 eni-1", false},
		{"all is there", dual, table("10.5.1.0/24 eni-1", "fd05:0:0:1::/64 eni-1"), "", false},
		{"the interface is stopped", four, table("10.5.1.0/24 eni-1 blackhole"), "", false},
		{"an earlier interface", dual, table("10.5.1.0/24 eni-9 blackhole", "fd05:0:0:1::/64 eni-8"),
			"replace-route 10.5.1.0/24 eni-1, replace-route fd05:0:0:1::/64 eni-1", false},
		{"something else", four, table("10.5.1.0/24 nat-1"), "replace-route 10.5.1.0/24 eni-1", false},
		{"propagated", four, table("10.5.1.0/24 vgw-1 EnableVgwRoutePropagation"), "create-route 10.5.1.0/24 eni-1", false},
		{"a peer's", peer, table("10.5.1.0/24 eni-1", "10.5.2.0/24 eni-2"), "", false},
		{"a peer's, gone", peer, table("10.5.1.0/24 eni-1", "10.5.2.0/24 eni-2 blackhole"), "", false},
		{"a peer's, once ours", peer, table("10.5.1.0/24 eni-1", "10.5.2.0/24 eni-1"), "", false},
		{"part of a peer's", peer, table("10.5.1.0/24 eni-1", "10.5.2.128/25 eni-2 blackhole"), "", false},
		{"nobody's", peer, table("10.5.3.0/24 eni-2 blackhole"), "delete-route 10.5.3.0/24 , create-route 10.5.1.0/24 eni-1",
			false},
		{"nobody's, IPv6", dual, table("10.5.1.0/24 eni-1", "fd05:0:0:1::/64 eni-1", "fd05:0:0:3::/64 eni-2 blackhole"),
			"delete-route fd05:0:0:3::/64 ", false},
		{"nobody's, and alive", peer, table("10.5.1.0/24 eni-1", "10.5.3.0/24 eni-2"), "", false},
		{"an earlier lease", peer, table("10.5.1.0/24 eni-1", "10.5.3.0/24 eni-1"), "delete-route 10.5.3.0/24 ", false},
		{"an earlier lease, or a peer's", unknown, table("10.5.1.0/24 eni-1", "10.5.3.0/24 eni-1"), "", true},
		{"nobody's, or a peer's", unknown, table("10.5.1.0/24 eni-1", "10.5.3.0/24 eni-2 blackhole"), "", true},
		{"the network's", four, table("10.5.1.0/24 eni-1", "10.5.0.0/16 eni-2 blackhole"), "", false},
		{"outside", four, table("10.5.1.0/24 eni-1", "10.6.0.0/24 eni-2 blackhole", "10.6.1.0/24 eni-1", "0.0.0.0/0 igw-1",
			"pl-1 vpce-1"), "", false},
		{"a gateway's", four, table("10.5.1.0/24 eni-1", "10.5.7.0/24 tgw-1 blackhole"), "", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			steps, waits := plan(test.table, test.desired)
			var got []string
			for _, s := range steps {
				if s.table != "rtb-1" {
					t.Errorf("%s is for another table", s)
				}
				got = append(got, string(s.verb)+" "+s.dst.String()+" "+s.eni)
			}
			if strings.Join(got, ", ") != test.want || waits != test.waits {
				t.Errorf("got %v, waits %t, want %s", got, waits, test.want)
			}
		})
	}
}

func TestStep(t *testing.T) {
	for want, s := range map[string]step{
		"aws ec2 create-route --route-table-id rtb-1 --destination-cidr-block 10.5.1.0/24 --network-interface-id eni-1":           {createRoute, "rtb-1", netip.MustParsePrefix("10.5.1.0/24"), "eni-1"},
		"aws ec2 replace-route --route-table-id rtb-1 --destination-ipv6-cidr-block fd05:0:0:1::/64 --network-interface-id eni-1": {replaceRoute, "rtb-1", netip.MustParsePrefix("fd05:0:0:1::/64"), "eni-1"},
		"aws ec2 delete-route --route-table-id rtb-1 --destination-cidr-block 10.5.1.0/24":                                        {deleteRoute, "rtb-1", netip.MustParsePrefix("10.5.1.0/24"), ""},
		// What AWS, or who is in its place, answers.
		`aws ec2 create-route --route-table-id 'rtb-1;reboot' --destination-cidr-block 10.5.1.0/24 --network-interface-id $'eni-1\012\033[2J'`: {
			createRoute, "rtb-1;reboot", netip.MustParsePrefix("10.5.1.0/24"), "eni-1\n\x1b[2J"},
	} {
		if s.String() != want {
			t.Errorf("got  %s\nwant %s", s, want)
		}
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
		text := (&cloud{region: "eu-west-1"}).explain("CreateRoute", err).Error()
		if len(text) > 1000 || strings.ContainsAny(text, "\n\x1b") {
			t.Errorf("%.100q is explained as %.500q", err, text)
		}
	}
}
