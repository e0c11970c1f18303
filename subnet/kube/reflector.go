package kube

import (
	"context"
	"errors"
	"net/http"
	"reflect"
	"sync"
	"time"

	"github.com/go-logr/logr/funcr"
	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// requestEvery bounds how often a reflector makes requests, whatever the answers are: client-go begins again at once
	// when a watch breaks off after an event. requestBurst is what a start takes: WatchList, its fallback, a watch.
	requestEvery = time.Second
	requestBurst = 4

	// settledAfter is how long a watch without events must have lasted to count as a success: client-go's number for a
	// very short watch. If the watch before broke off, this one may do the same, only later.
	settledAfter      = time.Second
	settledAfterBreak = 5 * time.Second

	// maxRetryAfter bounds how long a server may ask us to wait.
	maxRetryAfter = 30 * time.Second
)

// reflectNodes keeps a store equal to the Nodes that a field selector chooses, "" for all, until ctx ends. The
// operation is what subnet.StoreHealth logs.
func (m *Manager) reflectNodes(ctx context.Context, selector, operation string, store cache.ReflectorStore) {
	w := &nodeWatcher{
		manager: m, selector: selector, operation: operation, settledAfter: settledAfter,
		limit: rate.NewLimiter(rate.Every(requestEvery), requestBurst),
	}
	if selector == "" {
		store = checkedNodes{store, m}
	}
	from := &cache.ListWatch{ListWithContextFunc: w.list, WatchFuncWithContext: w.watch}
	reflector := cache.NewReflectorWithOptions(from, &Node{}, store, cache.ReflectorOptions{
		Name: "nodes",
		// As subnet.Backoff; client-go adds jitter of up to as much again.
		Backoff: &wait.Backoff{Duration: 100 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 10, Cap: 3 * time.Second},
	})
	// subnet.StoreHealth logs failures, once. What client-go logs is for developers.
	quiet := funcr.New(func(prefix, line string) {
		m.log.V(4).Info("Message of client-go", "logger", prefix, "message", line)
	}, funcr.Options{})
	reflector.RunWithContext(klog.NewContext(ctx, quiet))
}

// A nodeWatcher lists and watches Nodes, for a reflector.
type nodeWatcher struct {
	manager             *Manager
	selector, operation string
	limit               *rate.Limiter
	settledAfter        time.Duration
}

// list is a cache.ListWithContextFunc.
func (w *nodeWatcher) list(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	if err := w.limit.Wait(ctx); err != nil {
		return nil, err
	}
	if o.ResourceVersion == "0" || o.Limit > 0 {
		// A server that cannot stream the state would send all of it in one piece, from its cache: 50 MB for 5000 Nodes.
		// This way it comes in pages. Pages of a version are of exactly that version: after the server has refused to
		// watch from a version, a reflector would list the same version again and again.
		o.ResourceVersion = ""
	}
	o.FieldSelector = w.selector
	nodes := NodeList{prefix: w.manager.options.AnnotationPrefix}
	request := w.manager.client.current().Get().Resource("nodes").VersionedParams(&o, nodeParams)
	err := request.MaxRetries(0).Do(ctx).Into(&nodes)
	if err == nil && nodes.ResourceVersion == "" { // a proxy may answer anything, which must not count as an empty list
		err = errors.New("the answer is not a list of Nodes")
	}
	if err != nil {
		w.failed(ctx, err)
		return nil, err
	}
	w.succeeded()
	return &nodes, nil
}

// watch is a cache.WatchFuncWithContext.
func (w *nodeWatcher) watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	o.Watch = true
	o.FieldSelector = w.selector
	initial := o.SendInitialEvents != nil && *o.SendInitialEvents
	for pause := subnet.Backoff(); ; {
		events, err := w.tryWatch(ctx, o)
		switch {
		case err == nil:
			return w.observe(ctx, events, o.ResourceVersion, initial), nil
		case !initial && resumable(err), utilnet.IsConnectionRefused(err), apierrors.IsTooManyRequests(err):
			// A reflector would request the whole state, which is 50 MB of 5000 Nodes for each of 5000 daemons; or it would
			// pause without respect to ctx.
			w.failed(ctx, err)
			if err := pause.Sleep(ctx); err != nil {
				return nil, err
			}
		case initial:
			return nil, err // the state is listed next, which shows whether something is wrong
		default:
			w.failed(ctx, err)
			return nil, err
		}
	}
}

