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
	// requestEvery bounds how often a reflector asks, whatever is answered:
	// client-go begins again at once where a watch broke off after an event.
	// requestBurst is what a start takes: WatchList, its fallback, a watch.
	requestEvery = time.Second
	requestBurst = 4

	// settledAfter is how long a watch that says nothing must have lasted to count
	// as a success: client-go's number for a very short watch. Where the one before
	// broke off, it may be only slow to do so, too.
	settledAfter      = time.Second
	settledAfterBreak = 5 * time.Second

	// maxRetryAfter bounds how long a server may ask us to wait.
	maxRetryAfter = 30 * time.Second
)

// reflectNodes keeps a store equal to the Nodes that a field selector chooses, "" all,
// until ctx ends. The purpose completes the sentence "waiting to …".
func (m *Manager) reflectNodes(ctx context.Context, selector, purpose string, store cache.ReflectorStore) {
	w := &nodeWatcher{manager: m, selector: selector, purpose: purpose, limit: rate.NewLimiter(rate.Every(requestEvery), requestBurst), settledAfter: settledAfter}
	reflector := cache.NewReflectorWithOptions(&cache.ListWatch{ListWithContextFunc: w.list, WatchFuncWithContext: w.watch}, &Node{}, store, cache.ReflectorOptions{
		Name: "nodes",
		// As subnet.Backoff; client-go adds jitter of up to as much again.
		Backoff: &wait.Backoff{Duration: 100 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 10, Cap: 3 * time.Second},
	})
	reflector.RunWithContext(klog.NewContext(ctx, quiet))
}

// quiet is the log of client-go. What goes wrong is logged by subnet.Outage, once;
// what client-go logs of it is for developers.
var quiet = funcr.New(func(prefix, line string) { klog.V(4).Infof("client-go: %s %s", prefix, line) }, funcr.Options{})

// A nodeWatcher asks the API server for Nodes, for a reflector.
type nodeWatcher struct {
	manager           *Manager
	selector, purpose string
	limit             *rate.Limiter
	settledAfter      time.Duration
}

// list is a cache.ListWithContextFunc.
func (w *nodeWatcher) list(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	if err := w.limit.Wait(ctx); err != nil {
		return nil, err
	}
	if o.ResourceVersion == "0" {
		// A server that cannot stream the state would send all of it in one
		// piece, from its cache: 50 MB for 5000 Nodes. This way it comes in pages.
		o.ResourceVersion = ""
	}
	o.FieldSelector = w.selector
	var nodes NodeList
	err := w.manager.client.current().Get().Resource("nodes").VersionedParams(&o, nodeParams).MaxRetries(0).Do(ctx).Into(&nodes)
	if err == nil && nodes.ResourceVersion == "" { // a proxy may answer anything, which must not pass for no Nodes
		err = errors.New("the answer is no list of Nodes")
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
			return w.observe(ctx, events, initial), nil
		case !initial && resumable(err), utilnet.IsConnectionRefused(err), apierrors.IsTooManyRequests(err):
			// A reflector would ask for the whole state, which is 50 MB of 5000
			// Nodes for each of as many daemons; or it would pause without heed
			// of ctx.
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

// emptyWatch is what client-go returns where a connection was closed before there
// was an answer, or none came in time.
var emptyWatch = reflect.TypeOf(watch.NewEmptyWatch())

// errClosed is an answer that ended before it had begun.
var errClosed = errors.New("the server closes the connection")

// resumable tells whether a watch that failed may go on from where it was: it
// may unless the server says that it may not.
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

// succeeded takes note that the server does what it is asked.
func (w *nodeWatcher) succeeded() { w.manager.health.Succeeded(w.purpose) }

// failed takes note that a request has failed, and waits for as long as the
// server wants to be left alone.
func (w *nodeWatcher) failed(ctx context.Context, err error) {
	if ctx.Err() != nil || gone(err) {
		return
	}
	w.manager.fail(w.purpose, err)
	if seconds, ok := apierrors.SuggestsClientDelay(err); ok {
		retry.Sleep(ctx, min(time.Duration(seconds)*time.Second, maxRetryAfter))
	}
}

// gone tells that the server no longer knows of what we know: the reflector
// starts from its present state, and nothing is wrong.
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

// observe takes note of what the events of a watch say of the server. One that
// begins with the state is of use once all of that is there, which a bookmark
// tells; where it fails before, the reflector lists the state instead.
func (w *nodeWatcher) observe(ctx context.Context, from watch.Interface, initial bool) watch.Interface {
	o := &observedWatch{Interface: from, events: make(chan watch.Event), done: make(chan struct{})}
	o.stop = sync.OnceFunc(func() { close(o.done) })
	began, heard := time.Now(), false
	settled := time.AfterFunc(w.settledAfter, w.succeeded)
	if initial {
		settled.Stop()
	}
	go func() {
		defer close(o.events)
		defer settled.Stop()
		for e := range from.ResultChan() {
			select {
			case <-o.done: // what ends a watch that is stopped is no failure
				return
			default:
			}
			heard = true
			switch {
			case initial && e.Type == watch.Bookmark: // from here on a watch like any other
				initial, heard, began = false, false, time.Now()
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
		if initial { // or a reflector would ask for the same again, and never list
			select {
			case o.events <- watch.Event{Type: watch.Error, Object: &apierrors.NewInternalError(errClosed).ErrStatus}:
			case <-o.done:
			}
			return
		}
		if rest := settledAfter - time.Since(began); rest > 0 && !heard {
			// A reflector would take this for a reason to ask for the whole state.
			w.failed(ctx, errClosed)
			w.settledAfter = settledAfterBreak
			select {
			case <-time.After(rest):
			case <-o.done:
			}
		}
	}()
	return o
}
