package stores

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

const (
	// lasts is for how long a server misbehaves: some attempts.
	lasts = 8 * time.Second

	// A resource may be asked for perSecond times a second and, since more
	// attempts are made at first, atFirst times besides.
	perSecond, atFirst = 2, 6
)

// A badServer is one way in which a server misbehaves.
type badServer struct {
	name  string
	does  lab.Misbehaviour
	fails bool // nothing gets through: this has to be logged
}

var badServers = []badServer{
	{"slow", lab.Misbehaviour{Answer: slow}, false},
	{"repeats events", lab.Misbehaviour{Frame: repeat}, false},
	{"never answers", lab.Misbehaviour{Answer: silent}, false},
	{"cuts an event", lab.Misbehaviour{Frame: cut, Answer: onlyWatches}, true},
	{"closes at once", lab.Misbehaviour{Refuse: true}, true},
	{"429", lab.Misbehaviour{Answer: answer(http.StatusTooManyRequests, "text/plain",
		"Too many requests, please try again later.\n")}, true},
	{"500", lab.Misbehaviour{Answer: answer(http.StatusInternalServerError, "text/plain",
		"Internal Server Error\n")}, true},
	{"503", lab.Misbehaviour{Answer: unavailable}, true},
	{"a page", lab.Misbehaviour{Answer: answer(http.StatusOK, "text/html", page)}, true},
	{"502 with a page", lab.Misbehaviour{Answer: answer(http.StatusBadGateway, "text/html", page)}, true},
	{"redirects to a login page", lab.Misbehaviour{Answer: login}, true},
	{"nothing", lab.Misbehaviour{Answer: answer(http.StatusOK, "application/vnd.kubernetes.protobuf", "")}, true},
	{"cuts lists", lab.Misbehaviour{Answer: cutList}, true},
}

var unavailable = answer(http.StatusServiceUnavailable, "text/plain", "no healthy upstream\n")

const page = "<!DOCTYPE html>\n<html><head><title>Gateway</title></head><body><h1>Please come back later</h1></body></html>\n"

// answer is the same for all requests.
func answer(code int, kind, body string) func(http.ResponseWriter, *http.Request, http.Handler) {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", kind)
		if code == http.StatusTooManyRequests {
			w.Header().Set("Retry-After", "1")
		}
		w.WriteHeader(code)
		io.WriteString(w, body)
	}
}

// slow passes a request on after a second.
func slow(w http.ResponseWriter, r *http.Request, next http.Handler) {
	select {
	case <-time.After(time.Second):
	case <-r.Context().Done():
	}
	next.ServeHTTP(w, r)
}

// silent never answers. What is asked is not answered afterwards either.
func silent(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
	<-r.Context().Done()
	panic(http.ErrAbortHandler)
}

// login sends everybody to a page that has a form.
func login(w http.ResponseWriter, r *http.Request, next http.Handler) {
	if r.URL.Path == "/login" {
		answer(http.StatusOK, "text/html", page)(w, r, next)
		return
	}
	http.Redirect(w, r, "/login", http.StatusFound)
}

// repeat has each event come twice.
func repeat(w io.Writer, frame []byte) error {
	_, err := w.Write(append(frame[:len(frame):len(frame)], frame...))
	return err
}

// cut ends the watch in the middle of an event.
func cut(w io.Writer, frame []byte) error {
	_, err := w.Write(frame[:len(frame)/2])
	return errors.Join(err, io.ErrUnexpectedEOF)
}

// onlyWatches passes on no other requests.
func onlyWatches(w http.ResponseWriter, r *http.Request, next http.Handler) {
	if r.URL.Query().Get("watch") == "" {
		unavailable(w, r, next)
		return
	}
	next.ServeHTTP(w, r)
}

// cutList is a server that cannot stream lists, has forgotten all versions, and
// sends half of each list.
func cutList(w http.ResponseWriter, r *http.Request, next http.Handler) {
	query := r.URL.Query()
	status := func(code int, reason string) {
		answer(code, "application/json", fmt.Sprintf(`{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": %q, "message": "no", "code": %d}`, reason, code))(w, r, next)
	}
	switch {
	case r.URL.Path != "/api/v1/nodes":
		unavailable(w, r, next)
	case query.Get("sendInitialEvents") != "":
		status(http.StatusUnprocessableEntity, "Invalid")
	case query.Get("watch") != "":
		status(http.StatusGone, "Expired")
	default:
		whole := httptest.NewRecorder()
		next.ServeHTTP(whole, r)
		w.Header().Set("Content-Type", whole.Header().Get("Content-Type"))
		w.Header().Set("Content-Length", strconv.Itoa(whole.Body.Len()))
		w.Write(whole.Body.Bytes()[:whole.Body.Len()/2])
		panic(http.ErrAbortHandler)
	}
}

