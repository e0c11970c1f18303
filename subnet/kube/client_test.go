package kube

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// A server that is there and sends nothing is not waited for: neither before it
// answers nor in the middle of an answer.
func TestStallGuard(t *testing.T) {
	for _, answers := range []bool{false, true} {
		t.Run(fmt.Sprintf("answers=%t", answers), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				serve := func(c net.Conn) {
					if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
						t.Error(err)
					}
					if answers {
						time.Sleep(answerWithin - time.Second)
						fmt.Fprint(c, "HTTP/1.1 200 OK\r\n\r\n")
						time.Sleep(silence - time.Second)
						fmt.Fprint(c, "x")
					}
					c.Read(make([]byte, 1)) // until the other side is gone
				}
				transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
					here, there := net.Pipe()
					go serve(there)
					return here, nil
				}}
				defer transport.CloseIdleConnections()
				began := time.Now()
				resp, err := (&http.Client{Transport: stallGuard{transport}}).Get("http://api")
				want := answerWithin
				if answers {
					if err != nil {
						t.Fatal(err)
					}
					want = answerWithin - time.Second + silence - time.Second + silence
					if text, err := io.ReadAll(resp.Body); string(text) != "x" || err == nil {
						t.Errorf("read %q, %v", text, err)
					}
					resp.Body.Close()
				} else if !errors.As(err, &errStalled{}) {
					t.Error(err)
				}
				if took := time.Since(began); took != want { // by the test's own clock
					t.Errorf("it was waited for %v, not %v", took, want)
				}
			})
		})
	}
}

func answered(code int32, message string) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{Code: code, Message: message}}
}

// A busy server asks all nodes to wait for the same time. None of them comes back sooner, and they do not come back
// together.
func TestRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := klog.Logger{}
		m := &Manager{client: &client{log: log, loaded: fingerprint(nil)}, health: subnet.NewStoreHealth(log, subnet.State{})}
		pauses := map[time.Duration]int{}
		const nodes, asked = 100, 2
		for range nodes {
			began, attempts := time.Now(), 0
			err := m.retry(t.Context(), "write", func(context.Context) error {
				if attempts++; attempts == 1 {
					return apierrors.NewTooManyRequests("busy", asked)
				}
				return nil
			})
			pause := time.Since(began)
			if pauses[pause]++; err != nil || pause <= asked*time.Second {
				t.Fatalf("%v after %v, although the server asked for %d s", err, pause, asked)
			}
		}
		if len(pauses) < nodes/2 {
			t.Errorf("%d nodes come back at %d moments", nodes, len(pauses))
		}
	})
}

// That these are the errors that a real API server gives is shown in the tests
// with one.
func TestExplain(t *testing.T) {
	for _, c := range []struct {
		err         error
		cause, want string
	}{
		{apierrors.NewUnauthorized("Unauthorized"), "login", "check the service account"},
		{answered(403, "nodes is forbidden"), "", "ClusterRole"},
		{answered(422, "invalid"), "", "invalid"},
		{answered(429, "too many requests"), subnet.Unreachable, "too many"},
		{answered(503, "etcd leader changed"), subnet.Unreachable, "etcd"},
		{answered(302, ""), "redirect", "proxy"},
		{answered(502, "<html>\n"+strings.Repeat("page ", 1000)), subnet.Unreachable, "<html> page"},
		{errors.New("tls: failed to verify certificate: x509: certificate signed by unknown authority"), "certificate",
			"certificate-authority"},
		{errors.New("tls: failed to verify certificate: x509: certificate has expired or is not yet valid: current time 2026-11-29T23:00:00Z is after 2025-11-29T23:00:00Z"),
			"certificate", "check this host's clock"},
		{errors.New("connection refused"), subnet.Unreachable, "refused"},
	} {
		if cause, text := explain(fmt.Errorf("asking: %w", c.err)); cause != c.cause || !strings.Contains(text, c.want) ||
			len(text) > 2*plain.Most {
			t.Errorf("%v: got %q, %q; want %q, %q", c.err, cause, text, c.cause, c.want)
		}
	}
}

