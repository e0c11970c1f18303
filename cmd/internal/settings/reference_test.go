package settings

import (
	"fmt"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/pagetest"
)

// reference returns the part of the documentation that lists the flags, made from their table.
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
	return b.String()
}

// TestReference checks that the documentation lists all flags.
func TestReference(t *testing.T) {
	pagetest.Part(t, "../../../Documentation/configuration.md", "flags", reference(), *update)
}
