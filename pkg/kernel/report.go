package kernel

import (
	"fmt"
	"strings"

	"k8s.io/klog/v2"
)

// command returns the ip or bridge command that an entry waits for.
func command(e *entry) string {
	if e.want == nil {
		return e.have.Undo()
	}
	return e.want.String()
}

// changes collects what was done, for the log: a line for each of a few, a
// count of many.
type changes struct {
	lines []string
	added [kinds]int
	gone  [kinds]int
}

// wordy is how many changes at once are logged one by one.
const wordy = 20

func (c *changes) add(e *entry) {
	if e.key().Kind == KindNexthop && (e.want != nil || !e.drift) {
		return // the route that goes through it says all
	}
	if e.want != nil {
		c.added[e.want.Key().Kind]++
	} else {
		c.gone[e.have.Key().Kind]++
	}
	if len(c.lines) > wordy && !klog.V(2).Enabled() {
		return
	}
	line := command(e)
	switch {
	case e.want != nil && e.drift && e.have == nil:
		line += " (it was missing)"
	case e.want != nil && e.have != nil:
		line += fmt.Sprintf(" (instead of: %s)", describe(e.have))
	case e.want == nil && e.drift:
		line += " (left over)"
	}
	c.lines = append(c.lines, line)
}

func (c *changes) write() {
	if len(c.lines) <= wordy || klog.V(2).Enabled() {
		for _, line := range c.lines {
			klog.Info(line)
		}
		return
	}
	var parts []string
	for kind, name := range [kinds]string{"links", "addresses", "neighbours", "FDB entries", "nexthops", "routes", "policies"} {
		if n := c.added[kind]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s set", n, name))
		}
		if n := c.gone[kind]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s removed", n, name))
		}
	}
	klog.Infof("Kernel: %s (--v=2 shows each)", strings.Join(parts, ", "))
}

// describe names an object that is in the way of the one wanted.
func describe(o Object) string {
	switch o := o.(type) {
	case foreign:
		return strings.Replace(o.String(), fmt.Sprintf("proto %d", RouteProtocol), fmt.Sprintf("proto %d", o.protocol), 1)
	case Link:
		if o.Type == nil {
			return "a device of another type"
		}
		if o.down {
			return o.String() + " down"
		}
	}
	return o.String()
}

// failures collects errors, of which there may be one a peer.
type failures struct {
	first []error
	more  int
}

func (f *failures) add(err error) {
	if len(f.first) < 3 {
		f.first = append(f.first, err)
	} else {
		f.more++
	}
}

// err returns them as one error, of one line.
func (f *failures) err() error {
	if len(f.first) == 0 {
		return nil
	}
	err := f.first[0]
	for _, next := range f.first[1:] {
		err = fmt.Errorf("%w; %w", err, next)
	}
	if f.more > 0 {
		err = fmt.Errorf("%w; and %d more", err, f.more)
	}
	return err
}
