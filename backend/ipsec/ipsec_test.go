package ipsec

import (
	"fmt"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

func TestGolden(t *testing.T) { backendtest.Golden(t) }

// The key is not shown, however the backend is.
func TestSecret(t *testing.T) {
	psk := strings.Repeat("s3cret", 16)
	cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16", "Backend": {"Type": "ipsec", "PSK": "` + psk + `"}}`))
	if err != nil {
		t.Fatal(err)
	}
	b, err := New(cfg, iface.Uplink{Name: "eth0", MTU: 1500})
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
