// Package settings is what flanneld can be told by flags and the environment,
// and what flannelctl must know of it to look for itself.
package settings

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/iface"
)

// Options are what the command line and the environment say, checked as far as
// it goes without the network.
type Options struct {
	SubnetFile       string
	StatusSocket     string // "": off
	LeaseRenewMargin time.Duration

	EtcdEndpoints                         []string // URLs: http, https or unix
	EtcdPrefix                            string   // a leading slash, no trailing one
	EtcdCAFile, EtcdCertFile, EtcdKeyFile string
	EtcdUsername                          string
	EtcdPassword                          secret

	KubeSubnetMgr              bool
	KubeAPIURL, KubeconfigFile string
	KubeAnnotationPrefix       string // complete: "public-ip" is appended as it is
	NetConfigPath              string
	SetNodeNetworkUnavailable  bool

	Uplink           iface.Selector
	IfaceNodeAddress bool // the uplink holds the Node's InternalIP

	IPMasq          bool
	IPMasqNotRandom bool // without --random-fully
	ForwardRules    bool
	RulesResync     time.Duration
	KernelResync    time.Duration
	BlackholeRoute  bool

	HealthzIP   netip.Addr
	HealthzPort int // 0: off
	Profile     bool

	// Warnings are remarks on an environment that works, one line each.
	Warnings []string

	help, version bool
	settings      []*setting
}

// secret is a text that does not get into a log by accident.
type secret string

const redacted = "<redacted>"

func (secret) String() string   { return redacted }
func (secret) GoString() string { return redacted }

// ErrHelp and ErrVersion say that the command line asks for a text on standard
// output, and for nothing else.
var (
	ErrHelp    = errors.New("help is asked for")
	ErrVersion = errors.New("the version is asked for")
)

// A setting is one flag, and as a pflag.Value also what was said of it.
type setting struct {
	name string
	arg  string // stands for the value in the help; empty: true or false
	def  string // as one would type it
	help string
	set  func(text string) error // checks the text and puts it into the options

	repeatable bool
	hidden     bool // the value is a secret

	texts []string // that were set, in order; one unless repeatable
	from  string   // "--iface" or "FLANNELD_IFACE"; empty: nobody set it
}

// A group is a section of the help.
type group struct {
	title    string
	settings []*setting
}

