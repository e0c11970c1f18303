package etcd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/pkg/atomicfile"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// A keptRecord is this node's record as it was when this node wrote or found it last, in JSON in Options.LeaseFile. It
// outlives a restart of the daemon: a node whose public address has changed meanwhile recognizes its lease by it.
// Nothing in etcd does that, since upstream's records name nodes by their addresses alone.
type keptRecord struct {
	Key      string // in etcd
	Revision int64  // of the last change of the key
	Value    string // the JSON of subnet.Attrs
	Next     string `json:",omitempty"` // what this node was about to write as the value; it may have done so
	Identity string // of the machine, see Options: a copy of a machine must not take the lease of the original
}

// maxKept is the size of the largest LeaseFile that is read, in bytes.
const maxKept = 64 << 10

// readKept reads LeaseFile into m.wrote and m.next, and its addresses into m.known. A file that does not exist leaves
// them empty. The record is not ours if another machine wrote the file: then this machine may be a copy of that one.
// Its addresses are good to prefer all the same, since only one machine can have them.
func (m *Manager) readKept() error {
	if m.options.LeaseFile == "" {
		return nil
	}
	text, err := atomicfile.ReadTrusted(m.options.LeaseFile, maxKept)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	var k keptRecord
	if err := json.Unmarshal(text, &k); err != nil {
		return fmt.Errorf("%s: %s", m.options.LeaseFile, plain.Text(err.Error()))
	}
	r := record{key: k.Key, changed: k.Revision, value: []byte(k.Value)}
	if !strings.HasPrefix(k.Key, m.subnetsPrefix()) {
		return nil // of another network
	}
	if r.subnets, err = subnet.ParseKey(strings.TrimPrefix(r.key, m.subnetsPrefix())); err != nil {
		return fmt.Errorf("%s: %w", m.options.LeaseFile, err)
	}
	if r.attrs, err = subnet.ParseAttrs(r.value); err != nil {
		return fmt.Errorf("%s: %w", m.options.LeaseFile, err)
	}
	r.valid = true
	m.known = r.attrs.PublicIPs()
	if k.Identity != m.options.Identity {
		m.log.Info("The file with this node's lease is of another machine, or of this one under another host name; "+
			"the lease counts only at the same public address", "path", m.options.LeaseFile, "subnet", r.subnets)
		return nil
	}
	m.wrote, m.next = r, []byte(k.Next)
	return nil
}

// isWrote tells whether a record is as this node wrote or found it last: nobody has written the record since.
func (m *Manager) isWrote(r record) bool { return r.key == m.wrote.key && r.changed == m.wrote.changed }

// setWrote records this node's record as this node wrote or found it last, and writes LeaseFile.
func (m *Manager) setWrote(r record) {
	changed := !m.isWrote(r)
	m.wrote = r
	if changed || !m.file.isWritten() {
		m.keep(nil)
	}
}

// keep writes LeaseFile. Next is what this node is about to write as the value of its record, if anything: a daemon
// that is killed after that recognizes its record all the same.
func (m *Manager) keep(next []byte) {
	if m.options.LeaseFile == "" {
		return
	}
	r := m.wrote
	text, err := json.Marshal(keptRecord{
		Key: r.key, Revision: r.changed, Value: string(r.value), Next: string(next), Identity: m.options.Identity,
	})
	if err != nil {
		m.log.Error(err, "Cannot keep this node's lease in a file")
		return
	}
	m.file.mu.Lock()
	defer m.file.mu.Unlock()
	m.file.text = append(text, '\n')
	m.writeLeaseFile()
}

// A leaseFile is the state of LeaseFile.
type leaseFile struct {
	mu      sync.Mutex
	text    []byte // what the file must have; nil: nothing was written yet
	written bool   // and that succeeded
	err     retry.LastError
}

func (f *leaseFile) isWritten() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.written
}

// writeLeaseFile writes LeaseFile. The caller holds m.file.mu.
func (m *Manager) writeLeaseFile() {
	f := &m.file
	err := os.MkdirAll(filepath.Dir(m.options.LeaseFile), 0o755)
	if err == nil {
		err = atomicfile.Write(m.options.LeaseFile, f.text, 0o600) // backend data may be for this network's nodes only
	}
	f.written = err == nil
	if f.err.Changed(err) && err != nil {
		m.log.Error(err, "Cannot keep this node's lease in a file: "+
			"with another public address after a restart, this node would get another subnet")
	}
}

// RestoreFile implements subnet.FileKeeper. A file with another content stays: it may be that of a flanneld that shares
// the directory, which would restore its own.
func (m *Manager) RestoreFile() {
	m.file.mu.Lock()
	defer m.file.mu.Unlock()
	if m.file.text == nil {
		return
	}
	if m.file.written {
		if _, err := os.Lstat(m.options.LeaseFile); !errors.Is(err, fs.ErrNotExist) {
			return
		}
		m.log.Info("The file with this node's lease was removed by another program; writing it again",
			"path", m.options.LeaseFile)
	}
	m.writeLeaseFile()
}

