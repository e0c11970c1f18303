package alivpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	openapi "github.com/alibabacloud-go/darabonba-openapi/v2/client"
	"github.com/alibabacloud-go/tea/dara"

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
	step := func(verb cloudroute.Verb, table string, route cloudroute.Route) cloudroute.Step {
		return cloudroute.Step{Verb: verb, Table: table, Route: route}
	}
	for want, s := range map[string]cloudroute.Step{
		"aliyun vpc CreateRouteEntry --RouteTableId vtb-1 --DestinationCidrBlock 10.5.1.0/24 --NextHopType Instance --NextHopId i-1": step(
			cloudroute.Create, "vtb-1", to("10.5.1.0/24", "i-1")),
		"aliyun vpc ModifyRouteEntry --RouteTableId vtb-1 --DestinationCidrBlock fd05:0:0:1::/64 --NewNextHopType NetworkInterface --NewNextHopId eni-1": step(
			cloudroute.Replace, "vtb-1", to("fd05:0:0:1::/64", "eni-1")),
		"aliyun vpc DeleteRouteEntry --RouteTableId vtb-1 --DestinationCidrBlock 10.5.1.0/24 --NextHopId i-1": step(
			cloudroute.Delete, "vtb-1", to("10.5.1.0/24", "i-1")),
		"aliyun vpc DeleteRouteEntry --RouteTableId 'vtb-…' --DestinationCidrBlock 10.5.1.0/24": step(
			cloudroute.Delete, "vtb-…", to("10.5.1.0/24", "")),
		// What Alibaba Cloud, or who is in its place, answers.
		`aliyun vpc CreateRouteEntry --RouteTableId 'vtb-1;reboot' --DestinationCidrBlock 10.5.1.0/24 --NextHopType Instance --NextHopId $'i-1\012\033[2J'`: step(
			cloudroute.Create, "vtb-1;reboot", to("10.5.1.0/24", "i-1\n\x1b[2J")),
	} {
		if got := command(s); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

// TestRoute: which entries of a table are those of nodes, or may be.
func TestRoute(t *testing.T) {
	const hop = `,"NextHops":{"NextHop":[{"NextHopType":"Instance","NextHopId":"i-1"}]}`
	for text, want := range map[string]string{
		`"DestinationCidrBlock":"10.5.1.0/24","Status":"Available"` + hop:                                "10.5.1.0/24 i-1",
		`"DestinationCidrBlock":"fd05:0:0:1::/64","Status":"Pending"` + hop:                              "fd05:0:0:1::/64 i-1",
		`"DestinationCidrBlock":"10.5.1.0/24","Status":"Modifying"` + hop:                                "10.5.1.0/24 i-1",
		`"DestinationCidrBlock":"10.5.1.0/24","Status":"Deleting"` + hop:                                 "",
		`"DestinationCidrBlock":"10.5.1.0/24","Status":"Available","ServiceType":"TR"` + hop:             "",
		`"DestinationCidrBlock":"pl-1","Status":"Available"` + hop:                                       "",
		`"DestinationCidrBlock":"10.5.1.0/24","Status":"Available"`:                                      "10.5.1.0/24 ",
		`"DestinationCidrBlock":"10.5.1.0/24"` + strings.Replace(hop, "Instance", "NetworkInterface", 1): "10.5.1.0/24 i-1",
		`"DestinationCidrBlock":"10.5.1.0/24"` + strings.Replace(hop, "Instance", "NatGateway", 1):       "10.5.1.0/24 ",
		`"DestinationCidrBlock":"10.5.1.0/24","NextHops":{"NextHop":[{"NextHopType":"RouterInterface","NextHopId":"ri-1"},
			{"NextHopType":"RouterInterface","NextHopId":"ri-2"}]}`: "10.5.1.0/24 ",
	} {
		var e entry
		if err := json.Unmarshal([]byte("{"+text+"}"), &e); err != nil {
			t.Fatal(err)
		}
		got := ""
		if r, ok := e.route(); ok {
			got = r.Destination.String() + " " + r.NextHop
		}
		if got != want {
			t.Errorf("%s is %q, want %q", text, got, want)
		}
	}
}

func TestEndpoint(t *testing.T) {
	for _, test := range []struct {
		host     Host
		vpc, ecs string
	}{
		{Host{}, "https://vpc-vpc.cn-hangzhou.aliyuncs.com", "https://ecs-vpc.cn-hangzhou.aliyuncs.com"},
		{Host{Public: true}, "https://vpc.cn-hangzhou.aliyuncs.com", "https://ecs.cn-hangzhou.aliyuncs.com"},
		{Host{VPCEndpoint: "vpc.example.com"}, "https://vpc.example.com", "https://ecs-vpc.cn-hangzhou.aliyuncs.com"},
		{Host{ECSEndpoint: "http://127.0.0.1:1/"}, "https://vpc-vpc.cn-hangzhou.aliyuncs.com", "http://127.0.0.1:1"},
	} {
		for p, want := range map[product]string{vpc: test.vpc, ecs: test.ecs} {
			if scheme, host := test.host.endpoint(p, "cn-hangzhou"); scheme+"://"+host != want {
				t.Errorf("with %+v: got %s://%s, want %s", test.host, scheme, host, want)
			}
		}
	}
}

// clearEnvironment unsets what the SDK reads.
func clearEnvironment(t *testing.T) {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "ALIBABA_CLOUD_") {
			t.Setenv(name, "")
		}
	}
}

