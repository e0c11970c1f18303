package ipsec

import "testing"

// TestTunnelNames: a connection of charon is flanneld's by its name. A zone of an address could be any text.
func TestTunnelNames(t *testing.T) {
	for name, want := range map[string]bool{
		"198.18.0.1-10.5.1.0/24-10.5.2.0/24-198.18.0.2":        true,
		"fd18::1-fd05:0:0:1::/64-fd05:0:0:2::/64-fd18::2":      true,
		"198.18.0.1-10.5.1.0/24-10.5.2.0/24":                   false,
		"home":                                                 false,
		"198.18.0.1-10.5.1.0/24-10.5.2.0/24-$(reboot)":         false,
		"198.18.0.1-10.5.1.0/24-10.5.2.0/24-fe80::1%$(reboot)": false,
		"fe80::1%\n\x1b[2J-10.5.1.0/24-10.5.2.0/24-198.18.0.2": false,
		"198.18.0.1-10.5.1.0/24-fe80::%;reboot;/64-198.18.0.2": false,
	} {
		if got := isTunnel(name); got != want {
			t.Errorf("%q: got %t", name, got)
		}
	}
}
