package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/test/lab"
)

// standIns are the images of the suite for which ours stands in, by the last part of their names. The first is what
// nearly all pods run. Of the others the tests use what Debian has: a resolver with glibc and dig; a shell and nc;
// conntrack; a process that does not end.
var standIns = []string{"agnhost", "glibc-dns-testing", "busybox", "distroless-iptables", "nginx", "pause"}

// writeImage writes the image of the tests' pods, and returns the file: agnhost from Kubernetes' sources, and CoreDNS,
// which some tests start in a pod of agnhost's image, on a root file system of Debian's packages.
func writeImage(ctx context.Context, l *lab.Lab) (string, error) {
	names, err := suiteImages(ctx, l)
	if err != nil {
		return "", err
	}
	agnhost, err := l.Program("conformance/agnhost")
	if err != nil {
		return "", err
	}
	coredns, err := l.Program("conformance/coredns")
	if err != nil {
		return "", err
	}
	dir := filepath.Join(l.Build, "conformance")
	return l.WriteImage(lab.Image{
		Names: names, Base: filepath.Join(dir, "root.tar"),
		Files: map[string]string{"/agnhost": agnhost, "/coredns": coredns,
			"/localhost.crt": filepath.Join(dir, "localhost.crt"), "/localhost.key": filepath.Join(dir, "localhost.key")},
		// As in the image of Kubernetes.
		Entrypoint: []string{"/agnhost"}, Command: []string{"pause"},
	})
}

// suiteImages asks the suite for the names and tags of the images that ours stands in for.
func suiteImages(ctx context.Context, l *lab.Lab) ([]string, error) {
	suite, err := l.Program("conformance/e2e.test")
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, suite, "--list-images").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list-images: %w", suite, err)
	}
	var names []string
	for image := range strings.FieldsSeq(string(out)) {
		name, _, _ := strings.Cut(filepath.Base(image), ":")
		if slices.Contains(standIns, name) && !strings.Contains(image, "authenticated") {
			names = append(names, image)
		}
	}
	slices.Sort(names)
	if len(names) < len(standIns) {
		return nil, fmt.Errorf("of the images %v the suite lists only %v", standIns, names)
	}
	return names, nil
}