// flags is the table of all flags, which store into o. Its order is that of the
// help and of the documentation.
func flags(o *Options) []group {
	return []group{
		{"General", []*setting{
			{name: "subnet-file", arg: "PATH", def: "/run/flannel/subnet.env", set: into(&o.SubnetFile, path),
				help: "where to tell CNI, Docker and scripts of this node's subnet"},
			{name: "status-socket", arg: "PATH", def: statusBeside, set: into(&o.StatusSocket, anything),
				help: "where flannelctl asks: a unix socket for root alone; auto is flanneld.sock beside the subnet file, off is off"},
			{name: "subnet-lease-renew-margin", arg: "MINUTES", def: "60", set: into(&o.LeaseRenewMargin, duration("minutes", time.Minute, 1, 1439)),
				help: "renew the lease, which lasts a day, this long before it ends: 1 to 1439"},
			{name: "version", def: "false", set: into(&o.version, boolean), help: "print the version and exit"},
			{name: "help", def: "false", set: into(&o.help, boolean), help: "print this text and exit"},
		}},
		{"Leases in etcd", []*setting{
			{name: "etcd-endpoints", arg: "URL[,URL...]", def: "http://127.0.0.1:4001,http://127.0.0.1:2379", set: into(&o.EtcdEndpoints, endpoints),
				help: "etcd's addresses: http://, https:// or unix://"},
			{name: "etcd-prefix", arg: "KEY", def: "/coreos.com/network", set: into(&o.EtcdPrefix, etcdPrefix),
				help: "the key under which the network configuration and the leases are"},
			{name: "etcd-cafile", arg: "PATH", set: into(&o.EtcdCAFile, anything), help: "certificates of the authorities to trust etcd by"},
			{name: "etcd-certfile", arg: "PATH", set: into(&o.EtcdCertFile, anything), help: "this client's certificate; needs --etcd-keyfile"},
			{name: "etcd-keyfile", arg: "PATH", set: into(&o.EtcdKeyFile, anything), help: "this client's key; needs --etcd-certfile"},
			{name: "etcd-username", arg: "NAME", set: into(&o.EtcdUsername, anything), help: "user to log in to etcd as; needs --etcd-password"},
			{name: "etcd-password", arg: "PASSWORD", hidden: true, set: into(&o.EtcdPassword, password),
				help: "that user's password; in the environment, other users of the host cannot see it"},
		}},
		{"Leases in Kubernetes", []*setting{
			{name: "kube-subnet-mgr", def: "false", set: into(&o.KubeSubnetMgr, boolean),
				help: "take the subnet from the Node's spec.podCIDRs rather than from etcd"},
			{name: "kube-api-url", arg: "URL", set: into(&o.KubeAPIURL, optional(apiURL)),
				help: "the API server; without it and --kubeconfig-file, the one of the cluster that the pod runs in"},
			{name: "kubeconfig-file", arg: "PATH", set: into(&o.KubeconfigFile, anything), help: "the API server and credentials for it"},
			{name: "kube-annotation-prefix", arg: "PREFIX", def: "flannel.alpha.coreos.com", set: into(&o.KubeAnnotationPrefix, annotationPrefix),
				help: "what the names of the Node's annotations begin with"},
			{name: "net-config-path", arg: "PATH", def: "/etc/kube-flannel/net-conf.json", set: into(&o.NetConfigPath, path),
				help: "file with the network configuration"},
			{name: "set-node-network-unavailable", def: "true", set: into(&o.SetNodeNetworkUnavailable, boolean),
				help: "set the Node's condition NetworkUnavailable to False once the network is up"},
		}},
		{"Uplink (the interface that peers reach this node on)", []*setting{
			{name: "iface", arg: "NAME|IP", repeatable: true, set: appendTo(&o.Uplink.Names, anything),
				help: "the interface, or an address of it; the first that matches wins"},
			{name: "iface-regex", arg: "REGEX", repeatable: true, set: appendTo(&o.Uplink.Regexps, pattern),
				help: "tried after --iface: matched with addresses first, then with names"},
			{name: "iface-can-reach", arg: "IP", set: into(&o.Uplink.CanReach, optional(address)),
				help: "tried last: the interface on the way to this address; without the three, the default route's"},
			{name: "iface-node-address", def: "false", set: into(&o.IfaceNodeAddress, boolean),
				help: "with --kube-subnet-mgr: the interface that holds the Node's InternalIP, in place of --iface"},
			{name: "public-ip", arg: "IP", set: into(&o.Uplink.PublicIP, optional(publicIP("IPv4", netip.Addr.Is4))),
				help: "the address that peers use, if not the interface's own; without the three, its holder is the uplink"},
			{name: "public-ipv6", arg: "IP", set: into(&o.Uplink.PublicIPv6, optional(publicIP("IPv6", netip.Addr.Is6))),
				help: "the same for IPv6"},
		}},
		{"Rules and routes", []*setting{
			{name: "ip-masq", def: "false", set: into(&o.IPMasq, boolean), help: "masquerade traffic that leaves the overlay"},
			{name: "ip-masq-fully-random-disable", def: "false", set: into(&o.IPMasqNotRandom, boolean),
				help: "masquerade without --random-fully, so that source ports stay the same where they can"},
			{name: "iptables-forward-rules", def: "true", set: into(&o.ForwardRules, boolean), help: "accept forwarding from and to the overlay"},
			{name: "iptables-resync", arg: "SECONDS", def: "5", set: into(&o.RulesResync, duration("seconds", time.Second, 1, math.MaxInt32)),
				help: "how often to check the rules: 1 or more"},
			{name: "kernel-resync", arg: "SECONDS", def: "60", set: into(&o.KernelResync, duration("seconds", time.Second, 1, math.MaxInt32)),
				help: "how often to check devices and routes, which are set right at once when the kernel tells of a change: 1 or more"},
			{name: "ip-blackhole-route", def: "false", set: into(&o.BlackholeRoute, boolean),
				help: "drop what is sent to pods that are gone: a blackhole route for the node's own subnet"},
		}},
		{"Health", []*setting{
			{name: "healthz-ip", arg: "IP", def: "0.0.0.0", set: into(&o.HealthzIP, address), help: "address to serve /healthz, /readyz and /metrics on"},
			{name: "healthz-port", arg: "PORT", def: "0", set: into(&o.HealthzPort, port), help: "and the port; 0 is off"},
			{name: "pprof", def: "false", set: into(&o.Profile, boolean), help: "serve /debug/pprof there too"},
		}},
		{"Logging (to standard error)", []*setting{
			{name: "v", arg: "LEVEL", def: "0", set: logFlag("v", "a log level: 0 or more"), help: "how much to log; 4 is much"},
			{name: "vmodule", arg: "FILE=LEVEL[,...]", set: logFlag("vmodule", "a list of files and log levels such as vxlan=4,kube*=2"),
				help: "how much to log from source files of these names"},
			{name: "log_backtrace_at", arg: "FILE:LINE", set: logFlag("log_backtrace_at", "a line of a source file such as main.go:42"),
				help: "log a stack trace with what this line logs"},
		}},
	}
}

