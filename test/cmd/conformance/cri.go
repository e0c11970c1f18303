package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/flanneld/flanneld/test/lab"
)

const (
	criTests = "[It] [k8s.io] Networking " // how the names of critest's tests of networking begin
	criImage = "docker.io/lab/critest:1"
)

// runCRI runs critest's tests of networking on a node: a runtime that is not told of pods by kubelet, which would
// remove the pods of critest.
func runCRI(ctx context.Context, l *lab.Lab, cluster *lab.Cluster, dir string) error {
	program, err := l.Program("conformance/critest")
	if err != nil {
		return err
	}
	agnhost, err := l.Program("conformance/agnhost")
	if err != nil {
		return err
	}
	// One image in the place of two: a web server, and top of busybox, which needs no terminal. What critest needs of top
	// is that it does not end.
	image, err := l.WriteImage(lab.Image{
		Names: []string{criImage}, Base: filepath.Join(l.Build, "conformance", "root.tar"),
		Files:      map[string]string{"/agnhost": agnhost, "/usr/local/bin/top": filepath.Join(l.Dir, "images", "pause")},
		Entrypoint: []string{"/agnhost"}, Command: []string{"netexec", "--http-port=80", "--udp-port=-1"},
	})
	if err != nil {
		return err
	}
	if err := cluster.Import(ctx, image); err != nil {
		return err
	}
	images := filepath.Join(dir, "images.yaml")
	text := "defaultTestContainerImage: " + criImage + "\nwebServerTestImage: " + criImage + "\n"
	if err := os.WriteFile(images, []byte(text), 0o644); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(dir, "e2e.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	n := cluster.Nodes[0]
	if err := n.StopKubelet(ctx); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, "--ginkgo.v", "--ginkgo.no-color", "--ginkgo.timeout=10m",
		"--ginkgo.focus=Networking", "--ginkgo.junit-report="+filepath.Join(dir, "junit.xml"),
		"--runtime-endpoint=unix:///run/containerd/containerd.sock", "--test-images-file="+images)
	cmd.Stdout, cmd.Stderr = log, log
	p, err := n.Launch(cmd)
	if err != nil {
		return err
	}
	return p.Wait()
}
