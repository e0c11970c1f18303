package kube

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// lostAfter is how long a connection may go unanswered before it is given up. A connection on which nothing arrives is
	// probed once per probeAfter: only this shows that the server was replaced by another that does not know the
	// connection.
	lostAfter  = 20 * time.Second
	probeAfter = 5 * time.Second
	dialFor    = 5 * time.Second

	// requestTimeout bounds a request that is answered with one object.
	requestTimeout = 15 * time.Second
)

// A client sends requests to the API server. Its credentials, and the certificates that it trusts, come from files that
// may be replaced while it runs: client-go reads tokens and client certificates again by itself, and we read the other
// files again when a request has failed, see refresh.
type client struct {
	log        klog.Logger
	server     string // URL
	prefix     string // of the annotations of Nodes that are kept
	load       func() (*rest.Config, error)
	kubeconfig string
	dialer     *iface.Dialer

	mu     sync.Mutex
	files  []string // what load reads
	rest   *rest.RESTClient
	loaded [sha256.Size]byte // of the files
}

func newClient(ctx context.Context, o Options) (*client, error) {
	dialer, err := iface.NewDialer(ctx)
	if err != nil {
		return nil, err
	}
	dialer.Dialer = net.Dialer{
		Timeout: dialFor,
		KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: probeAfter, Interval: probeAfter, Count: int(lostAfter / probeAfter),
		},
		Control: limitWait,
	}
	c := &client{log: klog.FromContext(ctx), prefix: o.AnnotationPrefix, dialer: dialer, load: func() (*rest.Config, error) {
		config, err := readConfig(o.APIURL, o.Kubeconfig)
		if err == nil {
			config.Dial = dialer.DialContext
		}
		return config, err
	}}
	config, err := c.load()
	if err != nil {
		return nil, err
	}
	c.kubeconfig = o.Kubeconfig
	c.files = c.filesOf(config)
	c.loaded = fingerprint(c.files)
	if c.rest, err = newRESTClient(config, o.AnnotationPrefix); err != nil {
		return nil, err
	}
	server, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("--kube-api-url: %w", err)
	}
	server.User = nil // it is logged
	c.server = strings.TrimSuffix(server.String(), "/")
	return c, nil
}

// readConfig reads where the API server is and how to talk to it.
func readConfig(apiURL, kubeconfig string) (*rest.Config, error) {
	var config *rest.Config
	var err error
	if apiURL == "" && kubeconfig == "" {
		if config, err = rest.InClusterConfig(); err != nil {
			return nil, fmt.Errorf("no --kube-api-url or --kubeconfig-file is given, "+
				"and this is not a pod with a service account: %w", err)
		}
	} else if config, err = clientcmd.BuildConfigFromFlags(apiURL, kubeconfig); err != nil {
		return nil, fmt.Errorf("--kube-api-url, --kubeconfig-file: %w", err)
	}
	return config, nil
}

// newRESTClient returns a client of the API server that keeps the annotations of Nodes under a prefix.
func newRESTClient(config *rest.Config, prefix string) (*rest.RESTClient, error) {
	config.APIPath, config.GroupVersion = "/api", &nodeKinds
	config.NegotiatedSerializer = newCodecs(prefix)
	config.AcceptContentTypes = runtime.ContentTypeProtobuf
	config.ContentType = runtime.ContentTypeJSON // of what we send
	config.DisableCompression = true             // CPU costs more than bandwidth
	config.UserAgent = "flanneld"
	config.QPS = -1 // we pace ourselves
	config.WarningHandler = rest.NoWarnings{}
	// HTTP/1.1: an event costs half as much as with HTTP/2, where it passes one more goroutine, and updates the flow
	// control window.
	config.NextProtos = []string{"http/1.1"}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return stallGuard{next} })
	if config.BearerTokenFile != "" {
		// client-go reads the file once a minute. This way, a refused token is also read again for the next request.
		tokens := transport.NewCachedFileTokenSource(config.BearerTokenFile)
		config.Wrap(transport.ResettableTokenSourceWrapTransport(tokens))
		config.BearerToken, config.BearerTokenFile = "", ""
	}
	hc, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s: %w", config.Host, err)
	}
	// An API server does not redirect its clients. Another server that does would be sent our token.
	hc.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return rest.RESTClientForConfigAndClient(config, hc)
}

// limitWait makes the kernel give up a connection also while data wait to be sent, when it sends no keepalives: by
// default this takes a quarter of an hour (TCP_USER_TIMEOUT in tcp(7)).
func limitWait(_, _ string, c syscall.RawConn) error {
	var err error
	control := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(lostAfter/time.Millisecond))
	})
	return errors.Join(control, err)
}

