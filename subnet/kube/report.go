package kube

import (
	"context"
	"net/http"
	"net/netip"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/flanneld/flanneld/subnet"
)

// Expiries implements subnet.Manager. A podCIDR never expires.
func (m *Manager) Expiries(context.Context, ...subnet.Subnets) (map[subnet.Subnets]time.Time, error) {
	return nil, nil
}

// Clock implements subnet.Manager. Any answer has a Date.
func (m *Manager) Clock(ctx context.Context) (time.Time, error) {
	c := m.client.current()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.Get().AbsPath("/version").URL().String(), nil)
	if err != nil {
		return time.Time{}, err
	}
	answer, err := c.Client.Do(request)
	if err != nil {
		return time.Time{}, err
	}
	answer.Body.Close()
	return http.ParseTime(answer.Header.Get("Date"))
}

// Holdings returns the podCIDRs of all Nodes, sorted, and what the Nodes publish, for an operator.
func (m *Manager) Holdings(ctx context.Context) ([]subnet.Holding, error) {
	var all []subnet.Holding
	err := m.retry(ctx, "read the Nodes", func(ctx context.Context) error {
		all = nil
		for page := (metav1.ListOptions{Limit: 500}); ; {
			nodes := NodeList{prefix: m.options.AnnotationPrefix}
			request := m.client.current().Get().Resource("nodes").VersionedParams(&page, nodeParams)
			if err := request.MaxRetries(0).Do(ctx).Into(&nodes); err != nil {
				return err
			}
			for i := range nodes.Items {
				all = append(all, m.holding(&nodes.Items[i]))
			}
			if page.Continue = nodes.Continue; page.Continue == "" {
				return nil
			}
		}
	})
	slices.SortFunc(all, func(a, b subnet.Holding) int {
		return slices.CompareFunc(a.Each(), b.Each(), netip.Prefix.Compare)
	})
	return all, err
}

func (m *Manager) holding(n *Node) subnet.Holding {
	h := subnet.Holding{Node: n.Name, Lease: subnet.Lease{Subnets: subnetsOf(n.podCIDRs, bothFamilies)}}
	switch {
	case len(h.Each()) == 0:
		h.Note = "has no podCIDR"
	case n.annotation(managed) != "true":
		h.Note = "flanneld has not run there"
	default:
		h.Attrs = attrsOf(n.annotation)
	}
	return h
}
