// Package gce lets a VPC network of Google Cloud route pods' packets unchanged: each node keeps a static route to its
// own subnet in the network. See README.md.
package gce

import (
	"context"
	"fmt"
	"hash/crc32"
	"net/netip"
	"strings"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations. Leases carry none.
const Type = "gce"

// A Host is what the environment of the process says about Google Cloud. All else comes from the metadata server, and
// from where Google's tools find credentials.
type Host struct {
	Endpoint string // the URL of Compute Engine's API; "": https://compute.googleapis.com/compute/v1/
}

func init() { backend.Register(Host{}.Type()) }

// Type returns the backend for a host, to be registered.
func (h Host) Type() backend.Type {
	return backend.Type{Name: Type, New: h.new, Cleanup: h.cleanup}
}

// options are the backend's keys in the configuration: it has none.
type options struct{}

func (h Host) new(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	if err := backend.Options(cfg, &options{}); err != nil {
		return nil, err
	}
	return cloudroute.New(cfg, uplink, h.provider())
}

// provider returns Google Cloud. A project may make 1500 requests a minute that read global resources. To read the
// routes takes one request for 500 of them.
func (h Host) provider() cloudroute.Provider {
	return cloudroute.Provider{Name: "Google Cloud", Rate: 5, Connect: h.connect, Command: command}
}

func (h Host) cleanup(ctx context.Context, cfg *subnet.Config, env subnet.Env) (backend.Cleanup, error) {
	if cfg == nil || cfg.BackendType != Type {
		return backend.Cleanup{}, nil
	}
	return cloudroute.Cleanup(ctx, cfg, env, h.provider(), cloudroute.TableIDs{"projects/…/global/networks/default"}), nil
}

// command returns the command that has the same effect as a step. A route cannot be changed: to replace it takes two
// commands.
func command(s cloudroute.Step) string {
	project := " --project " + plain.Shell(element(s.Table, "projects"))
	remove := func(r cloudroute.Route) string {
		name := r.Name
		if name == "" {
			name = routeName(s.Table, r.Destination)
		}
		return "gcloud compute routes delete " + plain.Shell(name) + project + " --quiet"
	}
	create := fmt.Sprintf("gcloud compute routes create %s%s --network %s --destination-range %s", routeName(s.Table,
		s.Route.Destination), project, plain.Shell(element(s.Table, "networks")), s.Route.Destination)
	if instance, address := s.Route.NextHop, addressOf(s.Route); address.IsValid() {
		create += " --next-hop-address " + address.String()
	} else {
		create += " --next-hop-instance " + plain.Shell(element(instance, "instances")) + " --next-hop-instance-zone " +
			plain.Shell(element(instance, "zones"))
	}
	switch s.Verb {
	case cloudroute.Delete:
		return remove(s.Route)
	case cloudroute.Replace:
		return remove(s.Old) + "; " + create
	}
	return create
}

// namePrefix is how the names of nodes' routes begin, flannel's of old among them.
const namePrefix = "flannel-"

// maxName is the number of bytes that a name may have.
const maxName = 63

// routeName returns the name of the route to a subnet. It is flannel's of old in the network named default. A name must
// be unique in the project, which may have another network with the same subnets: in other networks, the name of the
// network is a part of it.
func routeName(network string, dst netip.Prefix) string {
	name := namePrefix + strings.NewReplacer(".", "-", ":", "-", "/", "-").Replace(dst.String())
	network = element(network, "networks")
	switch full := name + "-" + network; {
	case network == "default":
		return name
	case len(full) <= maxName:
		return full
	}
	return fmt.Sprintf("%s-%08x", name, crc32.ChecksumIEEE([]byte(network)))
}

// element returns what follows a word in a path such as projects/p/zones/z/instances/i, which may be the end of a URL.
func element(path, word string) string {
	parts := strings.Split(path, "/")
	for i, part := range parts[1:] {
		if parts[i] == word {
			return part
		}
	}
	return ""
}

// addressOf returns the address that a route leads to. The ID of a next hop is the path of an instance, or the
// addresses of its interface; see NextHop.
func addressOf(r cloudroute.Route) netip.Addr {
	for text := range strings.SplitSeq(r.NextHop, ",") {
		if a, err := netip.ParseAddr(text); err == nil && a.Is4() == r.Destination.Addr().Is4() {
			return a
		}
	}
	return netip.Addr{}
}
