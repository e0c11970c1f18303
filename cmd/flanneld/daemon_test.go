package main

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// TestMain runs the daemon in place of the tests if TEST_IS_FLANNELD is set, as start does.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_IS_FLANNELD") == "" {
		nstest.Main(m) // no other flanneld runs there
	}
	main()
}

// start starts flanneld, which is killed when ctx ends, and returns a scanner of the lines that flanneld logs. The subnet
// file and the status socket are in a directory of the test's own. The path of a socket has at most 107 bytes, and the
// names of some tests are too long for that.
func start(ctx context.Context, t *testing.T, env []string, args ...string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	dir, err := os.MkdirTemp("", "flanneld")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cmd := exec.CommandContext(ctx, os.Args[0], append(args, "--subnet-file="+filepath.Join(dir, "subnet.env"))...)
	cmd.Env = append(env, "TEST_IS_FLANNELD=1", "PATH="+os.Getenv("PATH"))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewScanner(r)
}
