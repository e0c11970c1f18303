package lab

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strings"
	"sync"
)

// A Misbehaviour is what a Proxy does to requests. The zero value does nothing:
// all of them are passed on.
type Misbehaviour struct {
	// Refuse closes each connection as soon as there is one.
	Refuse bool
	// Answer, where it is not nil, answers in the place of the API server, or
	// calls next to pass the request on. It may panic with
	// http.ErrAbortHandler, which cuts the answer off. The context of the
	// request ends with the misbehaviour.
	Answer func(w http.ResponseWriter, r *http.Request, next http.Handler)
	// Frame, where it is not nil, is given each event of a watch, and writes
	// what the daemon is to get. An error cuts the answer off.
	Frame func(w io.Writer, frame []byte) error
}

// A Proxy is between daemons and the API server. It has the API server's
// certificate for another port, and can do to requests what a broken server, a
// load balancer or a portal does.
type Proxy struct {
	URL string // for --kube-api-url

	kube   *Kube
	server *http.Server

	mu      sync.Mutex
	does    Misbehaviour
	end     context.Context // of does
	stop    context.CancelFunc
	counts  map[string]int // requests by what they are for
	clients map[net.Conn]bool
	pending int        // requests that are not answered yet, without watches
	settled *sync.Cond // pending has become zero
}

// NewProxy starts a proxy, which passes all requests on. It ends with the lab.
func (k *Kube) NewProxy() (*Proxy, error) {
	certificate, err := tls.LoadX509KeyPair(k.file("apiserver.crt"), k.file("apiserver.key"))
	if err != nil {
		return nil, err
	}
	p := &Proxy{kube: k, counts: map[string]int{}, clients: map[net.Conn]bool{}}
	p.end, p.stop = context.WithCancel(context.Background())
	p.settled = sync.NewCond(&p.mu)
	var l net.Listener
	err = k.lab.net.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(Gateway, 0).String())
		return err
	})
	if err != nil {
		return nil, err
	}
	k.lab.net.own(l)
	p.URL = "https://" + l.Addr().String()
	target, err := url.Parse(k.url)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(k.ca.certificate)
	pass := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport: &http.Transport{DialContext: k.lab.net.Dial, TLSClientConfig: &tls.Config{RootCAs: roots},
			DisableCompression: true},
		FlushInterval:  -1,
		ModifyResponse: p.followFrames,
		ErrorLog:       log.New(io.Discard, "", 0), // what is cut off is no news
	}
	p.server = &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{certificate}},
		ErrorLog:  log.New(io.Discard, "", 0),
		ConnState: p.connState,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			does, end, done := p.take(r)
			defer done()
			if does.Answer == nil {
				pass.ServeHTTP(w, r)
				return
			}
			ctx, cancel := context.WithCancel(r.Context())
			defer cancel()
			defer context.AfterFunc(end, cancel)()
			does.Answer(w, r.WithContext(ctx), http.HandlerFunc(func(w http.ResponseWriter, passed *http.Request) {
				pass.ServeHTTP(w, passed.WithContext(r.Context()))
			}))
		}),
	}
	go p.server.ServeTLS(l, "", "") // until the lab closes the listener
	return p, nil
}

// Do changes what the proxy does, and counts from nothing. What is being answered
// is answered first. Then connections that are open are closed unless they go on
// as they are, or as Frame has it.
func (p *Proxy) Do(m Misbehaviour) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop()
	for p.pending > 0 {
		p.settled.Wait()
	}
	p.does, p.counts = m, map[string]int{}
	p.end, p.stop = context.WithCancel(context.Background())
	if m.Frame == nil && (m.Refuse || m.Answer != nil) {
		for c := range p.clients {
			c.Close()
		}
	}
}

// Connections are what Counts has of those that were closed at once.
const Connections = "connections"

// Counts returns how often each thing was asked for since Do.
func (p *Proxy) Counts() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.counts)
}

// take counts a request and returns what is to be done to it, until when, and what
// to call when it is answered.
func (p *Proxy) take(r *http.Request) (does Misbehaviour, end context.Context, done func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	query := r.URL.Query()
	p.counts[strings.TrimSpace(r.Method+" "+r.URL.Path+" "+query.Get("fieldSelector"))]++
	if query.Get("watch") != "" {
		return p.does, p.end, func() {}
	}
	p.pending++
	return p.does, p.end, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.pending--; p.pending == 0 {
			p.settled.Broadcast()
		}
	}
}

func (p *Proxy) connState(c net.Conn, state http.ConnState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch state {
	case http.StateNew:
		if p.does.Refuse {
			p.counts[Connections]++
			c.Close()
			return
		}
		p.clients[c] = true
	case http.StateClosed, http.StateHijacked:
		delete(p.clients, c)
	}
}

// followFrames has the events of a watch pass one by one.
func (p *Proxy) followFrames(r *http.Response) error {
	if !strings.Contains(r.Header.Get("Content-Type"), "stream=watch") {
		return nil
	}
	from := r.Body
	reader, writer := io.Pipe()
	r.Body = struct {
		io.Reader
		io.Closer
	}{reader, closers{reader, from}}
	go func() {
		for {
			frame, err := readFrame(from)
			if err == nil {
				p.mu.Lock()
				change := p.does.Frame
				p.mu.Unlock()
				if change == nil {
					_, err = writer.Write(frame)
				} else {
					err = change(writer, frame)
				}
			}
			if err != nil {
				writer.CloseWithError(err) // io.EOF ends the answer in good order
				return
			}
		}
	}()
	return nil
}

// closers are closed together.
type closers []io.Closer

func (all closers) Close() error {
	for _, c := range all {
		c.Close()
	}
	return nil
}

// readFrame reads an event of a watch in Protocol Buffers, with its length in
// front, four bytes.
func readFrame(r io.Reader) ([]byte, error) {
	frame := make([]byte, 4)
	if _, err := io.ReadFull(r, frame); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(frame)
	if n > 4<<20 {
		return nil, fmt.Errorf("an event of %d bytes", n)
	}
	frame = append(frame, make([]byte, n)...)
	_, err := io.ReadFull(r, frame[4:])
	return frame, err
}
