package extension

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/klog/v2/textlogger"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

// A node is a place where extensions live, one after the other. Their commands
// write lines to $OUT, which heard returns.
type node struct {
	t      *testing.T
	dir    string
	lines  chan string
	peers  chan subnet.Update
	cancel context.CancelCauseFunc
	done   chan error
}

func newNode(t *testing.T) *node {
	n := &node{t: t, dir: t.TempDir(), lines: make(chan string, 100)}
	pipe := filepath.Join(n.dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(pipe, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	t.Setenv("OUT", pipe)
	t.Setenv("DIR", n.dir)
	t.Setenv("SUBNET", "of flanneld's own environment")
	go func() {
		for lines := bufio.NewScanner(f); lines.Scan(); {
			n.lines <- lines.Text()
		}
	}()
	return n
}

// start has an extension work with these commands.
func (n *node) start(o options) {
	n.t.Helper()
	x := n.extension(o)
	ctx, cancel := context.WithCancelCause(n.t.Context())
	n.cancel, n.done, n.peers = cancel, make(chan error, 1), make(chan subnet.Update, 1)
	own := lease("10.5.1.0-24", `{"PublicIP":"198.18.0.1","PublicIPv6":null,"BackendType":"extension"}`)
	go func() { n.done <- x.Work(ctx, own, n.peers) }()
	n.t.Cleanup(func() { n.stop(nil) })
}

func (n *node) extension(o options) *extension {
	n.t.Helper()
	text, err := json.Marshal(struct {
		Type string
		options
	}{"extension", o})
	if err != nil {
		n.t.Fatal(err)
	}
	cfg, err := subnet.ParseConfig(fmt.Appendf(nil, `{"Network": "10.5.0.0/16", "Backend": %s}`, text))
	if err != nil {
		n.t.Fatal(err)
	}
	b, err := New(cfg, iface.Uplink{IPv4: iface.Link{Name: "eth0", MTU: 1500}})
	if err != nil {
		n.t.Fatal(err)
	}
	x := b.(*extension)
	x.record, x.pause.First = filepath.Join(n.dir, "run", "record.json"), 10*time.Millisecond
	return x
}

// stop ends the extension for a reason, and waits for it.
func (n *node) stop(cause error) {
	n.t.Helper()
	n.cancel(cause)
	if err := <-n.done; err != nil {
		n.t.Errorf("Work returned %v", err)
	}
	n.done <- nil
}

// expect waits for what commands write next.
func (n *node) expect(lines ...string) {
	n.t.Helper()
	for _, want := range lines {
		if got := n.next(); got != want {
			n.t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

func (n *node) next() string {
	n.t.Helper()
	select {
	case line := <-n.lines:
		return line
	case <-time.After(20 * time.Second):
		n.t.Fatal("no command wrote anything for 20 s")
		return ""
	}
}

func lease(key, value string) subnet.Lease {
	s, err := subnet.ParseKey(key)
	if err != nil {
		panic(err)
	}
	l := subnet.Lease{Subnets: s}
	if err := json.Unmarshal([]byte(value), &l.Attrs); err != nil {
		panic(err)
	}
	return l
}

// peerLease returns the lease of the peer 198.18.0.N.
func peerLease(number int, data string) subnet.Lease {
	return lease(fmt.Sprintf("10.5.%d.0-24", number),
		fmt.Sprintf(`{"PublicIP":"198.18.0.%d","PublicIPv6":null,"BackendType":"extension","BackendData":%q}`, number, data))
}

func snapshot(leases ...subnet.Lease) subnet.Update {
	u := subnet.Update{Snapshot: true}
	for _, l := range leases {
		u.Put(&l)
	}
	return u
}

func change(l subnet.Lease) (u subnet.Update) { u.Put(&l); return u }

func removal(l subnet.Lease) (u subnet.Update) { u.Delete(l.Subnets); return u }

const (
	add      = `read DATA; echo "add $SUBNET $IPV6SUBNET $PUBLIC_IP $PUBLIC_IPV6 $DATA" >$OUT`
	remove   = `read DATA; echo "remove $SUBNET $IPV6SUBNET $PUBLIC_IP $PUBLIC_IPV6 $DATA" >$OUT`
	start    = `echo "start $NETWORK $SUBNET $IPV6SUBNET $PUBLIC_IP $PUBLIC_IPV6" >$OUT`
	shutdown = `echo "shutdown $NETWORK $SUBNET $IPV6SUBNET $PUBLIC_IP $PUBLIC_IPV6" >$OUT`
)

func TestWork(t *testing.T) {
	n := newNode(t)
	n.start(options{PostStartupCommand: start, SubnetAddCommand: add, SubnetRemoveCommand: remove,
		ShutdownCommand: shutdown, RunShutdownCommand: true})
	n.peers <- snapshot(peerLease(2, "two"), peerLease(3, "three"),
		lease("10.5.4.0-24&fd05:0:0:4::-64", `{"PublicIP":"198.18.0.4","PublicIPv6":"fd18::4","BackendType":"extension"}`))
	n.expect("start 10.5.0.0/16 10.5.1.0/24  198.18.0.1 ",
		"add 10.5.2.0/24  198.18.0.2  two", "add 10.5.3.0/24  198.18.0.3  three",
		"add 10.5.4.0/24 fd05:0:0:4::/64 198.18.0.4 fd18::4 ")

	// What stays as it is, is left alone.
	n.peers <- change(peerLease(2, "two"))
	n.peers <- change(peerLease(3, "three, changed"))
	n.expect("remove 10.5.3.0/24  198.18.0.3  three", "add 10.5.3.0/24  198.18.0.3  three, changed")
	n.peers <- removal(peerLease(2, ""))
	n.expect("remove 10.5.2.0/24  198.18.0.2  two")
	n.peers <- removal(peerLease(2, ""))
	n.peers <- change(lease("10.5.6.0-24", `{"PublicIP":"198.18.0.6","PublicIPv6":null,"BackendType":"extension","BackendData":{}}`))
	n.peers <- snapshot(peerLease(3, "three, changed"), peerLease(5, "five"))
	n.expect("remove 10.5.4.0/24 fd05:0:0:4::/64 198.18.0.4 fd18::4 ", "add 10.5.5.0/24  198.18.0.5  five")
	n.stop(backend.ErrStopping)
	n.expect("shutdown 10.5.0.0/16 10.5.1.0/24  198.18.0.1 ")
}

// TestShutdownCommand: as in flannel, ShutdownCommand alone does not run, and is remarked on. Configurations of k3s for
// Tailscale have one that takes the node off its network.
func TestShutdownCommand(t *testing.T) {
	n := newNode(t)
	n.start(options{SubnetAddCommand: add, ShutdownCommand: "touch $DIR/shutdown; " + shutdown})
	n.peers <- snapshot(peerLease(2, "two"))
	n.expect("add 10.5.2.0/24  198.18.0.2  two")
	n.stop(backend.ErrStopping)
	if _, err := os.Stat(filepath.Join(n.dir, "shutdown")); !os.IsNotExist(err) {
		t.Errorf("the command was run: %v", err)
	}
	const notRun = "ShutdownCommand is not run, as in flannel: RunShutdownCommand must be true for that"
	for run, want := range map[string]string{"": notRun, `, "RunShutdownCommand": true`: ""} {
		cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16",
			"Backend": {"Type": "extension", "ShutdownCommand": "true"` + run + `}}`))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(cfg, iface.Uplink{IPv4: iface.Link{Name: "eth0", MTU: 1500}}); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(cfg.Warnings, "\n"); got != want {
			t.Errorf("with %q: %q, want %q", run, got, want)
		}
	}
}

// What left, or changed, while flanneld was down is removed as it was added.
// What stayed is added again: only the commands know what is still there.
func TestRestart(t *testing.T) {
	n := newNode(t)
	n.start(options{SubnetAddCommand: add, SubnetRemoveCommand: remove, ShutdownCommand: shutdown,
		RunShutdownCommand: true})
	n.peers <- snapshot(peerLease(2, "two"), peerLease(3, "three"), peerLease(4, "four"))
	for range 3 {
		n.next()
	}
	n.stop(nil)
	n.start(options{SubnetAddCommand: add, SubnetRemoveCommand: remove, ShutdownCommand: shutdown,
		RunShutdownCommand: true})
	n.peers <- snapshot(peerLease(2, "two"), peerLease(4, "changed"))
	n.expect("remove 10.5.3.0/24  198.18.0.3  three",
		"add 10.5.2.0/24  198.18.0.2  two",
		"remove 10.5.4.0/24  198.18.0.4  four", "add 10.5.4.0/24  198.18.0.4  changed")
	n.stop(nil)

	n.start(options{PostStartupCommand: start, SubnetAddCommand: "echo other >$OUT"})
	n.peers <- snapshot(peerLease(2, "two"))
	n.expect("start 10.5.0.0/16 10.5.1.0/24  198.18.0.1 ",
		"remove 10.5.4.0/24  198.18.0.4  changed",
		"remove 10.5.2.0/24  198.18.0.2  two", "other")
	n.stop(backend.ErrStopping)
	if _, err := os.Stat(filepath.Join(n.dir, "run", "record.json")); !os.IsNotExist(err) {
		t.Errorf("though nothing can be removed, there is a record: %v", err)
	}
}

// A peer that is being added when flanneld dies is removed when it is gone.
func TestKilledWhileAdding(t *testing.T) {
	n := newNode(t)
	n.start(options{SubnetAddCommand: `echo "add $SUBNET" >$OUT; cp -r $DIR/run $DIR/copy; echo copied >$OUT`,
		SubnetRemoveCommand: remove})
	n.peers <- snapshot(peerLease(2, "two"))
	n.expect("add 10.5.2.0/24", "copied")
	n.stop(nil)
	if err := os.Rename(filepath.Join(n.dir, "copy", "record.json"),
		filepath.Join(n.dir, "run", "record.json")); err != nil {
		t.Fatal(err)
	}
	n.start(options{SubnetAddCommand: add, SubnetRemoveCommand: remove})
	n.peers <- snapshot()
	n.expect("remove 10.5.2.0/24  198.18.0.2  two")
}

// What fails is tried again, after what was done halfway has been undone.
func TestFailure(t *testing.T) {
	n := newNode(t)
	n.start(options{
		PostStartupCommand:  start + `; [ -e $DIR/started ] || { touch $DIR/started; exit 7; }`,
		SubnetAddCommand:    add + `; { [ $DATA = good ] || [ -e $DIR/fixed ]; } && echo well >$OUT`,
		SubnetRemoveCommand: remove + `; exit 1`,
	})
	n.peers <- snapshot(peerLease(2, "bad"), peerLease(3, "good"))
	const bad, undo = "add 10.5.2.0/24  198.18.0.2  bad", "remove 10.5.2.0/24  198.18.0.2  bad"
	n.expect("start 10.5.0.0/16 10.5.1.0/24  198.18.0.1 ", "start 10.5.0.0/16 10.5.1.0/24  198.18.0.1 ",
		bad, "add 10.5.3.0/24  198.18.0.3  good", "well", undo, bad, undo, bad)
	if err := os.WriteFile(filepath.Join(n.dir, "fixed"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for n.next() != "well" {
	}
	// Removing is given up.
	n.peers <- snapshot(peerLease(3, "good"))
	for range removeTries {
		n.expect(undo)
	}
	n.peers <- change(peerLease(2, "good"))
	n.expect("add 10.5.2.0/24  198.18.0.2  good", "well")
}

// A command that hangs is ended with all that it has started.
func TestHang(t *testing.T) {
	n := newNode(t)
	x := n.extension(options{PreStartupCommand: `sleep 1000 & echo "so far $!"; wait`})
	pid := 0
	for limit := 200 * time.Millisecond; pid == 0; limit *= 2 { // until it is long enough for the command to print
		x.runner = &command.Runner{Limit: limit}
		_, err := x.Attrs(t.Context(), subnet.Attrs{})
		if want := fmt.Sprintf("PreStartupCommand: ended, since it took longer than %v", limit); err == nil ||
			!strings.HasPrefix(err.Error(), want) || limit > time.Minute {
			t.Fatalf("got %v, want %s; it printed: so far, and its child", err, want)
		}
		_, child, _ := strings.Cut(err.Error(), "; it printed: so far ")
		pid, _ = strconv.Atoi(child)
	}
	n.expectEnd(pid)

	// One that runs when flanneld ends gets a little time.
	x.PreStartupCommand = `sleep 1000 & echo $! >$OUT; wait`
	x.runner = &command.Runner{Grace: 200 * time.Millisecond}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := x.Attrs(ctx, subnet.Attrs{})
		done <- err
	}()
	pid, err := strconv.Atoi(n.next())
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "could not wait") {
		t.Errorf("got %v", err)
	}
	n.expectEnd(pid)
}

// expectEnd waits for the end of a process.
func (n *node) expectEnd(pid int) {
	n.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ended(pid); {
		if time.Now().After(deadline) {
			n.t.Fatalf("process %d still runs", pid)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// ended tells whether a process has ended; nobody may have waited for it yet.
func ended(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}

func TestBackground(t *testing.T) {
	n := newNode(t)
	x := n.extension(options{PreStartupCommand: `sleep 1000 & echo $! >$OUT; echo data`})
	attrs, err := x.Attrs(t.Context(), subnet.Attrs{})
	if err != nil || string(attrs.BackendData) != `"data"` {
		t.Errorf("got %s, %v", attrs.BackendData, err)
	}
	pid, err := strconv.Atoi(n.next())
	if err != nil {
		t.Fatal(err)
	}
	if ended(pid) {
		t.Error("what was left in the background has been ended")
	}
	syscall.Kill(pid, syscall.SIGKILL)
}

func TestOutput(t *testing.T) {
	n := newNode(t)
	x := n.extension(options{PreStartupCommand: `head -c 1000000 /dev/zero; exit 3`})
	if _, err := x.Attrs(t.Context(), subnet.Attrs{}); err == nil ||
		!strings.HasPrefix(err.Error(), "PreStartupCommand: exit status 3; it printed: ") || len(err.Error()) > 2*maxOutput {
		t.Errorf("got an error of %d bytes", len(err.Error()))
	}
	x.PreStartupCommand = `printf 'one\n\n  two\n'; echo three >&2; exit 3`
	if _, err := x.Attrs(t.Context(), subnet.Attrs{}); err == nil ||
		err.Error() != "PreStartupCommand: exit status 3; it printed: one | two | three" {
		t.Errorf("got %v", err)
	}
}

// Commands get the environment of flanneld, without its settings.
func TestEnvironment(t *testing.T) {
	t.Setenv("FLANNELD_ETCD_PASSWORD", "hunter2")
	t.Setenv("AWS_PROFILE", "of the operator")
	n := newNode(t)
	x := n.extension(options{PreStartupCommand: `echo "$FLANNELD_ETCD_PASSWORD$AWS_PROFILE"`})
	attrs, err := x.Attrs(t.Context(), subnet.Attrs{})
	if err != nil || string(attrs.BackendData) != `"of the operator"` {
		t.Errorf("got %s, %v", attrs.BackendData, err)
	}
}

// As long as the record cannot be written, that is logged once. Then the record is written.
func TestRecordCannotBeWritten(t *testing.T) {
	n := newNode(t)
	var log bytes.Buffer
	logger := textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&log)))
	path := filepath.Join(n.dir, "run", "record.json")
	if err := os.MkdirAll(filepath.Join(path, "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	x := n.extension(options{SubnetRemoveCommand: remove})
	w := &worker{extension: x, log: logger, peers: map[subnet.Subnets]*peer{}, recorded: record{}}
	for i := range 3 {
		w.update(change(peerLease(i+2, "")))
		w.save()
	}
	if n := strings.Count(log.String(), "Cannot record peers"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, &log)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	w.save()
	if r := readRecord(logger, path); len(r) != 3 {
		t.Errorf("the record is %v", r)
	}
}

// TestLargeOutput: what peers would not read is not published. Quotes and line breaks take more room as JSON.
func TestLargeOutput(t *testing.T) {
	n := newNode(t)
	for command, want := range map[string]string{
		fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x", maxData-2):      "",
		fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x", maxData-1):      "has 65537 bytes as JSON: peers read 65536 at most",
		fmt.Sprintf("head -c %d /dev/zero | tr '\\0' '\"'", maxData/2+1): "has 65540 bytes as JSON",
		"head -c 1000000 /dev/zero | tr '\\0' x":                         "peers read 65536 at most",
	} {
		attrs, err := n.extension(options{PreStartupCommand: command}).Attrs(t.Context(), subnet.Attrs{})
		switch {
		case want == "" && (err != nil || len(attrs.BackendData) != maxData || attrs.CheckSize() != nil):
			t.Errorf("%s: %d bytes, %v, which peers read with %v", command, len(attrs.BackendData), err, attrs.CheckSize())
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: %v, want %q", command, err, want)
		}
	}
}

// TestRemovalCommand: the command that cleanup shows gives SubnetRemoveCommand what flanneld would give it, and has
// nothing in it that a terminal or a shell obeys.
func TestRemovalCommand(t *testing.T) {
	nstest.Need(t, "bash")
	l := peerLease(2, "")
	for _, data := range []string{"", "0e:00:00:00:00:02", "it's; touch $DIR/forged", "one\ntwo'; touch $DIR/forged; '\x1b[2J\u009b\xff"} {
		c := call{Variables: variables(l), Data: data, Remove: `cat; printf '%s' "$SUBNET $PUBLIC_IP"`}
		command := c.removal(l.Subnets).Command
		if strings.ContainsFunc(command, func(r rune) bool { return !strconv.IsPrint(r) }) {
			t.Errorf("cleanup shows %q", command)
		}
		cmd := exec.Command("bash", "-c", command)
		cmd.Dir = t.TempDir()
		cmd.Env = append(os.Environ(), "DIR="+cmd.Dir)
		out, err := cmd.CombinedOutput()
		if want := data + "\n10.5.2.0/24 198.18.0.2"; err != nil || string(out) != want {
			t.Errorf("%s prints %q, %v; want %q", command, out, err, want)
		}
		if left, _ := os.ReadDir(cmd.Dir); len(left) > 0 {
			t.Errorf("%s runs a command of the data", command)
		}
	}
}
