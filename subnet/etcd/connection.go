package etcd

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

// unablePatience is how long the member that the client uses may answer that it cannot serve: an election takes one
// second or two, and then all members answer this.
const unablePatience = 3 * time.Second

// maxUnanswered is how many requests in a row may get no answer before the client is replaced.
const maxUnanswered = 2

// A connection is what all goroutines use to send requests to etcd: a client, and the token of our login.
//
// The client could log in by itself. But it sends its request for a token with the token that it has, which etcd 3.4
// refuses once the token has expired: the client then repeats the request without end and without a pause. It also uses
// the stream of an earlier watch, which has the token of that time, for watches that begin later. Here the token is in
// the context of a request: the client has a stream for each kind of context, and so for each token.
type connection struct {
	log                klog.Logger
	config             clientConfig
	discovery          *discovery // nil: the endpoints are those of config
	username, password string

	turn chan struct{} // one element: the right to log in

	mu         sync.Mutex
	client     *clientv3.Client // nil: made when a request needs it
	unanswered int              // requests in a row
	unable     time.Time        // since when the member has answered that it cannot serve; zero: it can
	avoids     bool             // the client does not have all endpoints, see avoid
	avoided    int              // how often it was given others
	watches    *stream          // of watches that begin now; nil: there was none
	loggedIn   bool
	token      string // "" where etcd requires none
	closed     bool
	running    sync.WaitGroup
}

func newConnection(log klog.Logger, config clientConfig, username, password string) *connection {
	return &connection{
		log: log, config: config, username: username, password: password,
		turn: make(chan struct{}, 1), loggedIn: username == "",
	}
}

// attempt calls f, and calls it once more when etcd refuses the token, or when the client was replaced meanwhile.
func (c *connection) attempt(ctx context.Context, f func(context.Context, *clientv3.Client) error) error {
	limited, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	for again := false; ; again = true {
		client, request, err := c.open(limited)
		if err == nil {
			err = f(request, client)
		}
		current := c.noteAnswer(client, limited.Err() != nil, ctx.Err() != nil)
		c.noteMember(client, err)
		switch {
		case err == nil || again || limited.Err() != nil:
			return err
		case !current: // again, with the new client
		case (tokenRefused(err) || tokenMissing(err, request)) && c.logOut(request): // again, with another token
		default:
			return err
		}
	}
}

// open returns the client, and the context for requests with it: ctx with our token. A member that has no leader refuses
// such requests at once.
func (c *connection) open(ctx context.Context) (*clientv3.Client, context.Context, error) {
	ctx = clientv3.WithRequireLeader(ctx)
	client, token, loggedIn, err := c.state(ctx)
	if err == nil && !loggedIn {
		token, err = c.logIn(ctx)
	}
	if err == nil && token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, token)
	}
	return client, ctx, err
}

// state returns the client, which it makes if there is none, and the login.
func (c *connection) state(ctx context.Context) (client *clientv3.Client, token string, loggedIn bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client == nil && c.discovery != nil && !c.closed {
		c.mu.Unlock()
		found, err := c.discovery.lookUp(ctx)
		c.mu.Lock()
		if err != nil {
			return nil, "", false, err
		}
		c.config.Endpoints = found
	}
	if c.closed {
		return nil, "", false, context.Canceled
	}
	if c.client == nil {
		made, err := clientv3.New(c.config)
		if err != nil {
			return nil, "", false, err
		}
		c.client = made
		c.running.Go(func() { shortenPauses(made.Ctx(), made.ActiveConnection()) })
		if c.discovery != nil {
			c.running.Go(func() { c.followRecords(made) })
		}
	}
	return c.client, c.token, c.loggedIn, nil
}

