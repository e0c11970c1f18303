package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// configKey is the key of a ConfigMap that holds the network's configuration.
const configKey = "net-conf.json"

func (t *tool) validateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "validate FILE",
		Short: "Check a network configuration before it is used",
		Long: `validate checks a network configuration: a file such as net-conf.json, or a manifest for Kubernetes with a ConfigMap
that holds one. "-" is standard input. What is wrong is said with its line in the file; exit status 1 says that something is.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			text, err := readFile(args[0])
			if err != nil {
				return err
			}
			name := args[0]
			if name == "-" {
				name = "standard input"
			}
			remarks := validate(text)
			wrong := false
			for _, r := range remarks {
				word := t.warn("warning:")
				if !r.warning {
					word, wrong = t.bad("error:"), true
				}
				fmt.Fprintf(t.out, "%s:%d: %s %s\n", name, r.line, word, r.text)
			}
			if wrong {
				return errFound
			}
			fmt.Fprintf(t.out, "%s: %s\n", name, t.ok("valid"))
			return nil
		},
	}
}

func readFile(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(os.Stdin)
	}
	return os.ReadFile(name)
}

// A remark is what there is to say of a line.
type remark struct {
	line    int
	warning bool
	text    string
}

// validate returns all there is to say of a file.
func validate(text []byte) []remark {
	if trimmed := bytes.TrimSpace(text); bytes.HasPrefix(trimmed, []byte("{")) && !isManifest(trimmed) {
		return validateConfig(text, 1, true)
	}
	var remarks []remark
	found := false
	documents := yaml.NewDecoder(bytes.NewReader(text))
	for {
		var document yaml.Node
		err := documents.Decode(&document)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return append(remarks, yamlError(err))
		}
		if len(document.Content) == 0 {
			continue
		}
		root := document.Content[0]
		if value(root, "kind") == nil && value(root, "Network") != nil {
			return append(remarks, remark{line: root.Line, text: "a network configuration is JSON, not YAML: {\"Network\": …}"})
		}
		if kind := value(root, "kind"); kind == nil || kind.Value != "ConfigMap" {
			continue
		}
		config := value(value(root, "data"), configKey)
		if config == nil {
			continue
		}
		found = true
		remarks = append(remarks, validateConfig([]byte(config.Value), firstLine(config), false)...)
	}
	if !found {
		remarks = append(remarks, remark{line: 1, text: "there is no network configuration: neither a JSON object, nor a ConfigMap with " + configKey})
	}
	return remarks
}

// isManifest tells whether a JSON object is one of Kubernetes'.
func isManifest(text []byte) bool {
	var object struct{ APIVersion, Kind string }
	return json.Unmarshal(text, &object) == nil && object.APIVersion != "" && object.Kind != ""
}

var yamlLine = regexp.MustCompile(`line (\d+): (.*)`)

func yamlError(err error) remark {
	r := remark{line: 1, text: "this is neither JSON nor YAML: " + err.Error()}
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		fmt.Sscan(m[1], &r.line)
		r.text = "not valid YAML: " + m[2]
	}
	return r
}

// value returns the value of a mapping's key, nil where there is none.
func value(n *yaml.Node, key string) *yaml.Node {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

// firstLine is the line of the file that a text begins on: a block's, below the
// sign that opens it.
func firstLine(n *yaml.Node) int {
	if n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0 {
		return n.Line + 1
	}
	return n.Line
}

// exampleUplink is one that any backend can use.
var exampleUplink = iface.Uplink{
	Name: "eth0", Index: 2, MTU: 1500, MAC: "02:00:00:00:00:01",
	IPv4: netip.MustParseAddr("192.0.2.1"), PublicIP: netip.MustParseAddr("192.0.2.1"),
	IPv6: netip.MustParseAddr("2001:db8::1"), PublicIPv6: netip.MustParseAddr("2001:db8::1"),
	Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/64")},
}

// validateConfig checks a configuration that begins on a line. divided tells
// that it may be for etcd, where flanneld divides the network itself.
func validateConfig(text []byte, first int, divided bool) []remark {
	var syntax *json.SyntaxError
	if err := json.Unmarshal(text, new(any)); errors.As(err, &syntax) {
		line := first + bytes.Count(text[:min(syntax.Offset, int64(len(text)))], []byte("\n"))
		return []remark{{line: line, text: "not valid JSON: " + syntax.Error()}}
	}
	keys, remarks := scan(text, first)
	cfg, err := subnet.ParseConfig(text)
	if err == nil && divided {
		err = cfg.Divide()
	}
	var warnings []string
	if cfg != nil {
		warnings = cfg.Warnings
	}
	if err == nil {
		uplink := exampleUplink
		if !cfg.IPv4.Enabled() {
			uplink.IPv4, uplink.PublicIP = netip.Addr{}, netip.Addr{}
		}
		if !cfg.IPv6.Enabled() {
			uplink.IPv6, uplink.PublicIPv6 = netip.Addr{}, netip.Addr{}
		}
		_, err = backend.New(cfg, uplink)
		warnings = cfg.Warnings
	}
	for _, w := range warnings {
		remarks = append(remarks, remark{keys.line(w, first), true, w})
	}
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			remarks = append(remarks, remark{line: keys.line(line, first), text: strings.TrimSpace(line)})
		}
	}
	slices.SortStableFunc(remarks, func(a, b remark) int { return a.line - b.line })
	return remarks
}

// A key is one of the configuration's.
type key struct {
	name    string
	backend bool // in Backend
	line    int
}

type keys []key

// line returns the line of the key that a text is about: the first that it
// names, of Backend's where it says so.
func (k keys) line(text string, otherwise int) int {
	inBackend := strings.HasPrefix(text, "Backend") || strings.Contains(text, " of Backend ")
	best, at := otherwise, len(text)
	for _, key := range k {
		if key.backend != inBackend && (key.backend || key.name != "Backend") {
			continue
		}
		word := regexp.MustCompile(`(^|[^A-Za-z0-9])` + regexp.QuoteMeta(key.name) + `($|[^A-Za-z0-9])`)
		m := word.FindStringIndex(text)
		if key.name == "Backend" {
			if inBackend && at == len(text) { // where no key of its own is named
				best = key.line
			}
			continue
		}
		if m != nil && m[0] <= at { // of two keys of one name the latter counts
			best, at = key.line, m[0]
		}
	}
	return best
}

// scan finds the lines of all keys, and those that are there twice.
func scan(text []byte, first int) (keys, []remark) {
	var found keys
	var remarks []remark
	lineAt := func(offset int64) int { return first + bytes.Count(text[:offset], []byte("\n")) }
	d := json.NewDecoder(bytes.NewReader(text))
	var walk func(depth int, backend bool)
	walk = func(depth int, backend bool) {
		t, err := d.Token()
		if err != nil {
			return
		}
		switch t {
		case json.Delim('{'):
			seen := map[string]int{}
			for d.More() {
				t, err := d.Token()
				name, ok := t.(string)
				if err != nil || !ok {
					return
				}
				line := lineAt(d.InputOffset())
				if before := seen[strings.ToLower(name)]; before != 0 {
					remarks = append(remarks, remark{line, true, fmt.Sprintf("key %q is there twice, on line %d as well: the last one counts", name, before)})
				}
				seen[strings.ToLower(name)] = line
				if depth == 0 || backend && depth == 1 {
					found = append(found, key{name, backend, line})
				}
				walk(depth+1, depth == 0 && strings.EqualFold(name, "Backend"))
			}
			_, _ = d.Token() // }
		case json.Delim('['):
			for d.More() {
				walk(depth+1, false)
			}
			_, _ = d.Token() // ]
		}
	}
	walk(0, false)
	return found, remarks
}