// filesOf returns the files that a configuration was read from.
func (c *client) filesOf(config *rest.Config) []string {
	return slices.DeleteFunc([]string{c.kubeconfig, config.CAFile}, func(file string) bool { return file == "" })
}

// fingerprint returns a hash of the contents of the files.
func fingerprint(files []string) (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, file := range files {
		text, err := os.ReadFile(file)
		fmt.Fprintf(h, "%s %d %v\n", file, len(text), err)
		h.Write(text)
	}
	h.Sum(sum[:0])
	return sum
}

// current returns the client for a request.
func (c *client) current() *rest.RESTClient {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rest
}

// refresh reads the kubeconfig and the CA bundle again, if they have changed: they may be the reason why a request has
// failed. Files that cannot be used, such as a file that is half written, are read again at the next failure.
func (c *client) refresh() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := fingerprint(c.files)
	if now == c.loaded {
		return
	}
	config, err := c.load()
	if err == nil {
		var fresh *rest.RESTClient
		if fresh, err = newRESTClient(config, c.prefix); err == nil {
			if files := c.filesOf(config); !slices.Equal(files, c.files) {
				c.files, now = files, fingerprint(files)
			}
			c.rest, c.loaded = fresh, now
			c.log.Info("Read the credentials again after a change", "paths", c.files)
			return
		}
	}
	c.log.V(1).Info("The credentials have changed and cannot be used", "paths", c.files, "err", err)
}

// patchStatus patches a Node by its status subresource, which lets nodes change annotations, too. It returns the Node
// as it is then.
func (c *client) patchStatus(ctx context.Context, node string, patch any) (*Node, error) {
	body, err := json.Marshal(patch)
	if err != nil {
		return nil, err
	}
	now := Node{prefix: c.prefix}
	err = c.current().Patch(types.StrategicMergePatchType).Resource("nodes").Name(node).SubResource("status").
		Param("fieldManager", "flanneld").Body(body).MaxRetries(0).Do(ctx).Into(&now)
	if err == nil && now.Name != node { // a proxy may answer anything
		err = fmt.Errorf("the answer to a patch of Node %s is about %s", node, plain.Quote(now.Name))
	}
	return &now, err
}

// nodeOfPod returns the name of the node that a pod runs on.
func (c *client) nodeOfPod(ctx context.Context, namespace, pod string) (string, error) {
	var p struct{ Spec struct{ NodeName string } }
	if err := doJSON(ctx, c.current().Get().Namespace(namespace).Resource("pods").Name(pod), &p); err != nil {
		return "", err
	}
	if p.Spec.NodeName == "" {
		return "", fmt.Errorf("pod %s/%s has no spec.nodeName", namespace, pod)
	}
	return p.Spec.NodeName, nil
}

// doJSON sends a request and reads its answer, of a kind that the codecs do not know.
func doJSON(ctx context.Context, r *rest.Request, into any) error {
	answer := r.SetHeader("Accept", runtime.ContentTypeJSON).MaxRetries(0).Do(ctx)
	if err := answer.Error(); err != nil { // with the server's words, which Raw leaves out
		return err
	}
	text, err := answer.Raw()
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("the answer is not valid JSON: %w", err)
	}
	return nil
}

// explain describes an error for the operator, and says what to do about it. The cause is the one that
// subnet.StoreHealth takes.
func explain(err error) (cause, text string) {
	text = err.Error()
	if u := (*url.Error)(nil); errors.As(err, &u) {
		text = u.Err.Error() // without the URL, which only names the request
	}
	code := http.StatusServiceUnavailable // where there is no answer
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		code = int(status.Status().Code)
		text = cmp.Or(status.Status().Message, text)
	}
	certificate := strings.Contains(text, "x509:")
	untimely := strings.Contains(text, "certificate has expired or is not yet valid")
	text = plain.Text(strings.Join(strings.Fields(text), " ")) // a proxy may answer with a whole page
	switch {
	case code == http.StatusUnauthorized:
		return "login", text + "; it does not accept our credentials, check the service account, or --kubeconfig-file"
	case code == http.StatusForbidden:
		return "", text + "; the ClusterRole must allow get, list, watch of nodes and patch of nodes/status, " +
			"and get of pods where NODE_NAME is not set"
	case code/100 == 3:
		return "redirect", text + "; it redirects us, which no API server does: check --kube-api-url, " +
			"and whether a proxy requires a login"
	case code != http.StatusTooManyRequests && code < http.StatusInternalServerError:
		return "", text
	case untimely:
		return "certificate", text + "; check this host's clock, and until when the server's certificate is valid"
	case certificate:
		return "certificate", text + "; its certificate cannot be verified, " +
			"check certificate-authority in --kubeconfig-file, or --kube-api-url"
	default:
		return subnet.Unreachable, text
	}
}
