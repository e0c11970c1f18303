package kernel

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Diff reads the kernel's tables and returns the ip and bridge commands that
// lead from what it holds to what is wanted, in an order in which they work. It
// changes nothing: what it has learned is for the next Apply.
func (r *Reconciler) Diff() ([]string, error) {
	if err := r.compare(); err != nil {
		return nil, fmt.Errorf("reading the kernel's tables: %w", err)
	}
	if r.unknown {
		return nil, fmt.Errorf("reading the kernel's tables: %w", errors.New("they change all the time: try again"))
	}
	var adds, gone [kinds][]string
	for k, e := range r.entries {
		switch {
		case e.want == e.have:
		case e.want == nil && !r.ours(e.have):
		case e.want == nil:
			gone[k.Kind] = append(gone[k.Kind], removal(e.have))
		case k.Kind == KindNexthop: // a means only: the route says all
		case k.Kind == KindLink:
			adds[k.Kind] = append(adds[k.Kind], relink(e.have, e.want.(Link)))
		default:
			adds[k.Kind] = append(adds[k.Kind], e.want.String())
		}
	}
	var commands []string
	for _, part := range [][]string{
		gone[KindPolicy], gone[KindRoute], gone[KindLink],
		adds[KindLink], adds[KindAddr], adds[KindNeighbor], adds[KindFDB], adds[KindRoute], adds[KindPolicy],
		gone[KindNexthop], gone[KindFDB], gone[KindNeighbor], gone[KindAddr],
	} {
		slices.Sort(part)
		commands = append(commands, part...)
	}
	return commands, nil
}

// removal returns the command that removes what the kernel holds.
func removal(o Object) string {
	if f, ok := o.(foreign); ok {
		return strings.Replace(f.Undo(), fmt.Sprintf("proto %d", RouteProtocol), fmt.Sprintf("proto %d", f.protocol), 1)
	}
	return o.Undo()
}

// relink returns the commands that make a device what it is wanted to be.
func relink(have Object, want Link) string {
	h, exists := have.(Link)
	switch {
	case !exists:
		return want.String()
	case h.Type != want.Type:
		return want.Undo() + " && " + want.String()
	}
	command := "ip link set " + want.Name
	if want.MAC != h.MAC {
		command += fmt.Sprintf(" address %s", want.MAC)
	}
	if want.MTU != h.MTU {
		command += fmt.Sprintf(" mtu %d", want.MTU)
	}
	return command + " up"
}
