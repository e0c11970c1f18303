package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/fight"
	"github.com/flanneld/flanneld/pkg/filewatch"
	"github.com/flanneld/flanneld/subnet"
)

// A fileWatch signals when any program has changed a file, or one whose name begins with the name of that file.
type fileWatch struct {
	*filewatch.Watch
	dir string // not the file, which is replaced
}

// watchFile returns the watch of a file. It signals nothing before again has succeeded, and ends with the context.
func watchFile(ctx context.Context, path string) (*fileWatch, error) {
	dir, name := filepath.Dir(path), filepath.Base(path)
	w, err := filewatch.New(ctx, func(changed string) bool {
		return changed == dir || strings.HasPrefix(filepath.Base(changed), name)
	})
	return &fileWatch{w, dir}, err
}

// again watches the directory, which is another one by now if it was removed, and
// makes it where it is missing. A directory that is watched already stays so. Called
// before the file is written or read, again lets no change go unnoticed.
func (f *fileWatch) again() error {
	if err := os.MkdirAll(f.dir, 0o755); err != nil { // as the file's first writer would
		return err
	}
	if err := f.Add(f.dir); err != nil && !errors.Is(err, fsnotify.ErrClosed) { // closed: flanneld ends
		return fmt.Errorf("inotify for %s: %w", f.dir, err)
	}
	return nil
}

// restoreManagersFile has the manager's file beside the subnet file written again, if
// there must be one and it is missing.
func (n *node) restoreManagersFile() {
	if k, ok := n.Manager.(subnet.FileKeeper); ok {
		k.RestoreFile()
	}
}

// writeFile writes the subnet file and logs a failure, which is retried. What other programs have added since is for
// the content that the file then had: it stays as long as that content is right.
func (n *node) writeFile() {
	unwatched := n.watchFileAgain()
	n.restoreManagersFile()
	env := n.planNode(n.Options).env
	write := env.WriteFile
	if env.Equal(n.fileEnv) {
		write = env.RestoreFile
	}
	err := write(n.SubnetFile)
	n.logOnce("Subnet file", err)
	if n.fileSet = err == nil; !n.fileSet {
		n.health.waitFor(err.Error())
		return // without the directory, the file cannot be watched for the same reason
	}
	n.fileEnv = env
	n.fileFights.Restored(n.SubnetFile)
	n.logOnce("Watching the subnet file", unwatched)
}

// watchFileAgain has the subnet file watched where it is now.
func (n *node) watchFileAgain() error {
	if n.file == nil {
		return nil
	}
	return n.file.again()
}

// checkFile finds out whether the subnet file still has the right content, and whether
// the manager's file is still there.
func (n *node) checkFile() {
	if !n.fileSet {
		return
	}
	unwatched := n.watchFileAgain()
	n.restoreManagersFile()
	file, err := subnet.ReadEnvFile(n.SubnetFile)
	if n.fileSet = err == nil && file.Has(n.planNode(n.Options).env); n.fileSet {
		n.logOnce("Watching the subnet file", unwatched)
		if len(file.Others) > 0 { // mk-docker-opts.sh has emptied the file, and writes to it
			n.fileFights.End(n.SubnetFile)
			n.recordFileFight()
		}
		return
	}
	n.filePaced = n.fileFights.Undone(n.SubnetFile, n.SubnetFile)
	n.fileFights.LogNew()
	n.recordFileFight()
	if n.fileFight == "" { // the log has each of the first changes, and then the fight
		n.log.Info("The subnet file was changed or removed by another program; writing it again", "path", n.SubnetFile)
		return
	}
	n.metrics.failed("Subnet file")
}

// newFileFights returns the detector of fights over the subnet file.
func newFileFights(log klog.Logger) *fight.Detector[string, string] {
	return fight.New[string, string](log, fight.Options{
		Times: 20,
		Burst: 50 * time.Millisecond,
		Calm:  time.Minute,
		Pace:  time.Second,

		Message: "Another program changes or removes the subnet file again and again; writing it at most once per second",
		Key:     "path",
		Fix:     fileFightFix,
	})
}

const fileFightFix = "If another flanneld, of another network namespace or container, has the same --subnet-file, give it " +
	"another one. `auditctl -w PATH -p wa` finds other programs"

// recordFileFight takes note of the beginning and of the end of a fight over the subnet file.
func (n *node) recordFileFight() {
	message := ""
	if path := n.fileFights.Latest(); path != "" {
		message = fmt.Sprintf("Another program changes or removes %s again and again. %s", path, fileFightFix)
	}
	if message != n.fileFight {
		n.fileFight = message
		n.recordEvent("subnet-file", "SubnetFileFight", message)
	}
}
