package main

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
)

var update = flag.Bool("update", false, "write testdata")

// testUplink is the uplink of the host that the configurations are for.
var testUplink = iface.Uplink{
	IPv4: iface.Link{Name: "eth0", Prefixes: []netip.Prefix{netip.MustParsePrefix("198.18.4.0/24")}},
	IPv6: iface.Link{Name: "eth0", Prefixes: []netip.Prefix{netip.MustParsePrefix("fd18::/64")}},
}

// TestValidate: the issues of testdata/FILE are testdata/FILE.golden.
func TestValidate(t *testing.T) {
	files, err := filepath.Glob("testdata/*")
	if err != nil {
		t.Fatal(err)
	}
	tried := 0
	for _, file := range files {
		if filepath.Ext(file) == ".golden" {
			continue
		}
		tried++
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			for _, r := range validate(text, testUplink) {
				kind := "error"
				if r.warning {
					kind = "warning"
				}
				fmt.Fprintf(&out, "%d: %s: %s\n", r.line, kind, r.text)
			}
			// The list of all backends is not repeated here.
			var types []string
			for _, b := range backend.Types() {
				types = append(types, b.Name)
			}
			got := strings.ReplaceAll(out.String(), strings.Join(types, ", "), "BACKENDS")
			golden := file + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
	if tried == 0 {
		t.Error("there is nothing in testdata")
	}
}

func TestMiscomputesChecksums(t *testing.T) {
	for release, want := range map[string]bool{
		"3.10.0-1160.el7.x86_64": true, "4.14.180": true, "4.14.181": false, "4.15.0-20-generic": true, "4.19.122": true,
		"4.19.123": false, "5.4.0-42-generic": true,
		"5.4.41": false, "5.5.19": true, "5.6.12": true, "5.6.13": false, "5.7.0-rc5": false, "5.10.0-8-amd64": false,
		"6.1": false, "6.18.44-x": false, "2.6.78": true,
	} {
		if miscomputesChecksums(release) != want {
			t.Errorf("%s: %v", release, !want)
		}
	}
}
