package etcd

import (
	"context"
	"errors"
	"slices"
	"sync"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"k8s.io/klog/v2"
)

// silences is after how many requests in a row without an answer a client is
// thrown away.
const silences = 2

// A connection is what all goroutines use to talk to etcd: a client, and the
// token that shows who we are.
//
// The client could log in itself. But then it sends its request for a token with
// the token that it has, which etcd 3.4 refuses once that token has expired; so
// the client asks for a token again, without end and without a pause. And it
// keeps a watch's stream, with the token from when the stream began, for watches
// that begin later. Here the token is in the context of a request. The client
// has a stream of its own for each kind of context, and so for each token.
type connection struct {
	config             clientConfig
	username, password string

	turn chan struct{} // one element: the right to log in

	mu      sync.Mutex
	client  *clientv3.Client // nil: made when somebody needs it
	silent  int              // requests in a row that got no answer
	in      bool             // logged in
	token   string           // "" where etcd wants none
	closed  bool
	running sync.WaitGroup
}

func newConnection(config clientConfig, username, password string) *connection {
	return &connection{
		config: config, username: username, password: password,
		turn: make(chan struct{}, 1), in: username == "",
	}
}

// attempt calls f; and once more where etcd refuses the token, or the client was
// replaced meanwhile.
func (c *connection) attempt(ctx context.Context, f func(context.Context, *clientv3.Client) error) error {
	limited, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	for again := false; ; again = true {
		client, request, err := c.open(limited)
		if err == nil {
			err = f(request, client)
		}
		current := c.heard(client, limited.Err() != nil, ctx.Err() != nil)
		switch {
		case err == nil || again || limited.Err() != nil:
			return err
		case !current: // again, with the client that took its place
		case refused(err) && c.logOut(request): // again, with another token
		default:
			return err
		}
	}
}

// open returns the client, and the context for requests with it: ctx with our
// token.
func (c *connection) open(ctx context.Context) (*clientv3.Client, context.Context, error) {
	client, token, in, err := c.state()
	if err == nil && !in {
		token, err = c.logIn(ctx)
	}
	if err == nil && token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, token)
	}
	return client, ctx, err
}

// state returns the client, which is made if need be, and what is known of the
// login.
func (c *connection) state() (client *clientv3.Client, token string, in bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, "", false, context.Canceled
	}
	if c.client == nil {
		made, err := clientv3.New(c.config)
		if err != nil {
			return nil, "", false, err
		}
		c.client = made
		c.running.Go(func() { hasten(made.Ctx(), made.ActiveConnection()) })
	}
	return c.client, c.token, c.in, nil
}

// logIn returns a token, which one goroutine gets for all.
func (c *connection) logIn(ctx context.Context) (string, error) {
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	client, token, in, err := c.state()
	if err != nil || in {
		return token, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := client.Authenticate(ctx, c.username, c.password)
	switch {
	case errors.Is(err, rpctypes.ErrAuthNotEnabled):
		token = "" // as long as etcd asks for none
	case err != nil:
		return "", err
	default:
		token = answer.Token
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.token, c.in = token, true
	return token, nil
}

// refused tells that a request failed for the token: it expired, or etcd was
// restarted, or users changed, or authentication was switched on.
func refused(err error) bool {
	token := []error{rpctypes.ErrInvalidAuthToken, rpctypes.ErrUserEmpty, rpctypes.ErrAuthOldRevision}
	return slices.Contains(token, rpctypes.Error(err))
}

// logOut forgets the token that a request was made with, and tells whether
// another can be had.
func (c *connection) logOut(request context.Context) bool {
	if c.username == "" {
		return false
	}
	sent, _ := metadata.FromOutgoingContext(request)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token == "" || slices.Contains(sent.Get(rpctypes.TokenFieldNameGRPC), c.token) {
		c.in, c.token = false, ""
	}
	return true
}

// heard takes note of whether a request was answered, and tells whether its
// client is still in use. gRPC replaces connections that break. But one can be
// whole, up to a proxy say, and lead nowhere; the client would use it for ever.
func (c *connection) heard(client *clientv3.Client, silent, givenUp bool) (current bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed, client == nil:
		return true
	case client != c.client:
		return false
	case !silent:
		c.silent = 0
		return true
	case givenUp: // by the caller: that says nothing of the client
		return true
	}
	c.silent++
	if c.silent < silences || client.ActiveConnection().GetState() != connectivity.Ready {
		return true
	}
	klog.V(1).Infof("etcd: connections are open, but %d requests got no answer: trying new connections", c.silent)
	c.client, c.silent = nil, 0
	c.running.Go(func() { client.Close() }) // which ends the watches, too
	return true
}

func (c *connection) close() error {
	c.mu.Lock()
	client := c.client
	c.client, c.closed = nil, true
	c.mu.Unlock()
	var err error
	if client != nil {
		err = client.Close()
	}
	c.running.Wait()
	return err
}
