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

	"github.com/containernetworking/cni/pkg/types"

	"github.com/flanneld/flanneld/subnet"
)

// A request is the plugin's configuration as the runtime sends it, for one
// call. What goes to the delegate unread stays JSON. What is said of the keys
// here is what README.md says: make docs writes it there.
type request struct {
	// the version of the format; the delegate's too
	CNIVersion string `json:"cniVersion"`

	// the network's; the delegate's too
	Name string `json:"name" default:"required"`

	// `flannel`
	Type string `json:"type" default:"required"`

	// what flanneld's `--subnet-file` says
	SubnetFile string `json:"subnetFile"`

	// where the delegates' configurations are kept, one file for each attached
	// interface
	DataDir string `json:"dataDir"`

	// the delegate's own keys, see below
	Delegate json.RawMessage `json:"delegate" default:"{}"`

	// its `ipam` object: `type` is `host-local` unless set, `ranges` are always
	// this node's subnets, the networks are added to `routes`, anything else is
	// passed on
	IPAM json.RawMessage `json:"ipam" default:"{}"`

	Args             json.RawMessage      `json:"args"`                      // sent by the runtime, passed on
	RuntimeConfig    json.RawMessage      `json:"runtimeConfig"`             // likewise
	PrevResult       json.RawMessage      `json:"prevResult"`                // likewise
	ValidAttachments []types.GCAttachment `json:"cni.dev/valid-attachments"` // sent by the runtime with GC: what it still knows
}

// defaults are where flanneld writes the one and upstream's plugin keeps the
// other.
var defaults = request{SubnetFile: "/run/flannel/subnet.env", DataDir: "/var/lib/cni/flannel"}

// parse reads a request. What is wrong with the delegate's part is said when
// that is used, so that DEL and CHECK, which go by the record, do not fail on it.
func parse(stdin []byte) (*request, error) {
	r := &request{}
	if _, err := subnet.Decode(stdin, r); err != nil {
		return nil, invalid("%w", err)
	}
	r.SubnetFile = cmp.Or(r.SubnetFile, defaults.SubnetFile)
	r.DataDir = cmp.Or(r.DataDir, defaults.DataDir)
	return r, nil
}

// env reads subnet.env. There is at least one subnet, each has its network, and
// there is an MTU.
func (r *request) env() (subnet.Env, error) {
	const notReady = "flanneld is not ready on this node: "
	const see = "; see `kubectl -n kube-flannel logs ds/kube-flannel-ds` or `journalctl -u flanneld`"
	env, err := subnet.ReadEnv(r.SubnetFile)
	if errors.Is(err, fs.ErrNotExist) {
		return env, types.NewError(types.ErrTryAgainLater, notReady+r.SubnetFile+" is missing"+see, "")
	}
	if path := (*fs.PathError)(nil); errors.As(err, &path) {
		return env, types.NewError(types.ErrIOFailure, err.Error(), "")
	}
	lacks := func(key string) error { return fmt.Errorf("%s: %s is missing", r.SubnetFile, key) }
	switch {
	case err != nil:
	case len(env.Subnets.Each()) == 0:
		err = lacks("FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET")
	case env.Subnets.IPv4.IsValid() && !env.Networks.IPv4.IsValid():
		err = lacks("FLANNEL_NETWORK")
	case env.Subnets.IPv6.IsValid() && !env.Networks.IPv6.IsValid():
		err = lacks("FLANNEL_IPV6_NETWORK")
	case env.MTU <= 0:
		err = lacks("FLANNEL_MTU")
	}
	if err != nil {
		return env, types.NewError(types.ErrDecodingFailure, notReady+err.Error()+see, "")
	}
	return env, nil
}

// delegate returns the configuration of the delegate: what the user wants of
// it, completed by what subnet.env says.
func (r *request) delegate(env subnet.Env) (object, error) {
	d, err := parseObject("delegate", r.Delegate)
	if err != nil {
		return nil, err
	}
	if _, ok := d["name"]; ok {
		return nil, invalid("delegate.name is not allowed: leave it out, the delegate gets the network's name, %s", r.Name)
	}
	if _, ok := d["ipam"]; ok {
		return nil, invalid("delegate.ipam is not allowed: put the ipam object beside delegate, the plugin adds this node's subnet to it and passes it on")
	}
	d.setDefault("type", "bridge")
	kind := d.text("type")
	if kind == "" || kind != filepath.Base(kind) || kind == "." || kind == ".." {
		return nil, invalid("delegate.type %s is not allowed: want the file name of a CNI plugin in quotes, such as \"bridge\"", d["type"])
	}
	if kind == r.Type {
		return nil, invalid("delegate.type %q is not allowed: it is this plugin itself; want one that makes an interface, such as \"bridge\"", kind)
	}
	if kind == "bridge" {
		d.setDefault("isGateway", true)
	}
	d.setDefault("ipMasq", !env.IPMasq) // one of the two has to
	d.setDefault("mtu", env.MTU)
	d.set("name", r.Name)
	ipam, err := r.ipam(env)
	if err != nil {
		return nil, err
	}
	d.set("ipam", ipam)
	r.stamp(d)
	return d, nil
}

// ipam returns the delegate's ipam object: the user's, with an address of each
// of this node's subnets and routes to the whole networks.
func (r *request) ipam(env subnet.Env) (object, error) {
	ipam, err := parseObject("ipam", r.IPAM)
	if err != nil {
		return nil, err
	}
	ipam.setDefault("type", "host-local")
	var routes []any // the user's come first, as upstream has them
	if given(ipam["routes"]) {
		var theirs []json.RawMessage
		if err := json.Unmarshal(ipam["routes"], &theirs); err != nil {
			return nil, invalid(`ipam.routes: want a list of objects such as [{"dst": "10.96.0.0/12"}]`)
		}
		for _, route := range theirs {
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
		network := env.Networks.IPv4
		if s.Addr().Is6() {
			network = env.Networks.IPv6
		}
		routes = append(routes, route{network})
	}
	ipam.set("ranges", ranges)
	ipam.set("routes", routes)
	return ipam, nil
}

// stamp puts what belongs to this call, rather than to the network, into the
// delegate's configuration.
func (r *request) stamp(d object) {
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
	r.stamp(d)
	if given(r.PrevResult) {
		d["prevResult"] = r.PrevResult
	}
	return d
}

// invalid makes the error for a configuration that cannot work.
func invalid(format string, args ...any) error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Errorf(format, args...).Error(), "")
}

// An object is a JSON object whose values are passed on as they came.
type object map[string]json.RawMessage

// parseObject reads the object under a key of the configuration. Nothing, or
// null, is an empty one.
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

// given tells whether a key is there with a value; null is none.
func given(text json.RawMessage) bool { return text != nil && string(text) != "null" }

// set gives a key a value, which must be of a type that is JSON without fail.
func (o object) set(key string, value any) {
	text, err := json.Marshal(value)
	if err != nil {
		panic(fmt.Sprintf("%s: %v", key, err))
	}
	o[key] = text
}

// setDefault is set for a key that is not there.
func (o object) setDefault(key string, value any) {
	if _, ok := o[key]; !ok {
		o.set(key, value)
	}
}

// text returns the string under a key; "" when there is none.
func (o object) text(key string) string {
	var s string
	if json.Unmarshal(o[key], &s) != nil {
		return ""
	}
	return s
}
