package etcd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
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

// newClientConfig turns the options into the client's. The client knows nothing
// of the user: see connection.
func newClientConfig(o Options, files *tlsFiles, dialer *iface.Dialer) (clientConfig, error) {
	if len(o.Endpoints) == 0 {
		return clientConfig{}, errors.New("--etcd-endpoints is empty: give at least one, such as http://127.0.0.1:2379")
	}
	secure := make([]bool, len(o.Endpoints))
	for i, e := range o.Endpoints {
		scheme, _, found := strings.Cut(e, "://")
		switch {
		case e == "" || strings.ContainsAny(e, " \t"):
			return clientConfig{}, fmt.Errorf("--etcd-endpoints: %q is no endpoint such as http://127.0.0.1:2379", e)
		case scheme == "http" || scheme == "unix":
		case scheme == "https" || scheme == "unixs" || !found: // without a scheme: TLS if there is a file
			secure[i] = true
		default:
			return clientConfig{}, fmt.Errorf("--etcd-endpoints: %q begins neither with http:// nor with https://", e)
		}
	}
	if (o.Username == "") != (o.Password == "") {
		return clientConfig{}, errors.New("--etcd-username and --etcd-password go together: one of them is missing")
	}
	if files != nil && !slices.Contains(secure, true) {
		klog.Warning("--etcd-cafile, --etcd-certfile and --etcd-keyfile are of use only with endpoints that begin with https://")
	}
	options := []grpc.DialOption{
		grpc.WithConnectParams(grpc.ConnectParams{
			// See hasten.
			Backoff:           backoff.Config{BaseDelay: 500 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Minute},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithChainUnaryInterceptor(failFast),
		grpc.WithContextDialer(dial(dialer)),
	}
	if files != nil && secure[0] { // the client goes by the first endpoint, too
		options = append(options, grpc.WithTransportCredentials(newTransport(files)))
	}
	return clientConfig{
		Endpoints:   o.Endpoints,
		DialTimeout: requestTimeout,
		Context:     context.Background(), // Close must still be able to say goodbye
		// A server that vanished without closing the connection is given up
		// after the sum of these. Servers do not accept more than a ping in 5 s.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		// Requests are repeated by do, which also logs why. The second attempt
		// here is for the endpoint next to one that fails.
		MaxUnaryRetries: 2,
		Logger:          zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "msg"}), toKlog{}, zap.DebugLevel)),
		DialOptions:     options,
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

// toKlog lets the client's own log, which is for its developers, appear at
// verbosity 4.
type toKlog struct{}

func (toKlog) Write(line []byte) (int, error) {
	klog.V(4).Infof("etcd client: %s", strings.TrimSuffix(string(line), "\n"))
	return len(line), nil
}

func (toKlog) Sync() error { return nil }

// hastenEvery bounds how long gRPC's pauses grow while no server can be reached:
// from half a second to some four.
const hastenEvery = 10 * time.Second

// hasten has gRPC start its pauses anew, time and again, while no server can be
// reached. As long as one can, others are tried less and less often: of the two
// endpoints that are the default, there is mostly one only, for good.
func hasten(ctx context.Context, c channel) {
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

// channel is the part of a grpc.ClientConn that hasten needs.
type channel interface {
	GetState() connectivity.State
	WaitForStateChange(context.Context, connectivity.State) bool
	ResetConnectBackoff()
}
