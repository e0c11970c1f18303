package firewall

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// TestPlan: there is no command where all is right; else those that there are
// make it so, when a shell runs them.
func TestPlan(t *testing.T) {
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		d, err := New(t.Context(), "", m.nftables)
		if err != nil {
			t.Fatal(err)
		}
		plan := func(want Desired) []string {
			t.Helper()
			commands, err := d.Plan(t.Context(), want)
			if err != nil {
				t.Fatal(err)
			}
			return commands
		}
		run := func(commands []string) {
			t.Helper()
			for _, c := range commands {
				if out, err := exec.Command("/bin/sh", "-c", c).CombinedOutput(); err != nil {
					t.Fatalf("%s: %v\n%s", c, err, out)
				}
			}
		}
		if c := plan(Desired{}); len(c) > 0 {
			t.Errorf("to hold nothing where nothing is: %s", c)
		}
		for _, want := range []Desired{both, ipv4Alone, {}, both} {
			run(plan(want))
			if c := plan(want); len(c) > 0 {
				t.Errorf("still to do:\n%s", strings.Join(c, "\n"))
			}
		}
		if err := d.Apply(t.Context(), both); err != nil {
			t.Fatal(err)
		}
		if c := plan(both); len(c) > 0 {
			t.Errorf("after Apply:\n%s", strings.Join(c, "\n"))
		}
		if m.nftables {
			nstest.Run(t, "nft flush chain ip flannel-ipv4 forward")
		} else {
			nstest.Run(t, "iptables -D FLANNEL-FWD 1")
		}
		if c := plan(both); len(c) != 1 {
			t.Errorf("for a rule that is missing: %q", c)
		}
	})
}
