// Package etcd is the subnet manager that keeps leases in etcd, in the layout
// that upstream flannel uses. Under the prefix, /coreos.com/network by default:
//
//	config                the network's configuration, written by the operator
//	subnets/10.5.34.0-24  a node's lease; the value is the JSON of subnet.Attrs
//	nodes/192.0.2.7       which node is alive on a public address; ours alone,
//	                      upstream does not look at it
//
// A lease hangs on an etcd lease of 24 hours. One without is a reservation: it
// is the operator's way to give a node a subnet for good.
//
// A record under nodes says that a daemon runs there, and dies with it: it
// hangs on an etcd lease of 30 seconds. Nobody touches a lease without holding
// the records of its own addresses, which keeps two nodes that believe in the
// same public address from sharing one subnet.
package etcd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// leaseTTL is how long a lease outlives its last renewal: upstream's
	// subnetTTL, which operators count on when they take nodes down.
	leaseTTL = 24 * time.Hour

	// claimTTL is how long a node that died without a word is taken for alive.
	claimTTL = 30 * time.Second

	// pulseEvery is how soon an outage, or another etcd in the place of the
	// one we knew, is noticed while there is nothing to ask of etcd. The claim
	// is renewed as often.
	pulseEvery = claimTTL / 3

	// requestTimeout is long enough for a snapshot of 20000 leases, which is
	// 5 MB, over a poor link.
	requestTimeout = 10 * time.Second
)

// Options say which etcd to use, and who this node is.
type Options struct {
	Endpoints []string // "https://192.0.2.1:2379"; one that answers is enough
	Prefix    string   // of all keys: "/coreos.com/network"

	CAFile            string // PEM; with https and no file, the system's roots
	CertFile, KeyFile string // PEM; all three are read again at each connection, so that they can be replaced
	Username          string
	Password          string

	// RenewMargin is how long before its end a lease is renewed.
	RenewMargin time.Duration

	// Identity tells this machine from others. It must survive restarts of
	// the daemon and of the machine, and no two machines may share it.
	Identity string
}

// Manager is a subnet.Manager. Acquire and Keep are for one caller at a time;
// the other methods may be called at any time.
type Manager struct {
	options    Options
	tls        *tlsFiles
	connection *connection
	hostname   string

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	pulse  sync.WaitGroup

	health *subnet.StoreHealth
	failed queue

	configured []byte // what Config read

	mu      sync.Mutex
	latest  moment
	warned  map[string]int64 // bad records, by key: the revision that was warned of
	claim   *claim           // nil: none held
	expires time.Time        // of the lease that is kept

	// Of Acquire and Keep alone: our own record as we wrote or found it last,
	// and the revision of its creation once no older lease overlaps it.
	wrote    record
	verified int64
}

var _ subnet.Manager = (*Manager)(nil)

// New returns a manager. It does not talk to etcd, which may still be down; an
// error is about the options.
func New(ctx context.Context, o Options) (*Manager, error) {
	if o.Identity == "" {
		return nil, errors.New("etcd: this machine has no identity")
	}
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
	files, err := newTLSFiles(o)
	if err != nil {
		cancel()
		return nil, err
	}
	config, err := newClientConfig(o, files, dialer)
	if err != nil {
		cancel()
		return nil, err
	}
	m := &Manager{
		options:    o,
		tls:        files,
		connection: newConnection(config, o.Username, o.Password),
		hostname:   hostname,
		ctx:        ctx,
		cancel:     cancel,
		latest:     moment{replaced: make(chan struct{})},
		warned:     map[string]int64{},
		failed:     newQueue(),
		health: subnet.NewStoreHealth(klog.FromContext(ctx), subnet.State{
			Kind: "etcd", Store: "etcd at " + strings.Join(o.Endpoints, ","), Endpoints: o.Endpoints, Check: checkCommand(o),
		}),
	}
	m.pulse.Go(m.beat)
	return m, nil
}

