package kernel

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TUN is the type of a device whose IP packets a program reads and writes
// (Documentation/networking/tuntap.rst). The device is there whether or not the
// program is, so that its routes stay, and takes several queues.
type TUN struct{}

func (TUN) lower() string { return "" }

func (TUN) String() string { return "tun multi_queue" }

// TUNClone is the file that gives access to TUN devices (linux/if_tun.h).
const TUNClone = "/dev/net/tun"

// TUNFlags say what a queue of such a device is: packets are preceded by a
// struct virtio_net_hdr, not by the older struct tun_pi.
const TUNFlags = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE

// addTUN makes the device. Netlink cannot.
func addTUN(name string) error {
	fd, err := unix.Open(TUNClone, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w: load the module tun, and give a container this device", TUNClone, err)
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	request.SetUint16(TUNFlags | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("TUNSETPERSIST: %w", err)
	}
	return nil
}

// isTUN tells whether a device is a TUN. Linux tells more than the mere kind
// since 4.20.
func isTUN(t *netlink.Tuntap) bool {
	return t.Mode == 0 || t.Mode == unix.IFF_TUN && !t.NonPersist && t.Flags&netlink.TUNTAP_MULTI_QUEUE != 0
}
