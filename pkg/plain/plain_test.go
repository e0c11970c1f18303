package plain

import (
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

const (
	forged = "x\nE0101 00:00:00.000000       1 main.go:1] \"forged\""
	paints = "\x1b[2J\x1b]0;title\a"
)

func TestQuote(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	for _, c := range []struct{ text, want string }{
		{"", `""`},
		{"vxlan", `"vxlan"`},
		{`{"VNI":1}`, `'{"VNI":1}'`},
		{`it's "so"`, `"it's \"so\""`},
		{`a\"b`, `"a\\\"b"`},
		{"a\nb", `"a\nb"`},
		{paints, `"\x1b[2J\x1b]0;title\a"`},
		{"\u009b2J \u202egnp.exe", `"\u009b2J \u202egnp.exe"`}, // a control sequence in one character; right to left
		{"\xff\x9b", `"\xff\x9b"`},
		{"größer 日本", `"größer 日本"`},
		{long[:Most], `"` + long[:Most] + `"`},
		{long, `"` + long[:Most] + `"… (1048576 bytes)`},
		{strings.Repeat("ü", Most), `"` + strings.Repeat("ü", Most/2) + `"… (400 bytes)`},
		{"x" + strings.Repeat("ü", Most), `"x` + strings.Repeat("ü", Most/2-1) + `"… (401 bytes)`},
	} {
		if got := Quote(c.text); got != c.want {
			t.Errorf("%.40q: got %s, want %s", c.text, got, c.want)
		}
		if got := Quote([]byte(c.text)); got != c.want {
			t.Errorf("the bytes of %.40q: got %s, want %s", c.text, got, c.want)
		}
	}
}

func TestLine(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"Peer cannot be reached", "Peer cannot be reached"},
		{"IPv4 rules: refused\nIPv6 rules: refused\n", "IPv4 rules: refused; IPv6 rules: refused"},
		{forged, `x; E0101 00:00:00.000000       1 main.go:1] "forged"`},
		{paints, `\x1b[2J\x1b]0;title\a`},
		{"a\rb\u009b\u2028\xff", `a\rb\u009b\u2028\xff`},
		{strings.Repeat("x", maxLine), strings.Repeat("x", maxLine)},
		{strings.Repeat("x", maxLine+1), strings.Repeat("x", maxLine) + "…"},
	} {
		if got := Line(c.text); got != c.want {
			t.Errorf("%.60q: got %q, want %q", c.text, got, c.want)
		}
	}
	if got := Text(strings.Repeat("x", 1000)); got != strings.Repeat("x", Most)+"…" {
		t.Errorf("a long sentence is %q", got)
	}
	if got, want := Block("one"+paints+"\n\ttwo\r\n").String(), "one"+`\x1b[2J\x1b]0;title\a`+"\n\ttwo"+`\r`+"\n"; got != want {
		t.Errorf("a block is %q, want %q", got, want)
	}
}

func TestShell(t *testing.T) {
	for _, c := range []struct{ word, want string }{
		{"flannel-v6.1", "flannel-v6.1"},
		{"--cacert=/etc/a_b,c:d", "--cacert=/etc/a_b,c:d"},
		{"", "''"},
		{"a b", "'a b'"},
		{"$(reboot)", "'$(reboot)'"},
		{"it's;", `'it'\''s;'`},
		{"~root", "'~root'"},
		{"a\nb", `$'a\012b'`},
		{"\x1b'\\\xff", `$'\033\047\134\377'`},
	} {
		if got := Shell(c.word); got != c.want {
			t.Errorf("%q: got %s, want %s", c.word, got, c.want)
		}
	}
}

// FuzzPlain: whatever the text is, what is shown is printable and bounded, and a shell reads the word that was meant.
func FuzzPlain(f *testing.F) {
	for _, seed := range []string{"", forged, paints, "\u009b2J\u202e", "\xff\xfe", `$'\''`, "'; reboot; '", strings.Repeat("ü", 3000)} {
		f.Add(seed)
	}
	bash, _ := exec.LookPath("bash")
	if testing.Short() {
		bash = ""
	}
	words := 0
	f.Fuzz(func(t *testing.T, text string) {
		for name, got := range map[string]string{"Quote": Quote(text), "Text": Text(text), "Line": Line(text), "Shell": Shell(text)} {
			for _, r := range got {
				if !strconv.IsPrint(r) {
					t.Errorf("%s(%q) is %q, with %q in it", name, text, got, r)
				}
			}
			if !utf8.ValidString(got) {
				t.Errorf("%s(%q) is %q, which is not UTF-8", name, text, got)
			}
		}
		if n := len(Quote(text)); n > 10*Most {
			t.Errorf("Quote(%q) has %d bytes", text, n)
		}
		if got := strings.ReplaceAll(Block(text).String(), "\n", ""); strings.ContainsFunc(got, func(r rune) bool {
			return r != '\t' && !strconv.IsPrint(r)
		}) {
			t.Errorf("the block %q is %q", text, got)
		}
		// No process knows a word with a zero byte. Starting one takes a while: some words are enough.
		if words++; bash == "" || words%64 != 1 || strings.Contains(text, "\x00") || len(text) > 4096 {
			return
		}
		out, err := exec.Command(bash, "-c", "printf %s "+Shell(text)).Output()
		if err != nil || string(out) != text {
			t.Errorf("%q is %s, which bash takes for %q, %v", text, Shell(text), out, err)
		}
	})
}
