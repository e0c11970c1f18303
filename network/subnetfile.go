package network

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// A fileWatch signals when somebody, ourselves included, has written, replaced
// or removed a file. Signals that nobody took are merged into one. They end when
// the context does.
type fileWatch struct {
	changes chan struct{}
	watcher *fsnotify.Watcher
	dir     string // not the file, which is replaced
}

func watchFile(ctx context.Context, path string) (*fileWatch, error) {
	f := &fileWatch{changes: make(chan struct{}, 1), dir: filepath.Dir(path)}
	var err error
	if f.watcher, err = fsnotify.NewWatcher(); err == nil {
		err = f.again()
	}
	if err != nil {
		if f.watcher != nil {
			f.watcher.Close()
		}
		return nil, fmt.Errorf("changes of %s are noticed at comparisons alone (--kernel-resync): %w", path, err)
	}
	go func() {
		defer f.watcher.Close()
		for {
			select {
			case <-ctx.Done():
				return
			case e := <-f.watcher.Events:
				if filepath.Base(e.Name) != filepath.Base(path) && e.Name != f.dir {
					continue
				}
			case err := <-f.watcher.Errors:
				klog.V(1).Infof("Watching %s: %v", f.dir, err)
			}
			select {
			case f.changes <- struct{}{}:
			default: // there is one already
			}
		}
	}()
	return f, nil
}

// again watches the directory, which is another one by now if somebody removed
// it, and makes it if there is none. One that is watched already stays so. Before
// the file is written or read, it lets no change of it go unnoticed.
func (f *fileWatch) again() error {
	if err := os.MkdirAll(f.dir, 0o755); err != nil { // as the file's first writer would
		return err
	}
	return f.watcher.Add(f.dir)
}

// watchAgain has the subnet file watched where it is now.
func (n *node) watchAgain() {
	if n.file != nil {
		n.say("Watching the subnet file", n.file.again())
	}
}

// env is what the subnet file is to say.
func (n *node) env() subnet.Env {
	return subnet.Env{Networks: n.cfg.Networks(), Subnets: n.lease.Subnets, MTU: n.backend.MTU(), IPMasq: n.IPMasq}
}

// lookAtFile finds out whether the subnet file still says that.
func (n *node) lookAtFile() {
	if n.fileSet {
		n.watchAgain()
		said, err := subnet.ReadEnv(n.SubnetFile)
		if n.fileSet = err == nil && said == n.env(); !n.fileSet {
			klog.Warningf("Somebody changed or removed %s: writing it again", n.SubnetFile)
		}
	}
}
