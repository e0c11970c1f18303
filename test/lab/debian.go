package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// bootDebian is bootSystemd with the files of another system, $2, in the place of
// the machine's. /sys is read-only, as in every container: programs that find it
// writable wait for udev.
const bootDebian = joinCgroup + `
exec unshare --pid --ipc --mount --fork --kill-child sh -ec '
` + ownCgroups + `
	mount -t overlay -o lowerdir="$2",upperdir="$1"/files,workdir="$1"/work overlay "$1"/root
	cd "$1"/root
	mount -t proc proc proc
	mount --bind proc/sys proc/sys
	mount -o remount,bind,ro proc/sys
	mount --bind /proc/sys/net proc/sys/net
	mount --rbind /sys sys
	mount -o remount,bind,ro sys
	mount --rbind /dev dev
	mount -t tmpfs tmpfs run
	pivot_root . mnt
	umount -l /mnt
	exec /lib/systemd/systemd --system --unit=lab.target --show-status=no --log-target=console' sh "$2" "$3" >"$4" 2>&1
`

// StartDebian starts a system of its own on a node: systemd and the programs of build/debian, which share nothing with
// this machine but the node's network. files are written into it by their names; units are those of its packages that
// systemd is to know. None is started.
func (n *Node) StartDebian(ctx context.Context, files map[string]string, units ...string) (*Systemd, error) {
	root, err := findBuild()
	if err != nil {
		return nil, err
	}
	root = filepath.Join(root, "debian")
	if _, err := os.Stat(root); err != nil {
		return nil, fmt.Errorf("%w: run make build/debian", err)
	}
	if err := addCgroup(n.Namespace.Name); err != nil {
		return nil, err
	}
	dir := filepath.Join(n.Dir, "debian")
	own := func(name string) string { return filepath.Join(dir, "files", name) }
	write := func(name, text string) error {
		return errors.Join(os.MkdirAll(filepath.Dir(own(name)), 0o755), os.WriteFile(own(name), []byte(text), mode(name)))
	}
	id, err := os.ReadFile(n.machineID())
	if err != nil {
		return nil, err
	}
	if err := errors.Join(write("/etc/machine-id", string(id)), os.MkdirAll(filepath.Join(dir, "work"), 0o755),
		os.MkdirAll(filepath.Join(dir, "root"), 0o755), write("/units/service.d/log.conf", "[Service]\n"+
			"StandardOutput=append:/var/log/services.log\nStandardError=inherit\n")); err != nil {
		return nil, err
	}
	for _, target := range []string{"sysinit", "basic", "shutdown", "umount", "multi-user", "network-online", "lab",
		"network", "network-pre", "sockets"} {
		if err := write("/units/"+target+".target", "[Unit]\nDefaultDependencies=no\n"); err != nil {
			return nil, err
		}
	}
	for name, text := range files {
		if err := write(name, text); err != nil {
			return nil, err
		}
	}
	for _, unit := range units {
		if err := os.Symlink("/lib/systemd/system/"+unit, own("/units/"+unit)); err != nil {
			return nil, err
		}
	}
	s := &Systemd{node: n, log: filepath.Join(n.Dir, "debian.log")}
	cmd := exec.Command("sh", "-c", bootDebian, "sh", n.Namespace.Name, dir, root, s.log)
	cmd.Env = []string{"PATH=" + debianPath, "container=lab", "SYSTEMD_UNIT_PATH=/units"}
	return s, s.boot(ctx, cmd)
}

// LaunchDebian starts one program of build/debian on the node, without systemd. It has a /run of its own; what it writes
// elsewhere stays in build/debian.
func (n *Node) LaunchDebian(args ...string) (*Process, error) {
	program, args, err := inDebian(args)
	if err != nil {
		return nil, err
	}
	return n.launch(program, args...)
}

// LaunchRouter is LaunchDebian on the router between the nodes and the outside. The log is router.log.
func (l *Lab) LaunchRouter(args ...string) (*Process, error) {
	program, args, err := inDebian(args)
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(l.Dir, "router.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	return l.net.Launch(cmd)
}

// inDebian returns the command that runs a program of build/debian.
func inDebian(args []string) (string, []string, error) {
	root, err := findBuild()
	return "unshare", append([]string{"--mount", "sh", "-c",
		`mount --rbind /dev "$0"/dev && mount -t tmpfs tmpfs "$0"/run && exec chroot "$0" "$@"`,
		filepath.Join(root, "debian")}, args...), err
}

// mode returns a file's rights. NetworkManager reads a connection that only root can read.
func mode(name string) os.FileMode {
	if filepath.Ext(name) == ".nmconnection" {
		return 0o600
	}
	return 0o644
}

const debianPath = "/usr/sbin:/usr/bin:/sbin:/bin"
