package kernel

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TUN is the type of a device whose IP packets a program reads and writes (Documentation/networking/tuntap.rst of the
// kernel). The device has several queues, and stays when the program ends, so that its routes stay.
type TUN struct{}

func (TUN) lower() string { return "" }

func (TUN) String() string { return "tun multi_queue" }

// TUNClone is the file that gives access to TUN devices (linux/if_tun.h).
const TUNClone = "/dev/net/tun"

// tunFlags describe a queue of such a device: packets are preceded by a struct virtio_net_hdr, not by the older
// struct tun_pi.
const tunFlags = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE

// addTUN creates the device, which netlink cannot.
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
	request.SetUint16(tunFlags | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("TUNSETPERSIST: %w", err)
	}
	return nil
}

// ErrNoDevice says that there is no such device.
var ErrNoDevice = errors.New("no such device")

// OpenTUN opens one more queue of a TUN device, which must exist: a Reconciler creates it. Reads do not block.
func OpenTUN(name string) (fd int, err error) {
	if _, err := netlink.LinkByName(name); err != nil {
		return -1, fmt.Errorf("%s: %w", name, ErrNoDevice)
	}
	fd, err = unix.Open(TUNClone, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", TUNClone, err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(tunFlags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("attaching to %s: %w", name, err)
	}
	return fd, nil
}

// isTUN tells whether a device is a TUN as ours are. Linux before 4.20 says no more than that it is a TUN or a TAP.
func isTUN(t *netlink.Tuntap) bool {
	return t.Mode == 0 || t.Mode == unix.IFF_TUN && !t.NonPersist && t.Flags&netlink.TUNTAP_MULTI_QUEUE != 0
}
