package main

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestLogIsLines: each line of the log is one of flanneld's, whatever the texts in it hold, and no line paints the
// terminal.
func TestLogIsLines(t *testing.T) {
	const forged = "\nE0101 00:00:00.000000       1 main.go:1] \"forged\"\x1b[2J\u009b2J"
	config := filepath.Join(t.TempDir(), "net-conf.json"+strings.ReplaceAll(forged, "/", ""))
	server := "--kube-api-url=http://" + refusing(t)
	for name, text := range map[string]string{
		"a file that is missing": "",
		"a backend's name":       `{"Network": "10.5.0.0/16", "Backend": {"Type": "x\nE0101 \"forged\"\u001b[2J"}}`,
		"a network":              `{"Network": "\nE0101 \"forged\"\u001b[2J"}`,
		"a key":                  `{"Network": "10.5.0.0/16", "\nE0101 forged\u001b[2J": 1}`,
		"a long number":          `{"Network": ` + strings.Repeat("7", 1<<20) + `}`,
	} {
		os.Remove(config)
		if text != "" {
			if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		cmd, lines := start(ctx, t, []string{"NODE_NAME=n1"}, "--kube-subnet-mgr", server,
			"--net-config-path="+config)
		lines.Buffer(nil, 1<<24)
		header := regexp.MustCompile(`^[IWE]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ (main|network|health)\.go:\d+\] "`)
		for n := 0; lines.Scan(); n++ {
			line := lines.Text()
			if !header.MatchString(line) || strings.HasPrefix(line, "E0101 00:00:00.000000 ") ||
				strings.ContainsAny(line, "\x1b\u009b") || len(line) > 5000 {
				t.Errorf("%s: logged %.1000q", name, line)
			}
			if strings.Contains(line, "cannot continue") || strings.Contains(line, "unknown key") || n > 100 {
				cancel()
			}
		}
		cmd.Wait() // flanneld was killed, or has ended
	}
}