// The CA bundle that a kubeconfig names is read again when the API server has
// another certificate; a file that cannot be used changes nothing.
func TestRefresh(t *testing.T) {
	logged(t)
	before, after := tlsServer(t), tlsServer(t)
	dir := t.TempDir()
	bundle, kubeconfig := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "kubeconfig")
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	named := func(server, authority string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: x\nclusters: [{name: c, cluster: {server: %q, %s}}]\ncontexts: [{name: x, context: {cluster: c}}]\n", server, authority)
	}
	authority := func(s *httptest.Server) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	}
	write(bundle, authority(before))
	write(kubeconfig, named(before.URL, "certificate-authority: "+bundle))
	c, err := newClient(t.Context(), Options{Kubeconfig: kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	ask := func() error { return c.current().Get().AbsPath("/").Do(t.Context()).Error() }
	if err := ask(); err != nil {
		t.Fatal(err)
	}

	// Where the server listens matters as little as its certificate.
	write(kubeconfig, named(after.URL, "certificate-authority: "+bundle))
	c.refresh()
	if err := ask(); err == nil || !strings.Contains(err.Error(), "x509:") {
		t.Fatalf("the server's new certificate: %v", err)
	}
	for _, broken := range []string{"", "-----BEGIN CERTIFICATE-----\n", "nonsense"} {
		write(bundle, broken)
		c.refresh()
	}
	write(kubeconfig, "{")
	c.refresh()
	write(kubeconfig, named(after.URL, "certificate-authority: "+bundle))
	write(bundle, authority(after))
	c.refresh()
	if err := ask(); err != nil {
		t.Errorf("with the new bundle: %v", err)
	}
	same := c.current()
	c.refresh()
	if c.current() != same {
		t.Error("there is another client though nothing has changed")
	}

	// So is another file that the kubeconfig names by then.
	other := filepath.Join(dir, "other.crt")
	write(other, authority(after))
	write(kubeconfig, named(before.URL, "certificate-authority: "+other))
	c.refresh()
	if err := ask(); err == nil {
		t.Fatal("the server is trusted")
	}
	write(other, authority(before))
	c.refresh()
	if err := ask(); err != nil {
		t.Errorf("with another file: %v", err)
	}

	// So is a bundle that is written in the kubeconfig itself.
	write(kubeconfig, named(after.URL, fmt.Sprintf("certificate-authority-data: %q",
		base64.StdEncoding.EncodeToString([]byte(authority(after))))))
	c.refresh()
	if err := ask(); err != nil {
		t.Errorf("with a bundle in the kubeconfig: %v", err)
	}
}

// tlsServer returns a server that nobody else's certificate is valid for.
func tlsServer(t *testing.T) *httptest.Server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// A server that sends us elsewhere gets no token for there.
func TestRedirect(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("elsewhere was asked for %s, with %q", r.URL, r.Header.Get("Authorization"))
	}))
	defer elsewhere.Close()
	server := httptest.NewServer(http.RedirectHandler(elsewhere.URL, http.StatusFound))
	defer server.Close()
	c, err := newClient(t.Context(), Options{APIURL: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.nodeOfPod(t.Context(), "kube-flannel", "kube-flannel-ds-1")
	if err == nil {
		t.Fatal("it was answered")
	}
	if cause, text := explain(err); cause != "redirect" {
		t.Errorf("%s, %s", cause, text)
	}
}

// TestServerWithoutScheme: --kube-api-url may be HOST:PORT, as in flannel.
func TestServerWithoutScheme(t *testing.T) {
	c, err := newClient(t.Context(), Options{APIURL: "192.0.2.1:8080"})
	if err != nil {
		t.Fatal(err)
	}
	if c.server != "http://192.0.2.1:8080" {
		t.Errorf("the server is %q", c.server)
	}
}
