// Package etcd, which other programs may import, is the subnet manager that keeps leases in etcd, in upstream flannel's
// layout. Under the prefix, /coreos.com/network by default:
//
//	config                the network's configuration, which the operator writes
//	subnets/10.5.34.0-24  a node's lease; the value is the JSON of subnet.Attrs
//	nodes/192.0.2.7       which node is alive on a public address; upstream has no such key
//
// A lease hangs on an etcd lease of 24 hours. A lease without an etcd lease is a reservation: with it, the operator
// gives a node a subnet for good.
//
// A key under nodes is the claim of a running daemon on its public address. It ends with the daemon: it hangs on an
// etcd lease of 30 seconds, or of more in a large network, see pace. Another node that needs the address need not wait
// for that: it asks whether the daemon is alive, by a change of the key that a live daemon undoes. A daemon writes a
// lease only while it holds the claims on the lease's addresses. This keeps two nodes that believe in the same public
// address from sharing one subnet.
package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// leaseTTL is how long a lease outlives its last renewal: upstream's subnetTTL, which operators count on when they
	// take nodes down.
	leaseTTL = 24 * time.Hour

	// requestTimeout is long enough for a snapshot of 20000 leases, which is 5 MB, over a poor link.
	requestTimeout = 10 * time.Second
)

// DefaultRenewMargin is the default of flannel's --subnet-lease-renew-margin.
const DefaultRenewMargin = time.Hour

// Options are which etcd to use, and how this node is known.
type Options struct {
	Endpoints []string // "https://192.0.2.1:2379"; one that answers is enough
	Prefix    string   // of all keys: "/coreos.com/network"

	// DiscoverySRV, in place of Endpoints, is the domain whose SRV records _etcd-client-ssl._tcp and _etcd-client._tcp
	// name the endpoints. With DiscoverySRVName, "-" and that name follow _etcd-client-ssl and _etcd-client.
	DiscoverySRV, DiscoverySRVName string

	CAFile            string // PEM; without it, https uses the system's roots
	CertFile, KeyFile string // PEM; all three files are read again for each connection, so that they can be replaced
	Username          string
	Password          string

	// RenewMargin is how long before its end a lease is renewed; 0 or less: DefaultRenewMargin.
	RenewMargin time.Duration

	// Identity distinguishes this machine from others. It must survive restarts of the daemon and of the machine, and no
	// two machines may share it.
	Identity string

	// LeaseFile is where the node keeps its lease while the daemon does not run; "": nowhere.
	LeaseFile string
}

// Manager is a subnet.Manager. Previous, Acquire and Keep are for one caller at a time; the other methods may be called
// at any time.
type Manager struct {
	log        klog.Logger
	options    Options
	tls        *tlsFiles
	dialer     *iface.Dialer
	connection *connection
	hostname   string

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	running sync.WaitGroup

	health *subnet.StoreHealth
	failed queue

	configured   []byte     // what Config read
	configuredAt watchPoint // and when

	records    *subnet.RecordLog // what is wrong with records, by key
	ownRecords *subnet.RecordLog // what other programs do to our records, by key

	nodes  atomic.Int64  // how many leases there were when this was last known
	regrow chan struct{} // one element: the claim is to have a longer time, see pace
	listed listed

	silence time.Duration // for how long a watch may have no answer

	mu      sync.Mutex
	latest  watchPoint
	claim   *claim    // nil: none held
	expires time.Time // of the lease that is kept
	waiting string    // see subnet.State

	// Of Previous, Acquire and Keep alone: our own record as we wrote or found it last, maybe before a restart, and the
	// revision of its creation once we know that no older lease overlaps it.
	wrote    record
	next     []byte // in LeaseFile at the start, see keptRecord
	verified int64
	known    []netip.Addr // the addresses in LeaseFile at the start
	recalled bool         // wrote is ours, or was dropped: see recall

	file leaseFile
}

var (
	_ subnet.Manager    = (*Manager)(nil)
	_ subnet.FileKeeper = (*Manager)(nil)
)

