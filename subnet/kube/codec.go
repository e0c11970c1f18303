package kube

import (
	"bytes"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
)

// codecs are client-go's, except for Nodes in protobuf: client-go's decoder copies each event of a watch twice before
// it decodes the event, which is 30 KB for each heartbeat of a Node.
type codecs struct {
	runtime.NegotiatedSerializer
	media []runtime.SerializerInfo
}

// nodeKinds is the API group version that Nodes belong to.
var nodeKinds = schema.GroupVersion{Version: "v1"}

// nodeParams is the codec for the options of a list or watch.
var nodeParams = runtime.NewParameterCodec(newScheme())

func newScheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	scheme.AddKnownTypes(nodeKinds, &Node{}, &NodeList{})
	metav1.AddToGroupVersion(scheme, nodeKinds) // Status, WatchEvent, ListOptions
	return scheme
}

// newCodecs returns the codecs for Nodes with the annotations under a prefix, and for the statuses that the API server
// may answer instead.
func newCodecs(prefix string) codecs {
	scheme := newScheme()
	c := codecs{NegotiatedSerializer: serializer.NewCodecFactory(scheme).WithoutConversion()}
	for _, media := range c.NegotiatedSerializer.SupportedMediaTypes() {
		if media.MediaType == runtime.ContentTypeProtobuf {
			media.Serializer = nodeDecoder{media.Serializer, prefix}
			stream := *media.StreamSerializer
			stream.Serializer = eventDecoder{stream.Serializer}
			media.StreamSerializer = &stream
		}
		c.media = append(c.media, media)
	}
	return c
}

// SupportedMediaTypes implements runtime.NegotiatedSerializer.
func (c codecs) SupportedMediaTypes() []runtime.SerializerInfo { return c.media }

// An eventDecoder decodes the events of a watch (metav1.WatchEvent).
type eventDecoder struct{ runtime.Serializer }

// Decode implements runtime.Decoder. The event's object is a part of data, which the reader of the watch reuses only
// after the object has been decoded.
func (d eventDecoder) Decode(data []byte, gvk *schema.GroupVersionKind, into runtime.Object) (
	runtime.Object, *schema.GroupVersionKind, error,
) {
	event, ok := into.(*metav1.WatchEvent)
	if !ok {
		return d.Serializer.Decode(data, gvk, into)
	}
	err := eachField(data, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			event.Type = string(v)
		case 2:
			return eachField(v, func(num protowire.Number, v []byte, _ uint64) error {
				if num == 1 {
					event.Object.Raw = v
				}
				return nil
			})
		}
		return nil
	})
	return event, gvk, err
}

// envelope is the beginning of an object in protobuf; the rest is a runtime.Unknown.
var envelope = []byte("k8s\x00")

// A nodeDecoder decodes a Node without copying it first.
type nodeDecoder struct {
	runtime.Serializer
	prefix string // of the annotations that are kept
}

// Decode implements runtime.Decoder.
func (d nodeDecoder) Decode(data []byte, gvk *schema.GroupVersionKind, into runtime.Object) (
	runtime.Object, *schema.GroupVersionKind, error,
) {
	unknown, enveloped := bytes.CutPrefix(data, envelope)
	if !enveloped || into != nil {
		return d.Serializer.Decode(data, gvk, into)
	}
	var kind, raw []byte
	err := eachField(unknown, func(num protowire.Number, v []byte, _ uint64) (err error) {
		switch num {
		case 1: // apiVersion, kind
			_, kind, err = firstTwo(v)
		case 2:
			raw = v
		}
		return err
	})
	if err != nil || string(kind) != "Node" {
		return d.Serializer.Decode(data, gvk, into)
	}
	n := &Node{prefix: d.prefix}
	if err := n.Unmarshal(raw); err != nil {
		return nil, nil, fmt.Errorf("a Node: %w", err)
	}
	is := nodeKinds.WithKind("Node")
	return n, &is, nil
}
