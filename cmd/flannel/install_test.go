package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const conflist = `{"cniVersion": "1.0.0", "name": "cbr0", "plugins": [
	{"type": "flannel", "delegate": {"hairpinMode": true}}, {"type": "portmap", "capabilities": {"portMappings": true}}]}`

func newInstaller(t *testing.T) *installer {
	t.Helper()
	dir := t.TempDir()
	in := &installer{
		program: filepath.Join(dir, "image", "flannel"),
		binDir:  filepath.Join(dir, "bin"),
		conf:    filepath.Join(dir, "conf", "cni-conf.json"),
		confDir: filepath.Join(dir, "net.d"),
		name:    "10-flannel.conflist",
	}
	for _, d := range []string{filepath.Dir(in.program), in.binDir, filepath.Dir(in.conf), in.confDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, in.program, strings.Repeat("program", 50_000), 0o755)
	write(t, in.conf, conflist, 0o644)
	return in
}

func write(t *testing.T, path, text string, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// installed tells what is wrong with what in has put.
func (in *installer) installed() error {
	for _, f := range []struct {
		from, to string
		mode     fs.FileMode
	}{
		{in.program, filepath.Join(in.binDir, "flannel"), 0o755},
		{in.conf, filepath.Join(in.confDir, in.name), 0o644},
	} {
		want, err := os.ReadFile(f.from)
		if err != nil {
			return err
		}
		got, err := os.ReadFile(f.to)
		if err != nil {
			return err
		}
		info, err := os.Stat(f.to)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, want) || info.Mode() != f.mode {
			return errors.New(f.to + " is not as it should be")
		}
	}
	return nil
}

// logged returns where the log goes until the test ends.
func logged(t *testing.T) *bytes.Buffer {
	var b bytes.Buffer
	log.SetOutput(&b)
	t.Cleanup(func() { log.SetOutput(os.Stderr) })
	return &b
}

func TestInstall(t *testing.T) {
	in, out := newInstaller(t), logged(t)
	for _, plugin := range []string{"bridge", "host-local"} {
		write(t, filepath.Join(in.binDir, plugin), "", 0o755)
	}
	write(t, filepath.Join(in.confDir, "05-other.conflist"), "{}", 0o644)
	if err := in.install(); err != nil {
		t.Fatal(err)
	}
	if err := in.installed(); err != nil {
		t.Error(err)
	}
	for _, want := range []string{
		"the CNI plugin portmap is not in " + in.binDir,
		"05-other.conflist instead of 10-flannel.conflist",
		"Installed " + in.binDir + "/flannel",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, out)
		}
	}
	if strings.Contains(out.String(), "plugin bridge") {
		t.Errorf("it says\n%s", out)
	}
	for _, dir := range []string{in.binDir, in.confDir} {
		files, _ := filepath.Glob(filepath.Join(dir, ".*"))
		if files != nil {
			t.Errorf("left behind: %v", files)
		}
	}
	out.Reset()
	if err := in.install(); err != nil || out.Len() > 0 {
		t.Errorf("again: %v, %s", err, out)
	}
}

