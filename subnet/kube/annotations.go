package kube

import (
	"encoding/json"
	"fmt"
	"iter"

	"k8s.io/client-go/tools/cache"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// attrsOf reads a lease's annotations. It returns the zero Attrs, with which there is no lease, if readAttrs refuses
// them.
func attrsOf(annotation func(name string) string) subnet.Attrs {
	a, _ := readAttrs(annotation)
	return a
}

// readAttrs reads a lease's annotations. The error says why they are refused; its text is fit to be shown.
func readAttrs(annotation func(name string) string) (subnet.Attrs, error) {
	a := subnet.Attrs{
		BackendType:   annotation(backendType),
		BackendData:   raw(annotation(backendData)),
		BackendV6Data: raw(annotation(backendV6Data)),
	}
	if err := a.CheckSize(); err != nil {
		return subnet.Attrs{}, err
	}
	// Whatever the data go into, such as the status of this node, has to be valid JSON.
	for _, data := range []json.RawMessage{a.BackendData, a.BackendV6Data} {
		if data != nil && !json.Valid(data) {
			return subnet.Attrs{}, fmt.Errorf("the backend data %s are not JSON", plain.Quote(data))
		}
	}
	a.PublicIP, _ = parseAddress(annotation(publicIP), publicIP) // a peer's may be invalid
	a.PublicIPv6, _ = parseAddress(annotation(publicIPv6), publicIPv6)
	return a, nil
}

// raw returns the JSON of an annotation; nil if there is none, which upstream writes as "null".
func raw(text string) json.RawMessage {
	if text == "" || text == "null" {
		return nil
	}
	return json.RawMessage(text)
}

// checkedNodes passes Nodes on to another store, and logs whose annotations are refused.
type checkedNodes struct {
	cache.ReflectorStore
	*Manager
}

// Add implements cache.ReflectorStore.
func (c checkedNodes) Add(n any) error {
	c.check(n.(*Node))
	return c.ReflectorStore.Add(n)
}

// Update implements cache.ReflectorStore.
func (c checkedNodes) Update(n any) error {
	c.check(n.(*Node))
	return c.ReflectorStore.Update(n)
}

// Delete implements cache.ReflectorStore.
func (c checkedNodes) Delete(n any) error {
	c.records.Forget(n.(*Node).Name)
	return c.ReflectorStore.Delete(n)
}

// Replace implements cache.ReflectorStore.
func (c checkedNodes) Replace(nodes []any, version string) error {
	c.records.ForgetOthers(namesOf(nodes))
	for _, n := range nodes {
		c.check(n.(*Node))
	}
	return c.ReflectorStore.Replace(nodes, version)
}

func namesOf(nodes []any) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, n := range nodes {
			if !yield(n.(*Node).Name) {
				return
			}
		}
	}
}

// check logs why the annotations of a Node are refused.
func (c checkedNodes) check(n *Node) {
	if n.annotation(managed) != "true" {
		return
	}
	attrs, err := readAttrs(n.annotation)
	for _, name := range []string{publicIP, publicIPv6} {
		if err == nil && len(attrs.PublicIPs()) == 0 {
			_, err = parseAddress(n.annotation(name), name)
		}
	}
	if err != nil {
		c.records.Error(n.Name, err.Error(), err, "The annotations of a Node cannot be read; the node is not reachable",
			"node", plain.Text(n.Name), "fix", "flanneld on that node writes them; find out which other program does")
	} else {
		c.records.Forget(n.Name)
	}
}
