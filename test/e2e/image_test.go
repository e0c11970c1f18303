package e2e

import (
	"archive/tar"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestImage: the images have the programs and files of flannel's image and of flannel-cni-plugin's, at their paths, and
// answer to every command that manifests for them call. The larger image is left to make test-clusters.
func TestImage(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	for variant, check := range map[string]func(context.Context, *testing.T, string, imageConfig){
		"": checkNoShell, "-full": checkFull,
	} {
		if !labtest.Selected(variant == "") {
			continue
		}
		t.Run("flannel"+variant, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, time.Minute)
			root, config := unpackImage(t, "flannel-"+runtime.GOARCH+variant)
			check(ctx, t, root, config)
			testImage(ctx, t, root, config)
		})
	}
}

// checkNoShell: the small image has no shell.
func checkNoShell(_ context.Context, t *testing.T, root string, _ imageConfig) {
	for _, shell := range []string{"bin/sh", "usr/bin/sh", "bin/bash", "usr/bin/bash"} {
		if _, err := os.Lstat(filepath.Join(root, shell)); err == nil {
			t.Errorf("the image has %s", shell)
		}
	}
}

// checkFull: the programs run that the larger image has for backends and scripts.
func checkFull(ctx context.Context, t *testing.T, root string, config imageConfig) {
	labtest.Do(t, os.MkdirAll(filepath.Join(root, "run/flannel"), 0o755))
	labtest.Do(t, os.WriteFile(filepath.Join(root, "run/flannel/subnet.env"),
		[]byte("FLANNEL_SUBNET=10.5.1.1/24\nFLANNEL_MTU=1450\n"), 0o644))
	for command, want := range map[string]string{
		"ip -Version": "iproute2", "wg --version": "wireguard-tools", "/usr/lib/ipsec/charon --version": "strongSwan",
		"/opt/bin/mk-docker-opts.sh -d /run/docker": "",
	} {
		if out, err := runInImage(ctx, root, config, command); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v: %s, want %q in it", command, err, out, want)
		}
	}
	options, err := os.ReadFile(filepath.Join(root, "run/docker"))
	if !strings.Contains(string(options), `--bip=10.5.1.1/24 --mtu=1450`) {
		t.Errorf("mk-docker-opts.sh writes %q, %v", options, err)
	}
}

