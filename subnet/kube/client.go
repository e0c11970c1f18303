package kube

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

const (
	protobuf = "application/vnd.kubernetes.protobuf"

	// pageSize is how many nodes a server that cannot stream lists at once:
	// client-go's number.
	pageSize = 500

	// maxFrame bounds an event, which holds one Node: etcd takes no object
	// above 1.5 MB.
	maxFrame = 4 << 20

	// A watch is asked to end after watchSeconds, and up to twice as long, so
	// that nodes spread over the API servers there are, as client-go does.
	watchSeconds = 300

	// silence is how long a watch may say nothing: API servers send a bookmark
	// a minute.
	silence = 2 * time.Minute

	// lostAfter is how long a connection may go unanswered before it is given
	// up. One that nothing comes by is probed each probeAfter: that a server
	// has been replaced by one that knows nothing of it shows no sooner.
	lostAfter  = 20 * time.Second
	probeAfter = 5 * time.Second
	dialFor    = 5 * time.Second
)

// errSilent ends a watch that says nothing.
var errSilent = fmt.Errorf("no answer for %v", silence)

// client talks to the API server. client-go brings the credentials and keeps
// them fresh; the few requests are made by hand, since its typed clients decode
// and keep far more than we need.
type client struct {
	http   *http.Client
	server string // URL
}

func newClient(ctx context.Context, apiURL, kubeconfig string) (*client, error) {
	var config *rest.Config
	var err error
	if apiURL == "" && kubeconfig == "" {
		if config, err = rest.InClusterConfig(); err != nil {
			return nil, fmt.Errorf("no --kube-api-url or --kubeconfig-file is given, and this is no pod with a service account: %w", err)
		}
	} else if config, err = clientcmd.BuildConfigFromFlags(apiURL, kubeconfig); err != nil {
		return nil, fmt.Errorf("--kube-api-url, --kubeconfig-file: %w", err)
	}
	config.DisableCompression = true // the network is near, CPU is dear
	config.UserAgent = "flanneld"
	// HTTP/1.1: an event costs half of what it does with HTTP/2, where it passes
	// through one more goroutine, and gives back its piece of the window.
	config.NextProtos = []string{"http/1.1"}
	dialer, err := iface.NewDialer(ctx)
	if err != nil {
		return nil, err
	}
	dialer.Dialer = net.Dialer{
		Timeout:         dialFor,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: probeAfter, Interval: probeAfter, Count: int(lostAfter / probeAfter)},
		Control:         limitWait,
	}
	config.Dial = dialer.DialContext
	if config.BearerTokenFile != "" {
		// client-go reads the file once a minute. This way, a token that is
		// refused is also read again for the next request.
		config.Wrap(transport.ResettableTokenSourceWrapTransport(transport.NewCachedFileTokenSource(config.BearerTokenFile)))
		config.BearerToken, config.BearerTokenFile = "", ""
	}
	server, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("--kube-api-url: %w", err)
	}
	hc, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s: %w", server, err)
	}
	return &client{hc, strings.TrimSuffix(server.String(), "/")}, nil
}

// limitWait has the kernel give a connection up also while there is something to
// send, when no keepalive is: otherwise that takes it a quarter of an hour
// (TCP_USER_TIMEOUT in tcp(7)).
func limitWait(_, _ string, c syscall.RawConn) error {
	var err error
	control := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(lostAfter/time.Millisecond))
	})
	return errors.Join(control, err)
}

