package etcd

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"google.golang.org/grpc/credentials"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
)

// tlsFiles hold the certificates that we trust, and our own certificate. They are read again for each connection, since
// certificates are renewed. When a file cannot be used, as while it is being written, what was read before stays in
// force.
type tlsFiles struct {
	log klog.Logger

	caFile, certFile, keyFile string // "" for none

	mu     sync.Mutex
	roots  *x509.CertPool // nil: the system's
	pair   *tls.Certificate
	ca, id retry.LastError // why the CA file, and our certificate and its key, cannot be read
}

// newTLSFiles reads the files. It returns nil where there are none: https then uses the system's roots.
func newTLSFiles(log klog.Logger, o Options) (*tlsFiles, error) {
	if o.CAFile == "" && o.CertFile == "" && o.KeyFile == "" {
		return nil, nil
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		return nil, errors.New("--etcd-certfile and --etcd-keyfile go together: one of them is missing")
	}
	f := &tlsFiles{log: log, caFile: o.CAFile, certFile: o.CertFile, keyFile: o.KeyFile}
	if err := f.readCA(); err != nil {
		return nil, err
	}
	return f, f.readPair()
}

func (f *tlsFiles) readCA() error {
	if f.caFile == "" {
		return nil
	}
	text, err := os.ReadFile(f.caFile)
	if err != nil {
		return fmt.Errorf("--etcd-cafile: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return fmt.Errorf("--etcd-cafile: %s holds no certificate in PEM form", f.caFile)
	}
	if bytes.Count(text, []byte("-----BEGIN ")) != bytes.Count(text, []byte("-----END ")) {
		return fmt.Errorf("--etcd-cafile: %s ends in the middle of a certificate", f.caFile)
	}
	f.roots = roots
	return nil
}

func (f *tlsFiles) readPair() error {
	if f.certFile == "" {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(f.certFile, f.keyFile)
	if err != nil {
		return fmt.Errorf("--etcd-certfile, --etcd-keyfile: %w", err)
	}
	f.pair = &pair
	return nil
}

// config returns the configuration for a new connection; nil where there are no files.
func (f *tlsFiles) config() *tls.Config {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.logChange(&f.ca, "--etcd-cafile", f.readCA())
	f.logChange(&f.id, "--etcd-certfile, --etcd-keyfile", f.readPair())
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: f.roots}
	if pair := f.pair; pair != nil {
		// For any server: a certificate in config.Certificates is shown only to servers that name its CA.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil }
	}
	return config
}

// logChange logs that the files of the flags cannot be read, and that they can be read again.
func (f *tlsFiles) logChange(last *retry.LastError, flags string, err error) {
	switch {
	case !last.Changed(err):
	case err == nil:
		f.log.Info("The files can be read again", "flags", flags)
	default:
		f.log.Error(err, "Cannot use a file; what was read before stays in force", "flags", flags)
	}
}

// transport makes gRPC's TLS connections. The embedded credentials are there for the other methods: they make none.
type transport struct {
	credentials.TransportCredentials
	files *tlsFiles
}

func newTransport(files *tlsFiles) transport {
	return transport{credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12}), files}
}

func (t transport) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (
	net.Conn, credentials.AuthInfo, error) {
	return credentials.NewTLS(t.files.config()).ClientHandshake(ctx, authority, conn)
}

func (t transport) Clone() credentials.TransportCredentials { return t }
