package network

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/flanneld/flanneld/subnet"
)

// Whatever somebody does to the subnet file, or to its directory, it is there
// again, and looked after as before.
func TestSubnetFile(t *testing.T) {
	m := newManager(vxlanConfig)
	d := begin(t, m, func(o *Options) { o.KernelResync = time.Hour })
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	dir := filepath.Dir(d.file)
	for _, harm := range []struct {
		what string
		do   func() error
	}{
		{"the file removed", func() error { return os.Remove(d.file) }},
		{"the directory removed", func() error { os.Remove(d.file); return os.RemoveAll(dir) }},
		{"the file removed from the new directory", func() error { return os.Remove(d.file) }},
		{"the directory moved", func() error { return os.Rename(dir, dir+".old") }},
		{"the file emptied in the new directory", func() error { return os.Truncate(d.file, 0) }},
	} {
		if err := harm.do(); err != nil && !os.IsExist(err) { // for it may come back as it goes
			t.Fatalf("%s: %v", harm.what, err)
		}
		eventually(t, "the file after "+harm.what, func() bool {
			env, err := subnet.ReadEnv(d.file)
			return err == nil && env.Subnets.Key() == "10.5.1.0-24"
		})
	}
}
