package wireguard

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/atomicfile"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/retry"
)

// learned are the endpoints of peers that are not where their leases say, by device and public key.
type learned map[string]map[wgtypes.Key]netip.AddrPort

// maxLearned is the size of the largest file of learned endpoints that is read, in bytes: 100 for each of 20000 peers.
const maxLearned = 2 << 20

// endpointFile returns the path of the learned endpoints, beside the private key. They outlive a restart of the daemon:
// nobody can tell where a peer behind NAT is until its next packet, which may take minutes.
func (h Host) endpointFile() string { return h.KeyFile + ".endpoints" }

// readLearned reads the file of learned endpoints. A file that does not exist has none.
func readLearned(path string) (learned, error) {
	text, err := atomicfile.ReadTrusted(path, maxLearned)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("the endpoints of peers: %w", err)
	}
	var file map[string]map[string]netip.AddrPort
	if err := json.Unmarshal(text, &file); err != nil {
		return nil, fmt.Errorf("the endpoints of peers: %s: %s", path, plain.Text(err.Error()))
	}
	all := learned{}
	for dev, peers := range file {
		all[dev] = map[wgtypes.Key]netip.AddrPort{}
		for text, endpoint := range peers {
			key, err := wgtypes.ParseKey(text)
			if err != nil || !endpoint.IsValid() || endpoint.Port() == 0 {
				return nil, fmt.Errorf("the endpoints of peers: %s has a wrong key or endpoint: delete it", path)
			}
			all[dev][key] = endpoint
		}
	}
	return all, nil
}

// write writes the file of learned endpoints.
func (l learned) write(path string) error {
	file := map[string]map[string]netip.AddrPort{}
	for dev, peers := range l {
		file[dev] = map[string]netip.AddrPort{}
		for key, endpoint := range peers {
			file[dev][key.String()] = endpoint
		}
	}
	text, err := json.Marshal(file)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o755)
	}
	if err == nil {
		err = atomicfile.Write(path, append(text, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("the endpoints of peers behind NAT, which will not be known after a restart: %w", err)
	}
	return nil
}

func (l learned) equal(other learned) bool {
	return maps.EqualFunc(l, other, func(a, b map[wgtypes.Key]netip.AddrPort) bool { return maps.Equal(a, b) })
}

// A memory keeps the learned endpoints in their file.
type memory struct {
	path    string
	written learned
	err     retry.LastError
}

// read reads the file.
func (m *memory) read(log klog.Logger) {
	var err error
	if m.written, err = readLearned(m.path); err != nil {
		log.Error(err, "Peers behind NAT cannot be reached until they send")
	}
}

// keep writes the file, if what the devices have learned has changed.
func (m *memory) keep(log klog.Logger, devices []*deviceSync) {
	now := learned{}
	for _, d := range devices {
		if peers := d.peerStates.elsewhere(); len(peers) > 0 {
			now[d.dev] = peers
		}
	}
	if now.equal(m.written) {
		return
	}
	err := now.write(m.path)
	if err == nil {
		m.written = now
	}
	m.err.Log(log, "wireguard", err)
}