// Close gives up the node's claim to its addresses, so that another node may
// have them at once. The lease stays: it is taken up again by the next daemon.
// Calls that are under way fail.
func (m *Manager) Close() error {
	m.release()
	m.cancel()
	err := m.connection.close()
	m.pulse.Wait()
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
	for said := false; ; said = true {
		text, at, err := m.readConfig(ctx)
		if err != nil {
			return nil, err
		}
		if text == nil {
			if !said {
				klog.Warningf(`The network is not configured: etcd has no key %s. Waiting for it, for example: etcdctl put %s '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}'. If it is in etcd's v2 store, copy it: Documentation/requirements.md says how`,
					m.configKey(), m.configKey())
			}
			if err := m.await(ctx, at, []string{m.configKey()}); err != nil {
				return nil, err
			}
			continue
		}
		m.configured = text
		return m.parseConfig(text)
	}
}

// Configs implements subnet.Manager.
func (m *Manager) Configs(ctx context.Context) <-chan *subnet.Config {
	out := make(chan *subnet.Config)
	known := m.configured
	go func() {
		defer close(out)
		for {
			text, at, err := m.readConfig(ctx)
			if err != nil {
				return
			}
			if !bytes.Equal(text, known) || (text == nil) != (known == nil) { // an empty value is not a missing key
				known = text
				switch cfg, err := m.parseConfig(text); {
				case text == nil:
					klog.Warningf("etcd key %s is gone: its configuration stays in force here, but nodes that start will wait for it", m.configKey())
				case err != nil:
					klog.Errorf("The new configuration is refused, the old one stays in force: %v", err)
				default:
					select {
					case out <- cfg:
					case <-ctx.Done():
						return
					}
				}
			}
			if m.await(ctx, at, []string{m.configKey()}) != nil {
				return
			}
		}
	}()
	return out
}

// readConfig returns the configuration as it is in etcd: nil where there is
// none.
func (m *Manager) readConfig(ctx context.Context) ([]byte, moment, error) {
	var found *clientv3.GetResponse
	at, err := m.do(ctx, "read the network's configuration", func(ctx context.Context, c *clientv3.Client) (h *pb.ResponseHeader, err error) {
		if found, err = c.Get(ctx, m.configKey()); err != nil {
			return nil, err
		}
		return found.Header, nil
	})
	if err != nil || len(found.Kvs) == 0 {
		return nil, at, err
	}
	return append([]byte{}, found.Kvs[0].Value...), at, nil // nil is for no key
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

// Select implements subnet.Manager. etcd knows nothing of uplinks.
func (m *Manager) Select(ctx context.Context, sel iface.Selector) <-chan iface.Selector {
	out := make(chan iface.Selector, 1)
	out <- sel
	closed := sync.OnceFunc(func() { close(out) })
	context.AfterFunc(ctx, closed)
	context.AfterFunc(m.ctx, closed)
	return out
}

// Ready implements subnet.Manager. That a lease is there says enough.
func (m *Manager) Ready() {}

// State implements subnet.Manager.
func (m *Manager) State() subnet.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.health.State()
	s.Expires = m.expires
	return s
}

// expire takes note of when the lease ends.
func (m *Manager) expire(at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.expires = at
}

// Previous implements subnet.Manager.
func (m *Manager) Previous(ctx context.Context, self subnet.Attrs) (subnet.Attrs, error) {
	records, _, err := m.list(ctx)
	if err != nil {
		return subnet.Attrs{}, err
	}
	var found subnet.Attrs
	for _, r := range records {
		// A reservation that was never used says nothing of the backend.
		if r.valid && sameNode(r.attrs, self) && (found.BackendType == "" && len(found.BackendData) == 0 && len(found.BackendV6Data) == 0) {
			found = r.attrs
		}
	}
	return found, nil
}

// sameNode tells whether a lease was published by the node that has self's
// public addresses: by the IPv4 one where there is any, as upstream does.
func sameNode(a, self subnet.Attrs) bool {
	if self.PublicIP.IsValid() {
		return a.PublicIP == self.PublicIP
	}
	return self.PublicIPv6.IsValid() && a.PublicIPv6 == self.PublicIPv6
}
