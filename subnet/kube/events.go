package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
)

// events are what kubectl describe node shows of what needs a hand: Warnings on
// this node's Node. Each is one Event, however often it comes to that: its count
// and its last time are renewed, a minute apart at least, and from time to time
// while it goes on, since the API server forgets an Event after an hour.
//
// They say nothing that the log does not: where they cannot be written, for want
// of the right or of an API server, nothing else suffers.
type events struct {
	client *client
	node   func() string // its name, "" while it is not known

	mu     sync.Mutex
	all    map[string]*notice // by what they are about
	wake   chan struct{}      // there may be something to write
	denied bool               // has been said
}

// A notice is one thing that needs a hand.
type notice struct {
	reason, message string

	going  bool      // what it tells of
	unsent int       // how often it came to that since it was written
	tried  time.Time // to be written, for the last time
	count  int       // as written; 0: not by us
}

const (
	// What is over within eventGrace is none: a node that has just joined waits
	// for its podCIDR.
	eventGrace = 5 * time.Second

	// The least time between two times that one Event is written, and the time
	// after which it is while it goes on.
	eventRest  = time.Minute
	eventAgain = 10 * time.Minute

	// A notice that is over is forgotten after eventMemory; with that many,
	// there are no new ones.
	eventMemory = time.Hour
	maxEvents   = 50

	maxEventMessage = 1024 // the API server's
)

func newEvents(c *client, node func() string) *events {
	return &events{client: c, node: node, all: map[string]*notice{}, wake: make(chan struct{}, 1)}
}

// begin makes a notice of what has come about, until end. What it is about tells it
// from others.
func (n *events) begin(about, reason, message string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	v := n.all[about]
	switch {
	case v == nil && len(n.all) >= maxEvents:
		return
	case v == nil:
		v = &notice{}
		n.all[about] = v
	}
	if v.reason != reason || v.message != message {
		*v = notice{reason: reason, message: message, tried: v.tried}
	}
	v.going = true
	v.unsent++
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// end takes note that something is over.
func (n *events) end(about string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if v := n.all[about]; v != nil {
		v.going = false
		if v.count == 0 && v.tried.IsZero() {
			delete(n.all, about)
		}
	}
}

// run writes events until ctx ends, and then those that are not written at all.
func (n *events) run(ctx context.Context) {
	tick := time.NewTicker(eventRest)
	tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-n.wake:
			retry.Sleep(ctx, eventGrace)
		case <-tick.C:
		}
		if ctx.Err() == nil {
			n.write(ctx)
		}
		if n.idle() {
			tick.Stop()
		} else {
			tick.Reset(eventRest)
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	n.write(last)
}

// idle tells whether there is nothing to come back to.
func (n *events) idle() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for about, v := range n.all {
		if !v.going && v.unsent == 0 && time.Since(v.tried) > eventMemory {
			delete(n.all, about)
		}
	}
	return len(n.all) == 0
}

// write writes all that are due.
func (n *events) write(ctx context.Context) {
	node := n.node()
	if node == "" {
		return
	}
	due := map[string]notice{}
	n.mu.Lock()
	for about, v := range n.all {
		rest := time.Since(v.tried)
		switch {
		case v.going && v.unsent == 0 && rest >= eventAgain:
			v.unsent = 1
		case v.unsent == 0 || rest < eventRest:
			continue
		}
		v.tried = time.Now()
		due[about] = *v
	}
	n.mu.Unlock()
	for about, v := range due {
		count, err := n.put(ctx, node, v)
		n.wrote(about, v, count, err)
	}
}

// wrote takes note of what became of a notice as it was to be written.
func (n *events) wrote(about string, v notice, count int, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	forbidden := apierrors.IsForbidden(err)
	now := n.all[about]
	if now != nil && now.reason == v.reason && now.message == v.message && (err == nil || forbidden) {
		now.count, now.unsent = count, now.unsent-v.unsent
	}
	switch {
	case err == nil || forbidden && n.denied:
	case forbidden:
		n.denied = true
		klog.V(1).Infof("What needs a hand is said in the log alone: %v; the ClusterRole would have to allow create and patch of events", err)
	default:
		klog.V(1).Infof("The Event %s could not be written: %v", v.reason, err)
	}
}

// put writes a notice, and returns how often it came to that in all: an earlier
// life of this daemon may have written it.
func (n *events) put(ctx context.Context, node string, v notice) (count int, err error) {
	// Of a Node, which has no namespace, events are in the default one; and its
	// UID is its name there, as kubelet has it.
	sum := fnv.New64a()
	sum.Write([]byte(v.reason + "\n" + v.message))
	name := fmt.Sprintf("%s.flannel-%016x", node, sum.Sum64())
	now := time.Now().UTC().Format(time.RFC3339)
	type object = map[string]any
	patch := object{"lastTimestamp": now}
	if v.count > 0 {
		patch["count"] = v.count + v.unsent
	}
	update := func(o object) (int, error) {
		return n.send(ctx, n.client.current().Patch(types.StrategicMergePatchType).Name(name), o)
	}
	count, err = update(patch)
	switch {
	case apierrors.IsNotFound(err):
		return n.send(ctx, n.client.current().Post(), object{
			"apiVersion": "v1", "kind": "Event",
			"metadata":       object{"name": name, "namespace": "default"},
			"involvedObject": object{"apiVersion": "v1", "kind": "Node", "name": node, "uid": node},
			"type":           "Warning", "reason": v.reason, "message": v.message[:min(len(v.message), maxEventMessage)],
			"source":         object{"component": "flanneld", "host": node},
			"firstTimestamp": now, "lastTimestamp": now, "count": v.unsent,
		})
	case err == nil && v.count == 0:
		return update(object{"count": count + v.unsent})
	}
	return count, err
}

// send sends an Event, or a part of one, and returns its count.
func (n *events) send(ctx context.Context, request *rest.Request, event any) (int, error) {
	body, err := json.Marshal(event)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var answer struct{ Count int }
	err = doJSON(ctx, request.Namespace("default").Resource("events").Param("fieldManager", "flanneld").Body(body), &answer)
	return answer.Count, err
}
