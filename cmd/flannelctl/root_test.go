package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// run runs flannelctl.
func run(args ...string) (out string, err error) {
	var b bytes.Buffer
	root := newRoot()
	root.SetOut(&b)
	root.SetArgs(args)
	err = root.Execute()
	return b.String(), err
}

// TestPublishedManifest: what we publish is valid, and what is not is an exit
// status.
func TestPublishedManifest(t *testing.T) {
	const manifest = "../../Documentation/kube-flannel.yml"
	if _, err := run("validate", manifest); err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "wrong.yml")
	if err := os.WriteFile(file, bytes.Replace(text, []byte(`"10.244.0.0/16"`), []byte(`"10.244.0.0"`), 1),
		0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := run("validate", file); !errors.Is(err, errFound) {
		t.Errorf("with a wrong Network: %v", err)
	}
}

// TestCompletion: each shell that there is reads its script.
func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		script, err := run("completion", shell)
		if err != nil || !strings.Contains(script, "flannelctl") {
			t.Errorf("%s: %v\n%s", shell, err, script)
			continue
		}
		if _, err := exec.LookPath(shell); err != nil {
			continue
		}
		cmd := exec.Command(shell, "-n")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s -n: %v\n%s", shell, err, out)
		}
	}
	out, err := run("__complete", "")
	if err != nil || !strings.Contains(out, "doctor\t") || !strings.Contains(out, "status\t") {
		t.Errorf("what there is to complete: %v\n%s", err, out)
	}
}

func TestEnvironmentFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "flanneld")
	text := "# FLANNELD_A=1\n\nFLANNELD_IFACE=eth0\n FLANNELD_ETCD_PREFIX=\"/a b\"\n" +
		"FLANNELD_B='c'\nWIREGUARD_KEY_FILE=/k\n;D=1\nnonsense\n"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := environmentFile(file)
	if want := []string{"FLANNELD_IFACE=eth0", "FLANNELD_ETCD_PREFIX=/a b", "FLANNELD_B=c",
		"WIREGUARD_KEY_FILE=/k"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
}
