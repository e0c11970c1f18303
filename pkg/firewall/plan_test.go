package firewall

import (
	"strings"
	"testing"
)

// TestPlan: there is no command where all is right; else those that there are
// make it so, when a shell runs them.
func TestPlan(t *testing.T) {
	t.Parallel()
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		d, err := newDriver(t.Context(), n.runner(), "", m.nftables)
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
				n.sh(c)
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
			n.sh("nft flush chain ip flannel-ipv4 forward")
		} else {
			n.sh("iptables -D FLANNEL-FWD 1")
		}
		if c := plan(both); len(c) != 1 {
			t.Errorf("for a rule that is missing: %q", c)
		}
	})
}
