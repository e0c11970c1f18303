package lab

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// The images of a cluster's own, each of one static program under test/cmd.
const (
	pauseImage = "docker.io/lab/pause:1"
	echoImage  = "docker.io/lab/echo:1"
)

// Echo is a manifest: a Deployment of pods that answer who they are, and a
// Service in front of them.
//
//go:embed echo.yaml
var Echo string

// makeImage builds the program of an image and writes the image. It returns the
// file.
func (l *Lab) makeImage(ctx context.Context, image string) (string, error) {
	name, _, _ := strings.Cut(filepath.Base(image), ":")
	binary := filepath.Join(l.Dir, "images", name)
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", binary, "./cmd/"+name)
	build.Dir = filepath.Join(filepath.Dir(l.Build), "test")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // there is no libc in the image
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", name, err, out)
	}
	return l.packImage(image, name, binary)
}

// ImportProgram gives every node an image that holds one of the Programs, under
// a path in the image. The program is static.
func (c *Cluster) ImportProgram(ctx context.Context, image, path, program string) error {
	binary, err := c.lab.Program(program)
	if err != nil {
		return err
	}
	file, err := c.lab.packImage(image, path, binary)
	if err != nil {
		return err
	}
	return c.Import(ctx, file)
}

// packImage writes an image that has a program under a path, in the format of
// `docker save`. It returns the file.
func (l *Lab) packImage(image, path, binary string) (string, error) {
	program, err := os.ReadFile(binary)
	if err != nil {
		return "", err
	}
	layer, err := archive(file{strings.TrimPrefix(path, "/"), program})
	if err != nil {
		return "", err
	}
	type object = map[string]any
	config, err := json.Marshal(object{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": object{"Entrypoint": []string{"/" + strings.TrimPrefix(path, "/")}},
		"rootfs": object{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	})
	if err != nil {
		return "", err
	}
	manifest, err := json.Marshal([]object{{"Config": "config.json", "RepoTags": []string{image},
		"Layers": []string{"layer.tar"}}})
	if err != nil {
		return "", err
	}
	all, err := archive(file{"manifest.json", manifest}, file{"config.json", config}, file{"layer.tar", layer})
	if err != nil {
		return "", err
	}
	out := filepath.Join(l.Dir, "images", filepath.Base(path)+".tar")
	return out, os.WriteFile(out, all, 0o644)
}

type file struct {
	name string
	text []byte
}

// archive makes a tar file of executables.
func archive(files ...file) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.text))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.text); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), w.Close()
}
