package kernel

import (
	"slices"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// TestDiff: whatever happens to the kernel's tables, the commands that Diff
// prints, run by a shell, repair it; without a difference there are none.
func TestDiff(t *testing.T) {
	for _, c := range []struct {
		name string
		harm []string
		want []string // all of them; nil: many
	}{
		{name: "nothing", want: []string{}},
		{name: "a route gone", harm: []string{"ip route del 10.5.2.0/24"},
			want: []string{"ip route replace 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink proto 70"}},
		{name: "a route to elsewhere", harm: []string{"ip route replace 10.5.2.0/24 via 198.18.0.9 proto static"},
			want: []string{"ip route replace 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink proto 70"}},
		{name: "a route too many", harm: []string{"ip route add 10.5.9.0/24 via 198.18.0.9 proto 70"},
			want: []string{"ip route del 10.5.9.0/24 via 198.18.0.9 dev eth0 proto 70"}},
		{name: "another's route on our device", harm: []string{"ip route add 10.5.9.0/24 dev flannel.1 proto static"},
			want: []string{"ip route del 10.5.9.0/24 dev flannel.1 proto 4"}},
		{name: "another MTU", harm: []string{"ip link set flannel.1 mtu 1400"},
			want: []string{"ip link set flannel.1 mtu 1450 up"}},
		{name: "a neighbour and an FDB entry",
			harm: []string{"ip neigh del 10.5.2.0 dev flannel.1", "bridge fdb del 0e:00:00:00:00:02 dev flannel.1"},
			want: []string{"ip neigh replace 10.5.2.0 lladdr 0e:00:00:00:00:02 dev flannel.1 nud permanent",
				"bridge fdb replace 0e:00:00:00:00:02 dev flannel.1 dst 198.18.0.2 self permanent"}},
		{name: "an address too many", harm: []string{"ip addr add 10.9.9.9/32 dev flannel.1"},
			want: []string{"ip addr del 10.9.9.9/32 dev flannel.1"}},
		{name: "no device", harm: []string{"ip link del flannel.1"}},
		{name: "down", harm: []string{"ip link set flannel.1 down"}},
		{name: "a device of another kind", harm: []string{"ip link del flannel-v6.1",
			"ip link add flannel-v6.1 type bridge"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			host(t)
			r := start(t)
			for _, line := range c.harm {
				nstest.Run(t, line)
			}
			got := diff(t, r)
			if c.want != nil && !slices.Equal(got, c.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			if again := diff(t, r); !slices.Equal(again, got) {
				t.Errorf("the second time it is\n%s", strings.Join(again, "\n"))
			}
			for _, line := range got {
				for command := range strings.SplitSeq(line, " && ") {
					nstest.Run(t, command)
				}
			}
			if left := diff(t, r); len(left) > 0 {
				t.Errorf("after\n%s\nthere is left\n%s", strings.Join(got, "\n"), strings.Join(left, "\n"))
			}
		})
	}
}

func diff(t *testing.T, r *Reconciler) []string {
	t.Helper()
	commands, err := r.Diff()
	if err != nil {
		t.Fatal(err)
	}
	return commands
}

// TestRemoveAll: a Reconciler that wants nothing leaves nothing of ours, made by
// whomever, and all else.
func TestRemoveAll(t *testing.T) {
	host(t)
	before := nstest.Run(t, "ip -d -o link") + nstest.Run(t, "ip route") + nstest.Run(t, "ip -6 route")
	start(t).Close()
	nstest.Run(t, "ip link add flannel.7 type vxlan id 7 dstport 4789 dev eth0") // upstream's have no mark
	nstest.Run(t, "ip link add vxlan0 type vxlan id 8 dstport 4789 dev eth0")    // somebody else's
	r := idler(t)
	r.Devices = func(name string) bool { return name == "flannel.7" }
	if commands := diff(t, r); len(commands) != 9 { // six routes and three devices
		t.Errorf("to be removed:\n%s", strings.Join(commands, "\n"))
	}
	apply(t, r)
	nstest.Run(t, "ip link del vxlan0")
	if after := nstest.Run(t, "ip -d -o link") + nstest.Run(t, "ip route") +
		nstest.Run(t, "ip -6 route"); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
}

// TestDiffLeavesOthers: what somebody has put in the place of ours is his, once
// ours is no longer wanted.
func TestDiffLeavesOthers(t *testing.T) {
	host(t)
	r := start(t)
	nstest.Run(t, "ip route replace 10.5.3.0/24 via 198.18.0.9 proto static")
	if got := diff(t, r); len(got) != 1 {
		t.Errorf("while it is wanted: %q", got)
	}
	r.Set("direct", peerDirect()[1:])
	if got := diff(t, r); len(got) > 0 {
		t.Errorf("when it is not: %q", got)
	}
}
