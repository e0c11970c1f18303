package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/retry"
)

// events are Kubernetes' Events about this node's Node, which kubectl describe node shows: Warnings of problems that a
// person should act on. A problem is one Event, however often it occurs: its count and its last time are updated, at
// most once a minute, and from time to time while the problem lasts, since the API server deletes an Event after an
// hour.
//
// The log says the same: if Events cannot be written, because the right or the API server is missing, nothing else
// fails.
type events struct {
	log    klog.Logger
	client *client
	node   func() string // its name; "" while it is not known

	mu     sync.Mutex
	all    map[string]*event // by subject
	wake   chan struct{}     // there may be something to write
	denied bool              // that we may not write was logged
}

// An event is one problem.
type event struct {
	reason, message string

	ongoing bool
	unsent  int       // how often it has occurred since it was written
	tried   time.Time // when we last tried to write it
	count   int       // as written; 0: not written by this process
}

const (
	// A problem that is over within eventGrace is not written: a node that has just joined waits for its podCIDR.
	eventGrace = 5 * time.Second

	// The least time between two writes of one Event, and the time after which it is written again while it lasts.
	eventRest  = time.Minute
	eventAgain = 10 * time.Minute

	// An event that is over is forgotten after eventMemory. There are never more than maxEvents.
	eventMemory = time.Hour
	maxEvents   = 50

	maxEventMessage = 1024 // the API server's limit
)

func newEvents(log klog.Logger, c *client, node func() string) *events {
	return &events{log: log, client: c, node: node, all: map[string]*event{}, wake: make(chan struct{}, 1)}
}

// begin records that the problem of a subject has occurred. It lasts until end.
func (e *events) begin(subject, reason, message string) {
	message = plain.Line(message)
	e.mu.Lock()
	defer e.mu.Unlock()
	v := e.all[subject]
	switch {
	case v == nil && len(e.all) >= maxEvents:
		return
	case v == nil:
		v = &event{}
		e.all[subject] = v
	}
	if v.reason != reason || v.message != message {
		*v = event{reason: reason, message: message, tried: v.tried}
	}
	v.ongoing = true
	v.unsent++
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// end records that the problem of a subject is over.
func (e *events) end(subject string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if v := e.all[subject]; v != nil {
		v.ongoing = false
		if v.count == 0 && v.tried.IsZero() {
			delete(e.all, subject)
		}
	}
}

// run writes events until ctx ends, and then the events that were not written yet.
func (e *events) run(ctx context.Context) {
	tick := time.NewTicker(eventRest)
	tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-e.wake:
			retry.Sleep(ctx, eventGrace)
		case <-tick.C:
		}
		if ctx.Err() == nil {
			e.write(ctx)
		}
		if e.idle() {
			tick.Stop()
		} else {
			tick.Reset(eventRest)
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	e.write(last)
}

// idle forgets old events, and tells whether no events are left.
func (e *events) idle() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for subject, v := range e.all {
		if !v.ongoing && v.unsent == 0 && time.Since(v.tried) > eventMemory {
			delete(e.all, subject)
		}
	}
	return len(e.all) == 0
}

// write writes all events that are due.
func (e *events) write(ctx context.Context) {
	node := e.node()
	if node == "" {
		return
	}
	due := map[string]event{}
	e.mu.Lock()
	for subject, v := range e.all {
		rest := time.Since(v.tried)
		switch {
		case v.ongoing && v.unsent == 0 && rest >= eventAgain:
			v.unsent = 1
		case v.unsent == 0 || rest < eventRest:
			continue
		}
		v.tried = time.Now()
		due[subject] = *v
	}
	e.mu.Unlock()
	for subject, v := range due {
		count, err := e.put(ctx, node, v)
		e.wrote(subject, v, count, err)
	}
}

// wrote records the result of writing an event.
func (e *events) wrote(subject string, v event, count int, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	forbidden := apierrors.IsForbidden(err)
	now := e.all[subject]
	if now != nil && now.reason == v.reason && now.message == v.message && (err == nil || forbidden) {
		now.count, now.unsent = count, now.unsent-v.unsent
	}
	switch {
	case err == nil || forbidden && e.denied:
	case forbidden:
		e.denied = true
		e.log.V(1).Info("Cannot record Events; problems are in the log alone", "err", err,
			"fix", "a Role in the namespace default would have to allow create and patch of events")
	default:
		e.log.V(1).Info("Cannot record an Event; retrying", "reason", v.reason, "err", err)
	}
}

// put writes an event, and returns how often the problem has occurred in all: an earlier run of this daemon may have
// written the Event.
func (e *events) put(ctx context.Context, node string, v event) (count int, err error) {
	// A Node has no namespace: its Events are in the default namespace, where the Node's UID is its name, as in kubelet's
	// Events.
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
		return e.send(ctx, e.client.current().Patch(types.StrategicMergePatchType).Name(name), o)
	}
	count, err = update(patch)
	switch {
	case apierrors.IsNotFound(err):
		return e.send(ctx, e.client.current().Post(), object{
			"apiVersion": "v1", "kind": "Event",
			"metadata":       object{"name": name, "namespace": "default"},
			"involvedObject": object{"apiVersion": "v1", "kind": "Node", "name": node, "uid": node},
			"type":           "Warning", "reason": v.reason, "message": strings.ToValidUTF8(v.message[:min(len(v.message), maxEventMessage)], ""),
			"source":         object{"component": "flanneld", "host": node},
			"firstTimestamp": now, "lastTimestamp": now, "count": v.unsent,
		})
	case err == nil && v.count == 0:
		return update(object{"count": count + v.unsent})
	}
	return count, err
}

// send sends an Event, or the fields of an Event that change, and returns its count.
func (e *events) send(ctx context.Context, request *rest.Request, event any) (int, error) {
	body, err := json.Marshal(event)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var answer struct{ Count int }
	request = request.Namespace("default").Resource("events").Param("fieldManager", "flanneld").Body(body)
	err = doJSON(ctx, request, &answer)
	return answer.Count, err
}
