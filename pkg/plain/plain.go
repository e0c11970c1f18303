// Package plain makes text from outside fit to be shown: what a store, a file, the network or another program holds
// may have new lines, escape sequences of terminals, and a megabyte of anything.
//
// Quote is for such a text inside a text of ours, and Shell for a word of a command. Logger is the one place that all
// lines of the log pass, and the printer of flannelctl the one place for the terminal: both call Line, so that a text
// which was not quoted does no harm.
package plain

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	// Most is how many bytes of a text from outside are shown.
	Most = 200

	// maxLine is how many bytes are shown of a text of ours, which may contain texts from outside.
	maxLine = 2000
)

// Quote quotes a text from outside. Of a text of more than Most bytes, it quotes the beginning and adds the size. The
// result is printable and one line: in double quotes with Go's escapes, or in single quotes where these need no
// escapes, as around JSON.
func Quote[T ~string | ~[]byte](text T) string {
	begin := cut(string(text[:min(len(text), Most+1)]), Most)
	quoted := strconv.Quote(begin)
	if strings.Contains(begin, `"`) && !strings.ContainsAny(begin, `'\`) && isPlain(begin) {
		quoted = "'" + begin + "'"
	}
	if len(text) > Most {
		quoted += fmt.Sprintf("… (%d bytes)", len(text))
	}
	return quoted
}

// Text returns a sentence from outside, such as the error of a server, as one printable line of about Most bytes.
func Text(text string) string { return line(text, Most) }

// Line returns a text of ours, which may contain texts from outside, as one printable line of about 2000 bytes at most.
// It writes line breaks, which errors.Join puts between errors, as "; ", and all else that is not printable as Go's
// escapes.
func Line(text string) string { return line(text, maxLine) }

func line(text string, most int) string {
	if len(text) <= most && isPlain(text) {
		return text
	}
	text = strings.TrimSpace(text)
	end := ""
	if len(text) > most {
		text, end = cut(text, most), "…"
	}
	return escape(strings.ReplaceAll(text, "\n", "; "), "") + end
}

// A Block is a text of ours of several lines, such as a command with its input. Its lines stay apart.
type Block string

// String returns the text, with escapes for all that is not printable, except for line breaks and tabs.
func (b Block) String() string { return escape(string(b), "\n\t") }

// Shell returns a word of a command for a POSIX shell, in quotes where it needs them. A word that is not printable is
// written with escapes in $'…', which bash and POSIX.1-2024 know, and which older shells take for another word.
func Shell(word string) string {
	const safe = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./_-"
	switch {
	case word != "" && strings.Trim(word, safe) == "":
		return word
	case isPlain(word):
		return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
	}
	var b strings.Builder
	eachRune(word, func(piece string, printable bool) {
		if printable && piece != "'" && piece != `\` {
			b.WriteString(piece)
			return
		}
		for _, c := range []byte(piece) {
			fmt.Fprintf(&b, `\%03o`, c)
		}
	})
	return "$'" + b.String() + "'"
}

// isPlain reports whether a text is printable, and so one line.
func isPlain(text string) bool {
	plain := true
	eachRune(text, func(_ string, printable bool) { plain = plain && printable })
	return plain
}

// escape writes all that is not printable as Go's escapes, except for the characters of keep.
func escape(text, keep string) string {
	var b strings.Builder
	eachRune(text, func(piece string, printable bool) {
		if printable || strings.Contains(keep, piece) {
			b.WriteString(piece)
			return
		}
		quoted := strconv.Quote(piece)
		b.WriteString(quoted[1 : len(quoted)-1])
	})
	return b.String()
}

// eachRune calls f for each character of a text, and for each byte that is no part of a character.
func eachRune(text string, f func(piece string, printable bool)) {
	for len(text) > 0 {
		r, size := utf8.DecodeRuneInString(text)
		valid := r != utf8.RuneError || size > 1
		f(text[:size], valid && strconv.IsPrint(r))
		text = text[size:]
	}
}

// cut returns the first bytes of a text, without a part of a character at the end.
func cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	for range utf8.UTFMax - 1 {
		if most > 0 && !utf8.RuneStart(text[most]) {
			most--
		}
	}
	return text[:most]
}
