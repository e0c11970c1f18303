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

	"github.com/flanneld/flanneld/pkg/plain"
)

// A runner runs commands.
type runner struct {
	limit time.Duration // how long a command may run
	grace time.Duration // how long a command may go on running after the end of the context
}

// maxOutput is how many bytes of the output of a command are kept: somewhat more than fits into a lease.
const maxOutput = maxData + 1<<10

// pipeGrace is how long the pipes of a command that has ended stay open for programs that it left in the background.
const pipeGrace = time.Second

// run runs a command by sh -c and returns its output. The error is one line, and has the output.
func (r runner) run(ctx context.Context, name, command string, environment []string, stdin string) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	limited, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), r.limit, fmt.Errorf("ended, since it "+
		"took longer than %v", r.limit))
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
	cmd.WaitDelay = pipeGrace
	// The programs that the command has started end with the command.
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
		err = nil // the command has left a program in the background
	}
	output := strings.TrimSpace(out.String() + errs.String())
	if err != nil {
		if output == "" {
			output = "nothing"
		}
		return "", fmt.Errorf("%s: %w; it printed: %s", name, err, oneLine(output))
	}
	klog.FromContext(ctx).Info("Command succeeded", "name", name, "output", oneLine(output))
	return out.String(), nil
}

// oneLine joins the lines of the output of a command, which may have printed the data of a peer.
func oneLine(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return plain.Line(strings.Join(lines, " | "))
}

// capped keeps the first maxOutput bytes that are written.
type capped struct{ kept []byte }

func (c *capped) Write(p []byte) (int, error) {
	c.kept = append(c.kept, p[:min(len(p), maxOutput-len(c.kept))]...)
	return len(p), nil
}

func (c *capped) String() string { return string(c.kept) }