// Parse reads the command line, and for what it does not say the
// environment, whose lines are as os.Environ has them. An error is one line for
// the operator: what is wrong where, and what is allowed. ErrHelp and
// ErrVersion come before any complaint about the environment.
func Parse(args, env []string) (*Options, error) {
	fs := pflag.NewFlagSet("flanneld", pflag.ContinueOnError)
	o, err := Flags(fs)
	if err != nil {
		return nil, err
	}
	if err := fs.Parse(doubleDashes(fs, args)); err != nil {
		return nil, o.explain(err)
	}
	switch {
	case o.help:
		return nil, ErrHelp
	case o.version:
		return nil, ErrVersion
	case fs.NArg() > 0:
		return nil, unexpected(fs.Arg(0), args)
	}
	return o, o.Complete(env)
}

// Flags adds the flags to a set that somebody else parses, who calls Complete
// then.
func Flags(fs *pflag.FlagSet) (*Options, error) {
	o := &Options{}
	for _, g := range flags(o) {
		for _, s := range g.settings {
			if s.def != "" {
				if err := s.set(s.def); err != nil {
					return nil, fmt.Errorf("default of --%s: %w", s.name, err)
				}
			}
			o.settings = append(o.settings, s)
			f := fs.VarPF(s, s.name, "", s.help)
			if s.arg == "" {
				f.NoOptDefVal = "true"
			}
		}
	}
	return o, nil
}

// Complete takes from the environment what the flags did not say, and checks
// all that was said.
func (o *Options) Complete(env []string) error {
	if err := o.environment(env); err != nil {
		return err
	}
	switch o.StatusSocket {
	case statusBeside:
		o.StatusSocket = filepath.Join(filepath.Dir(o.SubnetFile), "flanneld.sock")
	case statusOff:
		o.StatusSocket = ""
	}
	return o.check()
}

// Values of --status-socket that are no path.
const (
	statusBeside = "auto"
	statusOff    = "off"
)

// doubleDashes writes -name as --name. Values, and what follows "--", are left
// alone.
func doubleDashes(fs *pflag.FlagSet, args []string) []string {
	out := slices.Clone(args)
	for i := 0; i < len(out) && out[i] != "--"; i++ {
		if len(out[i]) < 2 || out[i][0] != '-' {
			continue
		}
		name, _, joined := strings.Cut(strings.TrimPrefix(out[i][1:], "-"), "=")
		if name == "h" {
			name, out[i] = "help", "--help"
		}
		if out[i][1] != '-' {
			out[i] = "-" + out[i]
		}
		if f := fs.Lookup(name); f != nil && f.NoOptDefVal == "" && !joined {
			i++ // its value
		}
	}
	return out
}