// do sends a request and returns the answer to it; anything but success is an
// error, a *statusError where the server has answered.
func (c *client) do(ctx context.Context, method, path string, query url.Values, accept string, body []byte) (*http.Response, error) {
	target := c.server + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", accept)
	switch {
	case method == http.MethodPatch:
		req.Header.Set("Content-Type", "application/strategic-merge-patch+json")
	case body != nil:
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	e := &statusError{code: resp.StatusCode}
	var status struct{ Message, Reason string }
	if raw, err := unwrap(answer); err == nil {
		errors.As(decodeStatus(raw), &e)
	} else if json.Unmarshal(answer, &status) == nil {
		e.message, e.reason = status.Message, status.Reason
	}
	return nil, e
}

// patchStatus merges into a Node what its status subresource lets nodes change.
func (c *client) patchStatus(ctx context.Context, node string, patch any) error {
	body, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	resp, err := c.do(ctx, http.MethodPatch, "/api/v1/nodes/"+node+"/status", url.Values{"fieldManager": {"flanneld"}}, "application/json", body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// nodeOfPod returns the name of the node that a pod runs on.
func (c *client) nodeOfPod(ctx context.Context, namespace, pod string) (string, error) {
	resp, err := c.do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/pods/"+pod, nil, "application/json", nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var p struct{ Spec struct{ NodeName string } }
	if err := json.NewDecoder(resp.Body).Decode(&p); err != nil {
		return "", err
	}
	return p.Spec.NodeName, nil
}

// A follower is told of Nodes. What it is given is only valid during the call.
type follower interface {
	begin()           // the whole state follows, in puts
	put(*fields)      // a Node is there, or has changed
	drop(name []byte) // a Node is gone
	end()             // the whole state has been told
}

// A feed follows the Nodes that a field selector chooses, "" all.
type feed struct {
	*client
	selector string
	fields   fields
	version  []byte // of what was told last; empty asks for the whole state
	paged    bool   // the server does not stream the whole state
	initial  bool   // the whole state is being streamed
	buf      []byte
	header   [4]byte
	alive    *time.Timer // ends a call of follow that hears nothing
	answered func()      // is called when the server begins to answer
}

// follow tells f of all Nodes, or of what changed since the last call, and then
// of changes, until the server or ctx ends it. It returns nil when it can be
// called again at once.
func (w *feed) follow(ctx context.Context, f follower) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w.alive = time.AfterFunc(silence, func() { cancel(errSilent) })
	defer w.alive.Stop()
	query := url.Values{"watch": {"1"}, "allowWatchBookmarks": {"true"}, "timeoutSeconds": {fmt.Sprint(watchSeconds + rand.IntN(watchSeconds))}}
	if w.selector != "" {
		query.Set("fieldSelector", w.selector)
	}
	initial := len(w.version) == 0
	if initial && w.paged {
		if err := w.list(ctx, f); err != nil {
			return err
		}
		initial = false
	}
	if initial {
		// WatchList: the state comes as a stream, and nobody has to hold all
		// of it at once (KEP-3157).
		query.Set("sendInitialEvents", "true")
		query.Set("resourceVersionMatch", "NotOlderThan")
	}
	query.Set("resourceVersion", string(w.version))
	resp, err := w.do(ctx, http.MethodGet, "/api/v1/nodes", query, protobuf+";stream=watch", nil)
	var status *statusError
	if initial && errors.As(err, &status) && (status.code == http.StatusBadRequest || status.code == http.StatusUnprocessableEntity) {
		w.paged = true
		return nil
	}
	if err != nil {
		return w.lost(err)
	}
	defer resp.Body.Close()
	w.answered()
	if initial {
		f.begin()
	}
	w.initial = initial
	body := bufio.NewReaderSize(resp.Body, 64<<10)
	for err == nil {
		w.alive.Reset(silence)
		err = w.tell(body, f)
	}
	if errors.Is(err, io.EOF) || context.Cause(ctx) == errSilent {
		return nil // who does not answer the next call either is away
	}
	return w.lost(err)
}

// tell reads one event and passes it on.
func (w *feed) tell(r io.Reader, f follower) error {
	frame, err := w.frame(r)
	if err != nil {
		return err
	}
	e, err := decodeEvent(frame)
	if err != nil {
		return err
	}
	if err := w.fields.node(e.object); err != nil {
		return err
	}
	switch {
	case e.kind == "BOOKMARK":
		if w.initial && w.fields.initialEnd {
			w.initial = false
			f.end()
		}
	case e.kind == "DELETED":
		f.drop(w.fields.name)
	default:
		f.put(&w.fields)
	}
	if !w.initial { // what broke off half-way is begun again
		w.version = append(w.version[:0], w.fields.version...)
	}
	return nil
}

// lost has the next call begin anew when the server no longer knows of what we
// know (410 Gone), and hides that error, which needs no waiting.
func (w *feed) lost(err error) error {
	var status *statusError
	if errors.As(err, &status) && status.code == http.StatusGone && len(w.version) > 0 {
		w.version = nil
		return nil
	}
	return err
}

// frame reads one event: its length in four bytes, then that many
// (k8s.io/apimachinery/pkg/runtime/serializer/protobuf).
func (w *feed) frame(r io.Reader) ([]byte, error) {
	if _, err := io.ReadFull(r, w.header[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint32(w.header[:]))
	if n > maxFrame {
		return nil, fmt.Errorf("an event of %d bytes", n)
	}
	w.buf = slices.Grow(w.buf[:0], n)[:n]
	if _, err := io.ReadFull(r, w.buf); err != nil {
		return nil, err
	}
	return w.buf, nil
}

// list tells f of all Nodes, page by page.
func (w *feed) list(ctx context.Context, f follower) error {
	query := url.Values{"limit": {fmt.Sprint(pageSize)}}
	if w.selector != "" {
		query.Set("fieldSelector", w.selector)
	}
	f.begin()
	for {
		resp, err := w.do(ctx, http.MethodGet, "/api/v1/nodes", query, protobuf, nil)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return err
		}
		w.alive.Reset(silence)
		raw, err := unwrap(body)
		if err != nil {
			return err
		}
		var version, next string
		err = message(raw, func(num protowire.Number, v []byte, _ uint64) error {
			switch num {
			case 1: // ListMeta
				return message(v, func(num protowire.Number, v []byte, _ uint64) error {
					switch num {
					case 2:
						version = string(v)
					case 3:
						next = string(v)
					}
					return nil
				})
			case 2:
				if err := w.fields.node(v); err != nil {
					return err
				}
				f.put(&w.fields)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if next == "" {
			f.end()
			w.version = []byte(version)
			return nil
		}
		query.Set("continue", next)
	}
}

// explain words an error for the operator, with what to do about it. The cause is
// as subnet.Outage has it.
func explain(err error) (cause, text string) {
	var status *statusError
	answered := errors.As(err, &status)
	switch text := err.Error(); {
	case answered && status.code == http.StatusUnauthorized:
		return "login", text + "; it does not accept our credentials, check the service account, or --kubeconfig-file"
	case answered && status.code == http.StatusForbidden:
		return "", text + "; the ClusterRole must allow get, list, watch of nodes, patch of nodes/status and get of pods"
	case answered && status.code != http.StatusTooManyRequests && status.code < http.StatusInternalServerError:
		return "", text
	case strings.Contains(text, "x509:"):
		return "certificate", text + "; its certificate is not to be trusted, check certificate-authority in --kubeconfig-file, or --kube-api-url"
	default:
		return subnet.Away, text
	}
}
