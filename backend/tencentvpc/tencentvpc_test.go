package tencentvpc

import (
	"errors"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	tcerr "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/errors"

	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/backend/cloudroute"
)

// What the backend does to route tables, test/cloud tests, with a server.

func TestGolden(t *testing.T)    { backendtest.Golden(t) }
func TestReference(t *testing.T) { backendtest.Keys(t, options{}) }

// to makes a route.
func to(name, dst, hop string) cloudroute.Route {
	return cloudroute.Route{Name: name, Destination: netip.MustParsePrefix(dst), NextHop: hop}
}

func TestCommand(t *testing.T) {
	want := to("", "10.5.1.0/24", "198.18.0.1")
	for text, s := range map[string]cloudroute.Step{
		`CreateRoutes --RouteTableId rtb-1 --Routes '[{"DestinationCidrBlock":"10.5.1.0/24","GatewayType":"NORMAL_CVM","GatewayId":"198.18.0.1","RouteDescription":"flanneld","Enabled":true}]'`: {
			Verb: cloudroute.Create, Table: "rtb-1", Route: want},
		`ReplaceRoutes --RouteTableId rtb-1 --Routes '[{"RouteItemId":"rti-1","DestinationCidrBlock":"10.5.1.0/24","GatewayType":"NORMAL_CVM","GatewayId":"198.18.0.1","RouteDescription":"flanneld","Enabled":true}]'`: {
			Verb: cloudroute.Replace, Table: "rtb-1", Route: want, Old: to("rti-1", "10.5.1.0/24", "198.18.0.2")},
		`EnableRoutes --RouteTableId rtb-1 --RouteItemIds '["rti-1"]'`: {
			Verb: cloudroute.Replace, Table: "rtb-1", Route: want, Old: to("rti-1", "10.5.1.0/24", "198.18.0.1 disabled")},
		`EnableRoutes --RouteTableId rtb-1 --RouteIds '[17]'`: {
			Verb: cloudroute.Replace, Table: "rtb-1", Route: want, Old: to("17", "10.5.1.0/24", "198.18.0.1 disabled")},
		`NotifyRoutes --RouteTableId rtb-1 --RouteItemIds '["rti-1"]'`: {
			Verb: cloudroute.Replace, Table: "rtb-1", Route: want, Old: to("rti-1", "10.5.1.0/24", "198.18.0.1 unpublished")},
		`DeleteRoutes --RouteTableId rtb-1 --Routes '[{"RouteItemId":"rti-1"}]'`: {
			Verb: cloudroute.Delete, Table: "rtb-1", Route: to("rti-1", "10.5.1.0/24", "198.18.0.1")},
		`DeleteRoutes --RouteTableId rtb-1 --Routes '[{"RouteId":17}]'`: {
			Verb: cloudroute.Delete, Table: "rtb-1", Route: to("17", "10.5.1.0/24", "198.18.0.1")},
		`DeleteRoutes --RouteTableId 'rtb-…' --Routes '[{"RouteItemId":"rti-…"}]'`: {
			Verb: cloudroute.Delete, Table: "rtb-…", Route: to("", "10.5.1.0/24", "")},
		// What Tencent Cloud, or who is in its place, answers.
		`DeleteRoutes --RouteTableId 'rtb-1;reboot' --Routes '[{"RouteItemId":"'\''\n\u001b[2J"}]'`: {
			Verb: cloudroute.Delete, Table: "rtb-1;reboot", Route: to("'\n\x1b[2J", "10.5.1.0/24", "198.18.0.1")},
	} {
		if got := command(s); got != "tccli vpc "+text {
			t.Errorf("got  %s\nwant tccli vpc %s", got, text)
		}
	}
}

// TestRoutes: which routes of a table are those of nodes, or may be.
func TestRoutes(t *testing.T) {
	on, off := true, false
	table := routeTable{Routes: []route{
		{ItemID: "rti-1", Destination: "10.5.1.0/24", GatewayType: "NORMAL_CVM", GatewayID: "198.18.0.1", Type: "USER", Enabled: &on},
		{ID: 17, Destination: "10.5.2.0/24", GatewayType: "NORMAL_CVM", GatewayID: "198.18.0.2"},
		{ItemID: "rti-3", Destination: "10.5.3.0/24", GatewayType: "NORMAL_CVM", GatewayID: "198.18.0.1", Type: "USER", Enabled: &off},
		{ItemID: "rti-4", Destination: "10.5.4.0/24", GatewayType: "NORMAL_CVM", GatewayID: "198.18.0.1", Type: "USER", Published: true},
		{ItemID: "rti-5", Destination: "10.5.5.0/24", GatewayType: "NAT", GatewayID: "nat-1", Type: "USER"},
		{ItemID: "rti-6", Destination: "10.5.6.0/24", GatewayType: "CCN", GatewayID: "ccn-1", Type: "CCN"},
		{ItemID: "rti-7", Destination: "10.5.7.0/24", GatewayType: "NORMAL_CVM", GatewayID: "198.18.0.2", Type: "NETD"},
		{ItemID: "rti-8", Destination: "Local", GatewayType: "LOCAL", GatewayID: "Local"},
		{ItemID: "rti6-9", GatewayType: "CCN", GatewayID: "ccn-1", Type: "USER"}, // IPv6
	}}
	for publish, want := range map[bool]string{false: "198.18.0.1", true: "198.18.0.1 unpublished"} {
		c := &cloud{options: options{PublishToCCN: publish}}
		got := c.routes(table, cloudroute.NextHop{ID: "198.18.0.1"})
		if want := []cloudroute.Route{to("rti-1", "10.5.1.0/24", want), to("17", "10.5.2.0/24", "198.18.0.2"),
			to("rti-3", "10.5.3.0/24", "198.18.0.1 disabled"), to("rti-4", "10.5.4.0/24", "198.18.0.1"),
			to("rti-5", "10.5.5.0/24", "")}; !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	}
}

