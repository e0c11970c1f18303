package extension

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/subnet"
)

// A record is what SubnetAddCommand was run with, by peer, and so what is to be
// removed when the peer is gone, though flanneld was down when it left. It is
// kept in a file.
type record map[subnet.Subnets]call

// readRecord returns what an earlier life has recorded, if anything.
func readRecord(path string) record {
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
		klog.Warningf("Peers that left while flanneld was down may not all be removed: %s: %v", path, err)
	}
	return r
}

// write replaces the file atomically. Only root may read it, or write what root
// will run.
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
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := renameio.WriteFile(path, text, 0o600, renameio.WithTempDir(dir), renameio.WithStaticPermissions(0o600)); err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	return nil
}

// cleanup finds what SubnetAddCommand has added for peers, from the records of all
// networks that the node has had.
func cleanup(_ context.Context, cfg *subnet.Config, _ subnet.Env) (backend.Cleanup, error) {
	pattern := filepath.Join(stateDir, "extension-*.json")
	c := backend.Cleanup{Files: []string{pattern}}
	files, err := filepath.Glob(pattern)
	for _, file := range files {
		r := readRecord(file)
		for _, s := range slices.SortedFunc(maps.Keys(r), func(a, b subnet.Subnets) int { return strings.Compare(a.Key(), b.Key()) }) {
			c.Steps = append(c.Steps, r[s].removal(s))
		}
	}
	var o options
	if cfg != nil && cfg.BackendType == Type && backend.Options(cfg, &o) == nil && o.PostStartupCommand != "" {
		note := "what PostStartupCommand has done"
		if o.ShutdownCommand != "" {
			note += ", if flanneld was killed: else it has run ShutdownCommand"
		}
		c.Notes = append(c.Notes, note)
	}
	return c, err
}

// removal returns the removal of a peer, as flanneld would do it.
func (c call) removal(s subnet.Subnets) backend.CleanupStep {
	command := "printf '%s\\n' " + quote(c.Data) + " | env"
	for _, v := range c.Variables {
		command += " " + quote(v)
	}
	return backend.CleanupStep{Command: command + " sh -c " + quote(c.Remove), Do: func(ctx context.Context) error {
		_, err := runner{timeLimit, graceLimit}.run(ctx, "SubnetRemoveCommand for "+s.String(), c.Remove, c.Variables[:], c.Data)
		return err
	}}
}

// quote writes a text so that a shell takes it for one word.
func quote(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }
