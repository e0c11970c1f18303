package cloud

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/gce"
	"github.com/flanneld/flanneld/subnet"
)

var gceProvider = gceWith("default", false)

// gceWith returns a GCE with one network, which may be another project's.
func gceWith(network string, shared bool) provider {
	return provider{
		backend: "gce",
		new:     func() (*State, http.Handler) { s := NewGCE(network, shared); return s.State, s },
		env: func(url, nothing string) map[string]string {
			backend.Register(gce.Host{Endpoint: url + "/compute/v1/"}.Type())
			return map[string]string{"GCE_METADATA_HOST": strings.TrimPrefix(url, "http://"), "HOME": nothing}
		},
		clear:   "GOOGLE_",
		command: map[Action]string{Create: "gcloud compute routes create flannel-", Delete: "gcloud compute routes delete flannel-"},
		mine:    "no network interface of this instance has the address of the uplink eth0 198.18.0.1, fd18::1, mtu 9001; they have 198.18.0.9: …",
		silent: [2]string{"the metadata server does not answer (EOF): …",
			"Compute Engine's API does not answer …"},
		cannot: "the role of this node's service account lacks compute.instances.get for instances.get: ",
		fix: "gcloud compute instances export i-… --zone europe-test1-b --project flannel-test | sed '/^canIpForward:/d; " +
			"$a canIpForward: true' | gcloud compute instances update-from-file i-… --zone europe-test1-b --project flannel-test " +
			"--most-disruptive-allowed-action REFRESH%.0s",
		trouble: []trouble{
			{"no permission", Create, NotPermitted, "Route table %s",
				"the role of this node's service account lacks compute.routes.create for routes.insert: add it (backend/gce/README.md has the whole role); Compute Engine says: Required 'compute.routes.create' permission for 'projects/flannel-test/global/networks/default'"},
			{"no permission to read", Read, NotPermitted, "Route tables",
				"the role of this node's service account lacks compute.routes.list for routes.list: …"},
			{"no permission to wait", WaitOperation, NotPermitted, "Route table %s",
				"the role of this node's service account lacks compute.globalOperations.get for routes.insert: …"},
			{"the API away", Read, Reset, "Route tables",
				"Compute Engine's API does not answer routes.list (EOF): can this node reach compute.googleapis.com, through an external address, Cloud NAT or Private Google Access?"},
			{"the API broken", Read, Broken, "Route tables",
				"routes.list fails: Compute Engine says: backendError: Internal error. Please try again or contact Google Support."},
			{"bad credentials", Read, BadCredentials, "Route tables",
				"Compute Engine refuses this node's credentials for routes.list (authError): check …"},
			{"throttled", Read, Throttled, "Route tables",
				"Compute Engine throttles routes.list (rateLimitExceeded): it is tried again, less and less often"},
			{"the network gone", Create, NoTable, "Route table %s",
				"routes.insert fails: Compute Engine says: notFound: The resource 'projects/flannel-test/global/networks/default' was not found"},
			{"the network full", Create, Full, "Route table %s",
				"the network is full, this node's pods cannot be reached through it: raise the quota \"Static routes per network\" (STATIC_ROUTES_PER_NETWORK) at …; Compute Engine says: Quota 'STATIC_ROUTES_PER_NETWORK' exceeded.  Limit: 200.0 globally."},
			{"no metadata", Metadata, Reset, "Google Cloud", "the metadata server does not answer (EOF): gce is for …"},
		},
	}
}

// gceLease is the key of a lease with subnets of both families.
const gceLease = "10.5.1.0-24&fd05:0:0:1::-64"

// newGCE returns a region, and its server.
func newGCE(t *testing.T) (r *region, s GCE) {
	p := gceProvider
	p.new = func() (*State, http.Handler) { s = NewGCE("default", false); return s.State, s }
	r = newRegion(t, p)
	return r, s
}

// TestGCEShared: in a network of another project, and in one that is not named default, routes have other next hops and
// other names.
func TestGCEShared(t *testing.T) {
	r := newRegion(t, gceWith("prod", true))
	other := r.Launch("subnet-1", r.Local.Next())
	r.Put(r.Main(), route("10.5.1.0/24", other))
	r.Put(r.Main(), route("10.5.3.0/24", other))
	synctest.Test(t, func(t *testing.T) {
		n := work(t, r.dualConfig(""), gceLease)
		n.know(gceLease, "10.5.3.0-24")
		pass(30 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "10.5.3.0/24 "+other, "fd05:0:0:1::/64 "+r.hop)
		r.Terminate(other)
		n.know(gceLease)
		pass(100 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "fd05:0:0:1::/64 "+r.hop)
		const create, end = "gcloud compute routes create ", " --project flannel-host --network prod --destination-range "
		r.log.expect(t, `I "Found this node in the cloud" nextHop="198.18.0.1,fd18::1" subnet="" vpc="projects/flannel-host/global/networks/prod"`,
			"I gcloud compute routes delete flannel-10-5-1-0-24-prod --project flannel-host --quiet; "+create+
				"flannel-10-5-1-0-24-prod"+end+"10.5.1.0/24 --next-hop-address 198.18.0.1",
			"I "+create+"flannel-fd05-0-0-1---64-prod"+end+"fd05:0:0:1::/64 --next-hop-address fd18::1",
			"I gcloud compute routes delete flannel-10-5-3-0-24-prod --project flannel-host --quiet")
	})
}

