package kernel

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

const (
	policyOut = "src 10.5.1.0/24 dst 10.5.2.0/24 dir out"
	policyTo  = "tmpl src 198.18.0.1 dst 198.18.0.2 proto esp reqid 11 mode tunnel"
	others    = "src 10.5.1.0/24 dst 10.5.2.0/24 proto tcp dir out tmpl src 198.18.0.1 dst 198.18.0.2 proto esp reqid 11 mode tunnel"
)

// policies returns what one peer takes, in both families.
func policies() []Object {
	var all []Object
	for _, p := range []Policy{
		{Src: prefix("10.5.1.0/24"), Dst: prefix("10.5.2.0/24"), From: addr("198.18.0.1"), To: addr("198.18.0.2")},
		{Src: prefix("fd05:0:0:1::/64"), Dst: prefix("fd05:0:0:2::/64"), From: addr("fd18::1"), To: addr("fd18::2")},
	} {
		out, in, fwd := p, Policy{PolicyIn, p.Dst, p.Src, p.To, p.From, false}, Policy{PolicyFwd, p.Dst, p.Src, p.To, p.From,
			false}
		out.Dir = PolicyOut
		all = append(all, out, in, fwd)
	}
	return all
}

func needXFRM(t *testing.T) {
	t.Helper()
	nstest.New(t)
	if out, err := nstest.Try("ip xfrm policy list"); err != nil {
		t.Skipf("needs a kernel with IPsec: %s", out)
	}
}

func showPolicies(t *testing.T) string {
	t.Helper()
	return strings.Join(strings.Fields(nstest.Run(t, "ip xfrm policy list nosock")), " ")
}

// Policies are what the commands say, and come back whatever is done to them.
func TestPolicies(t *testing.T) {
	needXFRM(t)
	for _, o := range policies() {
		nstest.Run(t, o.String())
	}
	want := showPolicies(t)
	for _, o := range policies() {
		nstest.Run(t, o.(Policy).Undo())
	}
	if got := showPolicies(t); got != "" {
		t.Fatalf("the commands leave %s", got)
	}
	r := idler(t)
	r.Set("peer", policies())
	apply(t, r)
	if got := showPolicies(t); len(got) != len(want) || strings.Count(got, "tmpl") != 6 {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if err := r.compare(); err != nil || len(r.dirty) > 0 {
		t.Fatalf("what was just applied differs when read back: %v, %d entries", err, len(r.dirty))
	}
	whole := func() bool { return r.Has("peer") && strings.Count(showPolicies(t), "reqid 11") == 6 }
	for _, harm := range []string{
		"ip xfrm policy flush",
		"ip xfrm policy delete " + policyOut,
		"ip xfrm policy update " + policyOut + " action block",
		"ip xfrm policy update " + policyOut + " priority 7 " + policyTo,
		"ip xfrm policy update " + policyOut + " " + strings.Replace(policyTo, "198.18.0.2", "198.18.0.9", 1),
	} {
		nstest.Run(t, harm)
		if text := showPolicies(t); strings.Contains(text, policyOut+" priority 0 "+policyTo) &&
			!strings.Contains(text, "block") {
			t.Errorf("%s changes nothing", harm)
		}
		settle(t, r, "the policies, after "+harm, func() bool {
			text := showPolicies(t)
			return whole() && strings.Contains(text, policyOut+" priority 0 ") && !strings.Contains(text, "block") &&
				!strings.Contains(text, "198.18.0.9")
		})
	}
	r.Set("peer", nil)
	apply(t, r)
	if got := showPolicies(t); got != "" {
		t.Errorf("left over: %s", got)
	}
}

// What an earlier life or upstream's daemon left goes, what is others' stays.
func TestStalePolicies(t *testing.T) {
	needXFRM(t)
	for _, line := range []string{
		policyOut + " " + policyTo, others,
		"src 10.5.1.0/24 dst 192.0.2.0/24 dir out " + policyTo,
		"src 10.5.1.0/24 dst 10.5.3.0/24 dir out " + strings.Replace(policyTo, "reqid 11", "reqid 12", 1),
	} {
		nstest.Run(t, "ip xfrm policy add "+line)
	}
	r := idler(t)
	apply(t, r)
	got := showPolicies(t)
	if strings.Count(got, "tmpl") != 3 || strings.Contains(got, policyOut+" priority 0 ") {
		t.Errorf("there are %s", got)
	}
}

// The commands that Diff returns for policies lead to the desired policies.
func TestPoliciesDiff(t *testing.T) {
	needXFRM(t)
	r := idler(t)
	r.networks = []netip.Prefix{prefix("10.5.0.0/16"), prefix("fd05::/48")}
	for _, want := range []int{6, 0} { // how many there are to be
		r.Set("peer", policies()[:want])
		commands, err := r.Diff()
		if err != nil || len(commands) != 6 {
			t.Fatalf("%d policies are wanted: %q, %v", want, commands, err)
		}
		for _, c := range commands {
			nstest.Run(t, c)
		}
		if commands, err = r.Diff(); err != nil || len(commands) > 0 {
			t.Errorf("%d policies are there: %q, %v", want, commands, err)
		}
	}
}
