package kube

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
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
