package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/flanneld/flanneld/pkg/filewatch"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// configEvery is how soon a change of the configuration's file is seen that inotify did not report.
	configEvery = time.Minute

	// writeTime is how long a program may take to write the file: until then, a file that cannot be used may be incomplete.
	writeTime = 200 * time.Millisecond
)

// Config implements subnet.Manager. The file comes with the pod: if it is missing, waiting does not help.
func (m *Manager) Config(context.Context) (*subnet.Config, error) {
	text, err := os.ReadFile(m.options.ConfigPath)
	if err != nil {
		return nil, fmt.Errorf("--net-config-path: %w (in a pod, the ConfigMap kube-flannel-cfg has it)", err)
	}
	cfg, err := m.parseConfig(text)
	if err != nil {
		return nil, err
	}
	m.configured = text
	m.setNetworks(cfg.Networks())
	return cfg, nil
}

func (m *Manager) parseConfig(text []byte) (*subnet.Config, error) {
	cfg, err := subnet.ParseConfig(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.options.ConfigPath, err)
	}
	return cfg, nil
}

// Configs implements subnet.Manager. A configuration that does not suit the Node's podCIDRs is refused until the Node is
// another one.
func (m *Manager) Configs(ctx context.Context) <-chan *subnet.Config {
	out := make(chan *subnet.Config)
	f := configFile{Manager: m, known: m.configured}
	go func() {
		defer close(out)
		f.watch(ctx)
		for {
			f.read(ctx)
			node, changed := f.suits()
			if f.next != nil && node {
				select {
				case out <- f.next:
					f.next = nil
				case <-ctx.Done():
					return
				case <-m.ctx.Done():
					return
				}
			}
			if f.wait(ctx, changed) != nil {
				return
			}
		}
	}()
	return out
}

// A configFile follows the configuration's file.
type configFile struct {
	*Manager
	changes *filewatch.Watch // nil: the file is only read every configEvery
	known   []byte           // the content that was parsed last
	next    *subnet.Config   // which is to be sent; nil: none

	unread, unwatched, unsuitable retry.LastError
}

// watch begins to watch the directories of the file. The file of a mounted ConfigMap never changes: kubelet replaces a
// symbolic link beside it, ..data, and removes the directory that the link named before.
func (f *configFile) watch(ctx context.Context) {
	dir, name := filepath.Split(f.options.ConfigPath)
	var err error
	f.changes, err = filewatch.New(ctx, func(changed string) bool {
		base := filepath.Base(changed)
		return base == name || base == "..data" || changed == filepath.Clean(dir)
	})
	if err != nil {
		f.logUnwatched(err)
	}
}

func (f *configFile) logUnwatched(err error) {
	if f.unwatched.Changed(err) && err != nil {
		f.log.Error(err, "Cannot watch the file of the network's configuration; it is read once a minute",
			"path", f.options.ConfigPath)
	}
}

// watchAgain watches the directories in which the file and what it links to are now.
func (f *configFile) watchAgain() {
	if f.changes == nil {
		return
	}
	path := f.options.ConfigPath
	err := f.changes.Add(filepath.Dir(path))
	if target, linked := filepath.EvalSymlinks(path); linked == nil && err == nil {
		err = f.changes.Add(filepath.Dir(target))
	}
	if !errors.Is(err, fs.ErrNotExist) { // read logs a file that is missing
		f.logUnwatched(err)
	}
}

// read reads the file, and logs once what is wrong with it.
func (f *configFile) read(ctx context.Context) {
	f.watchAgain()
	text, err := os.ReadFile(f.options.ConfigPath)
	if err == nil && bytes.Equal(text, f.known) {
		f.logUnread(nil)
		return
	}
	var cfg *subnet.Config
	if err == nil {
		cfg, err = f.parseConfig(text)
	}
	if err != nil { // the file may be incomplete, or about to be replaced
		if retry.Sleep(ctx, writeTime) != nil {
			return
		}
		now, unread := os.ReadFile(f.options.ConfigPath)
		if unread != nil {
			f.logUnread(unread)
			return
		}
		text = now
		cfg, err = f.parseConfig(text)
	}
	f.logUnread(nil)
	if bytes.Equal(text, f.known) {
		return
	}
	f.known, f.next, f.unsuitable = text, cfg, ""
	if err != nil {
		f.next = nil
		f.log.Error(err, "The new configuration is refused; the old one stays in force")
	}
}

// logUnread logs that the file cannot be read, or can be read again.
func (f *configFile) logUnread(err error) {
	switch {
	case !f.unread.Changed(err):
	case err == nil:
		f.log.Info("The file of the network's configuration can be read again", "path", f.options.ConfigPath)
	default:
		f.log.Error(err, "The file of the network's configuration cannot be read; the configuration stays in force here, "+
			"but flanneld does not start again without the file", "path", f.options.ConfigPath)
	}
}

// suits tells whether the next configuration suits the Node as it is now. If it does not, suits logs why, once. The
// channel is closed when the Node changes.
func (f *configFile) suits() (ok bool, changed <-chan struct{}) {
	f.mu.Lock()
	own, changed := f.own, f.changed
	f.mu.Unlock()
	if f.next == nil || own == nil {
		return false, changed
	}
	err := f.unsuited(own, f.next)
	if f.unsuitable.Changed(err) && err != nil {
		f.log.Error(err, "The new configuration is refused; the old one stays in force")
	}
	return err == nil, changed
}

// wait waits until the file, or the Node for which a configuration waits, has changed, or may have changed.
func (f *configFile) wait(ctx context.Context, node <-chan struct{}) error {
	var changes <-chan struct{}
	if f.changes != nil {
		changes = f.changes.C
	}
	if f.next == nil {
		node = nil
	}
	due := time.NewTimer(configEvery)
	defer due.Stop()
	select {
	case <-changes:
	case <-node:
	case <-due.C:
	case <-ctx.Done():
		return ctx.Err()
	case <-f.ctx.Done():
		return f.ctx.Err()
	}
	return nil
}

// unsuited returns why a configuration cannot work with the podCIDRs of a Node. One that no longer has the network of a
// podCIDR can work, if that network is then retired: nodes stay where they are.
func (m *Manager) unsuited(own *ownNode, cfg *subnet.Config) error {
	on, _ := m.networks()
	retained := cfg.Retain(cfg.Removed(on)).Networks()
	for f, pool := range cfg.Pools().Each() {
		have := own.subnets.Of(f)
		switch {
		case !pool.Enabled():
		case !have.IsValid():
			return fmt.Errorf("Node %s has no %s podCIDR, which the Network %s in %s needs: its podCIDRs are %s",
				m.name, f, subnet.NetworksOf(pool.Networks()...), m.options.ConfigPath, own.subnets)
		case !retained.Network(have).IsValid():
			return m.outside(have, pool)
		}
	}
	return nil
}

// outside is the error of a podCIDR that is not in a network.
func (m *Manager) outside(podCIDR netip.Prefix, pool subnet.Pool) error {
	return fmt.Errorf("the podCIDR %s of Node %s is outside the Network %s in %s: make Network the same as "+
		"--cluster-cidr of kube-controller-manager, or add that to Networks",
		podCIDR, m.name, subnet.NetworksOf(pool.Networks()...), m.options.ConfigPath)
}
