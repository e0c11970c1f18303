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

// watchFile signals when somebody, ourselves included, has written, replaced or
// removed the file. Signals that nobody took are merged into one. The channel
// is closed when ctx ends.
func watchFile(ctx context.Context, path string) (<-chan struct{}, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil { // as the file's first writer would
		return nil, fmt.Errorf("watching %s: %w", path, err)
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watching %s: %w", path, err)
	}
	if err := w.Add(dir); err != nil { // not the file, which is replaced
		w.Close()
		return nil, fmt.Errorf("watching %s: %w", dir, err)
	}
	changes := make(chan struct{}, 1)
	go func() {
		defer close(changes)
		defer w.Close()
		for {
			select {
			case <-ctx.Done():
				return
			case e := <-w.Events:
				if filepath.Base(e.Name) != filepath.Base(path) {
					continue
				}
			case err := <-w.Errors:
				klog.V(1).Infof("Watching %s: %v", dir, err)
			}
			select {
			case changes <- struct{}{}:
			default: // there is one already
			}
		}
	}()
	return changes, nil
}

// env is what the subnet file is to say.
func (n *node) env() subnet.Env {
	return subnet.Env{Networks: n.cfg.Networks(), Subnets: n.lease.Subnets, MTU: n.backend.MTU(), IPMasq: n.IPMasq}
}

// lookAtFile finds out whether the subnet file still says that.
func (n *node) lookAtFile() {
	if n.fileSet {
		said, err := subnet.ReadEnv(n.SubnetFile)
		if n.fileSet = err == nil && said == n.env(); !n.fileSet {
			klog.Warningf("Somebody changed or removed %s: writing it again", n.SubnetFile)
		}
	}
}
