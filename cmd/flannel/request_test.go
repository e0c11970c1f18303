package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/flanneld/flanneld/pkg/pagetest"
	"github.com/flanneld/flanneld/subnet"
)

var update = flag.Bool("update", false, "write the results into the scenarios, and the keys into README.md")

// TestDelegate runs the scenarios of testdata/*.txt: the request with remarks,
// subnet.env (or "missing"), and the delegate's configuration or the error.
// "go test -update" writes the latter.
func TestDelegate(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios in testdata: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			const separator = "----\n"
			parts := strings.Split(string(text), separator)
			if len(parts) != 3 {
				t.Fatalf("%d parts, want 3", len(parts))
			}
			got := delegateOf(t, parts[0], parts[1])
			if *update {
				parts[2] = got
				if err := os.WriteFile(file, []byte(strings.Join(parts, separator)), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != parts[2] {
				t.Errorf("want\n%s\ngot\n%s", parts[2], got)
			}
		})
	}
}

var remarks = regexp.MustCompile(`(?m)^#.*$`)

// delegateOf returns the delegate's configuration, or the error, as text.
func delegateOf(t *testing.T, stdin, env string) string {
	file := filepath.Join(t.TempDir(), "subnet.env")
	if env != "missing\n" {
		if err := os.WriteFile(file, []byte(env), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	conf, err := func() (object, error) {
		r, err := parse(remarks.ReplaceAll([]byte(stdin), nil))
		if err != nil {
			return nil, err
		}
		if r.SubnetFile != defaults.SubnetFile {
			t.Errorf("subnetFile is %s by default, want %s", r.SubnetFile, defaults.SubnetFile)
		}
		r.SubnetFile = file
		env, err := r.env()
		if err != nil {
			return nil, err
		}
		return r.delegate(env)
	}()
	if e := (*types.Error)(nil); errors.As(err, &e) {
		return fmt.Sprintf("error %d: %s\n", e.Code, strings.ReplaceAll(e.Error(), file, defaults.SubnetFile))
	}
	if err != nil {
		t.Fatalf("an error without a code: %v", err)
	}
	compact, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := json.Indent(&out, compact, "", "  "); err != nil {
		t.Fatal(err)
	}
	return out.String() + "\n"
}

// The README lists the keys as they are, and those that the delegate gets from
// elsewhere than its user.
func TestReference(t *testing.T) {
	pagetest.Part(t, "README.md", "keys", pagetest.Keys(t, defaults), *update)
	r, err := parse([]byte(`{"cniVersion": "1.1.0", "name": "cbr0", "type": "flannel",
		"args": {}, "runtimeConfig": {}, "prevResult": {}}`))
	if err != nil {
		t.Fatal(err)
	}
	if r.DataDir != defaults.DataDir {
		t.Errorf("dataDir is %q by default", r.DataDir)
	}
	conf, err := r.delegate(subnet.EnvFile{Env: subnet.Env{MTU: 1450}})
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(page), "\n| in `delegate` |")
	table, _, _ = strings.Cut(table, "\n\n")
	var told []string
	for _, row := range regexp.MustCompile("(?m)^\\| (`.*?`) \\|").FindAllStringSubmatch(table, -1) {
		told = append(told, strings.Split(strings.Trim(row[1], "`"), "`, `")...)
	}
	slices.Sort(told)
	if got := slices.Sorted(maps.Keys(r.call(conf))); !slices.Equal(told, got) {
		t.Errorf("README.md tells of the delegate's keys\n%s\nand it gets\n%s", told, got)
	}
}
