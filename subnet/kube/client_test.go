package kube

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flanneld/flanneld/subnet"
)

// A server that is there and says nothing is not waited for: neither before it
// answers nor afterwards, when the watch goes on where it was.
func TestSilentServer(t *testing.T) {
	for _, answers := range []bool{false, true} {
		t.Run(fmt.Sprintf("answers=%t", answers), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				serve := func(c net.Conn) {
					if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
						t.Error(err)
					}
					if answers {
						fmt.Fprint(c, "HTTP/1.1 200 OK\r\n\r\n")
						c.Write(frame("MODIFIED", peerNode(3).marshal()))
					}
					c.Read(make([]byte, 1)) // until the other side is gone
				}
				transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
					here, there := net.Pipe()
					go serve(there)
					return here, nil
				}}
				defer transport.CloseIdleConnections()
				p := testPeers()
				w := &feed{
					client: &client{&http.Client{Transport: transport}, "http://api"}, version: []byte("1"),
					fields: fields{prefix: []byte("flannel.alpha.coreos.com/")}, answered: func() {},
				}
				began := time.Now()
				err := w.follow(t.Context(), p)
				if took := time.Since(began); took != silence { // by the test's own clock
					t.Errorf("it was waited for %v", took)
				}
				if answers && (err != nil || len(p.byName) != 1) {
					t.Errorf("%d peers, %v", len(p.byName), err)
				}
				if !answers && !errors.Is(err, errSilent) {
					t.Error(err)
				}
			})
		})
	}
}

// That these are the errors that a real API server gives is shown in the tests
// with one.
func TestExplain(t *testing.T) {
	for _, c := range []struct {
		err         error
		cause, want string
	}{
		{&statusError{code: 401, message: "Unauthorized"}, "login", "check the service account"},
		{&statusError{code: 403, message: "nodes is forbidden"}, "", "ClusterRole"},
		{&statusError{code: 422, message: "invalid"}, "", "invalid"},
		{&statusError{code: 429, message: "too many requests"}, subnet.Away, "too many"},
		{&statusError{code: 503, message: "etcd leader changed"}, subnet.Away, "etcd"},
		{errors.New("tls: failed to verify certificate: x509: certificate signed by unknown authority"), "certificate", "certificate-authority"},
		{errors.New("connection refused"), subnet.Away, "refused"},
	} {
		if cause, text := explain(fmt.Errorf("asking: %w", c.err)); cause != c.cause || !strings.Contains(text, c.want) {
			t.Errorf("%v: got %q, %q; want %q, %q", c.err, cause, text, c.cause, c.want)
		}
	}
}
