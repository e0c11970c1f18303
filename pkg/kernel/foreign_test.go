package kernel

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// lan adds a link to the host that has a prefix of the network.
func lan(t *testing.T) {
	t.Helper()
	for _, line := range []string{
		"ip link add eth1 type veth peer name far1", "ip link set far1 up", "ip link set eth1 up",
		"ip addr add 10.5.2.11/24 dev eth1",
	} {
		nstest.Run(t, line)
	}
}

const lanRoute = "10.5.2.0/24 dev eth1 proto kernel scope link src 10.5.2.11"

// routes returns the routes to a destination.
func routes(t *testing.T, dst string) []string {
	t.Helper()
	var all []string
	for line := range strings.Lines(nstest.Run(t, "ip route show "+dst)) {
		all = append(all, strings.TrimSpace(line))
	}
	return all
}

// foreignTexts returns what Foreign does, as texts.
func foreignTexts(r *Reconciler) []string {
	var all []string
	for _, f := range r.Foreign() {
		all = append(all, f.Text)
	}
	return all
}

// overlaid is idler with overlays.
func overlaid(t *testing.T) *Reconciler {
	r := idler(t)
	r.SetOverlays([]netip.Prefix{prefix("10.5.0.0/16"), prefix("fd05::/48")})
	return r
}

// TestNeverReplacesOthersRoutes: what was there before our route stays, and our route is refused until the other is
// gone.
func TestNeverReplacesOthersRoutes(t *testing.T) {
	for _, c := range []struct{ name, add, shown, del string }{
		{"connected", "ip addr add 10.5.3.11/24 dev eth1", "10.5.3.0/24 dev eth1 proto kernel scope link src 10.5.3.11",
			"ip addr del 10.5.3.11/24 dev eth1"},
		{"another program's", "ip route add 10.5.3.0/24 via 10.5.2.9 proto static", "10.5.3.0/24 via 10.5.2.9 dev eth1 proto static",
			"ip route del 10.5.3.0/24"},
		{"a black hole", "ip route add blackhole 10.5.3.0/24 proto static", "blackhole 10.5.3.0/24 proto static",
			"ip route del blackhole 10.5.3.0/24"},
		{"unreachable", "ip route add unreachable 10.5.3.0/24 proto static", "unreachable 10.5.3.0/24 proto static",
			"ip route del unreachable 10.5.3.0/24"},
	} {
		t.Run(c.name, func(t *testing.T) {
			host(t)
			lan(t)
			nstest.Run(t, c.add)
			r := idler(t)
			ours := Route{Dst: prefix("10.5.3.0/24"), Via: addr("198.18.0.3"), Dev: "eth0"}
			r.Set("peer", []Object{ours})
			if err := r.Reconcile(); err == nil || !strings.Contains(err.Error(), "is not ours, and stays") {
				t.Errorf("the error is %v", err)
			}
			if got := routes(t, "10.5.3.0/24"); !slices.Equal(got, []string{c.shown}) {
				t.Errorf("the routes are %q, not %q", got, c.shown)
			}
			nstest.Run(t, c.del)
			settle(t, r, "our route", func() bool { return r.Has("peer") })
			r.Set("peer", nil)
			apply(t, r)
			if got := routes(t, "10.5.3.0/24"); len(got) > 0 {
				t.Errorf("at the end, the routes are %q", got)
			}
		})
	}
}

// TestNeverReplacesWhatIsNews: a route that came before ours, and of which we have not heard yet.
func TestNeverReplacesWhatIsNews(t *testing.T) {
	host(t)
	r := idler(t)
	apply(t, r)
	lan(t)
	r.dirty, r.mustCompare = nil, false
	r.Set("peer", []Object{Route{Dst: prefix("10.5.2.0/24"), Via: addr("198.18.0.3"), Dev: "eth0"}})
	if err := r.apply(); err == nil {
		t.Error("no error")
	}
	if got := routes(t, "10.5.2.0/24"); !slices.Equal(got, []string{lanRoute}) {
		t.Errorf("the routes are %q", got)
	}
}

