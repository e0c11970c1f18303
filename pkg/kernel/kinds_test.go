package kernel

import (
	"reflect"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// samples has an object or two of each kind, in both families where there are two.
func samples() map[Kind][]Object {
	all := map[Kind][]Object{KindNexthop: {nexthop{id: 77, via: addr("198.18.0.3"), dev: "eth0", onlink: true}}}
	for _, objects := range [][]Object{node(), peer(mac2), peerDirect(), inTable(), policies()} {
		for _, o := range objects {
			all[o.Key().Kind] = append(all[o.Key().Kind], o)
		}
	}
	return all
}

// optional are the fields of a descriptor that a kind may leave empty.
var optional = []string{
	"bestEffort", "removeFirst", "removeFirstInDiff", "evict", "probe", "unsupported", "lower", "change", "skip",
	"notified", "removed", "blocked", "permit",
}

// Every kind has all properties that the reconciler needs.
func TestKindsAreComplete(t *testing.T) {
	names := map[string]Kind{}
	for k := range kinds {
		d := kindTable[k]
		ownMessages := d.apply != nil
		row := reflect.ValueOf(d)
		for i := range row.NumField() {
			name := row.Type().Field(i).Name
			want := !slices.Contains(optional, name) && name != "protocol" // NETLINK_ROUTE is 0
			switch name {
			case "read", "apply", "handle":
				want = ownMessages
			case "get", "dumps", "decode", "body":
				want = !ownMessages
			}
			if want && row.Field(i).IsZero() {
				t.Errorf("kind %d (%s) has no %s", k, d.name, name)
			}
		}
		if (d.protocol != unix.NETLINK_ROUTE) != (d.unsupported != nil) && d.probe == nil {
			t.Errorf("kind %s: a kernel may lack the protocol, and nothing says what to do then", k)
		}
		if other, taken := names[d.name]; taken {
			t.Errorf("kinds %d and %d are both called %s", k, other, d.name)
		}
		names[d.name] = k
		if len(samples()[k]) == 0 {
			t.Errorf("no test knows an object of kind %s", k)
		}
	}
}

// What is sent to the kernel to set an object is, when it is read, that object. Two objects have one key only if the
// kernel cannot hold both.
func TestObjectsEncodeAndDecodeToThemselves(t *testing.T) {
	at := newDevices()
	for index, name := range []string{"lo", "eth0", "flannel.1", "flannel-v6.1"} {
		at.put(index+1, device{name: name, enabled: true, up: true})
	}
	keys := map[Key]Object{}
	for k, objects := range samples() {
		d := &kindTable[k]
		for _, o := range objects {
			if other, taken := keys[o.Key()]; taken || o.Key().Kind != k {
				t.Errorf("%s has the key of %v, kind %s", o, other, o.Key().Kind)
			}
			keys[o.Key()] = o
			if d.apply != nil {
				continue
			}
			request := d.encode(o, at.number[o.device()], 0, true)
			if request.kind != d.set || request.flags != unix.NLM_F_CREATE|unix.NLM_F_REPLACE {
				t.Errorf("%s is sent as %+v", o, request)
			}
			if got := d.decode(request.body, at); got.Object != o {
				t.Errorf("%s is read back as %v", o, got.Object)
			}
			undo := d.encode(o, at.number[o.device()], 0, false)
			if undo.kind != d.del || undo.flags != 0 {
				t.Errorf("%s is undone by %+v", o, undo)
			}
			for n := range request.body { // a message that is cut off is no reason to panic
				d.decode(request.body[:n], at)
			}
		}
	}
}

// The keys of objects that differ only in what the kernel tells them apart by.
func TestKeys(t *testing.T) {
	p := policies()[0].(Policy)
	src, dst, dir := p, p, p
	src.Src, dst.Dst, dir.Dir = prefix("10.5.7.0/24"), prefix("10.5.7.0/24"), PolicyFwd
	v4, v6 := Route{Dst: prefix("0.0.0.0/0")}, Route{Dst: prefix("::/0")}
	all := []Object{p, src, dst, dir, v4, v6, Route{Dst: v4.Dst, Metric: 1}, Route{Dst: prefix("0.0.0.0/1")},
		Addr{Dev: "a", Prefix: prefix("10.0.0.1/32")}, Neighbor{Dev: "a", IP: addr("10.0.0.1")}, nexthop{id: 1},
		nexthop{id: 2}}
	for i, a := range all {
		for _, b := range all[:i] {
			if a.Key() == b.Key() {
				t.Errorf("%s and %s have one key", a, b)
			}
		}
	}
	other := p
	other.From = addr("198.18.0.9")
	if p.Key() != other.Key() {
		t.Errorf("%s and %s cannot both be there", p, other)
	}
	if size := unsafe.Sizeof(Key{}); size > 72 {
		t.Errorf("a key takes %d bytes: there are tens of thousands", size)
	}
}

// The order in which kinds are removed, by apply and by the commands of Diff.
func TestOrderOfRemoval(t *testing.T) {
	order := func(first func(*descriptor) bool) (all []Kind) {
		for _, want := range []bool{true, false} {
			for k := int(kinds) - 1; k >= 0; k-- {
				if first(&kindTable[k]) == want {
					all = append(all, Kind(k))
				}
			}
		}
		return all
	}
	apply := order(func(d *descriptor) bool { return d.removeFirst })
	diff := order(func(d *descriptor) bool { return d.removeFirstInDiff })
	if want := []Kind{KindRoute, KindLink, KindPolicy, KindRule, KindNexthop, KindFDB, KindNeighbor, KindAddr}; !slices.Equal(apply,
		want) {
		t.Errorf("apply removes %v", apply)
	}
	if want := []Kind{KindPolicy, KindRoute, KindLink, KindRule, KindNexthop, KindFDB, KindNeighbor, KindAddr}; !slices.Equal(diff,
		want) {
		t.Errorf("diff removes %v", diff)
	}
}

// A caller that reconciles after each Wake, and does nothing else, is right: what is refused is retried when it may have
// become possible, with backoff otherwise, and the error stays the same value until there was another attempt.
func TestWake(t *testing.T) {
	quietHost(t)
	r := idler(t)
	r.backoff.First, r.backoff.Most = time.Hour, time.Hour
	wakes := func() bool {
		select {
		case <-r.Wake():
			return true
		case <-time.After(100 * time.Millisecond):
			return false
		}
	}
	rest := func() {
		for wakes() {
			r.Reconcile()
		}
	}
	if !wakes() {
		t.Error("the first comparison is not due")
	}
	rest()
	far := []Object{Route{Dst: prefix("10.5.4.0/24"), Via: addr("198.19.0.4"), Dev: "eth0"}}
	r.Set("far", far)
	if !wakes() {
		t.Error("Set leaves nothing to do")
	}
	err := r.Reconcile()
	if err == nil {
		t.Fatal("a route with an unreachable gateway is accepted")
	}
	rest()
	if got := r.Reconcile(); got != err {
		t.Error("without another attempt, the error is another value")
	}
	r.Set("far", nil)
	if r.Reconcile(); r.err != nil || r.waiting() {
		t.Errorf("dropped, and the error is still %v", r.err)
	}

	r.Set("far", far)
	rest()
	nstest.Run(t, "ip addr add 198.19.0.1/24 dev eth0")
	settle(t, r, "the route, once its gateway can be reached", func() bool { return r.Has("far") })
	if r.err != nil {
		t.Errorf("the error is still %v", r.err)
	}

	r.backoff.Reset()
	r.backoff.First, r.backoff.Most = 10*time.Millisecond, 10*time.Millisecond
	r.retryAt = time.Time{}
	r.Set("other", []Object{Route{Dst: prefix("10.5.6.0/24"), Via: addr("203.0.113.4"), Dev: "eth0"}})
	first := r.Reconcile()
	tries := 0
	settle(t, r, "retries", func() bool {
		if r.err != first {
			first, tries = r.err, tries+1
		}
		return tries == 3
	})
	r.backoff.Reset()
	r.backoff.First, r.backoff.Most = time.Hour, time.Hour // else there is a retry before rest has rested
	r.Compare()
	rest()
	if _, err := r.Diff(); err != nil || r.pending() {
		t.Errorf("%v, and there is something left to do: %t", err, r.pending())
	}
}

// BenchmarkKey is what a key costs as the key of a map.
func BenchmarkKey(b *testing.B) {
	entries := map[Key]int{}
	var objects []Object
	for i := range 5000 {
		objects = append(objects, vxlanPeer(i)...)
	}
	for i, o := range objects {
		entries[o.Key()] = i
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		o := objects[i%len(objects)]
		if entries[o.Key()] != i%len(objects) {
			b.Fatal("not found")
		}
	}
}
