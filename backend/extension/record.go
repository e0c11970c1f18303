package extension

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"k8s.io/klog/v2"

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
