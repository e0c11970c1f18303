// Package filewatch signals that programs have changed files.
package filewatch

import (
	"context"

	"github.com/fsnotify/fsnotify"
	"k8s.io/klog/v2"
)

// A Watch signals when any program, this one included, has written, replaced or removed a file in the directories that
// were added.
type Watch struct {
	// C receives a value after a change. Signals that nobody has taken are merged into one.
	C <-chan struct{}

	watcher *fsnotify.Watcher
}

// New returns a watch that signals nothing before Add has succeeded. It ends with ctx. Only changes of files with paths
// that count are signalled, and of directories with such paths.
func New(ctx context.Context, counts func(path string) bool) (*Watch, error) {
	log := klog.FromContext(ctx)
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	changes := make(chan struct{}, 1)
	go func() {
		defer watcher.Close()
		for {
			select {
			case <-ctx.Done():
				return
			case e := <-watcher.Events:
				if !counts(e.Name) {
					continue
				}
			case err := <-watcher.Errors: // changes may have been lost
				log.V(1).Info("Watching files failed", "directories", watcher.WatchList(), "err", err)
			}
			select {
			case changes <- struct{}{}:
			default: // there is one already
			}
		}
	}()
	return &Watch{changes, watcher}, nil
}

// Add watches a directory. A directory that is watched already stays so; one that was removed, and made again, is
// another one. Called before a file is read or written, Add lets no change go unnoticed. It fails with
// fsnotify.ErrClosed when the watch has ended.
func (w *Watch) Add(dir string) error { return w.watcher.Add(dir) }
