package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// An intruder is what a daemon that was taken over could run. It takes the place of flanneld in a unit, and tries there
// what a test asks it to try.

const (
	// intruderSocket is where the intruder takes requests: lines "ACTION ARGUMENT". It answers each with a line: "ok", or
	// why the action failed.
	intruderSocket = "/run/flannel/intruder.sock"

	// intruderVar is set in the environment of an intruder.
	intruderVar = "TEST_IS_INTRUDER"
)

// intruderActions are what an intruder can try.
var intruderActions = map[string]func(argument string) error{
	// A file that is written is removed again.
	"write": func(path string) error {
		if err := os.WriteFile(path, []byte("intruder"), 0o644); err != nil {
			return err
		}
		return os.Remove(path)
	},
	"read": func(path string) error {
		_, err := os.ReadFile(path)
		return err
	},
	"list": func(path string) error {
		_, err := os.ReadDir(path)
		return err
	},
	"open": func(path string) error { // a device
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return f.Close()
	},
	"connect": func(path string) error {
		conn, err := net.Dial("unix", path)
		if err != nil {
			return err
		}
		return conn.Close()
	},
	// As iptables does. The lock is held until the intruder ends.
	"lock": func(path string) error {
		fd, err := unix.Open(path, unix.O_CREAT|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	},
	"run": func(line string) error {
		words := strings.Fields(line)
		out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, strings.Join(strings.Fields(string(out)), " "))
		}
		return nil
	},
	"socket": func(family string) error {
		number := map[string]int{"packet": unix.AF_PACKET, "netlink": unix.AF_NETLINK}[family]
		fd, err := unix.Socket(number, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	},
	"call": func(name string) error {
		switch name {
		case "mount":
			return unix.Mount("tmpfs", "/run/flannel", "tmpfs", 0, "")
		case "unshare":
			return unix.Unshare(unix.CLONE_NEWUTS)
		case "init_module":
			// With the right, the kernel says that this is no module.
			if err := unix.InitModule([]byte("no module"), ""); !errors.Is(err, unix.ENOEXEC) {
				return err
			}
			return nil
		case "mmap": // memory that is writable and executable
			b, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC,
				unix.MAP_ANON|unix.MAP_PRIVATE)
			if err != nil {
				return err
			}
			return unix.Munmap(b)
		case "acct": // as for init_module
			if err := unix.Acct("/run/flannel/nothing"); !errors.Is(err, unix.ENOENT) {
				return err
			}
			return nil
		}
		return errors.New("no such call")
	},
}

// TestIntruder is the intruder. It is no test where intruderVar is not set.
func TestIntruder(t *testing.T) {
	if os.Getenv(intruderVar) == "" {
		t.Skip("only TestSandbox starts the intruder")
	}
	l, err := net.Listen("unix", intruderSocket)
	if err != nil {
		t.Fatal(err)
	}
	ready, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(ready, "READY=1"); err != nil {
		t.Fatal(err)
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		for requests := bufio.NewScanner(conn); requests.Scan(); {
			action, argument, _ := strings.Cut(requests.Text(), " ")
			result := "ok"
			if err := intruderActions[action](argument); err != nil {
				result = strings.ReplaceAll(err.Error(), "\n", " ")
			}
			fmt.Fprintln(conn, result)
		}
		conn.Close()
	}
}
