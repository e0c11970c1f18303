package etcd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/pkg/atomicfile"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// A keptRecord is this node's record as it was when this node wrote or found it last, in JSON in Options.LeaseFile. It
// outlives a restart of the daemon: a node whose public address has changed meanwhile recognizes its lease by it.
// Nothing in etcd does that, since upstream's records name nodes by their addresses alone.
type keptRecord struct {
	Key      string // in etcd
	Revision int64  // of the last change of the key
	Value    string // the JSON of subnet.Attrs
	Identity string // of the machine, see Options: a copy of a machine must not take the lease of the original
}

// maxKept is the size of the largest LeaseFile that is read, in bytes.
const maxKept = 64 << 10

// readKept reads LeaseFile. The zero record stands for a file that does not exist. The record is not ours if another
// machine wrote the file: then this machine may be a copy of that one. Its addresses are good to prefer all the same,
// since only one machine can have them.
func (m *Manager) readKept() (r record, ours bool, err error) {
	if m.options.LeaseFile == "" {
		return record{}, false, nil
	}
	text, err := atomicfile.ReadTrusted(m.options.LeaseFile, maxKept)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return record{}, false, nil
	case err != nil:
		return record{}, false, err
	}
	var k keptRecord
	if err := json.Unmarshal(text, &k); err != nil {
		return record{}, false, fmt.Errorf("%s: %s", m.options.LeaseFile, plain.Text(err.Error()))
	}
	r = record{key: k.Key, changed: k.Revision, value: []byte(k.Value)}
	if !strings.HasPrefix(k.Key, m.subnetsPrefix()) {
		return record{}, false, nil // of another network
	}
	if r.subnets, err = subnet.ParseKey(strings.TrimPrefix(r.key, m.subnetsPrefix())); err != nil {
		return record{}, false, fmt.Errorf("%s: %w", m.options.LeaseFile, err)
	}
	if r.attrs, err = subnet.ParseAttrs(r.value); err != nil {
		return record{}, false, fmt.Errorf("%s: %w", m.options.LeaseFile, err)
	}
	r.valid = true
	if k.Identity != m.options.Identity {
		m.log.Info("The file with this node's lease is of another machine, or of this one under another host name; "+
			"the lease counts only at the same public address", "path", m.options.LeaseFile, "subnet", r.subnets)
		return r, false, nil
	}
	return r, true, nil
}

// setWrote records this node's record as this node wrote or found it last, and writes LeaseFile.
func (m *Manager) setWrote(r record) {
	changed := r.key != m.wrote.key || r.changed != m.wrote.changed
	m.wrote = r
	if m.options.LeaseFile == "" || !changed && m.kept {
		return
	}
	text, err := json.Marshal(keptRecord{Key: r.key, Revision: r.changed, Value: string(r.value), Identity: m.options.Identity})
	if err == nil {
		err = os.MkdirAll(filepath.Dir(m.options.LeaseFile), 0o755)
	}
	if err == nil {
		err = atomicfile.Write(m.options.LeaseFile, append(text, '\n'), 0o600) // backend data may be for this network's nodes only
	}
	m.kept = err == nil
	if m.keepError.Changed(err) && err != nil {
		m.log.Error(err, "Cannot keep this node's lease in a file: "+
			"with another public address after a restart, this node would get another subnet")
	}
}

// recall finds out, once, whether the record of LeaseFile is still this node's, now that its public addresses are
// self's. It is not, if another program has written the record since, or if a daemon lives at the addresses that the
// record names: this machine is then a copy of that one. If the record is this node's, and has other addresses, recall
// writes self's into it, here and in records: of several copies of a machine that start together, one is the first, and
// the others publish nothing that the record has.
func (m *Manager) recall(ctx context.Context, records []record, self subnet.Attrs) error {
	if m.recalled {
		return nil
	}
	i := slices.IndexFunc(records, func(r record) bool { return r.key == m.wrote.key })
	switch {
	case m.wrote.key == "":
	case i >= 0 && (records[i].changed != m.wrote.changed || !bytes.Equal(records[i].value, m.wrote.value)):
		m.wrote = record{}
	case sameNode(m.wrote.attrs, self):
	case i < 0:
		m.wrote = record{} // nothing proves that no copy of this machine publishes the same
	default:
		alive, err := m.anyAlive(ctx, m.wrote.attrs)
		if err != nil {
			return err
		}
		const fix = "a copy of a machine needs a /etc/machine-id of its own, and none of the files "
		if alive != nil {
			m.log.Error(nil, "Another node lives at the public address that this node had before; leaving it the lease",
				"address", alive.ip, "hostname", plain.Text(alive.Hostname), "subnet", m.wrote.subnets,
				"fix", fix+m.options.LeaseFile)
			m.wrote = record{}
			break
		}
		r, ok, err := m.move(ctx, records[i], self)
		if err != nil {
			return err
		}
		if !ok {
			m.log.Error(nil, "Another copy of this machine took the lease that this node had before, or lives at its address",
				"subnet", m.wrote.subnets, "fix", fix+m.options.LeaseFile)
			m.wrote = record{}
			break
		}
		m.log.Info("This node's public address changed; it takes its lease along", "subnet", r.subnets,
			"addresses", self.PublicIPs(), "before", records[i].attrs.PublicIPs())
		m.setWrote(r)
		records[i] = r
	}
	m.recalled = true
	return nil
}

// move writes self's public addresses into a record. If another program is faster, or a daemon lives at one of the
// former addresses by now, ok is false, and nothing is written.
func (m *Manager) move(ctx context.Context, from record, self subnet.Attrs) (r record, ok bool, err error) {
	ips := self.PublicIPs()
	if err := m.claimAll(ctx, ips); err != nil {
		return record{}, false, err
	}
	var deserted []clientv3.Cmp
	for _, ip := range from.attrs.PublicIPs() {
		if !slices.Contains(ips, ip) {
			deserted = append(deserted, clientv3.Compare(clientv3.CreateRevision(m.nodeKey(ip)), "=", 0))
		}
	}
	attrs := from.attrs
	attrs.PublicIP, attrs.PublicIPv6 = self.PublicIP, self.PublicIPv6
	value, err := json.Marshal(attrs)
	if err != nil {
		return record{}, false, err
	}
	r, _, ok, err = m.publish(ctx, from, from.key, value, deserted...)
	return r, ok, err
}

// anyAlive returns a node that is alive on one of the addresses; nil: there is none.
func (m *Manager) anyAlive(ctx context.Context, a subnet.Attrs) (*holder, error) {
	holders, _, err := m.holders(ctx, a.PublicIPs())
	if err != nil {
		return nil, err
	}
	holders = slices.DeleteFunc(holders, func(h holder) bool { return h.changed == 0 })
	for _, h := range holders {
		if h.lease == clientv3.NoLease {
			return &h, nil
		}
	}
	if len(holders) == 0 {
		return nil, nil
	}
	dead, err := m.silent(ctx, holders)
	if err != nil {
		return nil, err
	}
	for _, h := range holders {
		if !slices.ContainsFunc(dead, func(d holder) bool { return d.key == h.key }) {
			return &h, nil
		}
	}
	return nil, nil
}
