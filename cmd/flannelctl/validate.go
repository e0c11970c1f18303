package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// Keys of a ConfigMap: the network configuration, and the configuration of the CNI plugin.
const (
	configKey   = "net-conf.json"
	conflistKey = "cni-conf.json"
)

func (t *tool) validateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "validate FILE",
		Short: "Check a network configuration before it is used",
		Long: `validate checks a network configuration: a file such as net-conf.json, or a manifest for
Kubernetes with a ConfigMap that contains one. "-" is standard input. It prints all errors and warnings with their lines
in the file. It also warns of a Network that overlaps a prefix of this host's uplink. Exit status 1: there are errors.`,
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
			issues := validate(text, t.uplink())
			wrong := false
			for _, r := range issues {
				word := t.warn("warning:")
				if !r.warning {
					word, wrong = t.bad("error:"), true
				}
				t.printf("%s:%d: %s %s\n", name, r.line, word, r.text)
			}
			if wrong {
				return errFound
			}
			t.printf("%s: %s\n", name, t.ok("valid"))
			return nil
		},
	}
}

// uplink returns the uplink of this host, with as many families as it has; the zero Uplink if there is none.
func (t *tool) uplink() iface.Uplink {
	if t.complete() != nil {
		return iface.Uplink{}
	}
	for _, on := range [][2]bool{{true, true}, {true, false}, {false, true}} {
		if u, err := iface.Find(t.options.Uplink, on[0], on[1]); err == nil {
			return u
		}
	}
	return iface.Uplink{}
}

func readFile(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(os.Stdin)
	}
	return os.ReadFile(name)
}

// An issue is an error or a warning about a line.
type issue struct {
	line    int
	warning bool
	text    string
}

// validate returns the issues of a file on a host with this uplink, sorted by line.
func validate(text []byte, uplink iface.Uplink) []issue {
	issues := read(text, uplink)
	slices.SortStableFunc(issues, func(a, b issue) int { return a.line - b.line })
	return issues
}

func read(text []byte, uplink iface.Uplink) []issue {
	if trimmed := bytes.TrimSpace(text); bytes.HasPrefix(trimmed, []byte("{")) && !isManifest(trimmed) {
		return validateConfig(text, linesOf(text), true, uplink)
	}
	var issues []issue
	found := false
	for _, document := range documents(text) {
		var node yaml.Node
		if err := yaml.Unmarshal(document, &node); err != nil {
			issues, found = append(issues, yamlError(err)), true // the configuration may be in this document
			continue
		}
		if len(node.Content) == 0 {
			continue
		}
		root := node.Content[0]
		if value(root, "kind") == nil && value(root, "Network") != nil {
			return append(issues,
				issue{line: root.Line, text: "a network configuration is JSON, not YAML: {\"Network\": …}"})
		}
		for _, data := range configMaps(root) {
			if config := value(data, configKey); config != nil {
				found = true
				check := func(text []byte, at lines) []issue { return validateConfig(text, at, false, uplink) }
				issues = append(issues, validateText(document, config, check)...)
			}
			if conflist := value(data, conflistKey); conflist != nil {
				issues = append(issues, validateText(document, conflist, validateSyntax)...)
			}
		}
	}
	if !found {
		issues = append(issues, issue{line: 1,
			text: "there is no network configuration: neither a JSON object, nor a ConfigMap with " + configKey})
	}
	return issues
}

// validateText checks a text in a ConfigMap.
func validateText(file []byte, n *yaml.Node, check func([]byte, lines) []issue) []issue {
	if n.Kind != yaml.ScalarNode {
		return []issue{{line: n.Line, text: "a ConfigMap contains texts: put | after the key, on the same line"}}
	}
	return check([]byte(n.Value), linesIn(file, n))
}

