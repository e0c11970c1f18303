package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// A request is the plugin's configuration, which the runtime sends with each call. Values that only the delegate uses
// stay JSON. make docs writes the comments of the fields into README.md.
type request struct {
	// version of the CNI specification, also for the delegate
	CNIVersion string `json:"cniVersion"`

	// name of the network, also for the delegate
	Name string `json:"name" default:"required"`

	// `flannel`
	Type string `json:"type" default:"required"`

	// path of the subnet file, the same as flanneld's `--subnet-file`
	SubnetFile string `json:"subnetFile"`

	// directory of the delegates' configurations, one file for each attached interface
	DataDir string `json:"dataDir"`

	// keys for the delegate, see below
	Delegate json.RawMessage `json:"delegate" default:"{}"`

	// the delegate's `ipam` object: `type` is `host-local` unless set, `ranges` are always this node's subnets, the
	// networks are added to `routes`, and all other keys are passed on
	IPAM json.RawMessage `json:"ipam" default:"{}"`

	// sent by the runtime, passed on
	Args json.RawMessage `json:"args"`

	// sent by the runtime, passed on
	RuntimeConfig json.RawMessage `json:"runtimeConfig"`

	// sent by the runtime, passed on
	PrevResult json.RawMessage `json:"prevResult"`

	// sent by the runtime with GC: the attachments that the runtime still knows
	ValidAttachments []types.GCAttachment `json:"cni.dev/valid-attachments"`
}

// defaults are the path where flanneld writes the subnet file, and the directory of flannel's plugin.
var defaults = request{SubnetFile: "/run/flannel/subnet.env", DataDir: "/var/lib/cni/flannel"}

// parse parses a request. The delegate's part is checked when it is used: DEL and CHECK use the record instead, and
// must not fail because of that part.
func parse(stdin []byte) (*request, error) {
	r := &request{}
	if _, err := subnet.Decode(stdin, r); err != nil {
		return nil, invalid("%w", err)
	}
	r.SubnetFile = cmp.Or(r.SubnetFile, defaults.SubnetFile)
	r.DataDir = cmp.Or(r.DataDir, defaults.DataDir)
	return r, nil
}

// env reads subnet.env. Of the variables of the file, none that the plugin needs is missing.
func (r *request) env() (subnet.EnvFile, error) {
	const notReady = "flanneld is not ready on this node: "
	const see = "; see `kubectl -n kube-flannel logs ds/kube-flannel-ds` or `journalctl -u flanneld`"
	env, err := subnet.ReadEnvFile(r.SubnetFile)
	if errors.Is(err, fs.ErrNotExist) {
		return env, types.NewError(types.ErrTryAgainLater, notReady+r.SubnetFile+" is missing"+see, "")
	}
	if path := (*fs.PathError)(nil); errors.As(err, &path) {
		return env, types.NewError(types.ErrIOFailure, err.Error(), "")
	}
	if err == nil && env.Missing != nil {
		err = fmt.Errorf("%s is missing %s", r.SubnetFile, strings.Join(env.Missing, ", "))
	}
	if err != nil {
		return env, types.NewError(types.ErrDecodingFailure, notReady+err.Error()+see, "")
	}
	return env, nil
}

// delegate returns the configuration of the delegate: the user's keys, completed from subnet.env.
func (r *request) delegate(env subnet.EnvFile) (object, error) {
	d, err := parseObject("delegate", r.Delegate)
	if err != nil {
		return nil, err
	}
	if _, ok := d["name"]; ok {
		return nil, invalid("delegate.name is not allowed: leave it out; the delegate gets the name of the network, %s",
			r.Name)
	}
	if _, ok := d["ipam"]; ok {
		return nil, invalid("delegate.ipam is not allowed: put the ipam object beside delegate; " +
			"the plugin adds this node's subnet to it and passes it on")
	}
	d.setDefault("type", "bridge")
	if err := r.checkType(d); err != nil {
		return nil, err
	}
	if d.text("type") == "bridge" {
		d.setDefault("isGateway", true)
	}
	d.setDefault("ipMasq", !env.IPMasq) // either flanneld or the delegate must masquerade
	d.setDefault("mtu", env.MTU)
	d.set("name", r.Name)
	ipam, err := r.ipam(env)
	if err != nil {
		return nil, err
	}
	d.set("ipam", ipam)
	r.setCall(d)
	return d, nil
}

