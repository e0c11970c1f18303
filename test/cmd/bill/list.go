package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// A part is a module that is linked into our binaries, ours among them, or Go's
// standard library.
type part struct {
	path, version string
	sum           string // as in go.sum
	dir           string
	licences      []text
	notices       []text
}

// A text is a file that is to go with the binaries.
type text struct {
	name     string // its path inside the module
	content  string
	licences []string // SPDX identifiers
}

var (
	licenceFile = regexp.MustCompile(`(?i)^(licen[cs]es?|copying|unlicense)([.-].*)?$`)
	noticeFile  = regexp.MustCompile(`(?i)^(notice|patents)([.-].*)?$`)
)

// list returns all parts, in the order of their paths.
func list() ([]part, error) {
	toolchain, err := exec.Command("go", "env", "GOVERSION", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("go env: %w", err)
	}
	version, root, _ := strings.Cut(strings.TrimSpace(string(toolchain)), "\n")
	parts := map[string]*part{"std": {path: "std", version: strings.TrimPrefix(version, "go"), dir: root}}
	dirs := map[string][]string{"std": {root}} // of each part's packages
	for _, arch := range architectures {
		cmd := exec.Command("go", "list", "-deps", "-json=Dir,Module", "./cmd/...")
		cmd.Env = append(os.Environ(), "GOOS=linux", "CGO_ENABLED=0", "GOARCH="+arch)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		for lines := json.NewDecoder(strings.NewReader(string(out))); ; {
			var p struct {
				Dir    string
				Module *struct{ Path, Version, Sum, Dir string }
			}
			if err := lines.Decode(&p); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return nil, fmt.Errorf("go list: %w", err)
			}
			if m := p.Module; m != nil {
				parts[m.Path] = &part{path: m.Path, version: m.Version, sum: m.Sum, dir: m.Dir}
				dirs[m.Path] = append(dirs[m.Path], p.Dir)
			}
		}
	}
	var out []part
	for _, path := range slices.Sorted(maps.Keys(parts)) {
		p := parts[path]
		if err := p.read(dirs[path]); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, *p)
	}
	return out, nil
}

// read takes in the texts beside the packages that are used, and above them.
func (p *part) read(packages []string) error {
	seen := map[string]bool{}
	for _, dir := range packages {
		for ; !seen[dir] && strings.HasPrefix(dir, p.dir); dir = filepath.Dir(dir) {
			seen[dir] = true
		}
	}
	for _, dir := range slices.Sorted(maps.Keys(seen)) {
		files, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, f := range files {
			isLicence, isNotice := licenceFile.MatchString(f.Name()), noticeFile.MatchString(f.Name())
			if !f.Type().IsRegular() || strings.HasSuffix(f.Name(), ".go") || !isLicence && !isNotice {
				continue
			}
			content, err := os.ReadFile(filepath.Join(dir, f.Name()))
			if err != nil {
				return err
			}
			name, err := filepath.Rel(p.dir, filepath.Join(dir, f.Name()))
			if err != nil {
				return err
			}
			if isNotice {
				p.notices = append(p.notices, text{name: name, content: string(content)})
			} else {
				p.licences = append(p.licences, text{name, string(content), classify(string(content))})
			}
		}
	}
	return nil
}
