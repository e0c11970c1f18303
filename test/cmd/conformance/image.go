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

// regression is a server that answers with packets outside of the window of a connection. Its image has one program, of
// Kubernetes' sources, under this name.
const regression = "regression-issue-74839"

// writeImages writes the images of the tests' pods, and returns the files: agnhost from Kubernetes' sources, and CoreDNS,
// which some tests start in a pod of agnhost's image, on a root file system of Debian's packages; and regression.
func writeImages(ctx context.Context, l *lab.Lab) ([]string, error) {
	all, err := suiteImages(ctx, l)
	if err != nil {
		return nil, err
	}
	names, err := pick(all, standIns...)
	if err != nil {
		return nil, err
	}
	regressionNames, err := pick(all, regression)
	if err != nil {
		return nil, err
	}
	programs := map[string]string{}
	for _, name := range []string{"agnhost", "coredns", regression} {
		if programs[name], err = l.Program("conformance/" + name); err != nil {
			return nil, err
		}
	}
	dir := filepath.Join(l.Build, "conformance")
	var files []string
	for _, image := range []lab.Image{
		{
			Names: names, Base: filepath.Join(dir, "root.tar"),
			Files: map[string]string{"/agnhost": programs["agnhost"], "/coredns": programs["coredns"],
				"/localhost.crt": filepath.Join(dir, "localhost.crt"), "/localhost.key": filepath.Join(dir, "localhost.key")},
			// As in the image of Kubernetes.
			Entrypoint: []string{"/agnhost"}, Command: []string{"pause"},
		},
		{Names: regressionNames, Files: map[string]string{"/" + regression: programs[regression]},
			Entrypoint: []string{"/" + regression}},
	} {
		file, err := l.WriteImage(image)
		if err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	return files, nil
}

// suiteImages asks the suite for the names and tags of its images.
func suiteImages(ctx context.Context, l *lab.Lab) ([]string, error) {
	suite, err := l.Program("conformance/e2e.test")
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, suite, "--list-images").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list-images: %w", suite, err)
	}
	return strings.Fields(string(out)), nil
}

// pick returns those of the images whose names end so.
func pick(images []string, ends ...string) ([]string, error) {
	var names []string
	for _, image := range images {
		name, _, _ := strings.Cut(filepath.Base(image), ":")
		if slices.Contains(ends, name) && !strings.Contains(image, "authenticated") {
			names = append(names, image)
		}
	}
	slices.Sort(names)
	if len(names) < len(ends) {
		return nil, fmt.Errorf("of the images %v the suite lists only %v", ends, names)
	}
	return names, nil
}
