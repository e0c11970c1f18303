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
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// Keys of a ConfigMap: the network's configuration, and what the CNI plugin is
// told.
const (
	configKey   = "net-conf.json"
	conflistKey = "cni-conf.json"
)

func (t *tool) validateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "validate FILE",
		Short: "Check a network configuration before it is used",
		Long: `validate checks a network configuration: a file such as net-conf.json, or a manifest for Kubernetes with a ConfigMap
that holds one. "-" is standard input. All that is wrong is said, each with its line in the file; exit status 1 says that something is.`,
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

// validate returns all there is to say of a file, by its lines.
func validate(text []byte) []remark {
	remarks := read(text)
	slices.SortStableFunc(remarks, func(a, b remark) int { return a.line - b.line })
	return remarks
}

func read(text []byte) []remark {
	if trimmed := bytes.TrimSpace(text); bytes.HasPrefix(trimmed, []byte("{")) && !isManifest(trimmed) {
		return validateConfig(text, linesOf(text), true)
	}
	var remarks []remark
	found := false
	for _, document := range documents(text) {
		var node yaml.Node
		if err := yaml.Unmarshal(document, &node); err != nil {
			remarks, found = append(remarks, yamlError(err)), true // it may have been there
			continue
		}
		if len(node.Content) == 0 {
			continue
		}
		root := node.Content[0]
		if value(root, "kind") == nil && value(root, "Network") != nil {
			return append(remarks, remark{line: root.Line, text: "a network configuration is JSON, not YAML: {\"Network\": …}"})
		}
		for _, data := range configMaps(root) {
			if config := value(data, configKey); config != nil {
				found = true
				remarks = append(remarks, validateText(document, config, func(text []byte, at lines) []remark { return validateConfig(text, at, false) })...)
			}
			if conflist := value(data, conflistKey); conflist != nil {
				remarks = append(remarks, validateText(document, conflist, validateSyntax)...)
			}
		}
	}
	if !found {
		remarks = append(remarks, remark{line: 1, text: "there is no network configuration: neither a JSON object, nor a ConfigMap with " + configKey})
	}
	return remarks
}

// validateText checks a text that a ConfigMap holds.
func validateText(file []byte, n *yaml.Node, check func([]byte, lines) []remark) []remark {
	if n.Kind != yaml.ScalarNode {
		return []remark{{line: n.Line, text: "a ConfigMap holds texts: put | before this, on the line of the key"}}
	}
	return check([]byte(n.Value), linesIn(file, n))
}

// documents returns the documents of a YAML stream, each on its own: what is wrong
// with one does not keep the others from being read. Empty lines take the place of
// those before it, so that lines count as in the file.
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
		begun = begun || len(first) > 0 && first[0] != '#' && first[0] != '%' // a directive belongs to what follows
	}
	return append(all, document)
}

// configMaps returns the data of those that an object is, or has in a List.
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

// isManifest tells whether a JSON object is one of Kubernetes'.
func isManifest(text []byte) bool {
	var object struct{ APIVersion, Kind string }
	return json.Unmarshal(text, &object) == nil && object.APIVersion != "" && object.Kind != ""
}

// ofParser matches errors whose lines the library counts from zero.
var ofParser = regexp.MustCompile(`^did not find expected (node content|',' or|'-' indicator|key|<)`)

var yamlLine = regexp.MustCompile(`line (\d+): (.*)`)

