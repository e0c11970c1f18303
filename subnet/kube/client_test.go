package kube

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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
		{answered(429, "too many requests"), subnet.Away, "too many"},
		{answered(503, "etcd leader changed"), subnet.Away, "etcd"},
		{answered(302, ""), "redirect", "proxy"},
		{answered(502, "<html>\n"+strings.Repeat("page ", 1000)), subnet.Away, "<html> page"},
		{errors.New("tls: failed to verify certificate: x509: certificate signed by unknown authority"), "certificate", "certificate-authority"},
		{errors.New("connection refused"), subnet.Away, "refused"},
	} {
		if cause, text := explain(fmt.Errorf("asking: %w", c.err)); cause != c.cause || !strings.Contains(text, c.want) || len(text) > 2*maxErrorText {
			t.Errorf("%v: got %q, %q; want %q, %q", c.err, cause, text, c.cause, c.want)
		}
	}
}
