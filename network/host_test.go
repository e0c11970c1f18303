package network

import (
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// TestLANComesAndGoes: a link of the host gets a peer's subnet. The link's route is never touched, and the peer is left
// out as long as it is there.
func TestLANComesAndGoes(t *testing.T) {
	m := newManager(vxlanConfig)
	begin(t, m, nil)
	t.Cleanup(func() { nstest.Try("ip link del eth1") })
	<-m.wants
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	const ours, lan = "10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto 70 onlink", "10.5.2.0/24 dev eth1 proto kernel scope link src 10.5.2.11"
	if got := route("10.5.2.0/24"); got != ours {
		t.Errorf("the peer's route is %q", got)
	}
	leftOut := func(count string) bool {
		_, text := get("/metrics")
		return strings.Contains(text, "\nflannel_peers_faulty "+count+"\n")
	}
	for _, line := range []string{"ip link add eth1 type veth peer name far1", "ip link set far1 up", "ip addr add 10.5.2.11/24 dev eth1", "ip link set eth1 up"} {
		nstest.Run(t, line)
	}
	eventually(t, "the link's route alone", func() bool { return route("10.5.2.0/24") == lan && leftOut("1") })
	// The peer's lease changes, and its neighbour must not come back without the route.
	m.updates <- snapshot(peer2)
	if out, _ := nstest.Try("ip neigh show dev flannel.1 nud permanent"); strings.Contains(out, "10.5.2.0") {
		t.Errorf("of the peer there is %s", out)
	}
	nstest.Run(t, "ip link set eth1 down")
	eventually(t, "our route", func() bool { return route("10.5.2.0/24") == ours && leftOut("0") })
	nstest.Run(t, "ip link set eth1 up")
	eventually(t, "the link's route alone again", func() bool { return route("10.5.2.0/24") == lan })
	nstest.Run(t, "ip link del eth1")
	eventually(t, "our route again", func() bool { return route("10.5.2.0/24") == ours })
}