func yamlError(err error) remark {
	r := remark{line: 1, text: "this is neither JSON nor YAML: " + err.Error()}
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		fmt.Sscan(m[1], &r.line)
		if ofParser.MatchString(m[2]) {
			r.line++
		}
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

// lines are the lines of a file that the bytes of a text are on.
type lines []int

// at returns the line of what ends at an offset.
func (l lines) at(offset int64) int {
	if len(l) == 0 {
		return 1
	}
	return l[max(0, min(int(offset), len(l))-1)]
}

// linesOf returns the lines of a text that is a file.
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

// linesIn returns the lines of a text in a YAML file. However it is written there,
// as a block or in quotes, folded or with escapes, its characters follow one
// another in the file as in the text, but for white space.
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

// exampleUplink is one that any backend can use.
var exampleUplink = iface.Uplink{
	Name: "eth0", Index: 2, MTU: 1500, MAC: "02:00:00:00:00:01",
	IPv4: netip.MustParseAddr("192.0.2.1"), PublicIP: netip.MustParseAddr("192.0.2.1"),
	IPv6: netip.MustParseAddr("2001:db8::1"), PublicIPv6: netip.MustParseAddr("2001:db8::1"),
	Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/64")},
}

// validateSyntax checks that a text is JSON.
func validateSyntax(text []byte, at lines) []remark {
	var syntax *json.SyntaxError
	if err := json.Unmarshal(text, new(any)); errors.As(err, &syntax) {
		return []remark{{line: at.at(syntax.Offset), text: "not valid JSON: " + syntax.Error()}}
	}
	return nil
}

// validateConfig checks a configuration. divided tells that it may be for etcd,
// where flanneld divides the network itself.
func validateConfig(text []byte, at lines, divided bool) []remark {
	if wrong := validateSyntax(text, at); wrong != nil {
		return wrong
	}
	keys, remarks := scan(text, at)
	said, mended := map[string]bool{}, map[key]bool{}
	say := func(what string, warning bool) (fresh bool) {
		if said[what] {
			return false
		}
		said[what] = true
		remarks = append(remarks, remark{keys.find(what).line, warning, what})
		return true
	}
	// Whoever reads a configuration stops at the first error. It is put right, so
	// that the next one shows.
	for d := newDraft(text); ; {
		warnings, err := d.check(divided)
		for _, w := range warnings {
			say(w, true)
		}
		if err == nil {
			break
		}
		wrong := keys.find(err.Error())
		if wrong.backend && mended[wrong] { // it is wrong now that it is missing
			wrong = key{name: "Backend"}
		} else if !say(err.Error(), false) {
			break
		}
		if !d.mend(wrong) {
			break
		}
		mended[wrong] = true
	}
	return remarks
}

// A draft is a configuration that is put right step by step.
type draft struct {
	text    []byte // where it is no object
	keys    map[string]json.RawMessage
	backend map[string]json.RawMessage // nil: none, or it is no object

	unknown [2]bool // what IPv4's and IPv6's network is: how it is divided cannot be judged
}

func newDraft(text []byte) *draft {
	d := &draft{text: text}
	_ = json.Unmarshal(text, &d.keys) // no object: check says so
	_ = json.Unmarshal(d.keys[d.name("Backend")], &d.backend)
	return d
}

// name returns a key as it is written there.
func (d *draft) name(key string) string { return written(d.keys, key) }

func written(keys map[string]json.RawMessage, key string) string {
	for name := range keys {
		if strings.EqualFold(name, key) {
			return name
		}
	}
	return key
}

// check returns what the configuration's readers say of it.
func (d *draft) check(divided bool) (warnings []string, err error) {
	text := d.text
	if d.keys != nil {
		text, _ = json.Marshal(d.keys) // which was JSON before
	}
	cfg, err := subnet.ParseConfig(text)
	if err != nil {
		return nil, err
	}
	warnings = cfg.Warnings
	if divided {
		known := *cfg
		for i, pool := range []*subnet.Pool{&known.IPv4, &known.IPv6} {
			if d.unknown[i] {
				*pool = subnet.Pool{}
			}
		}
		if err := known.Divide(); err != nil {
			return warnings, err
		}
	}
	uplink := exampleUplink
	if !cfg.IPv4.Enabled() {
		uplink.IPv4, uplink.PublicIP = netip.Addr{}, netip.Addr{}
	}
	if !cfg.IPv6.Enabled() {
		uplink.IPv6, uplink.PublicIPv6 = netip.Addr{}, netip.Addr{}
	}
	_, err = backend.New(cfg, uplink)
	return cfg.Warnings, err
}

// mend puts something in place of a key that is wrong of which nothing more can be
// wrong. It returns false where it does not know what.
func (d *draft) mend(k key) bool {
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
		text, _ := json.Marshal(d.backend) // which was JSON before
		set("Backend", string(text))
	case k.backend || name == "backend":
		set("Backend", `{"Type": "alloc"}`) // which takes anything
	case name == "network":
		set("Network", `"10.0.0.0/8"`)
		d.unknown[0] = true
	case name == "ipv6network":
		set("IPv6Network", `"fd00::/8"`)
		d.unknown[1] = true
	case name == "enableipv4" && !has("Network"):
		set("EnableIPv4", "")
		return d.mend(key{name: "Network"})
	case name == "enableipv6" && has("IPv6Network"):
		set("EnableIPv6", "true")
	// With the longest subnets, what is said of SubnetMin and SubnetMax is wrong
	// with any.
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

// A key is one of the configuration's.
type key struct {
	name    string
	backend bool // in Backend
	line    int
}

// keys are those of a configuration, and the line that it begins on.
type keys struct {
	all   []key
	first int
}

// find returns the key that a text is about: the first that it names, of Backend's
// where it says so. It may be one that is missing.
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
			if inBackend && at == len(text) { // where no key of its own is named
				best = key
			}
			continue
		}
		if key.backend != inBackend {
			continue
		}
		// As it is written or, whatever that is, as it should be: with a capital
		// letter, unlike what are no keys.
		word := regexp.MustCompile(`(^|[^A-Za-z0-9])(` + regexp.QuoteMeta(key.name) + `|[A-Z](?i:` + regexp.QuoteMeta(key.name[min(1, len(key.name)):]) + `))($|[^A-Za-z0-9])`)
		m := word.FindStringSubmatchIndex(text)
		if m != nil && strings.EqualFold(text[m[4]:m[5]], key.name) && m[0] <= at { // of two keys of one name the latter counts
			best, at = key, m[0]
		}
	}
	return best
}

// scan finds the lines of all keys, and those that are there twice.
func scan(text []byte, at lines) (keys, []remark) {
	found := keys{first: at.at(0)}
	var remarks []remark
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
					remarks = append(remarks, remark{line, true, fmt.Sprintf("key %q is there twice, on line %d as well: the last one counts", name, before)})
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
	return found, remarks
}
