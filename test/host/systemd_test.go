// Package host tests what is installed on a host beside the binaries: systemd's
// units, and the script that configures Docker for the node's subnet.
package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// units returns a directory with our units, and programs in the place of ours. Docker's own unit is the least that
// one can be.
func units(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for from, to := range map[string]string{
		"flanneld.service":    "flanneld.service",
		"docker/flannel.conf": "docker.service.d/flannel.conf",
	} {
		text, err := os.ReadFile(filepath.Join("../../dist", from))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, to), strings.ReplaceAll(string(text), "/usr/local/bin/", dir+"/"))
	}
	write(t, filepath.Join(dir, "docker.service"), "[Service]\nExecStart=/bin/false\n")
	for _, program := range []string{"flanneld", "mk-docker-opts.sh"} {
		path := filepath.Join(dir, program)
		write(t, path, "#!/bin/sh\n")
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// analyze runs systemd-analyze, which needs no systemd that runs.
func analyze(t *testing.T, dir string, args ...string) (string, error) {
	t.Helper()
	nstest.Need(t, "systemd-analyze")
	cmd := exec.Command("systemd-analyze", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestUnits: systemd knows every line.
func TestUnits(t *testing.T) {
	dir := units(t)
	for _, unit := range []string{"flanneld.service", "docker.service"} {
		out, err := analyze(t, dir, "verify", "--man=no", unit)
		if err != nil {
			t.Errorf("%s: %v", unit, err)
		}
		for line := range strings.Lines(out) {
			if strings.Contains(line, dir) { // others' units have remarks of their own
				t.Errorf("%s: %s", unit, line)
			}
		}
	}
}

// TestUnitSecurity: what flanneld may do stays as little as Documentation/security.md says.
func TestUnitSecurity(t *testing.T) {
	if out, err := analyze(t, units(t), "security", "--offline=yes", "--no-pager", "--threshold=25",
		"flanneld.service"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
