package ipsec

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

func TestGolden(t *testing.T) { backendtest.Golden(t) }

// The key is not shown, however the backend is.
func TestSecret(t *testing.T) {
	psk := strings.Repeat("s3cret", 16)
	cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16", "Backend": {"Type": "ipsec", "PSK": "` + psk +
		`"}}`))
	if err != nil {
		t.Fatal(err)
	}
	b, err := New(cfg, iface.Uplink{IPv4: iface.Link{Name: "eth0", MTU: 1500}})
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if text := fmt.Sprintf(verb, b.(*ipsec).options); strings.Contains(text, psk) {
			t.Errorf("%s shows %s", verb, text)
		}
	}
	if string(b.(*ipsec).PSK) != psk {
		t.Error("charon would be given another key")
	}
}

func TestReference(t *testing.T) { backendtest.Keys(t, defaults) }

// Cleanup deletes the security associations that serve our policies, and no others.
func TestCleanupAssociations(t *testing.T) {
	nstest.New(t)
	nstest.Need(t, "ip")
	const key = " aead rfc4106(gcm(aes)) 0x0123456789abcdef0123456789abcdef01234567 128"
	const ours = "src 198.18.0.1 dst 198.18.0.2 proto esp spi 0x00000101 reqid 11 mode tunnel"
	if out, err := nstest.Try("ip xfrm state add " + ours + key); err != nil {
		t.Skipf("needs a kernel with ESP: %s", out)
	}
	for _, line := range []string{
		strings.NewReplacer("reqid 11", "reqid 12", "101", "102").Replace(ours),
		strings.NewReplacer("tunnel", "transport", "101", "103").Replace(ours),
		strings.NewReplacer("198.18.0.2", "198.18.0.3", "101", "104").Replace(ours),
	} {
		nstest.Run(t, "ip xfrm state add "+line+key)
	}
	nstest.Run(t, "ip xfrm policy add src 10.5.1.0/24 dst 10.5.2.0/24 dir out tmpl src 198.18.0.1 dst 198.18.0.2 proto esp reqid 11 mode tunnel")
	networks := []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16")}
	steps, err := associationSteps(networks)
	const command = "ip xfrm state delete src 198.18.0.1 dst 198.18.0.2 proto esp spi 0x101"
	if err != nil || len(steps) != 1 || steps[0].Command != command {
		t.Fatalf("%v, %v", steps, err)
	}
	count := func() int { return strings.Count(nstest.Run(t, "ip xfrm state list"), "proto esp") }
	if err := steps[0].Do(t.Context()); err != nil || count() != 3 {
		t.Errorf("%v, and %d are left", err, count())
	}
	nstest.Run(t, "ip xfrm state add "+ours+key)
	nstest.Run(t, command)
	if count() != 3 {
		t.Errorf("the command leaves %d", count())
	}
	if err := steps[0].Do(t.Context()); err != nil || count() != 3 {
		t.Errorf("once more: %v, and %d are left", err, count())
	}
	if steps, err := associationSteps([]netip.Prefix{netip.MustParsePrefix("10.6.0.0/16")}); err != nil || len(steps) > 0 {
		t.Errorf("for another network: %v, %v", steps, err)
	}
}
