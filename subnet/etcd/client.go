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

// newClientConfig returns the client's configuration. The client does not know the user: see connection.
func newClientConfig(log klog.Logger, o Options, files *tlsFiles, dialer *iface.Dialer) (clientConfig, error) {
	switch discovers := o.DiscoverySRV != ""; {
	case !discovers && len(o.Endpoints) == 0:
		return clientConfig{}, errors.New("--etcd-endpoints is empty: give at least one, such as http://127.0.0.1:2379")
	case discovers && len(o.Endpoints) != 0:
		return clientConfig{}, errors.New("--etcd-endpoints and --discovery-srv both set where etcd is: give only one of them")
	}
	secure := make([]bool, len(o.Endpoints))
	for i, e := range o.Endpoints {
		scheme, _, found := strings.Cut(e, "://")
		switch {
		case e == "" || strings.ContainsAny(e, " \t"):
			return clientConfig{}, fmt.Errorf("--etcd-endpoints: %q is not an endpoint such as http://127.0.0.1:2379", e)
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
	if files != nil && !slices.Contains(secure, true) && o.DiscoverySRV == "" {
		log.Error(nil, "The TLS files are not used", "flags", "--etcd-cafile, --etcd-certfile, --etcd-keyfile",
			"reason", "no endpoint begins with https://", "endpoints", o.Endpoints)
	}
	options := []grpc.DialOption{
		grpc.WithConnectParams(grpc.ConnectParams{
			// See shortenPauses.
			Backoff: backoff.Config{
				BaseDelay: 500 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Minute,
			},
			MinConnectTimeout: 5 * time.Second,
		}),
		// By default the client connects to all members, and etcd has as many connections as nodes times members. One is
		// enough, to a member picked at random; see connection.avoid.
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}`),
		grpc.WithChainUnaryInterceptor(failFast),
		grpc.WithContextDialer(dial(dialer)),
	}
	if files != nil && (o.DiscoverySRV != "" || secure[0]) { // the client decides by the first endpoint, too
		options = append(options, grpc.WithTransportCredentials(newTransport(files)))
	}
	return clientConfig{
		Endpoints:   o.Endpoints,
		DialTimeout: requestTimeout,
		Context:     context.Background(), // Close has requests of its own
		// A server that vanished without closing the connection is given up after the sum of these. Servers do not accept
		// more than one ping in 5 s.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		// Requests are repeated by do, which also logs why. The second attempt here is for a connection that broke.
		MaxUnaryRetries: 2,
		// The default is no limit. A watch whose events are larger ends, and all leases are read again.
		MaxCallRecvMsgSize: maxAnswer,
		Logger: zap.New(zapcore.NewCore(
			zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "msg"}), toKlog{log}, zap.DebugLevel)),
		DialOptions: options,
	}, nil
}

// maxAnswer is the size of the largest message that is taken from etcd, in bytes: it stands in memory twice. 20000
// leases have about 5 MB.
const maxAnswer = 8 << 20

// failFast makes requests fail at once, with the reason, when no server can be reached. By default the client lets
// requests wait until their time is over, and its error has no reason.
func failFast(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker,
	opts ...grpc.CallOption) error {
	return invoke(ctx, method, req, reply, conn, append(opts, grpc.WaitForReady(false))...)
}

// dial connects to gRPC's targets: to "host:port", or to a socket's path behind "unix://".
func dial(d *iface.Dialer) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, target string) (net.Conn, error) {
		if path, ok := strings.CutPrefix(target, "unix://"); ok {
			return d.DialContext(ctx, "unix", path)
		}
		return d.DialContext(ctx, "tcp", target)
	}
}

// toKlog logs the client's own log, which is for its developers, at verbosity 4.
type toKlog struct{ log klog.Logger }

func (k toKlog) Write(line []byte) (int, error) {
	k.log.V(4).Info("Message of the etcd client", "message", strings.TrimSuffix(string(line), "\n"))
	return len(line), nil
}

func (toKlog) Sync() error { return nil }

// resetPausesEvery bounds how long gRPC's pauses grow while no server can be reached: from half a second to about four.
const resetPausesEvery = 10 * time.Second

// shortenPauses resets gRPC's pauses again and again while no server can be reached.
func shortenPauses(ctx context.Context, c channel) {
	pause := retry.Backoff{First: resetPausesEvery, Most: resetPausesEvery, Jitter: true} // not all nodes at once
	for ctx.Err() == nil {
		if state := c.GetState(); state != connectivity.TransientFailure {
			c.WaitForStateChange(ctx, state)
			continue
		}
		pause.Sleep(ctx)
		c.ResetConnectBackoff()
	}
}

// channel is the part of a grpc.ClientConn that shortenPauses needs.
type channel interface {
	GetState() connectivity.State
	WaitForStateChange(context.Context, connectivity.State) bool
	ResetConnectBackoff()
}