// checkType returns an error unless the type of a delegate is the file name of another plugin: the type decides which
// program is executed.
func (r *request) checkType(d object) error {
	kind := d.text("type")
	if kind == "" || kind != filepath.Base(kind) || kind == "." || kind == ".." {
		return invalid("delegate.type %s is not allowed: want the file name of a CNI plugin in quotes, "+
			"such as \"bridge\"", plain.Text(string(d["type"])))
	}
	if kind == r.Type {
		return invalid("delegate.type %q is not allowed: it is this plugin itself; "+
			"want a plugin that creates an interface, such as \"bridge\"", kind)
	}
	return nil
}

// record returns the path and the content of the record of an attachment. The error is fs.ErrNotExist if there is none,
// and errBroken if the record cannot be used: a record must name a plugin as a configuration must.
func (r *request) record(a attachment) (path string, conf object, err error) {
	path, conf, err = records(r.DataDir).find(a)
	if err != nil {
		return path, nil, err
	}
	if err := r.checkType(conf); err != nil {
		return path, nil, fmt.Errorf("%s: %w: %v", path, errBroken, err)
	}
	return path, conf, nil
}

// ipam returns the delegate's ipam object: the user's, with an address of each of this node's subnets and routes to the
// whole networks.
func (r *request) ipam(env subnet.EnvFile) (object, error) {
	ipam, err := parseObject("ipam", r.IPAM)
	if err != nil {
		return nil, err
	}
	ipam.setDefault("type", "host-local")
	var routes []any // the user's routes come first, as in flannel
	if given(ipam["routes"]) {
		var own []json.RawMessage
		if err := json.Unmarshal(ipam["routes"], &own); err != nil {
			return nil, invalid(`ipam.routes: want a list of objects such as [{"dst": "10.96.0.0/12"}]`)
		}
		for _, route := range own {
			routes = append(routes, route)
		}
	}
	type ipRange struct {
		Subnet netip.Prefix `json:"subnet"`
	}
	type route struct {
		Dst netip.Prefix `json:"dst"`
	}
	var ranges [][]ipRange // a pod gets one address of each inner list
	for _, s := range env.Subnets.Each() {
		ranges = append(ranges, []ipRange{{s}})
	}
	for _, n := range env.Networks.Each() {
		if (n.Addr().Is4() && env.Subnets.IPv4.IsValid()) || (n.Addr().Is6() && env.Subnets.IPv6.IsValid()) {
			routes = append(routes, route{n}) // a pod without an address of the family cannot use the route
		}
	}
	ipam.set("ranges", ranges)
	ipam.set("routes", routes)
	return ipam, nil
}

// setCall sets the keys of the delegate's configuration that belong to this call, not to the network.
func (r *request) setCall(d object) {
	if r.CNIVersion != "" {
		d.set("cniVersion", r.CNIVersion)
	}
	for key, value := range map[string]json.RawMessage{"args": r.Args, "runtimeConfig": r.RuntimeConfig} {
		if given(value) {
			d[key] = value
		}
	}
}

// call returns the configuration for one call of the delegate.
func (r *request) call(d object) object {
	d = maps.Clone(d)
	delete(d, ifNameKey)
	r.setCall(d)
	if given(r.PrevResult) {
		d["prevResult"] = r.PrevResult
	}
	return d
}

// invalid returns the error for a configuration that cannot work.
func invalid(format string, args ...any) error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Errorf(format, args...).Error(), "")
}

// An object is a JSON object whose values are passed on unparsed.
type object map[string]json.RawMessage

// parseObject parses the object under a key of the configuration. A missing key, or null, is an empty object.
func parseObject(key string, text json.RawMessage) (object, error) {
	o := object{}
	if !given(text) {
		return o, nil
	}
	if err := json.Unmarshal(text, &o); err != nil {
		return nil, invalid("%s: want an object {…}", key)
	}
	return o, nil
}

// given reports whether a key exists with a value; null is no value.
func given(text json.RawMessage) bool { return text != nil && string(text) != "null" }

// set sets a key to a value, whose type must be one that can always be encoded as JSON.
func (o object) set(key string, value any) {
	text, err := json.Marshal(value)
	if err != nil {
		panic(fmt.Sprintf("%s: %v", key, err))
	}
	o[key] = text
}

// setDefault sets a key that does not exist.
func (o object) setDefault(key string, value any) {
	if _, ok := o[key]; !ok {
		o.set(key, value)
	}
}

// text returns the string under a key, "" if there is none.
func (o object) text(key string) string {
	var s string
	if json.Unmarshal(o[key], &s) != nil {
		return ""
	}
	return s
}