// tryWatch begins a watch.
func (w *nodeWatcher) tryWatch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	if err := w.limit.Wait(ctx); err != nil {
		return nil, err
	}
	var cause error // which client-go keeps to itself
	events, err := w.manager.client.current().Get().Resource("nodes").VersionedParams(&o, nodeParams).MaxRetries(0).
		Watch(context.WithValue(ctx, causeKey{}, &cause))
	if err != nil {
		return nil, err
	}
	switch {
	case reflect.TypeOf(events) != emptyWatch:
		return events, nil
	case cause == nil || utilnet.IsProbableEOF(cause):
		return nil, errClosed
	}
	return nil, cause
}

// emptyWatch is the type of what client-go returns when a connection was closed before there was an answer, or when no
// answer came in time.
var emptyWatch = reflect.TypeOf(watch.NewEmptyWatch())

// errClosed is the error of an answer that ended before it had begun.
var errClosed = errors.New("the server closes the connection")

// resumable tells whether a watch that failed may continue from where it was: always, unless the server's answer
// excludes it.
func resumable(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return true
	}
	switch code := status.Status().Code; code {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusRequestTimeout, http.StatusTooManyRequests:
		return true
	default:
		return code/100 != 4
	}
}

// succeeded records that a request has succeeded.
func (w *nodeWatcher) succeeded() { w.manager.health.Succeeded(w.operation) }

// failed records that a request has failed, and waits for as long as the server asks for.
func (w *nodeWatcher) failed(ctx context.Context, err error) {
	if ctx.Err() != nil || gone(err) {
		return
	}
	w.manager.fail(w.operation, err)
	retry.Sleep(ctx, askedPause(err))
}

// gone tells whether the server no longer knows the version that we know. This is no failure: the reflector starts from
// the present state.
func gone(err error) bool { return apierrors.IsResourceExpired(err) || apierrors.IsGone(err) }

// An observedWatch passes on the events of another watch.
type observedWatch struct {
	watch.Interface
	events chan watch.Event
	stop   func() // may be called again
	done   chan struct{}
}

// ResultChan implements watch.Interface.
func (o *observedWatch) ResultChan() <-chan watch.Event { return o.events }

// Stop implements watch.Interface.
func (o *observedWatch) Stop() {
	o.stop()
	o.Interface.Stop()
}

// observe records what the events of a watch tell about the server's health. A watch that begins with the state has
// succeeded once the state is complete, which a bookmark tells; if it fails before, the reflector lists the state
// instead. The version is the one that the watch begins after.
func (w *nodeWatcher) observe(ctx context.Context, from watch.Interface, version string, initial bool) watch.Interface {
	o := &observedWatch{Interface: from, events: make(chan watch.Event), done: make(chan struct{})}
	o.stop = sync.OnceFunc(func() { close(o.done) })
	began, heard := time.Now(), false
	settled := time.AfterFunc(w.settledAfter, func() { w.manager.health.Settled(w.operation) })
	if initial {
		settled.Stop()
	}
	go func() {
		defer close(o.events)
		defer settled.Stop()
		for e := range from.ResultChan() {
			select {
			case <-o.done: // the end of a watch that was stopped is no failure
				return
			default:
			}
			heard = true
			switch {
			case initial && e.Type == watch.Bookmark: // from now on, it is a watch like any other
				initial, heard, began = false, false, time.Now()
				if node, ok := e.Object.(*Node); ok {
					version = node.ResourceVersion
				}
				w.succeeded()
			case initial:
			case e.Type == watch.Error:
				w.failed(ctx, apierrors.FromObject(e.Object))
			default:
				w.succeeded()
				w.settledAfter = settledAfter
			}
			select {
			case o.events <- e:
			case <-o.done:
				return
			}
		}
		settled.Stop()
		if initial { // without an error, a reflector would request the same again, and never list
			select {
			case o.events <- watch.Event{Type: watch.Error, Object: &apierrors.NewInternalError(errClosed).ErrStatus}:
			case <-o.done:
			}
			return
		}
		if rest := settledAfter - time.Since(began); rest > 0 && !heard {
			w.failed(ctx, errClosed)
			w.settledAfter = settledAfterBreak
			select {
			case <-time.After(rest):
			case <-o.done:
				return
			}
			// A reflector requests the whole state after a watch without events that ends within a second, which it measures
			// from a later moment than we do. A bookmark is an event.
			here := &Node{ObjectMeta: metav1.ObjectMeta{ResourceVersion: version}}
			select {
			case o.events <- watch.Event{Type: watch.Bookmark, Object: here}:
			case <-o.done:
			}
		}
	}()
	return o
}
