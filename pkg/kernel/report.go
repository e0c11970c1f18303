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

// changes collects what was done, for the log: a line for each of a few changes, the counts of many.
type changes struct {
	log     klog.Logger
	lines   [][]any // keys and values
	added   [kinds]int
	removed [kinds]int
}

// maxLines is how many changes at once are logged one by one.
const maxLines = 20

func (c *changes) add(e *entry) {
	if kindTable[e.kind].bestEffort && (e.want != nil || !e.drift) {
		return // the object that uses it is logged
	}
	if e.want != nil {
		c.added[e.kind]++
	} else {
		c.removed[e.kind]++
	}
	if len(c.lines) > maxLines && !c.log.V(2).Enabled() {
		return
	}
	line := []any{"command", command(e)}
	switch {
	case e.want != nil && e.drift && e.have == nil:
		line = append(line, "reason", "it was missing")
	case e.want != nil && e.have != nil:
		line = append(line, "reason", "instead of "+describe(e.have))
	case e.want == nil && e.drift:
		line = append(line, "reason", "it was left over")
	}
	c.lines = append(c.lines, line)
}

func (c *changes) write() {
	if len(c.lines) <= maxLines || c.log.V(2).Enabled() {
		for _, line := range c.lines {
			c.log.Info("Applied", line...)
		}
		return
	}
	c.log.Info("Applied many changes; --v=2 logs each of them", "set", counts(c.added), "removed", counts(c.removed))
}

// counts returns such as "2 links, 40 routes".
func counts(numbers [kinds]int) string {
	var parts []string
	for k, n := range numbers {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, kindTable[k].plural))
		}
	}
	return strings.Join(parts, ", ")
}

// describe names an object that is in the place of the desired one.
func describe(o Object) string {
	if d, ok := o.(interface{ describe() string }); ok {
		return d.describe()
	}
	return o.String()
}
