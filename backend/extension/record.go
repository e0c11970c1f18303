package extension

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/atomicfile"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// A record holds what SubnetAddCommand was run with, by peer. The record is kept in a file, so that a peer that leaves
// while flanneld is down is removed later.
type record map[subnet.Subnets]call

// readRecord returns the record of an earlier process, if there is any.
func readRecord(log klog.Logger, path string) record {
	r := record{}
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return r
	}
	var file map[string]call
	if err == nil {
		err = json.Unmarshal(text, &file)
	}
	for key, c := range file {
		s, bad := subnet.ParseKey(key)
		if bad != nil {
			err = bad
			continue
		}
		r[s] = c
	}
	if err != nil {
		log.Error(err, "Cannot read the record of peers; those that left while flanneld was down may stay", "path",
			path)
	}
	return r
}

// write replaces the file atomically. Only root may read the file, and write commands that root will run.
func (r record) write(path string) error {
	if len(r) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	file := map[string]call{}
	for s, c := range r {
		file[s.Key()] = c
	}
	text, err := json.MarshalIndent(file, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(path, text, 0o600)
}

// cleanup finds what SubnetAddCommand has added for peers, from the records of all
// networks that the node has had.
func cleanup(ctx context.Context, cfg *subnet.Config, _ subnet.Env) (backend.Cleanup, error) {
	pattern := filepath.Join(stateDir, "extension-*.json")
	c := backend.Cleanup{Files: []string{pattern}}
	files, err := filepath.Glob(pattern)
	for _, file := range files {
		r := readRecord(klog.FromContext(ctx), file)
		byKey := func(a, b subnet.Subnets) int { return strings.Compare(a.Key(), b.Key()) }
		for _, s := range slices.SortedFunc(maps.Keys(r), byKey) {
			c.Steps = append(c.Steps, r[s].removal(s))
		}
	}
	var o options
	if cfg != nil && cfg.BackendType == Type && backend.Options(cfg, &o) == nil && o.PostStartupCommand != "" {
		note := "what PostStartupCommand has done"
		if o.ShutdownCommand != "" && o.RunShutdownCommand {
			note += ", if flanneld was killed: else it has run ShutdownCommand"
		}
		c.Notes = append(c.Notes, note)
	}
	return c, err
}

// removal returns the removal of a peer, as flanneld would do it.
func (c call) removal(s subnet.Subnets) backend.CleanupStep {
	command := "printf '%s\\n' " + plain.Shell(c.Data) + " | env"
	for _, v := range c.Variables {
		command += " " + plain.Shell(v)
	}
	return backend.CleanupStep{Command: command + " sh -c " + plain.Shell(c.Remove), Do: func(ctx context.Context) error {
		_, err := run(ctx, newRunner(), "SubnetRemoveCommand for "+s.String(), c.Remove, c.Variables[:], c.Data)
		return err
	}}
}
