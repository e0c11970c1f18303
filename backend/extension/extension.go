// Package extension has commands of the operator's make the way to peers. See
// README.md.
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
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "extension"

const (
	// A command that takes longer hangs, and is ended.
	timeLimit = time.Minute
	// Once flanneld ends, or the lease changes, a command is given this long.
	graceLimit = 5 * time.Second

	// A peer that is gone is forgotten when its removal has failed so often: it
	// may well be that there was nothing left to remove.
	removeTries = 5
)

// stateDir is where it is recorded what has to be removed again. Like the
// kernel's state, it does not outlive a reboot.
const stateDir = "/run/flannel"

func init() {
	backend.Register(backend.Type{Name: Type, New: New, Cleanup: cleanup})
}

// options are the backend's keys in the configuration. What is said of them here
// is what README.md says: make docs writes it there.
type options struct {
	// run before the subnet is leased. What it prints on standard output is this
	// node's data, which its peers' commands get
	PreStartupCommand string

	// run when the subnet is leased, before any peer is added
	PostStartupCommand string

	// run for each peer when flanneld starts, for a new one when it comes, for
	// one that has changed
	SubnetAddCommand string

	// run for a peer that is gone, and before one that has changed is added as
	// it is now
	SubnetRemoveCommand string

	// run when flanneld ends
	ShutdownCommand string

	// the largest packet that pods may send
	MTU int `default:"the uplink's"`
}

type extension struct {
	options
	networks subnet.Subnets
	runner   runner
	record   string        // path of the file
	pause    retry.Backoff // after a command that failed
}

var _ backend.Worker = (*extension)(nil)

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	x := &extension{
		networks: cfg.Networks(),
		runner:   runner{limit: timeLimit, grace: graceLimit},
		record:   filepath.Join(stateDir, "extension-"+cfg.Networks().Key()+".json"),
		pause:    retry.Backoff{Most: time.Minute},
	}
	if err := backend.Options(cfg, &x.options); err != nil {
		return nil, err
	}
	if x.options.MTU == 0 {
		x.options.MTU = uplink.MTU
	}
	if least := family.IPv4.MinMTU(); x.options.MTU < least || x.options.MTU > 65535 {
		return nil, fmt.Errorf("MTU %d is not allowed: %d to 65535, or 0 for the uplink's, %d", x.options.MTU, least, uplink.MTU)
	}
	return x, nil
}

// Info implements backend.Backend: the commands make the routes.
func (x *extension) Info() backend.Info { return backend.Info{MTU: x.MTU, ForeignRoutes: true} }

// Attrs runs PreStartupCommand: what it prints is what peers get.
func (x *extension) Attrs(ctx context.Context, _ subnet.Attrs) (subnet.Attrs, error) {
	attrs := subnet.Attrs{BackendType: Type}
	if x.PreStartupCommand == "" {
		return attrs, nil
	}
	out, err := x.runner.run(ctx, "PreStartupCommand", x.PreStartupCommand, nil, "")
	if err != nil {
		return attrs, err
	}
	attrs.BackendData, err = json.Marshal(strings.TrimSpace(out))
	if !x.networks.IPv4.IsValid() {
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
		return "", fmt.Errorf("backend data %s: want a text in quotes", data)
	}
	return text, nil
}

// variables returns what commands find in their environment of a lease. What
// does not apply is empty, whatever flanneld's own environment has.
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