// TestNeverReplacesWhatIsNewsLater: the same where our route was there before, and has gone.
func TestNeverReplacesWhatIsNewsLater(t *testing.T) {
	host(t)
	r := idler(t)
	r.Set("peer", []Object{Route{Dst: prefix("10.5.2.0/24"), Via: addr("198.18.0.3"), Dev: "eth0"}})
	apply(t, r)
	nstest.Run(t, "ip route del 10.5.2.0/24")
	for len(r.dirty) == 0 {
		<-r.Wake() // without news, the test's deadline ends this
		r.receive()
	}
	lan(t)
	if err := r.apply(); err == nil || !strings.Contains(err.Error(), "is not ours, and stays") {
		t.Errorf("the error is %v", err)
	}
	if got := routes(t, "10.5.2.0/24"); !slices.Equal(got, []string{lanRoute}) {
		t.Errorf("the routes are %q", got)
	}
}

// TestForeignWakes: what Foreign hears while it reads all routes, as new overlays call for, is left to Reconcile, which
// is woken.
func TestForeignWakes(t *testing.T) {
	host(t)
	r := start(t)
	settle(t, r, "nothing is left to do", func() bool { return !r.pending() && !r.waiting() })
	nstest.Run(t, "ip link del flannel.1")
	<-r.Wake() // the notification has come
	r.SetOverlays([]netip.Prefix{prefix("10.9.0.0/16")})
	r.Foreign()
	select {
	case <-r.Wake():
	default:
		t.Errorf("the removal of a device is left alone: %d to do", len(r.dirty))
	}
}

// TestNotMissedIsNoError: what we take for gone is still there.
func TestNotMissedIsNoError(t *testing.T) {
	host(t)
	r := start(t)
	r.forgetObjectsOn("eth0")
	for e := range r.entries.All() {
		if e.want != nil && e.have == nil {
			r.queue(e)
		}
	}
	if err := r.apply(); err != nil {
		t.Error(err)
	}
	if r.waiting() {
		t.Errorf("%d refused", len(r.failed))
	}
}

// TestRestartKeepsRouteBeforeOthers: a route of another program with another metric came after ours. A daemon that
// starts again finds ours, and both stay.
func TestRestartKeepsRouteBeforeOthers(t *testing.T) {
	host(t)
	r := overlaid(t)
	r.Set("direct", peerDirect())
	apply(t, r)
	nstest.Run(t, "ip route add 10.5.3.0/24 via 198.18.0.77 proto static metric 100")
	before := routes(t, "10.5.3.0/24")
	for range 2 {
		if got := foreignTexts(r); len(got) > 0 {
			t.Errorf("foreign are %q", got)
		}
		r.Close()
		r = overlaid(t)
	}
	r.Set("direct", peerDirect())
	apply(t, r)
	if got := routes(t, "10.5.3.0/24"); !slices.Equal(got, before) || len(got) != 2 {
		t.Errorf("the routes are %q, not %q", got, before)
	}
}

