package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestCopyCommands runs this program under the names that manifests call, as init containers do.
func TestCopyCommands(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"bin", "net.d", "conf/..data"} {
		if err := os.MkdirAll(path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"cp", "install-conf"} {
		if err := os.Symlink(self, path(name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, path("flannel"), strings.Repeat("program", 50_000), 0o755)
	write(t, path("conf/..data/cni-conf.json"), conflist, 0o644) // as the kubelet mounts a ConfigMap
	if err := os.Symlink("..data/cni-conf.json", path("conf/cni-conf.json")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		command  []string
		from, to string
		mode     os.FileMode
	}{
		{[]string{"cp", "-f", path("flannel"), path("bin/flannel")}, "flannel", "bin/flannel", 0o755},
		{[]string{"cp", path("flannel"), path("net.d")}, "flannel", "net.d/flannel", 0o755},
		{[]string{"cp", "--force", path("flannel"), path("bin/")}, "flannel", "bin/flannel", 0o755},
		{[]string{"cp", "-fv", path("flannel"), path("bin/flannel")}, "flannel", "bin/flannel", 0o755},
		{[]string{"cp", "-rpvf", "--", path("flannel"), path("bin")}, "flannel", "bin/flannel", 0o755},
		{[]string{"cp", path("flannel"), "-aLR", path("bin/flannel"), "--preserve=mode,timestamps", "--archive", "--preserve",
			"--recursive", "--dereference", "--verbose"}, "flannel", "bin/flannel", 0o755},
		{[]string{"cp", "-f", path("conf/cni-conf.json"), path("net.d/10-flannel.conflist")},
			"conf/cni-conf.json", "net.d/10-flannel.conflist", 0o644},
		{[]string{"install-conf", path("conf/cni-conf.json"), path("net.d/20-flannel.conflist")},
			"conf/cni-conf.json", "net.d/20-flannel.conflist", 0o644},
	} {
		for _, former := range []string{"", "a former file"} {
			to := path(c.to)
			os.Remove(to)
			if former != "" {
				write(t, to, former, 0o600)
			}
			former, _ := os.Stat(to)
			if out, err := exec.Command(path(c.command[0]), c.command[1:]...).CombinedOutput(); err != nil {
				t.Errorf("%q: %v: %s", c.command, err, out)
				continue
			}
			want, _ := os.ReadFile(path(c.from))
			got, err := os.ReadFile(to)
			info, _ := os.Lstat(to)
			if err != nil || string(got) != string(want) || info.Mode() != c.mode {
				t.Errorf("%q: %s is not a copy: %v", c.command, to, err)
			}
			if former != nil && os.SameFile(former, info) {
				t.Errorf("%q: %s was written rather than replaced", c.command, to)
			}
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(to), ".*")); left != nil {
				t.Errorf("%q: left behind: %q", c.command, left)
			}
		}
	}

	for want, command := range map[string][]string{
		"no such file":           {"cp", "-f", path("missing"), path("bin/flannel")},
		"is not a file":          {"cp", "-rf", dir, path("bin/flannel")},
		"want two arguments":     {"install-conf", path("flannel")},
		"flannel's own cp":       {"cp", "-fn", path("flannel"), path("bin/flannel")},
		path("missing/x"):        {"cp", "-f", path("flannel"), path("missing/x")},
		"unknown shorthand flag": {"install-conf", "-f", path("flannel"), path("bin/flannel")},
	} {
		out, err := exec.Command(path(command[0]), command[1:]...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) || !strings.HasPrefix(string(out), command[0]+": ") {
			t.Errorf("%q: %v: %s, want %q in it", command, err, out, want)
		}
	}
}
