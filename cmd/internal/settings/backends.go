package settings

import (
	"os"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/wireguard"
)

// hosts return backends that a build tag can leave out, with what the environment of the process says about this host.
var hosts []func() backend.Type

// RegisterBackends registers the backends with what the environment of the process says about this host. The variables
// are flannel's and wireguard-go's, and those of clouds' tools.
func RegisterBackends() {
	for _, host := range hosts {
		backend.Register(host())
	}
	backend.Register(wireguard.Host{
		KeyFile:   os.Getenv("WIREGUARD_KEY_FILE"),
		UserSpace: os.Getenv("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD") == "1",
	}.Type())
}
