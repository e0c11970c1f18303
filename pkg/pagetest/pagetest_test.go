package pagetest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPart(t *testing.T) {
	page := filepath.Join(t.TempDir(), "page.md")
	const before = "# Page\n\n<!-- made by make docs: flags -->\n<!-- end -->\n\n<!-- made by make docs: keys -->\n"
	const after = "<!-- end -->\n\nThe end.\n"
	if err := os.WriteFile(page, []byte(before+"old\n"+after), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := part(page, "keys", "new\n", false); err == nil || !strings.Contains(err.Error(), "Run make docs") {
		t.Errorf("a page that is out of date: %v", err)
	}
	const lacks = "lacks a line <!-- made by make docs: metrics -->"
	if err := part(page, "metrics", "new\n", true); err == nil || !strings.Contains(err.Error(), lacks) {
		t.Errorf("a page without the part: %v", err)
	}
	if err := part(page, "keys", "new\n", true); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(page)
	if want := before + "\nnew\n\n" + after; err != nil || string(got) != want {
		t.Errorf("%v, got\n%s\nwant\n%s", err, got, want)
	}
	if err := part(page, "keys", "new\n", false); err != nil {
		t.Error(err)
	}
}
