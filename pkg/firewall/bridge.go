package firewall

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// BridgeNetfilter returns nil when iptables sees packets that pass between pods
// on one bridge, as iptables mode needs. Otherwise the error says what does not
// work and what to run.
func BridgeNetfilter() error { return bridgeNetfilter("/proc/sys/net/bridge") }

func bridgeNetfilter(sysctls string) error {
	_, err := os.Stat(sysctls)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is missing, so the kernel module br_netfilter is not loaded: packets bridged between pods "+
			"of this node would bypass iptables, and pods would not reach services backed by a pod of their own node. "+
			"Run `modprobe br_netfilter`, and `echo br_netfilter >/etc/modules-load.d/br_netfilter.conf` to have it "+
			"after a reboot; "+
			`or set "EnableNFTables": true in the network configuration`, sysctls)
	}
	return err
}
