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
	return !errors.Is(p.askNFT(unix.NFT_MSG_GETTABLE, unix.NFT_MSG_NEWTABLE, name, ""), unix.ENOENT)
}

// hasEBTables returns whether ebtables has a table in nftables.
func hasEBTables() bool {
	bridge := protocol{nfproto: unix.NFPROTO_BRIDGE}
	for _, table := range []string{"filter", "nat", "broute"} {
		if bridge.askNFT(unix.NFT_MSG_GETTABLE, unix.NFT_MSG_NEWTABLE, table, "") == nil {
			return true
		}
	}
	return false
}

// hasChain returns whether a chain exists in a table of nftables. iptables-nft-save shows no chain of a table as soon
// as one of the table's rules is none that iptables knows.
func (p protocol) hasChain(table, name string) bool {
	return p.askNFT(unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_NEWCHAIN, table, name) == nil
}

// askNFT asks the kernel for a table of nftables or, if chain is not "", for one of its chains. The kernel answers with
// a message, or with an error.
func (p protocol) askNFT(get, answer int, table, chain string) error {
	const subsystem = unix.NFNL_SUBSYS_NFTABLES << 8
	req := nl.NewNetlinkRequest(subsystem|get, 0)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: p.nfproto, Version: unix.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(unix.NFTA_CHAIN_TABLE, nl.ZeroTerminated(table))) // the number of NFTA_TABLE_NAME, too
	if chain != "" {
		req.AddData(nl.NewRtAttr(unix.NFTA_CHAIN_NAME, nl.ZeroTerminated(chain)))
	}
	_, err := req.Execute(unix.NETLINK_NETFILTER, uint16(subsystem|answer))
	return err
}
