package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/plain"
)

// A printer writes to standard output, with colours on a terminal. All that flannelctl prints passes printf or printJSON:
// a terminal obeys no text that a store, a file or a daemon holds.
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

// confirm asks a question on the terminal, and tells whether the answer is yes.
func confirm(question string) bool {
	printer{out: os.Stderr}.printf("%s [y/N] ", question)
	line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	a := strings.ToLower(strings.TrimSpace(line))
	return a == "y" || a == "yes"
}

// printf prints texts, each as one printable line, and numbers as they are. A plain.Block keeps its lines.
func (p printer) printf(format string, args ...any) {
	for i, arg := range args {
		switch arg := arg.(type) {
		case int, styled, plain.Block:
		default:
			args[i] = plain.Line(fmt.Sprint(arg))
		}
	}
	fmt.Fprintf(p.out, format, args...)
}

// commands prints commands, each of which may have several lines, behind an indentation.
func (p printer) commands(indent string, all []string) {
	for _, c := range all {
		for line := range strings.Lines(c) {
			p.printf("%s%s\n", styled(indent), plain.Block(strings.TrimSuffix(line, "\n")))
		}
	}
}

// printJSON prints a value for programs.
func (p printer) printJSON(v any) error {
	var text strings.Builder
	e := json.NewEncoder(&text)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false) // commands have &&
	if err := e.Encode(v); err != nil {
		return err
	}
	var b strings.Builder
	for _, r := range text.String() {
		switch {
		case r == '\n' || strconv.IsPrint(r):
			b.WriteRune(r)
		case r > 0xffff:
			first, second := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04x\u%04x`, first, second)
		default: // only texts have such characters, and encoding/json leaves most of them as they are
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	_, err := io.WriteString(p.out, b.String())
	return err
}

// A styled text is fit for a terminal: a printable line, in a colour where there are colours.
type styled string

func (p printer) colour(code, text string) styled {
	text = plain.Line(text)
	if !p.coloured {
		return styled(text)
	}
	return styled("\x1b[" + code + "m" + text + "\x1b[0m")
}

func (p printer) ok(text string) styled   { return p.colour("32", text) }
func (p printer) warn(text string) styled { return p.colour("33", text) }
func (p printer) bad(text string) styled  { return p.colour("31", text) }
func (p printer) bold(text string) styled { return p.colour("1", text) }

// A cell is a text in a table. Its colour does not count for the width.
type cell struct {
	text   string
	colour func(string) styled // nil: none
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
			widths[i] = max(widths[i], width(c.text))
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
			text := styled(plain.Line(c.text))
			if c.colour != nil {
				text = c.colour(c.text)
			}
			b.WriteString(string(text))
			b.WriteString(strings.Repeat(" ", widths[i]-width(c.text)))
		}
		p.printf("%s\n", styled(strings.TrimRight(b.String(), " ")))
	}
}

// width returns how wide a text is on a terminal.
func width(text string) int { return utf8.RuneCountInString(plain.Line(text)) }