// gceRoute returns a route of the default network, as the API has it, and with other values.
func gceRoute(name, dst, hop string, other map[string]any) map[string]any {
	all := map[string]any{"name": name, "destRange": dst, "network": gceURL + "projects/flannel-test/global/networks/default",
		"nextHopInstance": gceURL + hop, "priority": 1000}
	for key, value := range other {
		all[key] = value
	}
	return all
}

// TestGCEOthers: several routes can have the same destination, and those that no node can have made stay. What flannel's
// own backend of old has made is as good as ours.
func TestGCEOthers(t *testing.T) {
	r, s := newGCE(t)
	s.PageSize = 3
	gone := map[string]any{"warnings": []any{map[string]any{"code": "NEXT_HOP_INSTANCE_NOT_FOUND"}}}
	stopped := map[string]any{"warnings": []any{map[string]any{"code": "NEXT_HOP_NOT_RUNNING"}}}
	nowhere := "projects/flannel-test/zones/europe-test1-b/instances/gone"
	for _, route := range []map[string]any{
		gceRoute("flannel-10-5-1-0-24", "10.5.1.0/24", r.hop, nil),
		gceRoute("flannel-wrong", "10.5.1.0/24", nowhere, gone), // half of the packets would get lost
		gceRoute("vpn", "10.5.1.0/24", nowhere, gone),
		gceRoute("flannel-tagged", "10.5.1.0/24", nowhere, map[string]any{"tags": []any{"special"}}),
		gceRoute("flannel-preferred", "10.5.1.0/24", nowhere, map[string]any{"priority": 100}),
		gceRoute("flannel-10-5-3-0-24", "10.5.3.0/24", nowhere, gone),
		gceRoute("flannel-10-5-4-0-24", "10.5.4.0/24", nowhere, stopped),
		gceRoute("flannel-10-5-5-0-24", "10.5.5.0/24", nowhere, map[string]any{"warnings": []any{map[string]any{"code": "NEXT_HOP_CANNOT_IP_FORWARD"}}}),
		gceRoute("kubernetes-1", "10.5.6.0/24", nowhere, gone),
		gceRoute("flannel-10-5-7-0-24-x", "10.5.7.0/24", nowhere, map[string]any{"network": gceURL + "projects/flannel-test/global/networks/x", "warnings": gone["warnings"]}),
	} {
		s.AddRoute(route)
	}
	synctest.Test(t, func(t *testing.T) {
		n := work(t, r.config(""), mine)
		n.know(mine)
		pass(2 * time.Minute)
		want := []string{"flannel-10-5-1-0-24", "vpn", "flannel-tagged", "flannel-preferred", "flannel-10-5-5-0-24",
			"kubernetes-1", "flannel-10-5-7-0-24-x"}
		if got := s.Others(); !slices.Equal(got, want) || len(r.Routes(r.Main())) > 0 {
			t.Errorf("the routes are %q and %q, want %q", got, r.Routes(r.Main()), want)
		}
		if said := r.errors(); len(said) > 0 {
			t.Errorf("it says\n%s", strings.Join(said, "\n"))
		}
	})
}

// TestGCENameTaken: a name is unique in the project. A route of another network that has it is an error, which is over
// once that route is gone.
func TestGCENameTaken(t *testing.T) {
	r, s := newGCE(t)
	s.AddRoute(gceRoute("flannel-10-5-1-0-24", "10.5.1.0/24", r.hop, map[string]any{"network": gceURL + "projects/flannel-test/global/networks/x"}))
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(time.Hour)
		if said := r.errors(); len(said) != 1 || !match(said[0], "E Route table "+r.Main()+`: the name flannel-10-5-1-0-24 is taken by a route to "10.5.1.0/24" in "projects/flannel-test/global/networks/x", …`) {
			t.Errorf("it says\n%s", strings.Join(said, "\n"))
		}
		s.mu.Lock()
		s.others = nil
		s.mu.Unlock()
		pass(100 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
	})
}

