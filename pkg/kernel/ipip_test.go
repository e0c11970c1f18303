package kernel

import (
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// An ipip device with the right settings is kept, whichever program created it. Another ipip device is replaced.
func TestIPIP(t *testing.T) {
	host(t)
	if out, err := nstest.Try("ip link add flannel.ipip type ipip local 198.18.0.1"); err != nil {
		t.Skipf("needs a kernel with ipip: %s", out)
	}
	r := idler(t)
	want := []Object{
		Link{Name: "flannel.ipip", MTU: 1480, Type: IPIP{Local: addr("198.18.0.1")}},
		Route{Dst: prefix("10.5.2.0/24"), Via: addr("198.18.0.2"), Dev: "flannel.ipip", Onlink: true},
	}
	index := func() string { return strings.Fields(nstest.Run(t, "ip -o link show flannel.ipip"))[0] }
	before := index()
	r.Set("node", want)
	apply(t, r)
	if index() != before {
		t.Error("a device that fits was replaced")
	}
	if got := nstest.Run(t, "ip route show proto 70"); got != "10.5.2.0/24 via 198.18.0.2 dev flannel.ipip onlink " {
		t.Errorf("routes: %q", got)
	}
	for _, kind := range []string{"local 198.18.0.9", "local 198.18.0.1 remote 198.18.0.7"} {
		nstest.Run(t, "ip link del flannel.ipip")
		nstest.Run(t, "ip link add flannel.ipip type ipip "+kind)
		settle(t, r, "the device instead of one with "+kind, func() bool {
			return r.Has("node") && strings.Contains(nstest.Run(t, "ip -d link show flannel.ipip"),
				"remote any local 198.18.0.1")
		})
	}
	if err := r.compare(); err != nil || len(r.dirty) > 0 {
		t.Errorf("%v, %d entries differ", err, len(r.dirty))
	}
}
