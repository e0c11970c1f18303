// Package pagetest compares the parts of the documentation that are made from the code with the code.
package pagetest

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// Part compares a part of a page with the text that was made from the code, or, with update, replaces the part. The
// part is between two lines:
//
//	<!-- made by make docs: name -->
//	<!-- end -->
func Part(t *testing.T, page, name, want string, update bool) {
	t.Helper()
	if err := part(page, name, want, update); err != nil {
		t.Error(err)
	}
}

func part(page, name, want string, update bool) error {
	text, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	begin, end := "<!-- made by make docs: "+name+" -->\n", "<!-- end -->\n"
	before, rest, opened := strings.Cut(string(text), begin)
	got, after, closed := strings.Cut(rest, end)
	if !opened || !closed {
		return fmt.Errorf("%s lacks a line %s or, after it, a line %s",
			page, strings.TrimSpace(begin), strings.TrimSpace(end))
	}
	want = "\n" + strings.Trim(want, "\n") + "\n\n"
	switch {
	case got == want:
		return nil
	case update:
		return os.WriteFile(page, []byte(before+begin+want+end+after), 0o644)
	}
	return fmt.Errorf("%s does not match the code. Run make docs, which writes\n%s", page, want)
}
