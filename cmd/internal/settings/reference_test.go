package settings

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// reference is the part of the documentation that tells of the flags, from
// their table.
func reference() string {
	var b strings.Builder
	for _, g := range flags(&Options{}) {
		fmt.Fprintf(&b, "\n**%s**\n\n| flag | default | meaning |\n| --- | --- | --- |\n", g.title)
		for _, s := range g.settings {
			fmt.Fprintf(&b, "| `--%s", s.name)
			if s.arg != "" {
				b.WriteString("=" + strings.ReplaceAll(s.arg, "|", `\|`)) // a bar would end the cell
			}
			b.WriteString("`")
			if s.repeatable {
				b.WriteString(", repeatable")
			}
			def := s.def
			if def != "" {
				def = "`" + def + "`"
			}
			fmt.Fprintf(&b, " | %s | %s |\n", def, s.help)
		}
	}
	return b.String() + "\n"
}

// TestReference: the documentation lists the flags as they are. "make docs"
// writes it.
func TestReference(t *testing.T) {
	const page, begin, end = "../../../Documentation/configuration.md", "<!-- made by make docs -->\n", "<!-- end -->\n"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	got, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		t.Fatalf("%s lacks %q or %q", page, begin, end)
	}
	want := reference()
	if *update {
		if err := os.WriteFile(page, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got != want {
		t.Errorf("the flags have changed: run make docs, which writes into %s\n%s", page, want)
	}
}