// explain words pflag's errors for the operator.
func (o *Options) explain(err error) error {
	var unknown *pflag.NotExistError
	var noValue *pflag.ValueRequiredError
	var invalid *pflag.InvalidValueError
	var malformed *pflag.InvalidSyntaxError
	switch {
	case errors.As(err, &unknown):
		name := unknown.GetSpecifiedName()
		hint := ""
		if near := o.nearest(name); near != "" {
			hint = fmt.Sprintf(" did you mean --%s?", near)
		}
		return fmt.Errorf("unknown flag --%s:%s --help lists the flags", name, hint)
	case errors.As(err, &malformed):
		name, _, _ := strings.Cut(malformed.GetSpecifiedFlag(), "=")
		return fmt.Errorf("%s is not a flag: --help lists the flags", name)
	case errors.As(err, &noValue):
		s := noValue.GetFlag().Value.(*setting)
		return fmt.Errorf("--%s needs a value: --%s=%s", s.name, s.name, s.arg)
	case errors.As(err, &invalid):
		return fmt.Errorf("--%s: %w", invalid.GetFlag().Name, invalid.Unwrap())
	}
	return err
}

// unexpected is the error for a word that belongs to no flag. It may be the
// rest of a password with spaces, and is then not shown.
func unexpected(word string, args []string) error {
	shown := strconv.Quote(word)
	for _, arg := range slices.Backward(args[:slices.Index(args, word)]) {
		if strings.HasPrefix(arg, "-") {
			if strings.Contains(arg, "password") {
				shown = redacted
			}
			break
		}
	}
	return fmt.Errorf("%s belongs to no flag: give values as --name=value, and those with spaces in quotes", shown)
}

const envPrefix = "FLANNELD_"

func (s *setting) env() string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(s.name, "-", "_"))
}

var (
	serviceLinkName  = regexp.MustCompile(`_SERVICE_HOST$|_SERVICE_PORT(_|$)|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$`)
	serviceLinkValue = regexp.MustCompile(`^(tcp|udp|sctp)://`)
)

// serviceLink tells whether a variable is one that Kubernetes sets in every
// container of a namespace that has a service called flanneld, or
// flanneld-something: FLANNELD_HEALTHZ_PORT=tcp://10.3.0.7:8080.
func serviceLink(name, value string) bool {
	return serviceLinkName.MatchString(name) || strings.HasSuffix(name, "_PORT") && serviceLinkValue.MatchString(value)
}

// environment takes from env what the command line does not say. An empty
// variable is one that is not set.
func (o *Options) environment(env []string) error {
	vars := map[string]string{}
	for _, line := range env {
		if name, value, _ := strings.Cut(line, "="); strings.HasPrefix(name, envPrefix) {
			vars[name] = value
		}
	}
	for _, s := range o.settings {
		text := vars[s.env()]
		delete(vars, s.env())
		if s.name == "help" || s.name == "version" {
			continue // commands rather than settings; an image may well say which FLANNELD_VERSION it holds
		}
		if text == "" || s.from != "" || serviceLink(s.env(), text) {
			continue
		}
		if err := s.Set(text); err != nil {
			return fmt.Errorf("%s: %w", s.env(), err)
		}
		s.from = s.env()
	}
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		if serviceLink(name, vars[name]) {
			continue
		}
		hint := ""
		if near := o.nearest(strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, envPrefix), "_", "-"))); near != "" {
			hint = fmt.Sprintf(": did you mean %s?", o.setting(near).env())
		}
		o.Warnings = append(o.Warnings, fmt.Sprintf("environment variable %s is ignored, as there is no such setting%s", name, hint))
	}
	return nil
}

