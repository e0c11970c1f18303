package backend

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// A Type is one type of backend: all that its folder registers.
type Type struct {
	// Name is the Type of the configuration's Backend, in which case does not matter.
	Name string

	// New makes a backend. Its errors are for the operator: neither waiting nor
	// retrying can help.
	New func(cfg *subnet.Config, uplink iface.Uplink) (Backend, error)

	// Devices is a regular expression that matches the whole names of the
	// devices that backends of this type make; empty: none.
	Devices string

	// MaxData is how large the backend data of a node may be, in bytes; 0: subnet.MaxData. Data of more than
	// subnet.MaxData bytes are one text in quotes.
	MaxData int

	// SharedAddresses is set where several nodes may have one public address, as behind NAT: Identities has nothing of
	// the public addresses.
	SharedAddresses bool

	// Checks are what flannelctl doctor looks for, on nodes with such a backend.
	Checks []Check

	// Cleanup finds what backends of this type have left on the node outside of
	// the kernel's tables; nil: they leave nothing. Where the configuration is
	// not known, cfg is nil; what is not known of the subnets is zero.
	Cleanup func(ctx context.Context, cfg *subnet.Config, env subnet.Env) (Cleanup, error)
}

func (t Type) make(cfg *subnet.Config, uplink iface.Uplink) (Backend, error) {
	b, err := t.New(cfg, uplink)
	if err != nil {
		return nil, fmt.Errorf("Backend %s: %w", t.Name, err)
	}
	return b, nil
}

var (
	types   = map[string]Type{}           // by name of the type, in lower case
	devices = map[string]*regexp.Regexp{} // by name of the type
)

// Register makes a type of backend known, in place of a type of the same name. It is called from init, or else before
// anything uses backends.
func Register(t Type) {
	types[strings.ToLower(t.Name)] = t
	if t.MaxData > 0 {
		subnet.LimitData(t.Name, t.MaxData)
	}
	if t.SharedAddresses {
		subnet.ShareAddresses(t.Name)
	}
	delete(devices, t.Name)
	if t.Devices != "" {
		devices[t.Name] = regexp.MustCompile("^(" + t.Devices + ")$")
	}
}

func typeOf(name string) (Type, error) {
	t, ok := types[strings.ToLower(name)]
	if !ok {
		known := slices.Sorted(maps.Keys(types))
		return t, fmt.Errorf("Backend Type %s is not known: known are %s", plain.Quote(name), strings.Join(known, ", "))
	}
	return t, nil
}

// Types returns all types of backends, sorted by name.
func Types() []Type {
	return slices.SortedFunc(maps.Values(types), func(a, b Type) int { return strings.Compare(a.Name, b.Name) })
}

// Device reports whether a device has a name that some type of backend gives to
// its devices.
func Device(name string) bool {
	for _, pattern := range devices {
		if pattern.MatchString(name) {
			return true
		}
	}
	return false
}

// A Check looks for one kind of fault that only the backend knows of.
type Check struct {
	Name  string // as Documentation/troubleshooting.md lists it
	About string // what holds where the check finds nothing
	Run   func(context.Context, Node) []Problem
}

// A Node is what a Check is told of the node.
type Node struct {
	Networks subnet.Networks
	Devices  []string       // that the backend has made
	Peers    []subnet.Lease // of nodes that are peers
}

// A Problem is a fault that a Check has found.
type Problem struct {
	Text string
	Fix  []string // commands
}

// A Cleanup is what there is to remove from a node.
type Cleanup struct {
	Steps []CleanupStep // to be done in this order
	Files []string      // to be deleted after the steps, where they exist: patterns of filepath.Glob
	Dirs  []string      // to be deleted after the files, where they exist and hold nothing else
	Notes []string      // on what is for the operator to remove
}

// A CleanupStep is a command, and a function that does the same without it.
type CleanupStep struct {
	Command string
	Do      func(context.Context) error
}

// CleanupAll returns what backends of all types have left on this node.
func CleanupAll(ctx context.Context, cfg *subnet.Config, env subnet.Env) (Cleanup, error) {
	var all Cleanup
	var errs []error
	for _, t := range Types() {
		if t.Cleanup == nil {
			continue
		}
		c, err := t.Cleanup(ctx, cfg, env)
		errs = append(errs, err)
		all.Steps, all.Files = append(all.Steps, c.Steps...), append(all.Files, c.Files...)
		all.Dirs, all.Notes = append(all.Dirs, c.Dirs...), append(all.Notes, c.Notes...)
	}
	return all, errors.Join(errs...)
}
