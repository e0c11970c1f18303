package firewall

import (
	"errors"
	"io/fs"
	"os"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// hasTable returns whether a table exists in the calling thread's network namespace: a table of nftables, where
// iptables-nft has its tables, too, or else one of iptables-legacy. Asking the kernel takes a hundredth of what a
// program takes to say that there are no rules. hasTable returns true where the kernel does not answer: the program
// knows why.
func (p protocol) hasTable(nft bool, name string) bool {
	if !nft {
		names, err := os.ReadFile("/proc/thread-self/net/" + p.nft + "_tables_names")
		if err != nil {
			return !errors.Is(err, fs.ErrNotExist) // without the file, iptables-legacy is not in the kernel
		}
		return strings.Contains("\n"+string(names), "\n"+name+"\n")
	}
	const subsystem = unix.NFNL_SUBSYS_NFTABLES << 8
	req := nl.NewNetlinkRequest(subsystem|unix.NFT_MSG_GETTABLE, 0)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: p.nfproto, Version: unix.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(unix.NFTA_TABLE_NAME, nl.ZeroTerminated(name)))
	_, err := req.Execute(unix.NETLINK_NETFILTER, subsystem|unix.NFT_MSG_NEWTABLE)
	return !errors.Is(err, unix.ENOENT)
}