// TestUpstreamsRoutes: what upstream flannel has left goes at the start. What comes later is an operator's.
func TestUpstreamsRoutes(t *testing.T) {
	host(t)
	nstest.Run(t, "ip route add 10.5.8.0/24 via 198.18.0.8")
	r, err := New(klog.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	networks := []netip.Prefix{prefix("10.5.0.0/16"), prefix("fd05::/48")}
	r.SetOverlays(networks)
	r.Foreign() // reads the routes before it is known which are ours
	r.SetNetworks(networks, networks)
	r.Set("direct", peerDirect())
	apply(t, r)
	if got := routes(t, "10.5.8.0/24"); len(got) > 0 {
		t.Errorf("at the start, the routes stay: %q", got)
	}
	const later = "10.5.9.0/24 via 198.18.0.9 dev eth0"
	nstest.Run(t, "ip route add "+later)
	settle(t, r, "news of the route", func() bool { return len(foreignTexts(r)) == 1 })
	r.Compare()
	apply(t, r)
	if got := routes(t, "10.5.9.0/24"); !slices.Equal(got, []string{later}) {
		t.Errorf("later, the routes are %q", got)
	}
	r.Set("peer", []Object{Route{Dst: prefix("10.5.9.0/24"), Via: addr("198.18.0.3"), Dev: "eth0"}})
	if err := r.Reconcile(); err == nil || !strings.Contains(err.Error(), "is not ours, and stays") {
		t.Errorf("the error is %v", err)
	}
}

// TestRoutesOfTypesOfService: a route for one type of service is no obstacle, and not in the place of ours.
func TestRoutesOfTypesOfService(t *testing.T) {
	host(t)
	const other = "10.5.3.0/24 tos 0x10 via 198.18.0.77 dev eth0 proto static"
	nstest.Run(t, "ip route add "+other)
	r := overlaid(t)
	if got := foreignTexts(r); len(got) > 0 {
		t.Errorf("foreign are %q", got)
	}
	r.Set("direct", peerDirect())
	apply(t, r)
	if got := diff(t, r); len(got) > 0 {
		t.Errorf("the difference is %q", got)
	}
	if got := routes(t, "10.5.3.0/24"); len(got) != 2 {
		t.Errorf("the routes are %q", got)
	}
}

// TestNexthopOfAnotherGoes: a route of another program goes with its nexthop, without a notification.
func TestNexthopOfAnotherGoes(t *testing.T) {
	host(t)
	r := overlaid(t)
	if !r.supported[KindNexthop] {
		t.Skip("this kernel has no nexthop objects")
	}
	nstest.Run(t, "ip nexthop add id 5 via 198.18.0.77 dev eth0")
	nstest.Run(t, "ip route add 10.5.3.0/24 nhid 5 proto static")
	if got := foreignTexts(r); len(got) != 1 {
		t.Errorf("foreign are %q", got)
	}
	r.Set("direct", peerDirect())
	if err := r.Reconcile(); err == nil {
		t.Error("no error")
	}
	nstest.Run(t, "ip nexthop del id 5")
	settle(t, r, "our route", func() bool { return r.Has("direct") && len(foreignTexts(r)) == 0 })
}

// TestConnectedLater: a link with our route's destination comes later. When the peer goes, our route alone does.
func TestConnectedLater(t *testing.T) {
	host(t)
	r := overlaid(t)
	ours := Route{Dst: prefix("10.5.2.0/24"), Via: addr("198.18.0.3"), Dev: "eth0"}
	r.Set("peer", []Object{ours})
	apply(t, r)
	if got := foreignTexts(r); len(got) > 0 {
		t.Errorf("before, foreign are %q", got)
	}
	lan(t)
	want := []string{"10.5.2.0/24 dev eth1 proto kernel"}
	settle(t, r, "news of the link", func() bool { return slices.Equal(foreignTexts(r), want) })
	if commands := diff(t, r); len(commands) > 0 {
		t.Errorf("the link's route comes after ours, and changes nothing: %q", commands)
	}
	r.Set("peer", nil)
	apply(t, r)
	if got := routes(t, "10.5.2.0/24"); !slices.Equal(got, []string{lanRoute}) {
		t.Errorf("the routes are %q", got)
	}
	if got := diff(t, r); len(got) > 0 {
		t.Errorf("the difference is %q", got)
	}
	// A restart finds the same.
	if got := foreignTexts(overlaid(t)); !slices.Equal(got, want) {
		t.Errorf("after a restart, foreign are %q", got)
	}
	// The last address takes routes with it that the kernel does not announce.
	nstest.Run(t, "ip route add 10.5.7.0/24 via 10.5.2.9 proto static")
	settle(t, r, "news of a route", func() bool { return len(foreignTexts(r)) == 2 })
	nstest.Run(t, "ip addr flush dev eth1")
	settle(t, r, "news that the address is gone", func() bool { return len(foreignTexts(r)) == 0 })
	nstest.Run(t, "ip addr add 10.5.2.11/24 dev eth1")
	settle(t, r, "news of the address", func() bool { return len(foreignTexts(r)) == 1 })
	nstest.Run(t, "ip link set eth1 down")
	settle(t, r, "news that the link is down", func() bool { return len(foreignTexts(r)) == 0 })
}

// TestForeign lists which routes precede ours.
func TestForeign(t *testing.T) {
	host(t)
	lan(t)
	for _, line := range []string{
		"ip route add 10.5.3.0/24 via 198.18.0.9 proto static metric 100",
		"ip route add 10.5.4.0/24 via 198.18.0.9",          // as upstream flannel leaves them: ours
		"ip route add 10.5.5.0/24 via 198.18.0.9 proto 70", // ours
		"ip route add 10.5.6.7 dev eth0 proto static",      // such as a pod's
		"ip route add 10.5.0.0/16 via 198.18.0.9 proto static",
		"ip route add 10.0.0.0/8 via 198.18.0.9 proto static",
		"ip route add default via 10.5.2.1 proto dhcp",
		"ip link add cni0 type bridge", "ip link set cni0 up", "ip addr add 10.5.1.1/24 dev cni0",
		"ip -6 addr add fd05:0:0:1::1/64 dev cni0 nodad",
	} {
		nstest.Run(t, line)
	}
	r := overlaid(t)
	var got []string
	for _, f := range r.Foreign() {
		text := f.Text
		if f.Connected {
			text += " connected"
		}
		if f.Bridge {
			text += " bridge"
		}
		got = append(got, text)
	}
	want := []string{
		"0.0.0.0/0 via 10.5.2.1 dev eth1 proto dhcp",
		"10.5.1.0/24 dev cni0 proto kernel connected bridge",
		"10.5.2.0/24 dev eth1 proto kernel connected",
		"10.5.3.0/24 via 198.18.0.9 dev eth0 proto static metric 100",
		"10.5.6.7/32 dev eth0 proto static",
		"fd05:0:0:1::/64 dev cni0 proto kernel metric 256 connected bridge",
	}
	if !slices.Equal(got, want) {
		t.Errorf("want\n%s\ngot\n%s", strings.Join(want, "\n"), strings.Join(got, "\n"))
	}
	if r.pending() == false {
		t.Error("nothing was compared yet, and nothing is pending")
	}
	// What takes the place of a route of ours later does not precede it.
	r.Set("direct", peerDirect())
	nstest.Run(t, "ip route del 10.5.3.0/24")
	settle(t, r, "our route", func() bool { return r.Has("direct") })
	for _, line := range []string{
		"ip route replace 10.5.3.0/24 via 198.18.0.66 dev eth0 proto static",
		"ip route replace 10.5.3.0/24 dev eth1 proto static", "ip route prepend 10.5.3.0/24 via 198.18.0.66 dev eth0 proto static",
	} {
		nstest.Run(t, line)
		hear(r, func(have Object) bool { _, theirs := have.(foreign); return theirs })
		if got := foreignTexts(r); slices.ContainsFunc(got, func(text string) bool { return strings.HasPrefix(text, "10.5.3.0/24") }) {
			t.Errorf("after %s: foreign are %q", line, got)
		}
		settle(t, r, "our route again", func() bool { return r.Has("direct") && len(routes(t, "10.5.3.0/24")) == 1 })
	}
	// What we drop is our own route, also behind another's with the same gateway.
	nstest.Run(t, "ip route prepend 10.5.3.0/24 via 198.18.0.3 dev eth0 proto static")
	hear(r, func(have Object) bool { _, theirs := have.(foreign); return theirs })
	r.Set("direct", nil)
	r.Compare()
	apply(t, r)
	if got := routes(t, "10.5.3.0/24"); !slices.Equal(got, []string{"10.5.3.0/24 via 198.18.0.3 dev eth0 proto static"}) {
		t.Errorf("the routes are %q", got)
	}
}

// TestForeignBeside: a route of ours can stand beside a route with another metric, in IPv4.
func TestForeignBeside(t *testing.T) {
	host(t)
	r := overlaid(t)
	lan(t)
	for _, line := range []string{
		"ip addr add fd18::11/64 dev eth1 nodad",
		"ip route add 10.5.3.0/24 via 10.5.2.9 proto bird metric 32",
		"ip route add 10.5.4.0/24 via 10.5.2.9 proto static",
		"ip -6 route add fd05:0:0:3::/64 via fd18::9 proto bird metric 32",
	} {
		nstest.Run(t, line)
	}
	got := map[string]bool{}
	for _, f := range r.Foreign() {
		got[f.Dst.String()] = f.Beside
	}
	want := map[string]bool{"10.5.2.0/24": false, "10.5.3.0/24": true, "10.5.4.0/24": false, "fd05:0:0:3::/64": false}
	if !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