// recall lists the records, and finds out, once, whether the record of LeaseFile is still this node's, now that its
// public addresses are self's. It is not, if another program has written the record since, or if a daemon with this
// machine's identity lives at the addresses that the record names: this machine is then a copy of that one. Another
// machine may live there: a node that takes a record by its address writes it, see publish, so that machine has not
// taken this one. If the record is this node's, and has other addresses, recall writes self's into it: of several
// copies of a machine that start together, one is the first, and the others publish nothing that the record has.
func (m *Manager) recall(ctx context.Context, self subnet.Attrs) (records []record, at watchPoint, err error) {
	pause := subnet.Backoff()
	for {
		if records, at, err = m.list(ctx); err != nil || m.recalled {
			return records, at, err
		}
		i := slices.IndexFunc(records, func(r record) bool { return r.key == m.wrote.key })
		if i >= 0 && records[i].changed > m.wrote.changed && len(m.next) > 0 && bytes.Equal(records[i].value, m.next) {
			m.setWrote(records[i]) // this node was ended before it knew that the value was written
		}
		const fix = "a copy of a machine needs a /etc/machine-id of its own, and none of the files "
		switch {
		case m.wrote.key == "":
			m.recalled = true
		case i >= 0 && (records[i].changed != m.wrote.changed || !bytes.Equal(records[i].value, m.wrote.value)):
			if !sameNode(records[i].attrs, self) {
				m.log.Error(nil, "Another node has the lease that this node had before; leaving the lease to it",
					"addresses", records[i].attrs.PublicIPs(), "subnet", m.wrote.subnets, "fix", "if that is a copy of this machine: "+
						fix+m.options.LeaseFile)
			}
			m.forget()
		case sameNode(m.wrote.attrs, self):
			m.recalled = true
		case i < 0:
			// Nothing proves that no copy of this machine publishes the same.
			m.wrote, m.recalled = record{key: m.wrote.key}, true
		default:
			former := slices.DeleteFunc(m.wrote.attrs.PublicIPs(), func(ip netip.Addr) bool {
				return slices.Contains(self.PublicIPs(), ip)
			})
			holders, copied, err := m.findCopy(ctx, former)
			if err != nil {
				return nil, watchPoint{}, err
			}
			if copied != nil {
				m.log.Error(nil, "A copy of this machine lives at this node's former public address; leaving it the lease",
					"address", copied.ip, "hostname", plain.Text(copied.Hostname), "subnet", m.wrote.subnets,
					"fix", fix+m.options.LeaseFile)
				m.forget()
				break
			}
			r, ok, err := m.move(ctx, records[i], self, holders)
			if err != nil {
				return nil, watchPoint{}, err
			}
			if !ok { // another program was faster: find out which
				if err := pause.Sleep(ctx); err != nil {
					return nil, watchPoint{}, err
				}
				break
			}
			m.log.Info("This node's public address changed; it takes its lease along", "subnet", r.subnets,
				"addresses", self.PublicIPs(), "before", records[i].attrs.PublicIPs())
			m.setWrote(r)
			m.recalled = true
		}
	}
}

// forget forgets the record of LeaseFile, which is not this node's.
func (m *Manager) forget() { m.wrote, m.recalled = record{}, true }

// move writes self's public addresses into a record. If another program is faster, with the record or with one of the
// former addresses, whose holders are given, ok is false, and nothing is written.
func (m *Manager) move(ctx context.Context, from record, self subnet.Attrs, holders []holder) (
	r record, ok bool, err error,
) {
	if err := m.claimAll(ctx, self.PublicIPs()); err != nil {
		return record{}, false, err
	}
	var unchanged []clientv3.Cmp
	for _, h := range holders {
		unchanged = append(unchanged, clientv3.Compare(clientv3.ModRevision(h.key), "=", h.changed))
	}
	attrs := from.attrs
	attrs.PublicIP, attrs.PublicIPv6 = self.PublicIP, self.PublicIPv6
	value, err := json.Marshal(attrs)
	if err != nil {
		return record{}, false, err
	}
	r, _, ok, err = m.publish(ctx, from, from.key, value, unchanged...)
	return r, ok, err
}

// findCopy returns who holds the addresses, and which of the holders is alive and has this machine's identity, if one
// is and has.
func (m *Manager) findCopy(ctx context.Context, ips []netip.Addr) (holders []holder, copied *holder, err error) {
	for asked := false; ; asked = true {
		holders, _, err := m.holders(ctx, ips)
		if err != nil {
			return nil, nil, err
		}
		var own []holder
		for _, h := range holders {
			if h.changed != 0 && !h.isOther(m.options.Identity) {
				own = append(own, h)
			}
		}
		for _, h := range own {
			if asked || h.lease == clientv3.NoLease {
				return holders, &h, nil
			}
		}
		if len(own) == 0 {
			return holders, nil, nil
		}
		if _, err := m.silent(ctx, own); err != nil {
			return nil, nil, err
		}
	}
}
