package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// A printer writes to standard output, with colours on a terminal.
type printer struct {
	out      io.Writer
	coloured bool
}

func newPrinter() printer {
	return printer{os.Stdout, os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && isTerminal(os.Stdout)}
}

// isTerminal reports whether the file is a terminal.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (p printer) colour(code, text string) string {
	if !p.coloured {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (p printer) ok(text string) string   { return p.colour("32", text) }
func (p printer) warn(text string) string { return p.colour("33", text) }
func (p printer) bad(text string) string  { return p.colour("31", text) }
func (p printer) bold(text string) string { return p.colour("1", text) }

// A cell is a text in a table. Its colour does not count for the width.
type cell struct {
	text   string
	colour func(string) string // nil: none
}

// table prints rows with aligned columns. Columns that are empty, except for the heading, are left out.
func (p printer) table(heading []string, rows [][]cell) {
	if heading != nil {
		first := make([]cell, len(heading))
		for i, h := range heading {
			first[i] = cell{h, p.bold}
		}
		rows = append([][]cell{first}, rows...)
	}
	var widths []int
	used := map[int]bool{}
	for r, row := range rows {
		for i, c := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
			used[i] = used[i] || c.text != "" && (r > 0 || heading == nil)
		}
	}
	for _, row := range rows {
		var b strings.Builder
		for i, c := range row {
			if !used[i] {
				continue
			}
			if b.Len() > 0 {
				b.WriteString("  ")
			}
			text := c.text
			if c.colour != nil {
				text = c.colour(text)
			}
			b.WriteString(text)
			b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)))
		}
		fmt.Fprintln(p.out, strings.TrimRight(b.String(), " "))
	}
}
