package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// A Systemd is a real one, process 1 of a node.
type Systemd struct {
	node *Node
	pid  int // as it is seen from outside
	log  string
}

// bootSystemd starts it as a container's: in a control group that is the root of
// its own, with /proc of its processes. What it would set or make for the whole
// machine it cannot: sysctls, files in /etc, /run, /var/lib and /usr/local/bin, and in
// the directory of control groups, where it mounts what it misses and then forbids
// all others to write.
const bootSystemd = joinCgroup + `
exec unshare --pid --ipc --mount --fork --kill-child --mount-proc sh -ec '
	mount --bind /proc/sys /proc/sys
	mount -o remount,bind,ro /proc/sys
	for own in etc usr/local/bin var/lib; do
		mkdir -p "$1"/root/$own "$1"/work/$own
		mount -t overlay -o lowerdir=/$own,upperdir="$1"/root/$own,workdir="$1"/work/$own overlay /$own
	done
` + ownCgroups + `
	exec /lib/systemd/systemd --system --unit=lab.target --show-status=no --log-target=console' sh "$2" >"$3" 2>&1
`

// joinCgroup puts the shell into the control group of the node, $1.
const joinCgroup = `set -e
for group in /sys/fs/cgroup/"$1" /sys/fs/cgroup/*/"$1"; do
	[ ! -d "$group" ] || echo $$ >"$group"/cgroup.procs
done
`

// ownCgroups mounts a /run, and the machine's control groups into a directory in which systemd can mount more. Systemd
// makes that directory read-only for all others otherwise.
const ownCgroups = `
	mount -t tmpfs tmpfs /run
	if [ ! -e /sys/fs/cgroup/cgroup.procs ]; then
		mkdir /run/cgroup
		mount -t tmpfs tmpfs /run/cgroup
		for hierarchy in /sys/fs/cgroup/*/cgroup.procs; do
			name=$(basename $(dirname $hierarchy))
			mkdir /run/cgroup/$name
			mount --bind /sys/fs/cgroup/$name /run/cgroup/$name
		done
		mount --move /run/cgroup /sys/fs/cgroup
	fi
`

// Install puts a program into the /usr/local/bin that systemd and its services will see.
func (n *Node) Install(program string) error {
	text, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	dir := filepath.Join(n.Dir, "root/usr/local/bin")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, filepath.Base(program)), text, 0o755)
}

// StartSystemd starts systemd on a node, with units by their names, beside those
// of /etc. The targets that every service refers to are there, and empty.
func (n *Node) StartSystemd(ctx context.Context, units map[string]string) (*Systemd, error) {
	if err := addCgroup(n.Namespace.Name); err != nil {
		return nil, err
	}
	dir := filepath.Join(n.Dir, "units")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	all := map[string]string{}
	for _, target := range []string{"lab", "sysinit", "basic", "shutdown", "umount", "multi-user", "network-online"} {
		all[target+".target"] = "[Unit]\nDescription=" + target + "\nDefaultDependencies=no\n"
	}
	for name, text := range units {
		all[name] = text
	}
	for name, text := range all {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	s := &Systemd{node: n, log: filepath.Join(n.Dir, "systemd.log")}
	cmd := exec.Command("sh", "-c", bootSystemd, "sh", n.Namespace.Name, n.Dir, s.log)
	cmd.Env = append(os.Environ(), "container=lab", "SYSTEMD_UNIT_PATH="+dir+":/etc/systemd/system")
	return s, s.boot(ctx, cmd)
}

// boot runs the command, whose only child becomes systemd, and waits until systemd has started.
func (s *Systemd) boot(ctx context.Context, cmd *exec.Cmd) error {
	proc, err := s.node.Launch(cmd)
	if err != nil {
		return err
	}
	return Poll(ctx, "systemd on "+s.node.Hostname, func() error {
		if proc.Exited() {
			return fmt.Errorf("it has exited\n%s", tail(s.log))
		}
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		if err != nil {
			return err
		}
		if s.pid, err = strconv.Atoi(strings.TrimSpace(string(children))); err != nil {
			return fmt.Errorf("it has not been started yet")
		}
		state, err := s.Run(ctx, "systemctl is-system-running")
		if state != "running" {
			return fmt.Errorf("it is %s: %w", state, err)
		}
		return nil
	})
}

// Run runs a command where systemd's services run.
func (s *Systemd) Run(ctx context.Context, line string) (string, error) {
	return s.node.Run(ctx, fmt.Sprintf("nsenter --target %d --pid --ipc --mount %s", s.pid, line))
}

// Path returns where this process finds a file of those that systemd and its services see.
func (s *Systemd) Path(name string) string { return fmt.Sprintf("/proc/%d/root%s", s.pid, name) }

// Log returns what systemd and its services have logged.
func (s *Systemd) Log() string {
	text, err := os.ReadFile(s.log)
	if err != nil {
		return err.Error()
	}
	return string(text)
}