// New returns a manager. It sends no request to etcd, which may still be down; an error is about the options.
func New(ctx context.Context, o Options) (*Manager, error) {
	if o.Identity == "" {
		return nil, errors.New("etcd: Options have no Identity, such as the text of /etc/machine-id")
	}
	if o.RenewMargin <= 0 {
		o.RenewMargin = DefaultRenewMargin
	}
	log := klog.FromContext(ctx)
	hostname, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("the name of this machine: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	dialer, err := iface.NewDialer(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	files, err := newTLSFiles(log, o)
	if err != nil {
		cancel()
		return nil, err
	}
	config, err := newClientConfig(log, o, files, dialer)
	if err != nil {
		cancel()
		return nil, err
	}
	m := &Manager{
		log:        log,
		options:    o,
		tls:        files,
		dialer:     dialer,
		connection: newConnection(log, config, o.Username, o.Password),
		hostname:   hostname,
		ctx:        ctx,
		cancel:     cancel,
		latest:     watchPoint{invalid: make(chan struct{})},
		records:    subnet.NewRecordLog(log),
		ownRecords: subnet.NewRecordLog(log),
		failed:     newQueue(),
		regrow:     make(chan struct{}, 1),
		listed:     newListed(),
		silence:    mostSilence + rand.N(mostSilence/8), // not of all nodes at once
		health:     subnet.NewStoreHealth(log, storeOf(o, o.Endpoints)),
	}
	if o.DiscoverySRV != "" {
		m.connection.discovery = &discovery{
			log: log, domain: o.DiscoverySRV, name: o.DiscoverySRVName, secure: files != nil,
			found: func(endpoints []string) { m.health.Located(storeOf(o, endpoints)) },
		}
	}
	if err := m.readKept(); err != nil {
		log.Error(err, "Cannot tell which lease this node held before")
	}
	m.running.Go(m.runHeartbeat)
	return m, nil
}

// storeOf returns what is known of etcd before it is used.
func storeOf(o Options, endpoints []string) subnet.State {
	at := " at " + strings.Join(endpoints, ",")
	switch {
	case o.DiscoverySRV == "":
	case len(endpoints) == 0:
		at = ", whose endpoints --discovery-srv=" + o.DiscoverySRV + " is to name"
	default:
		at += " (--discovery-srv=" + o.DiscoverySRV + ")"
	}
	return subnet.State{Kind: "etcd", Store: "etcd" + at, Endpoints: endpoints, Check: checkCommand(o, endpoints)}
}

// Close implements subnet.Manager. It gives up the node's claim on its addresses, so that another node can have them at
// once.
func (m *Manager) Close() error {
	m.release()
	m.cancel()
	err := m.connection.close()
	m.running.Wait()
	return err
}

func (m *Manager) configKey() string { return path.Join(m.options.Prefix, "config") }

// subnetsPrefix is what the keys of all leases begin with.
func (m *Manager) subnetsPrefix() string { return path.Join(m.options.Prefix, "subnets") + "/" }

func (m *Manager) subnetKey(s subnet.Subnets) string { return m.subnetsPrefix() + s.Key() }

func (m *Manager) nodeKey(ip netip.Addr) string {
	return path.Join(m.options.Prefix, "nodes", ip.String())
}

// Config implements subnet.Manager.
func (m *Manager) Config(ctx context.Context) (*subnet.Config, error) {
	for logged := false; ; logged = true {
		text, at, err := m.readConfig(ctx)
		if err != nil {
			return nil, err
		}
		if text == nil {
			if !logged {
				m.log.Error(nil, "The network is not configured; waiting for a key in etcd", "key", m.configKey(),
					"fix", "etcdctl put "+m.configKey()+" VALUE; Documentation/requirements.md: how to copy etcd's v2 data",
					"exampleValue", `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}`)
			}
			if err := m.awaitChange(ctx, at, []string{m.configKey()}); err != nil {
				return nil, err
			}
			continue
		}
		m.configured, m.configuredAt = text, at
		return m.parseConfig(text)
	}
}

// Configs implements subnet.Manager.
func (m *Manager) Configs(ctx context.Context) <-chan *subnet.Config {
	out := make(chan *subnet.Config)
	known, at := m.configured, m.configuredAt
	go func() {
		defer close(out)
		if known != nil && m.awaitChange(ctx, at, []string{m.configKey()}) != nil {
			return
		}
		for {
			text, at, err := m.readConfig(ctx)
			if err != nil {
				return
			}
			if !bytes.Equal(text, known) || (text == nil) != (known == nil) { // an empty value differs from a missing key
				known = text
				switch cfg, err := m.parseConfig(text); {
				case text == nil:
					m.log.Error(nil, "The configuration was deleted; it stays in force here, but nodes that start now wait for it",
						"key", m.configKey())
				case err != nil:
					m.log.Error(err, "The new configuration is refused; the old one stays in force")
				default:
					select {
					case out <- cfg:
					case <-ctx.Done():
						return
					}
				}
			}
			if m.awaitChange(ctx, at, []string{m.configKey()}) != nil {
				return
			}
		}
	}()
	return out
}

// readConfig returns the value of the configuration's key; nil where there is no key.
func (m *Manager) readConfig(ctx context.Context) ([]byte, watchPoint, error) {
	var found *clientv3.GetResponse
	read := func(ctx context.Context, c *clientv3.Client) (h *pb.ResponseHeader, err error) {
		if found, err = c.Get(ctx, m.configKey()); err != nil {
			return nil, err
		}
		return found.Header, nil
	}
	at, err := m.do(ctx, "read the network's configuration", read)
	if err != nil || len(found.Kvs) == 0 {
		return nil, at, err
	}
	return append([]byte{}, found.Kvs[0].Value...), at, nil // nil means that there is no key
}

func (m *Manager) parseConfig(text []byte) (*subnet.Config, error) {
	cfg, err := subnet.ParseConfig(text)
	if err == nil {
		err = cfg.Divide()
	}
	if err != nil {
		return nil, fmt.Errorf("etcd key %s: %w", m.configKey(), err)
	}
	return cfg, nil
}

// Select implements subnet.Manager. etcd knows nothing about uplinks, but LeaseFile has the addresses that peers know.
func (m *Manager) Select(ctx context.Context, sel iface.Selector) <-chan iface.Selector {
	sel.Prefer = append(slices.Clone(sel.Prefer), m.known...)
	out := make(chan iface.Selector, 1)
	out <- sel
	closed := sync.OnceFunc(func() { close(out) })
	context.AfterFunc(ctx, closed)
	context.AfterFunc(m.ctx, closed)
	return out
}

// Ready implements subnet.Manager. etcd has no place for it: the lease is enough.
func (m *Manager) Ready() {}

// State implements subnet.Manager.
func (m *Manager) State() subnet.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.health.State()
	s.Expires, s.Waiting, s.Addresses = m.expires, m.waiting, m.dialer.Remotes()
	return s
}