// TestGCEFullOperation: an operation that fails has its error when it ends.
func TestGCEFullOperation(t *testing.T) {
	r := newRegion(t, gceProvider)
	r.SetQuota(0)
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(time.Hour)
		if said := r.errors(); len(said) != 1 || !match(said[0], "E Route table "+r.Main()+": the network is full, …") {
			t.Errorf("it says\n%s", strings.Join(said, "\n"))
		}
		r.SetQuota(1)
		pass(100 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
	})
}

// TestGCECannotForward: IP forwarding is a property of the instance that only its owner may change.
func TestGCECannotForward(t *testing.T) {
	r, s := newGCE(t)
	s.SetForwards(r.hop, false)
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine)
		pass(time.Hour)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
		r.log.expect(t, found, `E "Cannot make the cloud accept packets of pods, which it must" err="IP forwarding is off for the instance `+
			r.hop+`: Google Cloud drops the packets of its pods" fix="`+fmt.Sprintf(r.fix, "")+`"`, r.said(Create, ""))
	})
}

// TestGCEOverlap: the network overlaps a subnet of the VPC network.
func TestGCEOverlap(t *testing.T) {
	r := newRegion(t, gceProvider)
	synctest.Test(t, func(t *testing.T) {
		work(t, strings.ReplaceAll(r.config(""), "10.5.0.0/16", "198.18.0.0/16"), "198.18.1.0-24")
		pass(time.Hour)
		if said := r.errors(); len(said) != 1 || !match(said[0], "E Route table "+r.Main()+": the subnet of this node is inside the range of a subnet of the VPC network: choose a Network that overlaps with none …") {
			t.Errorf("it says\n%s", strings.Join(said, "\n"))
		}
	})
}

// TestGCETokens: a token that ends is replaced.
func TestGCETokens(t *testing.T) {
	r, s := newGCE(t)
	s.lifetime = 600
	synctest.Test(t, func(t *testing.T) {
		n := work(t, r.config(""), mine)
		pass(time.Hour)
		s.mu.Lock()
		tokens := len(s.tokens)
		s.mu.Unlock()
		if said := r.errors(); len(said) > 0 || tokens < 5 {
			t.Errorf("with %d tokens, it says\n%s", tokens, strings.Join(said, "\n"))
		}
		n.peers <- subnet.Update{}
	})
}

// TestGCEOneFamily: an interface without an IPv6 address cannot get IPv6 packets, though the API takes routes to it.
func TestGCEOneFamily(t *testing.T) {
	r := newRegion(t, gceProvider)
	r.Terminate(r.hop)
	hop := r.Launch("subnet-1", ipv4)
	synctest.Test(t, func(t *testing.T) {
		work(t, r.dualConfig(""), gceLease).know(gceLease)
		pass(time.Hour)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+hop)
		if said := r.errors(); len(said) != 1 || !match(said[0], "E Route table "+r.Main()+": the interface of this instance has no address of the family of fd05:0:0:1::/64: …") {
			t.Errorf("it says\n%s", strings.Join(said, "\n"))
		}
	})
}

// TestGCENoAccount: an instance without a service account gets one.
func TestGCENoAccount(t *testing.T) {
	r, s := newGCE(t)
	s.lifetime = 0
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine)
		pass(time.Hour)
		r.log.expect(t, "E Google Cloud: there are no Google Cloud credentials (…service-accounts/default/token…): give the instance a service account …")
		s.mu.Lock()
		s.lifetime = 3600
		s.mu.Unlock()
		pass(100 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
	})
}

// TestGCESlow: operations take so long that the steps of one reconciliation do not fit into its time. Where another node
// deletes the same routes, nothing is logged, either.
func TestGCESlow(t *testing.T) {
	r, s := newGCE(t)
	nowhere := "projects/flannel-test/zones/europe-test1-b/instances/gone"
	for i := range 20 {
		s.AddRoute(gceRoute(fmt.Sprintf("flannel-10-5-%d-0-24", 100+i), fmt.Sprintf("10.5.%d.0/24", 100+i), nowhere,
			map[string]any{"warnings": []any{map[string]any{"code": "NEXT_HOP_INSTANCE_NOT_FOUND"}}}))
	}
	s.waits = 15
	s.Fail(Delete, NotReady)
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(10 * time.Minute)
		if left := len(s.Others()); left != 20 {
			t.Errorf("of 20 routes, %d are left, which were not ready", left)
		}
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
		s.Fail(Delete, "")
		pass(20 * time.Minute)
		if said, left := r.errors(), len(s.Others()); len(said) > 0 || left > 0 {
			t.Errorf("%d routes are left, and it says\n%s", left, strings.Join(said, "\n"))
		}
	})
}