// logIn returns a token. One goroutine logs in for all.
func (c *connection) logIn(ctx context.Context) (string, error) {
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	client, token, loggedIn, err := c.state(ctx)
	if err != nil || loggedIn {
		return token, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := client.Authenticate(ctx, c.username, c.password)
	switch {
	case errors.Is(err, rpctypes.ErrAuthNotEnabled):
		token = "" // as long as etcd requires none
	case err != nil:
		return "", err
	default:
		token = answer.Token
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.token, c.loggedIn = token, true
	return token, nil
}

// tokenRefused tells whether a request failed because of the token: it expired, or etcd was restarted, or users
// changed, or authentication was switched on. Where that ends a watch, the error has the text alone.
func tokenRefused(err error) bool {
	token := []error{rpctypes.ErrGRPCInvalidAuthToken, rpctypes.ErrGRPCUserEmpty, rpctypes.ErrGRPCAuthOldRevision}
	return err != nil && slices.ContainsFunc(token, func(e error) bool {
		return rpctypes.Error(err) == rpctypes.Error(e) || err.Error() == e.Error()
	})
}

// tokenMissing tells whether a request may have failed because it had no token: authentication was switched on since,
// and to etcd, a request without a token over a connection with a client certificate is that of the user whom the
// certificate names.
func tokenMissing(err error, request context.Context) bool {
	sent, _ := metadata.FromOutgoingContext(request)
	return rpctypes.Error(err) == rpctypes.ErrPermissionDenied && len(sent.Get(rpctypes.TokenFieldNameGRPC)) == 0
}

// logOut forgets the token that a request was made with, and tells whether we can get another one.
func (c *connection) logOut(request context.Context) bool {
	if c.username == "" {
		return false
	}
	sent, _ := metadata.FromOutgoingContext(request)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token == "" || slices.Contains(sent.Get(rpctypes.TokenFieldNameGRPC), c.token) {
		c.loggedIn, c.token = false, ""
	}
	return true
}

// noteAnswer records whether a request was answered, and tells whether its client is still in use. gRPC replaces
// connections that break. But a connection can be whole, up to a proxy for example, and lead nowhere: the client would
// use such a connection for ever.
func (c *connection) noteAnswer(client *clientv3.Client, unanswered, canceled bool) (current bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed, client == nil:
		return true
	case client != c.client:
		return false
	case !unanswered:
		c.unanswered = 0
		return true
	case canceled: // by the caller, which means nothing for the client
		return true
	}
	c.unanswered++
	if c.unanswered < maxUnanswered || client.ActiveConnection().GetState() != connectivity.Ready {
		return true
	}
	c.log.V(1).Info("Connections to etcd are open, but requests get no answer; making new connections",
		"requests", c.unanswered)
	c.drop(client)
	return true
}

// drop has the next request make another client. The caller holds c.mu.
func (c *connection) drop(client *clientv3.Client) {
	if client == c.client && !c.closed {
		c.client, c.unanswered, c.unable, c.avoids = nil, 0, time.Time{}, false
		c.running.Go(func() { closeClient(client) }) // this ends the watches, too
	}
}

// noteMember records whether the member that the client uses can serve. Where it cannot, because it is cut off from the
// others or is a learner, the client leaves it. Watches go on at the next member.
func (c *connection) noteMember(client *clientv3.Client, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	learner := rpctypes.Error(err) == errLearner
	switch code := codeOf(err); {
	case client == nil || client != c.client:
		return
	case err == nil:
		c.unable = time.Time{}
		return
	case !learner && code != codes.Unavailable && code != codes.DeadlineExceeded:
		return
	case c.unable.IsZero():
		c.unable = time.Now()
	}
	if learner || time.Since(c.unable) >= unablePatience {
		c.avoid(client)
	}
}

var errLearner = rpctypes.Error(rpctypes.ErrGRPCNotSupportedForLearner)

// codeOf returns gRPC's code of an error, also of one that the client has turned into etcd's.
func codeOf(err error) codes.Code {
	if known, ok := rpctypes.Error(err).(rpctypes.EtcdError); ok {
		return known.Code()
	}
	return status.Code(err)
}

// avoid takes one of the endpoints from the client, and gives it the one back that it took before: if the client is
// connected to that one, it connects to another. If the client is connected to none, it gets all endpoints back. Where
// there is only one endpoint, the client gets a new connection to it: a load balancer, or a name with several addresses,
// may lead to another member then.
func (c *connection) avoid(client *clientv3.Client) {
	all := c.config.Endpoints
	switch ready := client.ActiveConnection().GetState() == connectivity.Ready; {
	case ready:
		without := all[c.avoided%len(all)]
		others := slices.DeleteFunc(slices.Clone(all), func(e string) bool { return e == without })
		c.log.V(1).Info("A member of etcd cannot serve; trying others", "without", without)
		c.avoids, c.avoided = true, c.avoided+1
		client.SetEndpoints(others...)
		if len(others) == 0 { // which has closed the connection
			c.avoids = false
			client.SetEndpoints(all...)
		}
	case c.avoids:
		c.avoids = false
		client.SetEndpoints(all...)
	}
}

func (c *connection) close() error {
	c.mu.Lock()
	client := c.client
	c.client, c.closed = nil, true
	c.mu.Unlock()
	var err error
	if client != nil {
		err = closeClient(client)
	}
	c.running.Wait()
	return err
}
