package kube

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"

	"google.golang.org/protobuf/encoding/protowire"
)

// fields are what matters of a Node, as they stand in a buffer that will be
// used again. A Node of a real cluster has some 10 KB, most of it images and
// conditions that change with each heartbeat: those are skipped undecoded.
// Field numbers are from k8s.io/api/core/v1/generated.proto and
// k8s.io/apimachinery/pkg/apis/meta/v1/generated.proto.
type fields struct {
	name, version []byte // metadata.name, metadata.resourceVersion
	created       uint64 // metadata.creationTimestamp, seconds
	annotations   []pair // those under our prefix, which is cut off
	initialEnd    bool   // of a bookmark: the initial state is complete
	podCIDRs      [][]byte
	internalIPs   [][]byte
	networkUp     bool // condition NetworkUnavailable is False

	prefix []byte
}

type pair struct{ key, value []byte }

// initialEventsEnd is the annotation of the bookmark that ends the initial
// events of a watch (k8s.io/apimachinery, metav1.InitialEventsAnnotationKey).
var initialEventsEnd = []byte("k8s.io/initial-events-end")

func (f *fields) reset() {
	*f = fields{annotations: f.annotations[:0], podCIDRs: f.podCIDRs[:0], internalIPs: f.internalIPs[:0], prefix: f.prefix}
}

// sum tells fields that differ apart, with all but certainty. Heartbeats do
// not change it.
func (f *fields) sum(seed maphash.Seed) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	for _, list := range [][][]byte{f.podCIDRs, f.internalIPs} {
		for _, b := range list {
			h.Write(b)
			h.WriteByte(0)
		}
		h.WriteByte(1)
	}
	for _, a := range f.annotations {
		h.Write(a.key)
		h.WriteByte(0)
		h.Write(a.value)
		h.WriteByte(0)
	}
	if f.networkUp {
		h.WriteByte(2)
	}
	return h.Sum64()
}

// message calls each for the fields of a protobuf message: v is the payload of
// those that have a length, n the value of those that are numbers.
func message(b []byte, each func(num protowire.Number, v []byte, n uint64) error) error {
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
		if err := each(num, v, number); err != nil {
			return err
		}
	}
	return nil
}

// unwrap returns the object inside the API's protobuf envelope: four bytes,
// then a runtime.Unknown (k8s.io/apimachinery/pkg/runtime/generated.proto).
func unwrap(b []byte) (raw []byte, err error) {
	b, ok := bytes.CutPrefix(b, []byte("k8s\x00"))
	if !ok {
		return nil, errors.New("not in Kubernetes' protobuf envelope")
	}
	err = message(b, func(num protowire.Number, v []byte, _ uint64) error {
		if num == 2 {
			raw = v
		}
		return nil
	})
	return raw, err
}

// node reads a Node, or the bookmark that stands for one.
func (f *fields) node(b []byte) error {
	f.reset()
	return message(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			return f.metadata(v)
		case 2:
			return message(v, func(num protowire.Number, v []byte, _ uint64) error {
				if num == 7 {
					f.podCIDRs = append(f.podCIDRs, v)
				}
				return nil
			})
		case 3:
			return f.status(v)
		}
		return nil
	})
}

func (f *fields) metadata(b []byte) error {
	return message(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			f.name = v
		case 6:
			f.version = v
		case 8:
			return message(v, func(num protowire.Number, _ []byte, n uint64) error {
				if num == 1 {
					f.created = n
				}
				return nil
			})
		case 12:
			key, value, err := two(v)
			if err != nil {
				return err
			}
			if ours, ok := bytes.CutPrefix(key, f.prefix); ok {
				f.annotations = append(f.annotations, pair{ours, value})
			}
			f.initialEnd = f.initialEnd || bytes.Equal(key, initialEventsEnd)
		}
		return nil
	})
}

func (f *fields) status(b []byte) error {
	return message(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 4: // type, status
			kind, status, err := two(v)
			if err != nil {
				return err
			}
			if string(kind) == "NetworkUnavailable" && string(status) == "False" {
				f.networkUp = true
			}
		case 5: // type, address
			kind, address, err := two(v)
			if err != nil {
				return err
			}
			if string(kind) == "InternalIP" {
				f.internalIPs = append(f.internalIPs, address)
			}
		}
		return nil
	})
}

// two returns the first two fields of a message, which are texts.
func two(b []byte) (first, second []byte, err error) {
	err = message(b, func(num protowire.Number, v []byte, _ uint64) error {
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

// An event is one of a watch (metav1.WatchEvent).
type event struct {
	kind   string // ADDED, MODIFIED, DELETED, BOOKMARK
	object []byte // unwrapped
}

// decodeEvent reads an event. What the API server reports in one of kind ERROR
// is returned as an error, a *statusError.
func decodeEvent(b []byte) (e event, err error) {
	var kind, object []byte
	err = message(b, func(num protowire.Number, v []byte, _ uint64) error {
		switch num {
		case 1:
			kind = v
		case 2:
			return message(v, func(num protowire.Number, v []byte, _ uint64) error {
				if num == 1 {
					object = v
				}
				return nil
			})
		}
		return nil
	})
	if err != nil {
		return event{}, err
	}
	if e.object, err = unwrap(object); err != nil {
		return event{}, err
	}
	if string(kind) == "ERROR" {
		return event{}, decodeStatus(e.object)
	}
	for _, known := range []string{"MODIFIED", "ADDED", "DELETED", "BOOKMARK"} {
		if string(kind) == known {
			e.kind = known // rather than one more copy
			return e, nil
		}
	}
	return event{}, fmt.Errorf("an event of kind %q", kind)
}

// statusError is what the API server answers in place of what was asked for
// (metav1.Status).
type statusError struct {
	message, reason string
	code            int
}

func (e *statusError) Error() string {
	if e.message == "" {
		return fmt.Sprintf("HTTP status %d", e.code)
	}
	return e.message
}

func decodeStatus(b []byte) error {
	e := &statusError{}
	err := message(b, func(num protowire.Number, v []byte, n uint64) error {
		switch num {
		case 3:
			e.message = string(v)
		case 4:
			e.reason = string(v)
		case 6:
			e.code = int(n)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return e
}
