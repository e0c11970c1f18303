// Package extension runs the operator's commands, which connect the node with its peers. See README.md.
package extension

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "extension"

const (
	// A command that takes longer is killed.
	timeLimit = time.Minute
	// When flanneld stops, or the lease changes, a running command has this much time left.
	graceLimit = 5 * time.Second

	// maxData is how large the data of a node may be, in bytes: peers do not read what is larger.
	maxData = 64 << 10

	// A peer that is gone is forgotten when its removal has failed this many times: there may be nothing left to remove.
	removeTries = 5
)

// stateDir has the records of what must be removed later. Like the kernel's state, it is lost in a reboot.
const stateDir = "/run/flannel"

func init() {
	backend.Register(backend.Type{Name: Type, New: New, MaxData: maxData, Cleanup: cleanup})
}

// options are the backend's keys in the configuration. make docs writes the comments of the fields into README.md.
type options struct {
	// command that runs before the subnet is leased. Its standard output is this node's data, which the commands of peers
	// get
	PreStartupCommand string

	// command that runs when the subnet is leased, before any peer is added
	PostStartupCommand string

	// command that runs for each peer when flanneld starts, for each new peer, and for each peer that has changed
	SubnetAddCommand string

	// command that runs for each peer that is gone, and for each peer that has changed, before `SubnetAddCommand`
	SubnetRemoveCommand string

	// command that runs when flanneld stops, if `RunShutdownCommand` is true
	ShutdownCommand string

	// flannel has the key `ShutdownCommand` and never runs the command; true runs the command
	RunShutdownCommand bool `default:"false"`

	// MTU of pods
	MTU int `default:"the uplink's"`
}

type extension struct {
	options
	networks subnet.Networks
	runner   *command.Runner
	record   string        // path of the file
	pause    retry.Backoff // after a command that failed
}

var _ backend.Worker = (*extension)(nil)

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	x := &extension{
		networks: cfg.Networks(),
		runner:   newRunner(),
		record:   filepath.Join(stateDir, "extension-"+cfg.Networks().First().Key()+".json"),
		pause:    retry.Backoff{Most: time.Minute},
	}
	if err := backend.Options(cfg, &x.options); err != nil {
		return nil, err
	}
	if x.ShutdownCommand != "" && !x.RunShutdownCommand {
		cfg.Warnings = append(cfg.Warnings,
			"ShutdownCommand is not run, as in flannel: RunShutdownCommand must be true for that")
	}
	if x.options.MTU == 0 {
		x.options.MTU = uplink.MTU()
	}
	if least := family.IPv4.MinMTU(); x.options.MTU < least || x.options.MTU > 65535 {
		return nil, fmt.Errorf("MTU %d is not allowed: %d to 65535, or 0 for the uplink's, %d",
			x.options.MTU, least, uplink.MTU())
	}
	return x, nil
}

// Info implements backend.Backend: the commands make the routes.
func (x *extension) Info() backend.Info { return backend.Info{MTU: x.MTU, ForeignRoutes: true} }

// Attrs runs PreStartupCommand, and returns its output as the data for peers.
func (x *extension) Attrs(ctx context.Context, _ subnet.Attrs) (subnet.Attrs, error) {
	attrs := subnet.Attrs{BackendType: Type}
	if x.PreStartupCommand == "" {
		return attrs, nil
	}
	out, err := run(ctx, x.runner, "PreStartupCommand", x.PreStartupCommand, nil, "")
	if err != nil {
		return attrs, err
	}
	attrs.BackendData, err = json.Marshal(strings.TrimSpace(out))
	if size := len(attrs.BackendData); size > maxData {
		return subnet.Attrs{}, fmt.Errorf("PreStartupCommand: its output has %d bytes as JSON: peers read %d at most",
			size, maxData)
	}
	if len(x.networks.IPv4) == 0 {
		// In Kubernetes, each family's data is published with its address only.
		attrs.BackendV6Data = attrs.BackendData
	}
	return attrs, err
}

func (x *extension) Local(subnet.Lease) []kernel.Object { return nil }

// Peer returns no objects: SubnetAddCommand makes them.
func (x *extension) Peer(_, peer subnet.Lease) ([]kernel.Object, error) {
	_, err := dataOf(peer)
	return nil, err
}

// dataOf returns what a peer's PreStartupCommand printed.
func dataOf(peer subnet.Lease) (string, error) {
	data := peer.Attrs.BackendData
	if data == nil {
		data = peer.Attrs.BackendV6Data
	}
	if data == nil {
		return "", nil
	}
	var text string
	if err := json.Unmarshal(data, &text); err != nil {
		return "", backend.DataError(data, "want a text in quotes")
	}
	return text, nil
}

// variables returns the environment variables that describe a lease. A variable that does not apply is empty, even if
// flanneld's own environment has it.
func variables(l subnet.Lease) [4]string {
	return [4]string{
		"SUBNET=" + prefix(l.IPv4),
		"IPV6SUBNET=" + prefix(l.IPv6),
		"PUBLIC_IP=" + address(l.Attrs.PublicIP),
		"PUBLIC_IPV6=" + address(l.Attrs.PublicIPv6),
	}
}

func prefix(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

func address(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}
