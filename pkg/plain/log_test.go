package plain

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2"
)

// logged returns what klog writes while f runs, without the date and the process of the header.
func logged(t *testing.T, f func(klog.Logger)) string {
	t.Helper()
	state := klog.CaptureState()
	defer state.Restore()
	flags := flag.NewFlagSet("", flag.PanicOnError)
	klog.InitFlags(flags)
	flags.Parse([]string{"-logtostderr=false", "-stderrthreshold=FATAL", "-one_output=true", "-vmodule=log_test=3"})
	var log bytes.Buffer
	klog.SetOutput(&log)
	defer klog.SetOutput(nil)
	f(Logger(klog.Background()))
	klog.Flush()
	return log.String()
}

// commandError is as the error of a program that has failed.
type commandError struct{ error }

func (commandError) Command() string { return "nft -f - <<-'END'\nadd table ip \x1b[2J\nEND" }

// TestLogger: whatever is logged, and wherever in the line it is, the log has one line more.
func TestLogger(t *testing.T) {
	hostile := forged + paints
	type object struct{ Text string }
	for name, log := range map[string]func(klog.Logger){
		"a text":            func(l klog.Logger) { l.Info("Message", "key", hostile) },
		"an error":          func(l klog.Logger) { l.Error(errors.New(hostile), "Message") },
		"two errors":        func(l klog.Logger) { l.Error(errors.Join(errors.New(hostile), errors.New("b")), "Message") },
		"a value's error":   func(l klog.Logger) { l.Info("Message", "err", fmt.Errorf("wrapped: %w", errors.New(hostile))) },
		"the message":       func(l klog.Logger) { l.Info(hostile) },
		"a logger's value":  func(l klog.Logger) { l.WithValues("key", hostile).Info("Message") },
		"a named logger":    func(l klog.Logger) { l.WithName("name").Info("Message", "key", hostile) },
		"a zone":            func(l klog.Logger) { l.Info("Message", "key", netip.MustParseAddr("fe80::1%"+hostile)) },
		"zones":             func(l klog.Logger) { l.Info("Message", "key", []netip.Addr{netip.MustParseAddr("fe80::1%\u009b2J")}) },
		"bytes":             func(l klog.Logger) { l.Info("Message", "key", []byte(hostile)) },
		"an object":         func(l klog.Logger) { l.Info("Message", "key", object{"\u009b2J\u202e\x7f"}) },
		"what no JSON has":  func(l klog.Logger) { l.Info("Message", "key", map[string]any{hostile: func() {}}) },
		"one level deeper":  func(l klog.Logger) { l.WithCallDepth(0).Info("Message", "key", hostile) },
		"a text of a MB":    func(l klog.Logger) { l.Info("Message", "key", strings.Repeat("\x1b\n", 1<<19)) },
		"a message of a MB": func(l klog.Logger) { l.Info(strings.Repeat("x", 1<<20)) },
	} {
		text := logged(t, log)
		if strings.Count(text, "\n") != 1 || !strings.HasSuffix(text, "\n") || strings.ContainsAny(text, "\x1b\a\r\x7f\u009b\u202e") {
			t.Errorf("%s: the log has\n%q", name, text)
		}
		if len(text) > 12*maxLine {
			t.Errorf("%s: the log has %d bytes", name, len(text))
		}
	}
}

// TestLoggerLeavesAlone: what is fit to be shown is logged as klog does it by itself, from the line where it is called.
func TestLoggerLeavesAlone(t *testing.T) {
	log := func(l klog.Logger) {
		for range 1 {
			l.Info("Message", "text", "a \"b\"", "number", 7, "on", true, "took", time.Second, "nothing", nil)
			l.Info("Message", "addresses", []netip.Addr{netip.MustParseAddr("192.0.2.1")}, "prefix",
				netip.MustParsePrefix("10.5.0.0/16"), "bytes", []byte("x"))
			l.Error(errors.New("refused"), "Message", "command", Block("iptables-restore <<-'END'\n*nat\nEND"))
			l.Error(nil, "Message")
			l.WithValues("device", "flannel.1").WithName("name").V(3).Info("Message")
			l.V(4).Info("not at this verbosity")
		}
	}
	want := logged(t, func(klog.Logger) { log(klog.Background()) })
	got := logged(t, log)
	strip := func(text string) string { // the time differs
		var lines []string
		for line := range strings.Lines(text) {
			if _, rest, found := strings.Cut(line, " log_test.go:"); found {
				line = line[:1] + " log_test.go:" + rest
			}
			lines = append(lines, line)
		}
		return strings.Join(lines, "")
	}
	if strip(got) != strip(want) || strings.Count(want, "log_test.go:") != 5 {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestBudget: whatever happens again and again, the log has some lines about it, and says how many it lacks.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		text := logged(t, func(l klog.Logger) {
			named := l.WithName("name").WithValues("a", 1).WithCallDepth(0)
			for i := range 2000 {
				l.Info("Applied", "command", i)
				named.Error(errors.New("refused"), "Failed; retrying", "number", i)
			}
			time.Sleep(10 * time.Second)
			l.Info("Applied", "command", "last")
			for i := range 2 * maxMessages {
				l.Info(fmt.Sprint("Message ", i))
			}
			l.Info("Another message")
		})
		for part, want := range map[string]int{
			`"Applied" command=`: mostLines + 1, `"Failed; retrying" err="refused" logger="name" a=1 number=`: mostLines,
			`"Applied" command="last" leftOut=1500`: 1, tooMany: 3, `"Message `: maxMessages - 1 + mostLines, `"Another message"`: 0,
		} {
			if got := strings.Count(text, part); got != want {
				t.Errorf("%s is there %d times, want %d", part, got, want)
			}
		}
	})
}

// TestCommandOfError: the command of an error stands in a block of its own, which has no escape sequences.
func TestCommandOfError(t *testing.T) {
	text := logged(t, func(l klog.Logger) {
		failed := commandError{errors.New("exit status 1")}
		l.Error(errors.Join(fmt.Errorf("IPv4 rules: %w", failed), fmt.Errorf("IPv6 rules: %w", failed)), "Failed; retrying",
			"operation", "Rules")
	})
	const command = "\n\t" + `nft -f - <<-'END'` + "\n\t" + `add table ip \x1b[2J` + "\n\tEND"
	const want = `"Failed; retrying" err="IPv4 rules: exit status 1; IPv6 rules: exit status 1" operation="Rules" command=<` +
		command + command + "\n >\n"
	if !strings.HasSuffix(text, want) {
		t.Errorf("the log has\n%s\nwant\n%s", text, want)
	}
}
