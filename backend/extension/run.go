package extension

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"k8s.io/klog/v2"
)

// A runner runs commands.
type runner struct {
	limit time.Duration // for a command
	grace time.Duration // for one that runs when the context ends
}

// maxOutput is how much of a command's output is kept, in bytes: what is
// published has to fit into a lease, and the rest into a log.
const maxOutput = 64 << 10

// settle is how long the pipes of a command that has ended are kept open for
// programs that it left in the background.
const settle = time.Second

// run runs a command by sh -c and returns what it printed. The error is one
// line, with what the command had to say.
func (r runner) run(ctx context.Context, name, command string, environment []string, stdin string) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	limited, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), r.limit, fmt.Errorf("ended, since it took longer than %v", r.limit))
	defer cancel()
	limited, end := context.WithCancelCause(limited)
	defer end(nil)
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(r.grace):
			end(errors.New("ended, since flanneld could not wait"))
		case <-limited.Done():
		}
	})
	defer stop()

	var out, errs capped
	cmd := exec.CommandContext(limited, "sh", "-c", command)
	cmd.Env = append(os.Environ(), environment...)
	cmd.Stdin = strings.NewReader(stdin + "\n")
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = settle
	// What the command has started goes with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil {
			return os.ErrProcessDone
		}
		return nil
	}
	err := cmd.Run()
	switch cause := context.Cause(limited); {
	case err != nil && cause != nil:
		err = cause
	case errors.Is(err, exec.ErrWaitDelay):
		err = nil // it left something in the background
	}
	said := strings.TrimSpace(out.String() + errs.String())
	if err != nil {
		if said == "" {
			said = "nothing"
		}
		return "", fmt.Errorf("%s: %w; it printed: %s", name, err, oneLine(said))
	}
	if said == "" {
		klog.Infof("%s: done", name)
	} else {
		klog.Infof("%s: done; it printed: %s", name, oneLine(said))
	}
	return out.String(), nil
}

// oneLine makes a command's output fit for the log.
func oneLine(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, " | ")
}

// capped keeps the first maxOutput bytes of what is written to it.
type capped struct{ kept []byte }

func (c *capped) Write(p []byte) (int, error) {
	c.kept = append(c.kept, p[:min(len(p), maxOutput-len(c.kept))]...)
	return len(p), nil
}

func (c *capped) String() string { return string(c.kept) }
