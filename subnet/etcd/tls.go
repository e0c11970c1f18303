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

// tlsFiles hold whom we trust, and the certificate that shows who we are. They
// are read again for each connection, since certificates are renewed. Where a
// file cannot be used, as while it is being written, what it held before stays
// in force.
type tlsFiles struct {
	caFile, certFile, keyFile string // "" for none

	mu     sync.Mutex
	roots  *x509.CertPool // nil: the system's
	pair   *tls.Certificate
	ca, id trouble // with the CA file, and with the certificate and its key
}

// newTLSFiles reads the files. It returns nil where there are none: https then
// goes by the system's roots.
func newTLSFiles(o Options) (*tlsFiles, error) {
	if o.CAFile == "" && o.CertFile == "" && o.KeyFile == "" {
		return nil, nil
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		return nil, errors.New("--etcd-certfile and --etcd-keyfile go together: one of them is missing")
	}
	f := &tlsFiles{caFile: o.CAFile, certFile: o.CertFile, keyFile: o.KeyFile}
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

// config returns the configuration for a new connection; nil where there are no
// files.
func (f *tlsFiles) config() *tls.Config {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ca.log("--etcd-cafile", f.readCA())
	f.id.log("--etcd-certfile, --etcd-keyfile", f.readPair())
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: f.roots}
	if pair := f.pair; pair != nil {
		// For any server; one of config.Certificates is for servers that name its CA.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil }
	}
	return config
}

// trouble is what keeps files from being read.
type trouble struct{ retry.LastError }

// log logs how reading what the flags name ended, if that is news.
func (t *trouble) log(flags string, err error) {
	switch {
	case !t.Changed(err):
	case err == nil:
		klog.Infof("%s: the files can be read again", flags)
	default:
		klog.Errorf("%v. What was read before stays in force", err)
	}
}

// transport is how gRPC secures connections. What is embedded never makes one.
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