// check looks at what only settings together tell, and at the files they name.
func (o *Options) check() error {
	together := func(a, b string) error {
		x, y := o.setting(a), o.setting(b)
		if x.value() == "" {
			x, y = y, x
		}
		if x.value() != "" && y.value() == "" {
			return fmt.Errorf("%s is given without --%s: set both, or neither", x.from, y.name)
		}
		return nil
	}
	readable := func(name string) error {
		s := o.setting(name)
		if s.value() == "" {
			return nil
		}
		f, err := os.Open(s.value())
		if err != nil {
			return fmt.Errorf("%s: cannot read the file: %w", s.from, err)
		}
		defer f.Close()
		if info, err := f.Stat(); err == nil && info.IsDir() {
			return fmt.Errorf("%s: %s is a directory, not a file", s.from, s.value())
		}
		return nil
	}
	nodeAddress := o.setting("iface-node-address")
	apart := func(name string) error {
		if s := o.setting(name); o.IfaceNodeAddress && strings.Join(s.texts, "") != "" {
			return fmt.Errorf("%s and %s each choose the uplink: give one of them alone", s.from, nodeAddress.from)
		}
		return nil
	}
	if o.Profile && o.HealthzPort == 0 {
		return fmt.Errorf("%s is served on --healthz-port, which is off: give that too", o.setting("pprof").from)
	}
	if o.KubeSubnetMgr {
		return cmp.Or(apart("iface"), apart("iface-regex"), apart("iface-can-reach"), readable("kubeconfig-file"))
	}
	if o.IfaceNodeAddress {
		return fmt.Errorf("%s is of use only with --kube-subnet-mgr: give --iface instead", nodeAddress.from)
	}
	for i, e := range o.EtcdEndpoints {
		switch {
		case strings.Contains(e, "://"):
		case o.EtcdCAFile+o.EtcdCertFile == "":
			o.EtcdEndpoints[i] = "http://" + e
		default:
			o.EtcdEndpoints[i] = "https://" + e
		}
	}
	return cmp.Or(
		together("etcd-keyfile", "etcd-certfile"),
		together("etcd-username", "etcd-password"),
		readable("etcd-cafile"),
		readable("etcd-certfile"),
		readable("etcd-keyfile"),
	)
}

// setting returns the setting of a flag that exists.
func (o *Options) setting(name string) *setting {
	return o.settings[slices.IndexFunc(o.settings, func(s *setting) bool { return s.name == name })]
}

// redacted returns the flags that differ from their defaults, wherever they
// were set, as one could type them; but for secrets.
func (o *Options) Redacted() []string {
	var out []string
	for _, s := range o.settings {
		for _, text := range s.texts {
			if text != s.def {
				out = append(out, "--"+s.name+"="+text)
			}
		}
	}
	return out
}

func (o *Options) String() string { return strings.Join(o.Redacted(), " ") }

// nearest returns the flag that name is probably meant to be, "" where none is
// near.
func (o *Options) nearest(name string) string {
	best, found := 1+len(name)/4, ""
	for _, s := range o.settings {
		if d := distance(strings.ToLower(name), s.name); d < best || d == best && found == "" {
			best, found = d, s.name
		}
	}
	return found
}

// distance is Levenshtein's: how many letters to insert, delete or replace.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// Set makes a setting a pflag.Value. Where there is no default, an empty text is
// as good as none: units have lines such as --iface=$IFACE.
func (s *setting) Set(text string) error {
	if err := s.set(text); err != nil {
		return err
	}
	if s.hidden && text != "" {
		text = redacted
	}
	if !s.repeatable {
		s.texts = nil
	}
	s.texts, s.from = append(s.texts, text), "--"+s.name
	return nil
}

func (s *setting) value() string {
	if len(s.texts) == 0 {
		return s.def
	}
	return s.texts[len(s.texts)-1]
}

func (s *setting) String() string { return s.value() }
func (s *setting) Type() string   { return s.arg }

