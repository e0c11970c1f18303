package firewall

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/nstest"
)

// hang makes a program hang when its arguments match a pattern of the shell. It
// starts a child that does not end with it, in a session of its own, and keeps
// its outputs open.
func (n *node) hang(name, realName, arguments string) {
	n.t.Helper()
	pid := filepath.Join(n.bin, "child")
	n.install(name, realName, fmt.Sprintf(`case "$*" in %s)
	PATH=%s; [ ! -e %s ] || kill $(cat %[3]s); setsid sleep 1000 & echo $! >%[3]s.new; mv %[3]s.new %[3]s; exec sleep 1000;;
esac`, arguments, os.Getenv("PATH"), pid))
	n.t.Cleanup(func() { n.killChild() })
}

// child returns the process that a program that hangs has started, 0 if none hangs.
func (n *node) child() int {
	text, err := os.ReadFile(filepath.Join(n.bin, "child"))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		n.t.Error(err)
	}
	return pid
}

func (n *node) killChild() {
	if pid := n.child(); pid != 0 {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// programs are those that a driver runs, with the arguments at which each hangs.
var programs = []struct {
	mode
	name, realName, arguments string
	limit                     bool // tried with the limit, too, which takes some seconds
}{
	{legacyMode, "iptables", "iptables-legacy", "--version", false},
	{legacyMode, "iptables-save", "iptables-legacy-save", "*", true},
	{legacyMode, "iptables-restore", "iptables-legacy-restore", "*", false},
	{nftMode, "ip6tables-save", "ip6tables-nft-save", "*", false},
	{tablesMode, "nft", "nft", "--version", true},
	{tablesMode, "nft", "nft", "*list*", false},
	{tablesMode, "nft", "nft", "'-f -'", true},
}

// A program that hangs is given up after a time, with an error that is the same
// each time.
func TestHang(t *testing.T) {
	t.Parallel()
	for _, p := range programs {
		if !p.limit {
			continue
		}
		t.Run(p.name+" "+p.arguments, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, p.variant)
			n.remove("*-legacy*", "*-nft*") // the other variant would do instead
			n.hang(p.name, p.realName, p.arguments)
			for limit := 2 * time.Second; n.child() == 0; limit *= 2 { // until it is long enough for the others
				if limit > 30*time.Second {
					t.Fatal("nothing has hung")
				}
				runner := &command.Runner{Path: n.bin, Limit: limit}
				d, err := newDriver(t.Context(), runner, "", p.nftables)
				if err == nil {
					err = d.Apply(t.Context(), both)
				}
				if want := fmt.Sprintf("ended, since it took longer than %v", limit); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v", err)
				}
			}
		})
	}
}

// A reconciler ends with its context, whatever hangs. Until then, the log says
// what it waits for.
func TestReconcilerEndsWhileProgramHangs(t *testing.T) {
	t.Parallel()
	for _, p := range programs {
		t.Run(p.name+" "+p.arguments, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, p.variant)
			n.remove("*-legacy*", "*-nft*")
			n.hang(p.name, p.realName, p.arguments)
			want := `"Waiting for a program" program="` + filepath.Join(n.bin, p.name)
			log := &nstest.Log{}
			ctx, cancel := context.WithCancel(log.Context(t.Context()))
			defer cancel()
			ended := make(chan struct{})
			late := atomic.Bool{}
			go func() {
				for n.child() == 0 || !strings.Contains(log.String(), want) {
					time.Sleep(5 * time.Millisecond)
				}
				cancel()
				select {
				case <-ended:
				case <-time.After(30 * time.Second):
					late.Store(true)
					n.killChild()
				}
			}()
			r := NewReconciler("", resync)
			runner := &command.Runner{Path: n.bin, Waits: command.Waits{Notice: 100 * time.Millisecond}}
			r.open = func(ctx context.Context, nftables bool) (driver, error) { return newDriver(ctx, runner, "", nftables) }
			r.Set(both, p.nftables)
			r.Run(ctx, p.nftables) // in this thread's namespace
			close(ended)
			if late.Load() {
				t.Error("it ends when the child of the program does")
			}
			if strings.Contains(log.String(), "Failed") {
				t.Errorf("it has logged:\n%s", log)
			}
		})
	}
}