// documents returns the documents of a YAML stream as separate texts, so that an error in one document does not affect
// the others. Each text begins with as many empty lines as the file has lines before the document: this keeps line
// numbers right.
func documents(text []byte) [][]byte {
	var all [][]byte
	document, begun := []byte(nil), false
	number := 0
	for line := range bytes.Lines(text) {
		if begun && (bytes.HasPrefix(line, []byte("--- ")) || string(bytes.TrimRight(line, " \t\r\n")) == "---") {
			all = append(all, document)
			document, begun = bytes.Repeat([]byte("\n"), number), false
		}
		number++
		document = append(document, line...)
		first := bytes.TrimSpace(line)
		begun = begun || len(first) > 0 && first[0] != '#' && first[0] != '%' // a directive belongs to the next document
	}
	return append(all, document)
}

// configMaps returns the data of the ConfigMaps in an object, which is a ConfigMap or a List.
func configMaps(object *yaml.Node) []*yaml.Node {
	kind := value(object, "kind")
	switch {
	case kind == nil:
	case kind.Value == "ConfigMap":
		return []*yaml.Node{value(object, "data")}
	case kind.Value == "List":
		var all []*yaml.Node
		if items := value(object, "items"); items != nil {
			for _, item := range items.Content {
				all = append(all, configMaps(item)...)
			}
		}
		return all
	}
	return nil
}

// isManifest reports whether a JSON object is an object of Kubernetes.
func isManifest(text []byte) bool {
	var object struct{ APIVersion, Kind string }
	return json.Unmarshal(text, &object) == nil && object.APIVersion != "" && object.Kind != ""
}

// ofParser matches the errors of the YAML library whose line numbers begin with zero.
var ofParser = regexp.MustCompile(`^did not find expected (node content|',' or|'-' indicator|key|<)`)

var yamlLine = regexp.MustCompile(`line (\d+): (.*)`)

func yamlError(err error) issue {
	r := issue{line: 1, text: "this is neither JSON nor YAML: " + err.Error()}
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		fmt.Sscan(m[1], &r.line)
		if ofParser.MatchString(m[2]) {
			r.line++
		}
		r.text = "not valid YAML: " + m[2]
	}
	return r
}

// value returns the value of a mapping's key, nil if the key is missing.
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

// lines has the line in the file for each byte of a text.
type lines []int

// at returns the line of the text that ends at the offset.
func (l lines) at(offset int64) int {
	if len(l) == 0 {
		return 1
	}
	return l[max(0, min(int(offset), len(l))-1)]
}

// linesOf returns the lines of a text that is the whole file.
func linesOf(text []byte) lines {
	all := make(lines, len(text))
	line := 1
	for i, c := range text {
		all[i] = line
		if c == '\n' {
			line++
		}
	}
	return all
}

// linesIn returns the lines of a text in a YAML file. In all notations (block, quoted, folded, with escapes), the file
// has the characters in the same order as the text, except for white space.
func linesIn(file []byte, n *yaml.Node) lines {
	all := make(lines, len(n.Value))
	line, at := 1, 0
	next := func() {
		if file[at] == '\n' {
			line++
		}
		at++
	}
	for line < n.Line && at < len(file) {
		next()
	}
	at = min(at+n.Column-1, len(file))
	for i, c := range []byte(n.Value) {
		if c > ' ' {
			for at < len(file) && file[at] != c {
				next()
			}
		}
		all[i] = line
		if c > ' ' && at < len(file) {
			at++
		}
	}
	return all
}

// exampleUplink is an uplink that all backends accept.
var exampleUplink = iface.Uplink{
	IPv4: exampleLink(netip.MustParsePrefix("192.0.2.1/24")),
	IPv6: exampleLink(netip.MustParsePrefix("2001:db8::1/64")),
}

func exampleLink(p netip.Prefix) iface.Link {
	return iface.Link{Name: "eth0", Index: 2, MTU: 1500, MAC: "02:00:00:00:00:01",
		Addr: p.Addr(), PublicIP: p.Addr(), Prefixes: []netip.Prefix{p.Masked()}}
}