// Help is the answer to --help.
func Help() string {
	var b strings.Builder
	b.WriteString(`Usage: flanneld [flags]

flanneld leases a subnet for this node and keeps the way to the other nodes' subnets open.

Every flag can be set in the environment as well, by its name in upper case with _ for -
and FLANNELD_ before it: FLANNELD_ETCD_ENDPOINTS for --etcd-endpoints. The command line wins.
A flag that is true or false is made true by --name alone, and false by --name=false.
`)
	for _, g := range flags(&Options{}) {
		fmt.Fprintf(&b, "\n%s:\n", g.title)
		for _, s := range g.settings {
			fmt.Fprintf(&b, "  --%s", s.name)
			if s.arg != "" {
				b.WriteString("=" + s.arg)
			}
			if s.repeatable {
				b.WriteString(" (repeatable)")
			}
			if s.def != "" && s.def != "false" {
				fmt.Fprintf(&b, " (default %s)", s.def)
			}
			fmt.Fprintf(&b, "\n        %s\n", s.help)
		}
	}
	return b.String()
}

// into returns the set function of a flag whose parsed value goes to p.
func into[T any](p *T, parse func(string) (T, error)) func(string) error {
	return func(text string) error {
		v, err := parse(text)
		if err == nil {
			*p = v
		}
		return err
	}
}

// appendTo is into for flags that may be repeated. Empty texts are skipped.
func appendTo[T any](p *[]T, parse func(string) (T, error)) func(string) error {
	return func(text string) error {
		if text == "" {
			return nil
		}
		v, err := parse(text)
		if err == nil {
			*p = append(*p, v)
		}
		return err
	}
}

// optional makes an empty text the zero value.
func optional[T any](parse func(string) (T, error)) func(string) (T, error) {
	return func(text string) (T, error) {
		if text == "" {
			var zero T
			return zero, nil
		}
		return parse(text)
	}
}

func anything(text string) (string, error) { return text, nil }
func password(text string) (secret, error) { return secret(text), nil }

func boolean(text string) (bool, error) {
	v, err := strconv.ParseBool(text)
	if err != nil {
		return false, fmt.Errorf("%q is neither true nor false", text)
	}
	return v, nil
}

func path(text string) (string, error) {
	if text == "" {
		return "", errors.New("the path of a file is missing")
	}
	return text, nil
}

func pattern(text string) (*regexp.Regexp, error) {
	re, err := regexp.Compile(text)
	var wrong *syntax.Error
	if errors.As(err, &wrong) {
		return nil, fmt.Errorf("%q is not a regular expression of RE2's syntax: %s", text, wrong.Code)
	}
	return re, err
}

func port(text string) (int, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("%q is not a port number: 0 (off) to 65535", text)
	}
	return int(n), nil
}

func duration(units string, unit time.Duration, low, high int) func(string) (time.Duration, error) {
	return func(text string) (time.Duration, error) {
		n, err := strconv.Atoi(text)
		switch {
		case err == nil && low <= n && n <= high:
			return time.Duration(n) * unit, nil
		case high == math.MaxInt32:
			return 0, fmt.Errorf("%q is not a number of %s: %d or more", text, units, low)
		}
		return 0, fmt.Errorf("%q is not a number of %s: %d to %d", text, units, low, high)
	}
}

func address(text string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(text)
	if err != nil || ip.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is not an IP address such as 192.0.2.7 or 2001:db8::7", text)
	}
	return ip.Unmap(), nil
}

func publicIP(family string, is func(netip.Addr) bool) func(string) (netip.Addr, error) {
	return func(text string) (netip.Addr, error) {
		ip, err := address(text)
		switch {
		case err != nil || !is(ip):
			return netip.Addr{}, fmt.Errorf("%q is not an %s address", text, family)
		case ip.IsUnspecified() || ip.IsMulticast() || ip.Is6() && ip.IsLinkLocalUnicast():
			return netip.Addr{}, fmt.Errorf("%q is not an address that peers can reach this node at", text)
		}
		return ip, nil
	}
}