// libraryPrograms are those that go-iptables runs, how the calls that hang are logged, and with which arguments the
// program hangs then. The other variant is there, too, with our rules.
var libraryPrograms = []struct {
	call string
	mode
	name, realName    string
	logged, arguments string
}{
	// The first time, we ask for the variant.
	{"version", nftMode, "iptables-legacy", "iptables-legacy", "--version",
		`"$([ -e $0.ran ] && echo --version || >$0.ran)"`},
	{"delete rule", nftMode, "iptables-legacy", "iptables-legacy", "-t nat -D POSTROUTING",
		"'-t nat -D POSTROUTING '*"},
	{"delete chain", legacyMode, "iptables-nft", "iptables-nft", "-t filter -X FLANNEL-FWD",
		"'-t filter -X FLANNEL-FWD '*"},
}

// A call of the library whose program hangs has an end, at the limit and with its context. The log names the program
// once. The rules are in place.
func TestLibraryHangs(t *testing.T) {
	t.Parallel()
	for _, p := range libraryPrograms {
		t.Run(p.call, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, p.variant)
			other := map[string]string{"nft": "legacy", "legacy": "nft"}[p.variant]
			for _, c := range []chain{postrouting, forward} {
				n.sh(fmt.Sprintf(`iptables-%s -t %s -N %s; iptables-%[1]s -t %[2]s %[4]s`, other, c.table, c.name, c.jump()))
			}
			n.hang(p.name, p.realName, p.arguments)
			log := &nstest.Log{}
			ctx, cancel := context.WithCancel(log.Context(t.Context()))
			defer cancel()
			apply := func(limit time.Duration) error {
				runner := &command.Runner{Path: n.bin, Limit: limit, Waits: command.Waits{Notice: 900 * time.Millisecond}}
				d, err := newDriver(ctx, runner, "", p.nftables)
				if err == nil {
					err = d.Apply(ctx, ipv4Alone)
				}
				return err
			}
			if err := apply(10 * time.Second); err != nil {
				t.Errorf("got %v", err)
			}
			if !strings.Contains(n.sh("iptables-"+p.variant+"-save"), forward.jump()) {
				t.Errorf("the rules are not in place:\n%s", n.listing())
			}
			want := `"Waiting for a program" program="` + filepath.Join(n.bin, p.name) + " " + p.logged
			if strings.Count(log.String(), want) != 1 {
				t.Errorf("want one line with %s, got\n%s", want, log)
			}
			if n.child() == 0 {
				t.Fatal("nothing has hung")
			}
			os.Remove(filepath.Join(n.bin, "child"))
			go func() {
				for n.child() == 0 && ctx.Err() == nil {
					time.Sleep(5 * time.Millisecond)
				}
				cancel()
			}()
			_ = apply(time.Hour) // a failure to remove what others left is only logged
			if ctx.Err() == nil {
				t.Error("nothing has hung the second time")
			}
		})
	}
}

// No program gets the secrets of this process's environment, but for what go-iptables runs.
func TestEnvironment(t *testing.T) {
	t.Setenv("FLANNELD_ETCD_PASSWORD", "hunter2")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
	t.Setenv("NODE_NAME", "n1")
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		file := filepath.Join(n.bin, "environment")
		names := map[string]string{"nft": "nft"}
		if !m.nftables {
			names = map[string]string{}
			for _, action := range []string{"-save", "-restore"} {
				names["iptables"+action] = "iptables-" + m.variant + action
			}
		}
		for name, realName := range names {
			n.install(name, realName, fmt.Sprintf("export -p >>%s", file))
		}
		n.apply(n.driver(m), both)
		text, err := os.ReadFile(file)
		if err != nil || strings.Contains(string(text), "hunter2") || !strings.Contains(string(text), "NODE_NAME=") {
			t.Errorf("%v\n%s", err, text)
		}
	})
}

// A kernel that knows no comments on tables and chains, as Linux before 5.10,
// has the same rules without these comments.
func TestNoComments(t *testing.T) {
	t.Parallel()
	n := newNode(t, "nft")
	// Such a kernel is played by a program that refuses what such a kernel refuses.
	n.install("nft", "nft", fmt.Sprintf(`PATH=%s
case "$*" in *"-f -") in=$(cat)
	if printf '%%s\n' "$in" | grep -q '^add \(table\|chain\) .*comment'; then
		echo "Operation not supported" >&2
		exit 1
	fi
	printf '%%s\n' "$in" | exec %s "$@"; exit;;
esac`, os.Getenv("PATH"), "$(which nft)"))
	d := n.driver(tablesMode)
	n.apply(d, both)
	n.check(d, true)
	rules := n.sh("nft list ruleset")
	if strings.Contains(rules, "flanneld's") || !strings.Contains(rules, "counter") {
		t.Errorf("got\n%s", rules)
	}
	plan, err := d.Plan(t.Context(), both)
	if err != nil || len(plan) > 0 {
		t.Errorf("got %v, %v", plan, err)
	}
}