func TestClientProfile(t *testing.T) {
	for _, test := range []struct{ region, endpoint, scheme, host string }{
		{"ap-guangzhou", "", "HTTPS", ""}, // the SDK's: vpc.tencentcloudapi.com
		{"ap-shanghai-fsi", "", "HTTPS", "vpc.ap-shanghai-fsi.tencentcloudapi.com"},
		{"ap-shanghai-fsi", "vpc.example.com", "HTTPS", "vpc.example.com"},
		{"ap-guangzhou", "http://127.0.0.1:80", "http", "127.0.0.1:80"},
	} {
		if p := clientProfile(test.region, test.endpoint).HttpProfile; p.Scheme != test.scheme || p.Endpoint != test.host {
			t.Errorf("%v: %s %s", test, p.Scheme, p.Endpoint)
		}
	}
}

// TestExplain: an error has the same text for each request, and no answer of another server in it.
func TestExplain(t *testing.T) {
	c := &cloud{region: "ap-guangzhou"}
	for _, test := range []struct {
		action, code, message string
		want                  string // its beginning
	}{
		{"CreateRoutes", "AuthFailure.UnauthorizedOperation", "[request id:f4a1]no permission",
			"the CAM policy of this node's role or API key lacks vpc:CreateRoutes: add it (backend/tencentvpc/README.md has the whole policy); Tencent Cloud says: no permission"},
		{"CreateRoutes", "AuthFailure.SignatureExpire", "expired", "Tencent Cloud refuses this node's credentials for CreateRoutes (AuthFailure.SignatureExpire): "},
		{"CreateRoutes", "LimitExceeded.ActionLimited", "", "Tencent Cloud throttles CreateRoutes (LimitExceeded.ActionLimited): "},
		{"CreateRoutes", "UnsupportedOperation.EcmpWithCcnRoute", "Form an ECMP",
			"CreateRoutes fails (UnsupportedOperation.EcmpWithCcnRoute): the Cloud Connect Network has a route to the subnet of this node, too: "},
		{"CreateRoutes", "InvalidParameterValue.VpcCidrConflict", "conflict",
			"CreateRoutes fails (InvalidParameterValue.VpcCidrConflict): the subnet of this node overlaps the addresses of the VPC: choose another Network; Tencent Cloud says: conflict"},
		{"NotifyRoutes", "UnsupportedOperation.CcnNotAttached", "none", "NotifyRoutes fails (UnsupportedOperation.CcnNotAttached): the VPC belongs to no Cloud Connect Network: "},
		{"DeleteRoutes", "UnsupportedOperation.MutexOperationTaskRunning", "", "DeleteRoutes waits for another task in the VPC "},
		{"DeleteRoutes", "InternalError", "3f934a21-2786-44af-a421-38ee6c6e1fae failed", "DeleteRoutes fails: Tencent Cloud says: InternalError: failed"},
		{"DescribeRouteTables", "ClientError.ParseJsonError", "Fail to parse json content: <html>Log in at 12:00</html>",
			"Tencent Cloud's API in ap-guangzhou does not answer DescribeRouteTables (the answer is none of the API: ClientError.ParseJsonError): "},
	} {
		code, err := c.explain(test.action, tcerr.NewTencentCloudSDKError(test.code, test.message, "1"))
		if !strings.HasPrefix(err.Error(), test.want) || code != test.code && !strings.HasPrefix(test.code, "ClientError") {
			t.Errorf("got  %s\nwant %s", err, test.want)
		}
	}
}

// TestExplainHostile: what is answered in the place of Tencent Cloud is one short line.
func TestExplainHostile(t *testing.T) {
	const forged = "\nE0101 00:00:00.000000       1 main.go:1] forged\x1b[2J"
	long := forged + strings.Repeat("x", 1<<20)
	for _, err := range []error{
		tcerr.NewTencentCloudSDKError("UnauthorizedOperation", long, long),
		tcerr.NewTencentCloudSDKError("AuthFailure."+long, long, long),
		tcerr.NewTencentCloudSDKError("RequestLimitExceeded."+long, long, long),
		tcerr.NewTencentCloudSDKError("LimitExceeded."+long, long, long),
		tcerr.NewTencentCloudSDKError(long, long, long),
		tcerr.NewTencentCloudSDKError(long+"MutexTaskRunning", long, long),
		tcerr.NewTencentCloudSDKError("ClientError.ParseJsonError", long, ""),
		tcerr.NewTencentCloudSDKErrorWithCause("ClientError.NetworkError", long, "", errors.New(long)),
		errors.New(long),
		&net.OpError{Op: "dial", Err: errors.New(forged)},
	} {
		_, explained := (&cloud{region: "ap-guangzhou"}).explain("CreateRoutes", err)
		if text := explained.Error(); len(text) > 1000 || strings.ContainsAny(text, "\n\x1b") {
			t.Errorf("%.100q is explained as %.500q", err, text)
		}
	}
}