// validateSyntax checks that a text is JSON.
func validateSyntax(text []byte, at lines) []issue {
	var syntax *json.SyntaxError
	if err := json.Unmarshal(text, new(any)); errors.As(err, &syntax) {
		return []issue{{line: at.at(syntax.Offset), text: "not valid JSON: " + syntax.Error()}}
	}
	return nil
}

// validateConfig checks a configuration. divided is set if the configuration may be for etcd: flanneld then divides the
// network into subnets.
func validateConfig(text []byte, at lines, divided bool, uplink iface.Uplink) []issue {
	if wrong := validateSyntax(text, at); wrong != nil {
		return wrong
	}
	keys, issues := scan(text, at)
	reported, repaired := map[string]bool{}, map[key]bool{}
	report := func(what string, warning bool) (fresh bool) {
		if reported[what] {
			return false
		}
		reported[what] = true
		issues = append(issues, issue{keys.find(what).line, warning, what})
		return true
	}
	// The parser stops at the first error. The draft is repaired, so that the parser finds the next error.
	for d := newDraft(text); ; {
		warnings, err := d.check(divided, uplink)
		for _, w := range warnings {
			report(w, true)
		}
		if err == nil {
			break
		}
		wrong := keys.find(err.Error())
		if wrong.backend && repaired[wrong] { // the error is that repair deleted the key
			wrong = key{name: "Backend"}
		} else if !report(err.Error(), false) {
			break
		}
		if !d.repair(wrong) {
			break
		}
		repaired[wrong] = true
	}
	return issues
}

// A draft is a configuration that is repaired step by step.
type draft struct {
	text    []byte // used if the text is not an object
	keys    map[string]json.RawMessage
	backend map[string]json.RawMessage // nil: missing, or not an object

	unknown [2]bool // the network of IPv4, of IPv6 is not known: its division into subnets is not checked
}

func newDraft(text []byte) *draft {
	d := &draft{text: text}
	_ = json.Unmarshal(text, &d.keys) // if the text is not an object, check reports the error
	_ = json.Unmarshal(d.keys[d.name("Backend")], &d.backend)
	return d
}

// name returns a key as the configuration spells it.
func (d *draft) name(key string) string { return written(d.keys, key) }

func written(keys map[string]json.RawMessage, key string) string {
	for name := range keys {
		if strings.EqualFold(name, key) {
			return name
		}
	}
	return key
}

// check returns the warnings of the parser and about the host's uplink, and the first error of parser and backend.
func (d *draft) check(divided bool, host iface.Uplink) (warnings []string, err error) {
	text := d.text
	if d.keys != nil {
		text, _ = json.Marshal(d.keys) // cannot fail: it was JSON before
	}
	cfg, err := subnet.ParseConfig(text)
	if err != nil {
		return nil, err
	}
	known := *cfg
	for i, pool := range []*subnet.Pool{&known.IPv4, &known.IPv6} {
		if d.unknown[i] {
			*pool = subnet.Pool{}
		}
	}
	cfg.Warnings = append(cfg.Warnings, network.UplinkOverlaps(&known, host)...)
	warnings = cfg.Warnings
	if divided {
		if err := known.Divide(); err != nil {
			return warnings, err
		}
	}
	uplink := exampleUplink
	if !cfg.IPv4.Enabled() {
		uplink.IPv4 = iface.Link{}
	}
	if !cfg.IPv6.Enabled() {
		uplink.IPv6 = iface.Link{}
	}
	_, err = backend.New(cfg, uplink)
	return cfg.Warnings, err
}

