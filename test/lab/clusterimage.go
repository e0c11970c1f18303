package lab

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// The images of a cluster's own. The first two have one static program under test/cmd each.
const (
	pauseImage = "docker.io/lab/pause:1"
	echoImage  = "docker.io/lab/echo:1"
	dnsImage   = "docker.io/lab/coredns:1"
)

// Echo is a manifest: a Deployment of pods that answer who they are, and a
// Service in front of them.
//
//go:embed echo.yaml
var Echo string

// An Image is for Import.
type Image struct {
	Names      []string          // with tags, such as docker.io/lab/echo:1
	Base       string            // a tar file with the root file system; empty: nothing but Files
	Files      map[string]string // absolute paths in the image of executable files: a path here
	Entrypoint []string
	Command    []string // of containers whose pods name no arguments
}

// makeImage builds the program of an image and writes the image. It returns the file.
func (l *Lab) makeImage(ctx context.Context, image string) (string, error) {
	name, _, _ := strings.Cut(filepath.Base(image), ":")
	binary := filepath.Join(l.Dir, "images", name)
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", binary, "./cmd/"+name)
	build.Dir = filepath.Join(filepath.Dir(l.Build), "test")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // there is no libc in the image
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", name, err, out)
	}
	return l.WriteImage(Image{Names: []string{image}, Files: map[string]string{"/" + name: binary},
		Entrypoint: []string{"/" + name}})
}

// ImportProgram gives every node an image that holds one of the Programs, under a path in the image. The program is
// static.
func (c *Cluster) ImportProgram(ctx context.Context, image, path, program string) error {
	binary, err := c.lab.Program(program)
	if err != nil {
		return err
	}
	file, err := c.lab.WriteImage(Image{Names: []string{image}, Files: map[string]string{path: binary},
		Entrypoint: []string{path}})
	if err != nil {
		return err
	}
	return c.Import(ctx, file)
}

// WriteImage writes an image in the format of `docker save`, and returns the file.
func (l *Lab) WriteImage(i Image) (string, error) {
	name, _, _ := strings.Cut(filepath.Base(i.Names[0]), ":")
	dir := filepath.Join(l.Dir, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	layer := filepath.Join(dir, name+".layer")
	if err := writeTar(layer, i.Files); err != nil {
		return "", err
	}
	layers := []string{layer}
	if i.Base != "" {
		layers = []string{i.Base, layer}
	}
	contents := map[string]string{}
	var sums, files []string
	for number, path := range layers {
		sum, err := sha256File(path)
		if err != nil {
			return "", err
		}
		file := "layer" + strconv.Itoa(number) + ".tar"
		sums, files, contents[file] = append(sums, "sha256:"+sum), append(files, file), path
	}
	type object = map[string]any
	for file, value := range map[string]any{
		"config.json": object{
			"architecture": runtime.GOARCH, "os": "linux",
			"config": object{"Entrypoint": i.Entrypoint, "Cmd": i.Command,
				"Env": []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}},
			"rootfs": object{"type": "layers", "diff_ids": sums},
		},
		"manifest.json": []object{{"Config": "config.json", "RepoTags": i.Names, "Layers": files}},
	} {
		text, err := json.Marshal(value)
		if err != nil {
			return "", err
		}
		contents[file] = filepath.Join(dir, name+"."+file)
		if err := os.WriteFile(contents[file], text, 0o644); err != nil {
			return "", err
		}
	}
	path := filepath.Join(dir, name+".tar")
	return path, writeTar(path, contents)
}

// sha256File returns the checksum of a file, in hexadecimal digits.
func sha256File(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	_, err = io.Copy(sum, f)
	return hex.EncodeToString(sum.Sum(nil)), err
}

// writeTar makes a tar file of executables: names in it, and paths here.
func writeTar(path string, files map[string]string) error {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	w := tar.NewWriter(out)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := addFile(w, strings.TrimPrefix(name, "/"), files[name]); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return out.Close()
}

func addFile(w *tar.Writer, name, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: info.Size()}); err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return err
}