// setExpires records when the lease that is kept ends.
func (m *Manager) setExpires(at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.expires = at
}

// setWaiting records what this node's lease waits for; "": nothing.
func (m *Manager) setWaiting(what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiting = what
}

// Previous implements subnet.Manager.
func (m *Manager) Previous(ctx context.Context, self subnet.Attrs) (subnet.Attrs, error) {
	records, _, err := m.recall(ctx, self)
	if err != nil {
		return subnet.Attrs{}, err
	}
	var found subnet.Attrs
	for _, r := range records {
		if m.isWrote(r) {
			return r.attrs, nil
		}
		// A reservation that was never used has no backend data.
		unused := found.BackendType == "" && len(found.BackendData) == 0 && len(found.BackendV6Data) == 0
		if r.valid && unused && sameNode(r.attrs, self) && (!m.wrote.isGone() || r.reserved()) {
			found = r.attrs
		}
	}
	if found.BackendType == "" && m.wrote.valid { // the record is gone from etcd
		return m.wrote.attrs, nil
	}
	return found, nil
}

// sameNode tells whether a lease was published by the node that has self's public addresses. If there is an IPv4
// address, that one decides, as upstream has it.
func sameNode(a, self subnet.Attrs) bool {
	if self.PublicIP.IsValid() {
		return a.PublicIP == self.PublicIP
	}
	return self.PublicIPv6.IsValid() && a.PublicIPv6 == self.PublicIPv6
}
