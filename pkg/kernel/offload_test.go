package kernel

import (
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// TestTXChecksumOff: a device keeps the feature off, whichever program turns it on, until
// that is no longer wanted.
func TestTXChecksumOff(t *testing.T) {
	host(t)
	nstest.Need(t, "ethtool")
	feature := func() string {
		out, _ := nstest.Try("ethtool -k flannel.1") // the device may be gone
		for line := range strings.Lines(out) {
			if value, ok := strings.CutPrefix(strings.TrimSpace(line), "tx-checksum-ip-generic: "); ok {
				return value
			}
		}
		return "unknown"
	}
	is := func(r *Reconciler, want string) {
		t.Helper()
		settle(t, r, "tx-checksum-ip-generic "+want, func() bool { return feature() == want })
		if on, err := ComputesTXChecksums("flannel.1"); err != nil || on != (want == "on") {
			t.Errorf("with tx-checksum-ip-generic %s, the device computes checksums: %v, %v", want, on, err)
		}
	}
	link := node()[0].(Link)
	off := link
	off.TXChecksumOff = true

	r := idler(t)
	r.Set("node", []Object{link})
	apply(t, r)
	if feature() != "on" {
		t.Fatalf("by itself the device has the feature %s: the test proves nothing", feature())
	}
	r.Set("node", []Object{off})
	apply(t, r)
	is(r, "off")
	index := strings.SplitN(nstest.Run(t, "ip -o link show flannel.1"), ":", 2)[0]
	nstest.Run(t, "ethtool -K flannel.1 tx-checksum-ip-generic on")
	is(r, "off")
	if got := strings.SplitN(nstest.Run(t, "ip -o link show flannel.1"), ":", 2)[0]; got != index {
		t.Error("the device was made again")
	}

	// Without the kernel's word, the comparison tells.
	nstest.Run(t, "ethtool -K flannel.1 tx-checksum-ip-generic on")
	again := idler(t)
	again.Set("node", []Object{off})
	apply(t, again)
	if feature() != "off" {
		t.Error("the comparison has not noticed that the feature was on")
	}
	nstest.Run(t, "ip link del flannel.1")
	if on, err := ComputesTXChecksums("flannel.1"); err == nil {
		t.Errorf("a device that is not there computes checksums: %v", on)
	}
	is(again, "off")
	if err := again.compare(); err != nil || len(again.dirty) > 0 {
		t.Errorf("what was just applied differs when read back: %v, %d entries", err, len(again.dirty))
	}

	// As it is wanted no longer, it is on, and whatever somebody makes of it.
	again.Set("node", []Object{link})
	apply(t, again)
	is(again, "on")
	nstest.Run(t, "ethtool -K flannel.1 tx-checksum-ip-generic off")
	again.Compare()
	apply(t, again)
	if feature() != "off" {
		t.Error("the feature was turned on where nothing was said about it")
	}

	// The command does the same.
	nstest.Run(t, "ip link del flannel.1")
	for _, line := range strings.Split(off.String(), " && ") {
		nstest.Run(t, line)
	}
	if feature() != "off" {
		t.Errorf("%s leaves the feature on", off)
	}
}
