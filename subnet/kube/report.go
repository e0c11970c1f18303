package kube

import (
	"context"
	"net/http"
	"time"

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
