package backendtest

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	row = regexp.MustCompile("(?m)^(?:\\| )?(`[A-Za-z0-9]+`(?:, `[A-Za-z0-9]+`)*)")
	key = regexp.MustCompile("`([A-Za-z0-9]+)`")
)

// Keys tells where the README's section Configuration, in which each key begins
// a line, and the keys that options, a struct, takes from the configuration
// differ.
func Keys(t *testing.T, options any) {
	t.Helper()
	const page = "README.md"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## Configuration\n")
	if !ok {
		t.Fatalf("%s has no section Configuration", page)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var written, taken []string
	for _, r := range row.FindAllStringSubmatch(section, -1) {
		for _, k := range key.FindAllStringSubmatch(r[1], -1) {
			written = append(written, k[1])
		}
	}
	for _, f := range reflect.VisibleFields(reflect.TypeOf(options)) {
		if f.IsExported() {
			taken = append(taken, f.Name)
		}
	}
	for _, k := range written {
		if !slices.Contains(taken, k) {
			t.Errorf("%s tells of a key %s that means nothing", page, k)
		}
	}
	for _, k := range taken {
		if !slices.Contains(written, k) {
			t.Errorf("%s does not tell of the key %s", page, k)
		}
	}
}