// repair replaces the value of a wrong key by a value that causes no further errors. It returns false if it knows no
// such value.
func (d *draft) repair(k key) bool {
	set := func(name, text string) {
		maps.DeleteFunc(d.keys, func(n string, _ json.RawMessage) bool { return strings.EqualFold(n, name) })
		if text != "" {
			d.keys[name] = json.RawMessage(text)
		}
	}
	has := func(name string) bool { _, ok := d.keys[d.name(name)]; return ok }
	switch name := strings.ToLower(k.name); {
	case d.keys == nil:
		return false
	case k.backend && name != "type" && d.backend != nil:
		maps.DeleteFunc(d.backend, func(n string, _ json.RawMessage) bool { return strings.EqualFold(n, name) })
		text, _ := json.Marshal(d.backend) // cannot fail: it was JSON before
		set("Backend", string(text))
	case k.backend || name == "backend":
		set("Backend", `{"Type": "alloc"}`) // accepts any network
	case name == "network":
		set("Network", `"10.0.0.0/8"`)
		d.unknown[0] = true
	case name == "ipv6network":
		set("IPv6Network", `"fd00::/8"`)
		d.unknown[1] = true
	case name == "enableipv4" && !has("Network"):
		set("EnableIPv4", "")
		return d.repair(key{name: "Network"})
	case name == "enableipv6" && has("IPv6Network"):
		set("EnableIPv6", "true")
	// With the longest subnets, errors of SubnetMin and SubnetMax are errors with any length.
	case name == "subnetlen":
		set("SubnetLen", "30")
	case name == "ipv6subnetlen":
		set("IPv6SubnetLen", "126")
	case name == "":
		return false
	default:
		set(k.name, "")
	}
	return true
}

// A key is a key of the configuration.
type key struct {
	name    string
	backend bool // in Backend
	line    int
}

// keys are the keys of a configuration, and its first line.
type keys struct {
	all   []key
	first int
}

// find returns the key that an error is about: the first key that the error names, which may be missing in the
// configuration. Only keys in Backend are considered if the error is about Backend.
func (k keys) find(text string) key {
	for _, name := range []string{"Network", "IPv6Network"} {
		if strings.HasPrefix(text, name+" is missing") {
			return key{name, false, k.first}
		}
	}
	inBackend := strings.HasPrefix(text, "Backend") || strings.Contains(text, " of Backend ")
	best, at := key{line: k.first}, len(text)
	for _, key := range k.all {
		if !key.backend && strings.EqualFold(key.name, "Backend") {
			if inBackend && at == len(text) { // if the error names no key in Backend
				best = key
			}
			continue
		}
		if key.backend != inBackend {
			continue
		}
		// The error has the key as the configuration spells it, or in its right spelling, with a capital letter.
		rest := regexp.QuoteMeta(key.name[min(1, len(key.name)):])
		word := regexp.MustCompile(`(^|[^A-Za-z0-9])(` + regexp.QuoteMeta(key.name) + `|[A-Z](?i:` + rest + `))` +
			`($|[^A-Za-z0-9])`)
		m := word.FindStringSubmatchIndex(text)
		// Of two keys with the same name, the later one is found.
		if m != nil && strings.EqualFold(text[m[4]:m[5]], key.name) && m[0] <= at {
			best, at = key, m[0]
		}
	}
	return best
}

// scan returns all keys with their lines, and issues for duplicate keys.
func scan(text []byte, at lines) (keys, []issue) {
	found := keys{first: at.at(0)}
	var issues []issue
	d := json.NewDecoder(bytes.NewReader(text))
	var walk func(depth int, backend bool)
	walk = func(depth int, backend bool) {
		t, err := d.Token()
		if err != nil {
			return
		}
		if depth == 0 {
			found.first = at.at(d.InputOffset())
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
				line := at.at(d.InputOffset())
				if before := seen[strings.ToLower(name)]; before != 0 {
					text := fmt.Sprintf("key %q is a duplicate of line %d: the last one is used", name, before)
					issues = append(issues, issue{line, true, text})
				}
				seen[strings.ToLower(name)] = line
				if depth == 0 || backend && depth == 1 {
					found.all = append(found.all, key{name, backend, line})
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
	return found, issues
}