func TestInstallRefuses(t *testing.T) {
	logged(t)
	in := newInstaller(t)
	write(t, in.conf, `{"name": "cbr0"}`, 0o644)
	if err := in.install(); err == nil || !strings.Contains(err.Error(), in.conf) {
		t.Errorf("a configuration without plugins: %v", err)
	}
	if _, err := os.Stat(filepath.Join(in.binDir, "flannel")); err == nil {
		t.Error("the program was installed without a configuration for it")
	}
	for _, args := range [][]string{
		{"--conf-name=x.txt"}, {"--conf-name=a/b.conf"}, {"now"}, {"--unknown"}, {"--after=x"},
	} {
		if err := runInstall(args); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
}

// Whatever somebody does to the files is undone, and a new configuration goes
// where the old one was.
func TestKeep(t *testing.T) {
	logged(t)
	in := newInstaller(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- in.keep(ctx) }()
	await := func(what string) {
		t.Helper()
		var err error
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if err = in.installed(); err == nil {
				return
			}
		}
		t.Fatalf("%s: %v", what, err)
	}
	await("at first")
	bin, conf := filepath.Join(in.binDir, "flannel"), filepath.Join(in.confDir, in.name)
	for what, harm := range map[string]func() error{
		"the program removed":           func() error { return os.Remove(bin) },
		"the configuration removed":     func() error { return os.Remove(conf) },
		"the configuration moved":       func() error { return os.Rename(conf, conf+".bak") },
		"the program truncated":         func() error { return os.Truncate(bin, 10) },
		"the program made a plain file": func() error { return os.Chmod(bin, 0o600) },
		"the configuration altered":     func() error { return os.WriteFile(conf, []byte("{}"), 0o644) },
		"another configuration": func() error {
			return os.WriteFile(in.conf, []byte(strings.ReplaceAll(conflist, "cbr0", "cbr1")), 0o644)
		},
	} {
		if err := harm(); err != nil {
			t.Fatal(err)
		}
		await(what)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// The configuration makes a node ready for pods, and so waits for flanneld.
func TestKeepAfter(t *testing.T) {
	out := logged(t)
	in := newInstaller(t)
	run := filepath.Join(filepath.Dir(in.binDir), "run")
	if err := os.Mkdir(run, 0o755); err != nil {
		t.Fatal(err)
	}
	in.after = filepath.Join(run, "subnet.env")
	if err := in.install(); err != nil {
		t.Fatal(err)
	}
	if files, _ := os.ReadDir(in.confDir); len(files) > 0 || !strings.Contains(out.String(), "Waiting for "+in.after) {
		t.Errorf("before flanneld is ready there is %v, and it says\n%s", files, out)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- in.keep(ctx) }()
	write(t, in.after, "", 0o644)
	for end := time.Now().Add(time.Minute); in.installed() != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(in.installed())
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestInstallProgramAlone(t *testing.T) {
	logged(t)
	in := newInstaller(t)
	in.conf = ""
	if err := in.install(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(in.binDir, "flannel")); err != nil {
		t.Error(err)
	}
	if files, _ := os.ReadDir(in.confDir); len(files) > 0 {
		t.Errorf("there is %v", files)
	}
}

func TestInstallConfigurationAlone(t *testing.T) {
	out := logged(t)
	in := newInstaller(t)
	in.program = ""
	if err := in.install(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(in.confDir, in.name)); err != nil {
		t.Error(err)
	}
	if files, _ := os.ReadDir(in.binDir); len(files) > 0 || !strings.Contains(out.String(), "the CNI plugin flannel is not in") {
		t.Errorf("there is %v, and it says\n%s", files, out)
	}
}

func TestKeepWithoutDirectory(t *testing.T) {
	logged(t)
	in := newInstaller(t)
	done := make(chan error, 1)
	go func() { done <- in.keep(t.Context()) }()
	for in.installed() != nil {
		time.Sleep(time.Millisecond)
	}
	for end := time.Now().Add(time.Minute); ; { // a file that is installed meanwhile keeps the directory
		err := os.RemoveAll(in.confDir)
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	if err := <-done; err == nil {
		t.Error("no error")
	}
}

// TestHostileNames: a remark is a line, whatever the names of files and plugins are.
func TestHostileNames(t *testing.T) {
	out := logged(t)
	in := newInstaller(t)
	write(t, in.conf, `{"cniVersion": "1.0.0", "name": "cbr0", "plugins": [{"type": "x\nforged\u001b[2J"}]}`, 0o644)
	write(t, filepath.Join(in.confDir, "00\nforged\x1b[2J.conf"), "{}", 0o644)
	if err := in.install(); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	if strings.Count(text, "Pods will not start") != 1 || strings.Count(text, "The container runtime uses") != 1 ||
		strings.Contains(text, "\nforged") || strings.Contains(text, "\x1b") {
		t.Errorf("it says\n%q", text)
	}
}