func testImage(ctx context.Context, t *testing.T, root string, config imageConfig) {
	if config.Entrypoint == nil || config.Entrypoint[0] != "/opt/bin/flanneld" {
		t.Errorf("the image runs %q", config.Entrypoint)
	}
	for path, want := range map[string]string{"opt/bin/mk-docker-opts.sh": "#!/bin/sh\n", "flannel": "\x7fELF"} {
		text, err := os.ReadFile(filepath.Join(root, path))
		info, _ := os.Stat(filepath.Join(root, path))
		if err != nil || !strings.HasPrefix(string(text), want) || info.Mode().Perm() != 0o755 {
			t.Errorf("%s is not what it should be: %v", path, err)
		}
	}
	checkAuthorities(t, filepath.Join(root, "etc/ssl/certs/ca-certificates.crt"))

	// The directories that manifests mount.
	conf := `{"name": "cbr0", "cniVersion": "0.3.1", "plugins": [{"type": "flannel"}]}`
	for _, dir := range []string{"opt/cni/bin", "etc/cni/net.d", "etc/kube-flannel"} {
		labtest.Do(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	labtest.Do(t, os.WriteFile(filepath.Join(root, "etc/kube-flannel/cni-conf.json"), []byte(conf), 0o644))
	const conflist = "/etc/cni/net.d/10-flannel.conflist"
	for _, c := range []struct{ command, from, to string }{
		{"cp -f /flannel /opt/cni/bin/flannel", "flannel", "/opt/cni/bin/flannel"},
		{"cp -f /etc/kube-flannel/cni-conf.json " + conflist, "etc/kube-flannel/cni-conf.json", conflist},
		{"/opt/bin/install-conf /etc/kube-flannel/cni-conf.json " + conflist, "etc/kube-flannel/cni-conf.json", conflist},
		{"/opt/bin/flannel install --program=/flannel", "flannel", "/opt/cni/bin/flannel"},
		{"cp /opt/bin/mk-docker-opts.sh /opt/cni/bin", "opt/bin/mk-docker-opts.sh", "/opt/cni/bin/mk-docker-opts.sh"},
	} {
		to := filepath.Join(root, c.to)
		labtest.Do(t, os.RemoveAll(to))
		if out, err := runInImage(ctx, root, config, c.command); err != nil {
			t.Errorf("%s: %v: %s", c.command, err, out)
			continue
		}
		want, got := labtest.Must(os.ReadFile(filepath.Join(root, c.from)))(t), labtest.Must(os.ReadFile(to))(t)
		if string(got) != string(want) {
			t.Errorf("%s: %s is not a copy", c.command, c.to)
		}
	}
	// The version flag ends flanneld before it does anything, but after all flags are known to be right.
	for _, command := range []string{
		"/opt/bin/flanneld --ip-masq --kube-subnet-mgr --healthz-port=8081 --version",
		"/flannel --version", "/opt/bin/flannelctl --version", "iptables-nft --version", "iptables-legacy --version", "nft --version",
	} {
		if out, err := runInImage(ctx, root, config, command); err != nil {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
}

// checkAuthorities: a file has the certificates of authorities, all of which Go can read.
func checkAuthorities(t *testing.T, file string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Error(err)
	}
	count := 0
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			t.Errorf("%s: certificate %d: %v", file, count, err)
		}
		count++
	}
	if count < 100 { // Mozilla's list has some 140
		t.Errorf("%s has %d certificates", file, count)
	}
}

// An imageConfig has what a runtime needs to know of an image.
type imageConfig struct{ Env, Entrypoint []string }

// unpackImage writes the files of an image that make image has built into a directory.
func unpackImage(t *testing.T, name string) (root string, config imageConfig) {
	t.Helper()
	file := "../../build/image/" + name + ".tar"
	if _, err := os.Stat(file); err != nil {
		nstest.Missing(t, "%v: run make image image-full", err)
	}
	saved, root := t.TempDir(), t.TempDir()
	labtest.Do(t, untar(file, saved))
	var images []struct {
		Config string
		Layers []string
	}
	labtest.Do(t, json.Unmarshal(labtest.Must(os.ReadFile(filepath.Join(saved, "manifest.json")))(t), &images))
	for _, layer := range images[0].Layers {
		labtest.Do(t, untar(filepath.Join(saved, layer), root))
	}
	var about struct{ Config imageConfig }
	labtest.Do(t, json.Unmarshal(labtest.Must(os.ReadFile(filepath.Join(saved, images[0].Config)))(t), &about))
	return root, about.Config
}

// untar writes the files of an archive into a directory.
func untar(archive, dir string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", archive, err)
		}
		path := filepath.Join(dir, h.Name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, 0o755)
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, path)
		case tar.TypeLink:
			err = os.Link(filepath.Join(dir, h.Linkname), path)
		case tar.TypeReg:
			var content []byte
			if content, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(path, content, h.FileInfo().Mode().Perm())
			}
		}
		if err != nil {
			return err
		}
	}
}

// runInImage runs a command, split at spaces, with the files of an image and nothing else. The program is looked up in
// the image's PATH, as a container runtime does it.
func runInImage(ctx context.Context, root string, config imageConfig, command string) ([]byte, error) {
	words := strings.Fields(command)
	program := words[0]
	if !strings.Contains(program, "/") {
		i := slices.IndexFunc(config.Env, func(v string) bool { return strings.HasPrefix(v, "PATH=") })
		if i < 0 {
			return nil, errors.New("the image has no PATH")
		}
		for dir := range strings.SplitSeq(strings.TrimPrefix(config.Env[i], "PATH="), ":") {
			// Lstat: a link leads to a file of the image.
			path := filepath.Join(dir, words[0])
			if _, err := os.Lstat(filepath.Join(root, path)); err == nil {
				program = path
				break
			}
		}
		if program == words[0] {
			return nil, fmt.Errorf("the image has no %s in %s", program, config.Env[i])
		}
	}
	cmd := exec.CommandContext(ctx, program)
	cmd.Args, cmd.Env, cmd.Dir = words, config.Env, "/"
	cmd.SysProcAttr = &unix.SysProcAttr{Chroot: root, Cloneflags: unix.CLONE_NEWNET}
	return cmd.CombinedOutput()
}