// endpoints parses etcd's comma-separated addresses. HOST:PORT alone, which old
// units have, is left without a scheme: check chooses it.
func endpoints(text string) ([]string, error) {
	var out []string
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		bare := false
		if _, _, err := net.SplitHostPort(part); err == nil && !strings.Contains(part, "/") {
			bare, part = true, "http://"+part
		}
		u, err := url.Parse(part)
		shown := strconv.Quote(withoutUser(part))
		switch {
		case part == "":
			return nil, fmt.Errorf("%q lacks a URL: one or more such as http://127.0.0.1:2379, separated by commas", withoutUser(text))
		case err == nil && u.Scheme == "unix" && u.Host+u.Path+u.Opaque != "":
			out = append(out, part)
			continue
		case err != nil || u.Scheme != "http" && u.Scheme != "https":
			return nil, fmt.Errorf("%s is not a URL: http://HOST:PORT, https://HOST:PORT or unix:///PATH", shown)
		case u.User != nil:
			return nil, fmt.Errorf("%s holds a user name: use --etcd-username and --etcd-password", shown)
		case u.Hostname() == "" || u.Port() == "":
			return nil, fmt.Errorf("%s lacks a host or a port: %s://127.0.0.1:2379, for example", shown, u.Scheme)
		case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
			return nil, fmt.Errorf("%s goes on after the port: should it be %s://%s?", shown, u.Scheme, u.Host)
		}
		if _, err := port(u.Port()); err != nil {
			return nil, fmt.Errorf("%s has no valid port: 1 to 65535", shown)
		}
		if bare {
			out = append(out, u.Host)
		} else {
			out = append(out, u.Scheme+"://"+u.Host)
		}
	}
	return out, nil
}

func apiURL(text string) (string, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
		return "", fmt.Errorf("%q is not a URL: https://HOST:PORT, or http", withoutUser(text))
	case u.User != nil:
		return "", fmt.Errorf("%q holds a user name: credentials belong into --kubeconfig-file", withoutUser(text))
	}
	return text, nil
}

// withoutUser returns a URL, well-formed or not, without the user name and
// password that it may hold.
func withoutUser(text string) string {
	if i := strings.LastIndexByte(text, '@'); i >= 0 {
		return "..." + text[i:]
	}
	return text
}

// etcdPrefix returns the key with a slash before it and none after.
func etcdPrefix(text string) (string, error) {
	key := strings.Trim(text, "/")
	if key == "" {
		return "", fmt.Errorf("%q is not a key: /coreos.com/network, for example", text)
	}
	return "/" + key, nil
}

// Annotations are named as labels are: an optional DNS name and a slash, then
// at most 63 letters, digits, '-', '_' and '.', which begin with a letter or
// digit (k8s.io/apimachinery, IsQualifiedName). Longest of the words that
// follow the prefix is "public-ipv6-overwrite".
var (
	annotationDomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	annotationName   = regexp.MustCompile(`^([A-Za-z0-9][-A-Za-z0-9_.]*)?$`)
)

const (
	maxAnnotationDomain = 253
	maxAnnotationName   = 63 - len("public-ipv6-overwrite")
)

// annotationPrefix completes the prefix as upstream does: with a slash where
// there is none, else with a dash, unless it ends in one of the two.
func annotationPrefix(text string) (string, error) {
	prefix := text
	switch {
	case !strings.Contains(prefix, "/"):
		prefix += "/"
	case !strings.HasSuffix(prefix, "/") && !strings.HasSuffix(prefix, "-"):
		prefix += "-"
	}
	domain, name, _ := strings.Cut(prefix, "/")
	if len(domain) > maxAnnotationDomain || !annotationDomain.MatchString(domain) ||
		len(name) > maxAnnotationName || !annotationName.MatchString(name) {
		return "", fmt.Errorf("%q is not a prefix of annotations: DOMAIN or DOMAIN/NAME, such as flannel.alpha.coreos.com or example.com/flannel", text)
	}
	return prefix, nil
}

// logFlag returns the set function of one of the flags that klog brings along.
func logFlag(name, want string) func(string) error {
	fs := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(fs)
	return func(text string) error {
		if strings.HasPrefix(text, "-") || fs.Set(name, text) != nil {
			return fmt.Errorf("%q is not %s", text, want)
		}
		return nil
	}
}
