package gce

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"cloud.google.com/go/auth"
	compute "google.golang.org/api/compute/v1"
	"google.golang.org/api/googleapi"

	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/backend/cloudroute"
)

// What the backend does to a network, test/cloud tests, with a server.

func TestGolden(t *testing.T)    { backendtest.Golden(t) }
func TestReference(t *testing.T) { backendtest.Keys(t, options{}) }

const (
	table = "projects/p/global/networks/default"
	self  = "projects/p/zones/z/instances/i"
	other = "projects/p/zones/z/instances/j"
)

func route(name, dst, hop string) cloudroute.Route {
	return cloudroute.Route{Name: name, Destination: netip.MustParsePrefix(dst), NextHop: hop}
}

func TestCommand(t *testing.T) {
	const six = "fd05:0:0:1::/64"
	for want, s := range map[string]cloudroute.Step{
		"gcloud compute routes create flannel-10-5-1-0-24 --project p --network default --destination-range 10.5.1.0/24 --next-hop-instance i --next-hop-instance-zone z": {
			Verb: cloudroute.Create, Table: table, Route: route("", "10.5.1.0/24", self)},
		"gcloud compute routes create flannel-fd05-0-0-1---64-prod --project h --network prod --destination-range fd05:0:0:1::/64 --next-hop-address fd18::1": {
			Verb: cloudroute.Create, Table: "projects/h/global/networks/prod", Route: route("", six, "198.18.0.1,fd18::1")},
		"gcloud compute routes delete flannel-old --project p --quiet; gcloud compute routes create flannel-10-5-1-0-24 --project p --network default --destination-range 10.5.1.0/24 --next-hop-instance i --next-hop-instance-zone z": {
			Verb: cloudroute.Replace, Table: table, Route: route("", "10.5.1.0/24", self), Old: route("flannel-old", "10.5.1.0/24", other)},
		"gcloud compute routes delete flannel-old --project p --quiet": {
			Verb: cloudroute.Delete, Table: table, Route: route("flannel-old", "10.5.1.0/24", self)},
		// Where the API could not be asked.
		"gcloud compute routes delete flannel-10-5-1-0-24 --project '…' --quiet": {
			Verb: cloudroute.Delete, Table: "projects/…/global/networks/default", Route: route("", "10.5.1.0/24", "")},
		// What Google Cloud, or who is in its place, answers.
		`gcloud compute routes delete $'flannel-\012\033[2J' --project 'p;reboot' --quiet`: {
			Verb: cloudroute.Delete, Table: "projects/p;reboot/global/networks/default", Route: route("flannel-\n\x1b[2J", "10.5.1.0/24", self)},
		"gcloud compute routes create flannel-10-5-1-0-24- --project '' --network '' --destination-range 10.5.1.0/24 --next-hop-instance '' --next-hop-instance-zone ''": {
			Verb: cloudroute.Create, Table: "", Route: route("", "10.5.1.0/24", "")},
	} {
		if got := command(s); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

// TestRouteName: a name has 63 bytes at most, and is another one in each network.
func TestRouteName(t *testing.T) {
	long := strings.Repeat("n", 62)
	subnets := []string{"10.5.1.0/24", "fd05:1234:5678:9abc:def0:1234:5678:9a00/120"}
	names := map[string]bool{}
	for _, network := range []string{"default", "prod", long + "1", long + "2"} {
		for _, dst := range subnets {
			name := routeName("projects/p/global/networks/"+network, netip.MustParsePrefix(dst))
			if len(name) > maxName || !strings.HasPrefix(name, namePrefix) || names[name] {
				t.Errorf("the route to %s in %s is named %s", dst, network, name)
			}
			names[name] = true
		}
	}
}

// TestRouteOf: which routes are those of nodes, or may be.
func TestRouteOf(t *testing.T) {
	const url = "https://www.googleapis.com/compute/v1/"
	hop := cloudroute.NextHop{ID: "198.18.0.1,fd18::1"}
	warning := func(code string) []*compute.RouteWarnings { return []*compute.RouteWarnings{{Code: code}} }
	for name, test := range map[string]struct {
		route compute.Route
		want  cloudroute.Route
		ok    bool
	}{
		"an instance": {compute.Route{DestRange: "10.5.1.0/24", NextHopInstance: url + other}, route("flannel-1", "10.5.1.0/24", other), true},
		"another form of the URL": {compute.Route{DestRange: "10.5.1.0/24", NextHopInstance: "https://compute.googleapis.com/compute/v1/" + other},
			route("flannel-1", "10.5.1.0/24", other), true},
		"our address":    {compute.Route{DestRange: "10.5.1.0/24", NextHopIp: "198.18.0.1"}, route("flannel-1", "10.5.1.0/24", hop.ID), true},
		"our IPv6":       {compute.Route{DestRange: "fd05:0:0:1::/64", NextHopIp: "fd18:0:0:0::1"}, route("flannel-1", "fd05:0:0:1::/64", hop.ID), true},
		"an address":     {compute.Route{DestRange: "10.5.1.0/24", NextHopIp: "198.18.0.2"}, route("flannel-1", "10.5.1.0/24", "198.18.0.2"), true},
		"a gateway":      {compute.Route{DestRange: "10.5.1.0/24", NextHopGateway: url + "projects/p/global/gateways/x"}, cloudroute.Route{}, false},
		"a tunnel":       {compute.Route{DestRange: "10.5.1.0/24", NextHopVpnTunnel: url + "projects/p/regions/r/vpnTunnels/x"}, cloudroute.Route{}, false},
		"no destination": {compute.Route{NextHopInstance: url + other}, cloudroute.Route{}, false},
		"tags":           {compute.Route{DestRange: "10.5.1.0/24", NextHopInstance: url + other, Tags: []string{"t"}}, cloudroute.Route{}, false},
		"a priority":     {compute.Route{DestRange: "10.5.1.0/24", NextHopInstance: url + other, Priority: 900}, cloudroute.Route{}, false},
		"a name":         {compute.Route{DestRange: "10.5.1.0/24", NextHopInstance: url + other, Name: "mine"}, cloudroute.Route{}, false},
		"deleted":        {compute.Route{DestRange: "10.5.1.0/24", NextHopInstance: url + other, Warnings: warning("NEXT_HOP_INSTANCE_NOT_FOUND")}, route("gone", "10.5.1.0/24", other), true},
		"in no network":  {compute.Route{DestRange: "10.5.1.0/24", NextHopInstance: url + other, Warnings: warning("NEXT_HOP_INSTANCE_NOT_ON_NETWORK")}, route("gone", "10.5.1.0/24", other), true},
		"stopped":        {compute.Route{DestRange: "10.5.1.0/24", NextHopInstance: url + other, Warnings: warning("NEXT_HOP_NOT_RUNNING")}, route("gone", "10.5.1.0/24", other), true},
		"nobody's":       {compute.Route{DestRange: "10.5.1.0/24", NextHopIp: "198.18.0.2", Warnings: warning("NEXT_HOP_ADDRESS_NOT_ASSIGNED")}, route("gone", "10.5.1.0/24", "198.18.0.2"), true},
		"not forwarding": {compute.Route{DestRange: "10.5.1.0/24", NextHopInstance: url + other, Warnings: warning("NEXT_HOP_CANNOT_IP_FORWARD")}, route("flannel-1", "10.5.1.0/24", other), true},
	} {
		r := test.route
		if r.Name == "" {
			r.Name = "flannel-1"
		}
		if r.Priority == 0 {
			r.Priority = 1000
		}
		if test.want.Name == "gone" {
			test.want.Name, test.want.Blackhole = "flannel-1", true
		}
		if got, ok := routeOf(&r, hop); got != test.want && ok || ok != test.ok {
			t.Errorf("%s: got %+v, %t, want %+v, %t", name, got, ok, test.want, test.ok)
		}
	}
}

// anyone has credentials.
type anyone struct{}

func (anyone) Token(context.Context) (*auth.Token, error) { return &auth.Token{Value: "x"}, nil }

var login = auth.NewCredentials(&auth.CredentialsOptions{TokenProvider: anyone{}})

// TestExplain: errors that need a remedy of their own, and that the server of test/cloud does not have.
func TestExplain(t *testing.T) {
	refuse := func(reason, message string) error {
		return &googleapi.Error{Code: 403, Message: message, Errors: []googleapi.ErrorItem{{Reason: reason, Message: message}}}
	}
	for want, err := range map[string]error{
		"--zone z --project p --scopes compute-rw;":                         refuse("insufficientPermissions", "Request had insufficient authentication scopes."),
		"gcloud services enable compute.googleapis.com --project p;":        refuse("accessNotConfigured", "Compute Engine API has not been used in project 1 before or it is disabled."),
		"must wait for another change of the network":                       refuse("resourceNotReady", "The resource is not ready"),
		"lacks compute.networks.updatePolicy for routes.insert: add it (":   refuse("forbidden", "Required 'compute.networks.updatePolicy' permission for 'projects/p/global/networks/default'"),
		"lacks a permission for routes.insert: add it (":                    refuse("forbidden", "no"),
		`raise the quota "Static routes per network"`:                       operationError{"QUOTA_EXCEEDED", "Quota 'STATIC_ROUTES_PER_NETWORK' exceeded."},
		"routes.insert fails: Compute Engine says: HTTP status 502: ":       &googleapi.Error{Code: 502, Body: "<html>"},
		"can this node reach compute.googleapis.com":                        &net.DNSError{Err: "no such host", Name: "compute.googleapis.com"},
		"does not answer routes.insert (no such host: compute.googleapis.c": &net.DNSError{Err: "no such host", Name: "compute.googleapis.com"},
	} {
		if text := (&cloud{self: self, login: login}).explain(t.Context(), "routes.insert", err).Error(); !strings.Contains(text, want) {
			t.Errorf("%v is explained as %s, which has not %s", err, text, want)
		}
	}
}

// TestExplainHostile: what is answered in the place of Google Cloud is one short line.
func TestExplainHostile(t *testing.T) {
	const forged = "\nE0101 00:00:00.000000       1 main.go:1] forged\x1b[2J"
	long := forged + strings.Repeat("x", 1<<20)
	for _, err := range []error{
		&googleapi.Error{Code: 403, Message: long, Errors: []googleapi.ErrorItem{{Reason: "forbidden", Message: long}}},
		&googleapi.Error{Code: 403, Message: long, Errors: []googleapi.ErrorItem{{Reason: long, Message: long}}},
		&googleapi.Error{Code: 403, Body: long},
		operationError{long, long},
		operationError{"QUOTA_EXCEEDED", long},
		errors.New(long),
		&net.OpError{Op: "dial", Err: errors.New(forged)},
	} {
		c := &cloud{self: "projects/p/zones/z/instances/i" + forged, login: login}
		text := c.explain(t.Context(), "routes.insert", err).Error()
		if len(text) > 1000 || strings.ContainsAny(text, "\n\x1b") {
			t.Errorf("%.100q is explained as %.500q", err, text)
		}
	}
}