// TestBadServer: whatever is between the daemon and the API server, when it
// starts and while it runs, the daemon waits, asks now and then, logs that once,
// and goes on when the server is well.
func TestBadServer(t *testing.T) {
	t.Parallel()
	labtest.NeedPrograms(t, "kube/kube-apiserver")
	ctx := labtest.Context(t, 4*time.Minute)
	c := newCluster(ctx, t, labtest.New(ctx, t, "{}", make([]lab.NodeOptions, len(badServers))...))
	var all sync.WaitGroup
	defer all.Wait()
	for i, bad := range badServers {
		// All at once: they wait most of the time.
		all.Go(func() {
			t.Run(bad.name, func(t *testing.T) { c.suffer(ctx, t, c.Nodes()[i], bad) })
		})
	}
}

// suffer puts a bad server between a node and the API server, twice.
func (c *cluster) suffer(ctx context.Context, t *testing.T, n *lab.Node, bad badServer) {
	c.register(ctx, t, n)
	p := labtest.Must(c.kube.NewProxy())(t)
	for _, phase := range []struct {
		name          string
		before, after func()
	}{
		{"from the start", func() { labtest.Do(t, n.Start(append(c.args, "--kube-api-url="+p.URL)...)) },
			func() { c.waitUp(ctx, t, n) }},
		{"while the daemon runs", func() { c.addPeer(ctx, t, 100+n.Number) },
			func() { waitRoute(ctx, t, n, fmt.Sprintf("10.5.%d.0/24", 100+n.Number), true) }},
	} {
		from := len(n.Log())
		began := time.Now()
		p.Do(bad.does)
		phase.before()
		if bad.fails {
			waitLog(ctx, t, n, from, outageBegins.String())
		}
		time.Sleep(time.Until(began.Add(lasts))) // for requests to be counted
		counts := p.Counts()
		bound := atFirst + perSecond*int(time.Since(began)/time.Second)
		p.Do(lab.Misbehaviour{})
		well := time.Now()
		phase.after()
		t.Logf("%s: %v after the server was well; requests %v", phase.name, time.Since(well).Round(time.Millisecond), counts)
		for what, times := range counts {
			most := bound
			if what == lab.Connections { // for its own Node, for all of them, and for what is written
				most *= 3
			}
			if times > most {
				t.Errorf("%s: %d times %s, more than %d", phase.name, times, what, most)
			}
		}
		checkOutage(ctx, t, n, phase.name, from, bad.fails)
	}
	if n.Exited() || strings.Contains(n.Log(), "panic") {
		t.Error("the daemon has crashed")
	}
}

// waitUp waits until a node is ready and its Node has a condition: nothing is written any more.
func (c *cluster) waitUp(ctx context.Context, t *testing.T, n *lab.Node) {
	t.Helper()
	labtest.Do(t, n.WaitReady(ctx))
	labtest.Do(t, lab.Poll(ctx, "the condition of Node "+n.Hostname, func() error {
		node, err := c.kube.Node(ctx, n.Hostname)
		if err == nil && len(node.Status.Conditions) == 0 {
			err = errors.New("it has none")
		}
		return err
	}))
}

var (
	outageBegins = regexp.MustCompile(`(?m)^E.*"The store cannot be used; retrying" store="Kubernetes' API server at https://198\.18\.0\.254:.*$`)
	outageEnds   = regexp.MustCompile(`(?m)^I.*"The store is back" store="Kubernetes' API server at https://198\.18\.0\.254:.*$`)
)

// checkOutage: one line when it begins and one when it ends; or perhaps none,
// where the server did not fail altogether.
func checkOutage(ctx context.Context, t *testing.T, n *lab.Node, phase string, from int, failed bool) {
	t.Helper()
	var begins, ends []string
	err := lab.Poll(ctx, "the outage to end in the log", func() error {
		text := n.Log()[from:]
		begins, ends = outageBegins.FindAllString(text, -1), outageEnds.FindAllString(text, -1)
		if len(begins) == len(ends) && (len(begins) > 0 || !failed) {
			return nil
		}
		return fmt.Errorf("%d lines tell that it begins, %d that it ends", len(begins), len(ends))
	})
	if err == nil && len(begins) > 1 {
		err = fmt.Errorf("it is logged %d times", len(begins))
	}
	if err != nil {
		t.Errorf("%s: %v:\n%s", phase, err, strings.Join(append(begins, ends...), "\n"))
	}
}
