package kube

import (
	"bytes"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// Node is a Kubernetes Node with the fields that flanneld uses. A Node of a real cluster has about 10 KB, most of it
// images, conditions, which change with each heartbeat, and annotations of others: Unmarshal skips them, whereas
// client-go's own Node would decode and keep them. The field numbers are those of k8s.io/api/core/v1/generated.proto and
// k8s.io/apimachinery/pkg/apis/meta/v1/generated.proto.
type Node struct {
	metav1.TypeMeta
	metav1.ObjectMeta // name, resourceVersion, creationTimestamp

	prefix      string       // of the annotations that Unmarshal keeps
	annotations []annotation // without the prefix
	podCIDRs    []string
	internalIPs []string
	networkUp   bool // the condition NetworkUnavailable is False
}

// An annotation is one of flanneld's.
type annotation struct{ name, value string }

// NodeList is a list of Nodes as the API server sends it.
type NodeList struct {
	metav1.TypeMeta
	metav1.ListMeta
	Items []Node

	prefix string // as in Node
}

// DeepCopyObject implements runtime.Object.
func (n *Node) DeepCopyObject() runtime.Object {
	c := n.deepCopy()
	return &c
}

func (n *Node) deepCopy() Node {
	return Node{
		TypeMeta: n.TypeMeta, ObjectMeta: *n.ObjectMeta.DeepCopy(),
		prefix: n.prefix, annotations: slices.Clone(n.annotations),
		podCIDRs: slices.Clone(n.podCIDRs), internalIPs: slices.Clone(n.internalIPs), networkUp: n.networkUp,
	}
}

// DeepCopyObject implements runtime.Object.
func (l *NodeList) DeepCopyObject() runtime.Object {
	c := &NodeList{
		TypeMeta: l.TypeMeta, ListMeta: *l.ListMeta.DeepCopy(), Items: make([]Node, len(l.Items)), prefix: l.prefix,
	}
	for i := range l.Items {
		c.Items[i] = l.Items[i].deepCopy()
	}
	return c
}

// Reset is called before Unmarshal.
func (n *Node) Reset() { *n = Node{prefix: n.prefix} }

// Reset is called before Unmarshal.
func (l *NodeList) Reset() { *l = NodeList{prefix: l.prefix} }

// Unmarshal reads a Node from protobuf, or a bookmark, which has the form of a Node. It does not keep parts of b.
func (n *Node) Unmarshal(b []byte) error {
	return eachField(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			return n.unmarshalMeta(v)
		case 2:
			return eachField(v, func(num protowire.Number, v []byte, _ uint64) error {
				if num == 7 {
					n.podCIDRs = append(n.podCIDRs, string(v))
				}
				return nil
			})
		case 3:
			return n.unmarshalStatus(v)
		}
		return nil
	})
}

func (n *Node) unmarshalMeta(b []byte) error {
	return eachField(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			n.Name = string(v)
		case 6:
			n.ResourceVersion = string(v)
		case 8:
			return eachField(v, func(num protowire.Number, _ []byte, seconds uint64) error {
				if num == 1 {
					n.CreationTimestamp = metav1.NewTime(time.Unix(int64(seconds), 0))
				}
				return nil
			})
		case 12:
			key, value, err := firstTwo(v)
			if err != nil {
				return err
			}
			if string(key) == metav1.InitialEventsAnnotationKey { // a bookmark's, which a reflector waits for
				n.Annotations = map[string]string{metav1.InitialEventsAnnotationKey: string(value)}
			}
			if name, ours := bytes.CutPrefix(key, []byte(n.prefix)); ours {
				n.annotations = append(n.annotations, annotation{annotationName(name), string(value)})
			}
		}
		return nil
	})
}

func (n *Node) unmarshalStatus(b []byte) error {
	return eachField(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 4: // type, status
			kind, status, err := firstTwo(v)
			if err != nil {
				return err
			}
			if string(kind) == "NetworkUnavailable" && string(status) == "False" {
				n.networkUp = true
			}
		case 5: // type, address
			kind, address, err := firstTwo(v)
			if err != nil {
				return err
			}
			if string(kind) == "InternalIP" {
				n.internalIPs = append(n.internalIPs, string(address))
			}
		}
		return nil
	})
}

// Unmarshal reads a list of Nodes from protobuf.
func (l *NodeList) Unmarshal(b []byte) error {
	return eachField(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			return eachField(v, func(num protowire.Number, v []byte, _ uint64) error {
				switch num {
				case 2:
					l.ResourceVersion = string(v)
				case 3:
					l.Continue = string(v)
				}
				return nil
			})
		case 2:
			l.Items = append(l.Items, Node{prefix: l.prefix})
			return l.Items[len(l.Items)-1].Unmarshal(v)
		}
		return nil
	})
}

// eachField calls f for the fields of a protobuf message: v is the payload of fields that have a length, n is the value
// of fields that are numbers.
func eachField(b []byte, f func(num protowire.Number, v []byte, n uint64) error) error {
	for len(b) > 0 {
		num, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var v []byte
		var number uint64
		switch kind {
		case protowire.BytesType:
			v, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			number, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(num, kind, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := f(num, v, number); err != nil {
			return err
		}
	}
	return nil
}

// firstTwo returns the first two fields of a message, which are texts.
func firstTwo(b []byte) (first, second []byte, err error) {
	err = eachField(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			first = v
		case 2:
			second = v
		}
		return nil
	})
	return first, second, err
}

// annotationName returns the name as a text: one that is known already, if possible, since all Nodes have the same names.
func annotationName(name []byte) string {
	for _, known := range annotationNames {
		if string(name) == known {
			return known
		}
	}
	return string(name)
}

// annotation returns the value of an annotation; "" if there is none.
func (n *Node) annotation(name string) string {
	for _, a := range slices.Backward(n.annotations) { // of two with one name, the last counts
		if a.name == name {
			return a.value
		}
	}
	return ""
}