// TestSDK: the SDK's variables choose the SDK's provider of credentials.
func TestSDK(t *testing.T) {
	oidc := []string{"ALIBABA_CLOUD_ROLE_ARN", "ALIBABA_CLOUD_OIDC_PROVIDER_ARN", "ALIBABA_CLOUD_OIDC_TOKEN_FILE"}
	for _, test := range []struct {
		variables []string
		want      string
	}{
		{nil, ""},
		{[]string{"ALIBABA_CLOUD_ACCESS_KEY_ID"}, "env"},
		{oidc, "oidc_role_arn"},
		{[]string{"ALIBABA_CLOUD_CREDENTIALS_FILE"}, "profile"},
		{[]string{"ALIBABA_CLOUD_CREDENTIALS_URI"}, "credential_uri"},
	} {
		t.Run(test.want, func(t *testing.T) {
			clearEnvironment(t)
			for _, name := range test.variables {
				t.Setenv(name, "/x")
			}
			got := ""
			p, err := fromSDK()
			if err != nil {
				t.Fatal(err)
			}
			if p != nil {
				got = p.GetProviderName()
			}
			if got != test.want {
				t.Errorf("got %q", got)
			}
		})
	}
	clearEnvironment(t)
	t.Setenv("ALIBABA_CLOUD_OIDC_TOKEN_FILE", "/x")
	if _, err := fromSDK(); err == nil {
		t.Error("a role is missing, and there is no error")
	}
}

func answer(status int, code, message string) error {
	return &openapi.ClientError{StatusCode: &status, Code: &code, Message: dara.String("code: 403, " + message + " request id: 1"),
		Data: map[string]any{"Code": code, "Message": message, "RequestId": "1"}}
}

// TestExplain: what the API answers, by the remedy.
func TestExplain(t *testing.T) {
	c := &cloud{api: newAPI(Host{}, "cn-hangzhou", nil)}
	for _, test := range []struct {
		err  error
		want string
	}{
		{answer(403, "Forbidden.RAM", "x"), "lacks vpc:CreateRouteEntry: "},
		{answer(403, "NoPermission", "x"), "lacks vpc:CreateRouteEntry: "},
		{answer(403, "Forbidden", "x"), "lacks vpc:CreateRouteEntry: "},
		{answer(404, "InvalidAccessKeyId.NotFound", "x"), "check ACCESS_KEY_ID"},
		{answer(400, "InvalidSecurityToken.Expired", "x"), "check ACCESS_KEY_ID"},
		{answer(400, "SignatureDoesNotMatch", "x"), "check ACCESS_KEY_ID"},
		{answer(400, "InvalidTimeStamp.Expired", "x"), "the clock"},
		{answer(400, "QuotaExceeded", "x"), "vpc_quota_route_entrys_num"},
		{answer(404, "InvalidRouteTableId.NotFound", "x"), "correct RouteTableID"},
		{answer(400, "Throttling", "x"), "throttles CreateRouteEntry (Throttling): it is tried again"},
		{answer(400, "InvalidNextHopId.NotFound", "x"), "CreateRouteEntry fails: Alibaba Cloud says: InvalidNextHopId.NotFound: x"},
		{answer(502, "", ""), "CreateRouteEntry fails: Alibaba Cloud says: HTTP status 502: "},
		{&net.OpError{Op: "dial", Err: errors.New("refused")}, "does not answer CreateRouteEntry (dial: refused): can this node reach"},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), "does not answer CreateRouteEntry (no answer in time): "},
		{&loginError{errors.New("no role")}, "there are no credentials of Alibaba Cloud (no role): give the instance a RAM role"},
	} {
		text := c.explain(vpc, "CreateRouteEntry", test.err).Error()
		if !strings.Contains(text, test.want) || strings.Contains(text, "request id") {
			t.Errorf("%v is explained as\n%s\nwithout\n%s", test.err, text, test.want)
		}
	}
}

// TestExplainHostile: what is answered in the place of Alibaba Cloud is one short line.
func TestExplainHostile(t *testing.T) {
	const forged = "\nE0101 00:00:00.000000       1 main.go:1] forged\x1b[2J"
	long := forged + strings.Repeat("x", 1<<20)
	c := &cloud{api: newAPI(Host{}, "cn-hangzhou"+long, nil), refused: map[netip.Prefix]refusal{}}
	var errs []error
	for _, code := range []string{"Forbidden.RAM", "SignatureDoesNotMatch", "QuotaExceeded", "InvalidRouteTableId.NotFound", "Throttling",
		"IncorrectStatus." + long, long} {
		errs = append(errs, c.explain(vpc, "CreateRouteEntry", answer(400, code, long)))
	}
	for _, err := range []error{errors.New(long), &net.OpError{Op: "dial", Err: errors.New(forged)}, &loginError{errors.New(long)}} {
		errs = append(errs, c.explain(vpc, "CreateRouteEntry", err))
	}
	errs = append(errs, noMetadata(errors.New(long)), noCredentials(errors.New(long)))
	for i, err := range errs {
		if text := err.Error(); len(text) > 1500 || strings.ContainsAny(text, "\n\x1b") {
			t.Errorf("error %d is explained as %.500q, of %d bytes", i, text, len(text))
		}
	}
}
