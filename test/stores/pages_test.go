package stores

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/kubelet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// pageSize is how many Nodes client-go requests in a page.
const pageSize = 500

// TestLostHistoryInPages: a daemon lists Nodes in pages, since there are many of them and the API server cannot stream
// the state. After a restart, the API server refuses to watch from the version that the daemon knows, but still lists
// that version. The daemon gets the present Nodes.
func TestLostHistoryInPages(t *testing.T) {
	t.Parallel()
	labtest.NeedPrograms(t, "kube/kube-apiserver")
	ctx := labtest.Context(t, 30*time.Second)
	c := newCluster(ctx, t, labtest.New(ctx, t, "{}", lab.NodeOptions{}), "--feature-gates=WatchList=false")
	labtest.Do(t, kubelet.Each(ctx, pageSize, func(ctx context.Context, i int) error {
		_, err := c.kube.Do(ctx, "POST", "/api/v1/nodes", fmt.Appendf(nil, `{"metadata": {"name": "idle%d"}}`, i))
		return err
	}))
	n := c.Nodes()[0]
	c.register(ctx, t, n)
	labtest.Do(t, n.Start(c.args...))
	labtest.Do(t, n.WaitReady(ctx))
	c.join(ctx, t, c.Nodes())
	version := c.version(ctx, t)
	labtest.Do(t, c.kube.Cut(ctx))
	leaves := c.leave(ctx, t)
	c.join(ctx, t, nil)
	c.forget(ctx, t, version)
	old := fmt.Sprintf("/api/v1/nodes?limit=%d&resourceVersion=%s", pageSize, version)
	labtest.Must(c.kube.Do(ctx, "GET", old, nil))(t)
	waitRoute(ctx, t, n, leaves, true) // the daemon does not know yet
	labtest.Do(t, c.kube.Restore(ctx))
	waitRoute(ctx, t, n, c.lastPeer, true)
	waitRoute(ctx, t, n, leaves, false)
}
