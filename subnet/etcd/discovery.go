package etcd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
)

const (
	// lookUpEvery is the time between two lookups of the endpoints while etcd can be reached.
	lookUpEvery = 10 * time.Minute

	// lookUpRest is the least time between two lookups.
	lookUpRest = 10 * time.Second

	// maxEndpoints is how many endpoints are taken from DNS.
	maxEndpoints = 32
)

// A discovery looks up etcd's endpoints in DNS: the SRV records that etcdctl looks up with its flags of the same names.
type discovery struct {
	log          klog.Logger
	domain, name string
	secure       bool           // there are TLS files: endpoints without TLS are refused
	found        func([]string) // is called when the endpoints are other ones than before

	mu   sync.Mutex
	last []string // the endpoints that were found last
}

// lookUp returns the endpoints: those with TLS, and those without TLS only where DNS has none with TLS. A lookup of the
// former that fails is not an answer, and does not lead to the latter.
func (d *discovery) lookUp(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	endpoints, err := d.records(ctx, "https", "etcd-client-ssl")
	if err == nil && endpoints == nil && !d.secure {
		endpoints, err = d.records(ctx, "http", "etcd-client")
	}
	switch {
	case err != nil:
		return nil, err
	case endpoints == nil && d.secure:
		return nil, &lookupError{fmt.Sprintf("DNS has no SRV record %s, which --etcd-cafile and --etcd-certfile require: "+
			"check --discovery-srv", d.record("etcd-client-ssl"))}
	case endpoints == nil:
		return nil, &lookupError{fmt.Sprintf("DNS has neither an SRV record %s nor %s: check --discovery-srv",
			d.record("etcd-client-ssl"), d.record("etcd-client"))}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !sameEndpoints(endpoints, d.last) {
		d.log.Info("Found the endpoints of etcd in DNS", "domain", d.domain, "endpoints", endpoints)
		d.found(endpoints)
		d.last = endpoints
	}
	return endpoints, nil
}

// records returns the endpoints that a service's records name; none, without an error, where DNS has no such records.
func (d *discovery) records(ctx context.Context, scheme, service string) (endpoints []string, err error) {
	var records []*net.SRV
	looked := make(chan struct{})
	go func() { // in the process's own network namespace, where iface.Dialer looks up the names of the endpoints, too
		defer close(looked)
		_, records, err = net.DefaultResolver.LookupSRV(ctx, "", "", d.record(service))
	}()
	<-looked
	for _, r := range records {
		if host := strings.TrimSuffix(r.Target, "."); host != "" && len(endpoints) < maxEndpoints { // "." means: no such service
			endpoints = append(endpoints, scheme+"://"+net.JoinHostPort(host, strconv.Itoa(int(r.Port))))
		}
	}
	var failed *net.DNSError
	switch {
	case err == nil, endpoints != nil, errors.As(err, &failed) && failed.IsNotFound:
		return endpoints, nil // an error beside records is about other records, which are malformed
	case failed == nil:
		return nil, err
	}
	// The text before the last colon has the port of our socket.
	why := failed.Err[strings.LastIndex(": "+failed.Err, ": "):]
	server := ""
	if failed.Server != "" {
		server = " on " + failed.Server
	}
	return nil, &lookupError{fmt.Sprintf("lookup of the SRV record %s%s: %s: check --discovery-srv and /etc/resolv.conf",
		d.record(service), server, why)}
}

// record returns the name of a service's records.
func (d *discovery) record(service string) string {
	if d.name != "" {
		service += "-" + d.name
	}
	return "_" + service + "._tcp." + d.domain
}

// A lookupError is why DNS does not name endpoints.
type lookupError struct{ text string }

func (e *lookupError) Error() string { return e.text }

// sameEndpoints tells whether two lists have the same endpoints, in any order: DNS changes the order.
func sameEndpoints(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// followRecords keeps the endpoints of a client as DNS has them, until the client is closed. DNS is asked when no
// endpoint can be reached, since the members may be elsewhere now; and now and then.
func (c *connection) followRecords(client *clientv3.Client) {
	ctx := client.Ctx()
	rest := retry.Backoff{First: lookUpRest, Most: lookUpRest, Jitter: true}
	var failed retry.LastError
	for rest.Sleep(ctx) == nil {
		awaitFailure(ctx, client.ActiveConnection(), lookUpEvery-rand.N(lookUpEvery/2))
		if ctx.Err() != nil {
			return
		}
		found, err := c.discovery.lookUp(ctx)
		if ctx.Err() != nil {
			return
		}
		failed.Log(c.log, "look up the endpoints of etcd again", err)
		if err == nil {
			c.moveTo(client, found)
		}
	}
}

// moveTo gives the client other endpoints, if they are others.
func (c *connection) moveTo(client *clientv3.Client, endpoints []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.config.Endpoints
	if client != c.client || sameEndpoints(endpoints, before) {
		return
	}
	// The client has decided for TLS or against it when it was made.
	if strings.HasPrefix(endpoints[0], "https:") != strings.HasPrefix(before[0], "https:") {
		c.drop(client)
		return
	}
	c.config.Endpoints, c.avoids = endpoints, false
	client.SetEndpoints(endpoints...)
}

// awaitFailure returns when no endpoint of the channel can be reached, or after a while.
func awaitFailure(ctx context.Context, c channel, most time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for state := c.GetState(); state != connectivity.TransientFailure; state = c.GetState() {
		if !c.WaitForStateChange(ctx, state) {
			return
		}
	}
}
