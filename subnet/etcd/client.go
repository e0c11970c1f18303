package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/retry"
)

type clientConfig = clientv3.Config

// newClientConfig turns the options into the client's, and checks the files.
func newClientConfig(o Options, dialer *iface.Dialer) (clientConfig, error) {
	if len(o.Endpoints) == 0 {
		return clientConfig{}, errors.New("--etcd-endpoints is empty: give at least one, such as http://127.0.0.1:2379")
	}
	secure := false
	for _, e := range o.Endpoints {
		scheme, _, found := strings.Cut(e, "://")
		switch {
		case e == "" || strings.ContainsAny(e, " \t"):
			return clientConfig{}, fmt.Errorf("--etcd-endpoints: %q is no endpoint such as http://127.0.0.1:2379", e)
		case scheme == "http" || scheme == "unix":
		case scheme == "https" || scheme == "unixs" || !found: // without a scheme: TLS if there is a file
			secure = true
		default:
			return clientConfig{}, fmt.Errorf("--etcd-endpoints: %q begins neither with http:// nor with https://", e)
		}
	}
	if (o.Username == "") != (o.Password == "") {
		return clientConfig{}, errors.New("--etcd-username and --etcd-password go together: one of them is missing")
	}
	tlsConfig, err := newTLSConfig(o, secure)
	if err != nil {
		return clientConfig{}, err
	}
	return clientConfig{
		Endpoints:   o.Endpoints,
		TLS:         tlsConfig,
		Username:    o.Username,
		Password:    o.Password,
		DialTimeout: requestTimeout,
		Context:     context.Background(), // Close must still be able to say goodbye
		// A server that vanished without closing the connection is given up
		// after the sum of these. Servers do not accept more than a ping in 5 s.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		// Requests are repeated by do, which also says so.
		MaxUnaryRetries: 3,
		Logger:          zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "msg"}), toKlog{}, zap.DebugLevel)),
		DialOptions: []grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 500 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Minute}, // see hasten
				MinConnectTimeout: 5 * time.Second,
			}),
			grpc.WithChainUnaryInterceptor(failFast),
			grpc.WithContextDialer(dial(dialer)),
		},
	}, nil
}

// failFast has requests fail at once when no server can be reached, with the
// reason. By default the client lets them wait until they run out of time, and
// then says no more than that.
func failFast(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoke(ctx, method, req, reply, conn, append(opts, grpc.WaitForReady(false))...)
}

// dial connects in the way that gRPC wants it: to "host:port", or to a socket's
// path behind "unix://".
func dial(d *iface.Dialer) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, target string) (net.Conn, error) {
		if path, ok := strings.CutPrefix(target, "unix://"); ok {
			return d.DialContext(ctx, "unix", path)
		}
		return d.DialContext(ctx, "tcp", target)
	}
}

// newTLSConfig returns nil where there is nothing to configure.
func newTLSConfig(o Options, secure bool) (*tls.Config, error) {
	if o.CAFile == "" && o.CertFile == "" && o.KeyFile == "" {
		return nil, nil // https then goes by the system's roots
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("--etcd-cafile: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--etcd-cafile: %s holds no certificate in PEM form", o.CAFile)
		}
	}
	if o.CertFile != "" || o.KeyFile != "" {
		if o.CertFile == "" || o.KeyFile == "" {
			return nil, errors.New("--etcd-certfile and --etcd-keyfile go together: one of them is missing")
		}
		load := func() (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
			if err != nil {
				return nil, fmt.Errorf("--etcd-certfile, --etcd-keyfile: %w", err)
			}
			return &cert, nil
		}
		if _, err := load(); err != nil {
			return nil, err
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	if !secure {
		klog.Warning("--etcd-cafile, --etcd-certfile and --etcd-keyfile are of use only with endpoints that begin with https://")
	}
	return config, nil
}

// toKlog lets the client's own log, which is for its developers, appear at
// verbosity 4.
type toKlog struct{}

func (toKlog) Write(line []byte) (int, error) {
	klog.V(4).Infof("etcd client: %s", strings.TrimSuffix(string(line), "\n"))
	return len(line), nil
}

func (toKlog) Sync() error { return nil }

// connect returns the client. With a password it is only to be had from an etcd
// that is up.
func (m *Manager) connect() (*clientv3.Client, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, context.Canceled
	}
	if m.client == nil {
		client, err := clientv3.New(m.config)
		if err != nil {
			return nil, err
		}
		m.client = client
		m.pulse.Go(func() { hasten(m.ctx, client.ActiveConnection()) })
	}
	return m.client, nil
}

// hastenEvery bounds how long gRPC's pauses grow while no server can be reached:
// from half a second to some four.
const hastenEvery = 10 * time.Second

// hasten has gRPC start its pauses anew, time and again, while no server can be
// reached. As long as one can, others are tried less and less often: of the two
// endpoints that are the default, there is mostly one only, for good.
func hasten(ctx context.Context, c connection) {
	pause := retry.Backoff{First: hastenEvery, Most: hastenEvery, Jitter: true} // lest all nodes come at once
	for ctx.Err() == nil {
		if state := c.GetState(); state != connectivity.TransientFailure {
			c.WaitForStateChange(ctx, state)
			continue
		}
		pause.Sleep(ctx)
		c.ResetConnectBackoff()
	}
}

// connection is the part of a grpc.ClientConn that hasten looks at.
type connection interface {
	GetState() connectivity.State
	WaitForStateChange(context.Context, connectivity.State) bool
	ResetConnectBackoff()
}
