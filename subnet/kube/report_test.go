package kube

import (
	"fmt"
	"slices"
	"testing"
)

// TestHoldings: what Nodes have, sorted, without a file of the configuration.
func TestHoldings(t *testing.T) {
	s := newAPIServer(t)
	s.update("n3", func(n *testNode) { n.cidrs = []string{"10.5.3.0/24", "fd00:5:0:3::/64"} })
	s.update("n2", func(n *testNode) { n.cidrs, n.annotations = []string{"10.5.2.0/24"}, peerNode(2).annotations })
	s.update("n1", func(*testNode) {})
	m, err := New(t.Context(), Options{APIURL: s.URL, NodeName: "elsewhere"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	all, err := m.Holdings(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, h := range all {
		got = append(got, fmt.Sprintf("%s: %s %v %s %s", h.Node, h.Subnets, h.Attrs.PublicIPs(), h.Attrs.BackendType, h.Note))
	}
	if want := []string{"n1:  []  has no podCIDR", "n2: 10.5.2.0/24 [198.18.0.2] vxlan ",
		"n3: 10.5.3.0/24,fd00:5:0:3::/64 []  flanneld has not run there"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
