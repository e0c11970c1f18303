package udp

import (
	"encoding/binary"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/kernel"
)

// offloads are the offloads of the kernel that are used. Without an offload, packets are moved one by one.
type offloads struct {
	tso        bool // many segments of a TCP stream at once, from and to the device
	uso        bool // the same for UDP; Linux 6.2
	udpSegment bool // many datagrams at once to the socket; Linux 4.18
	udpGRO     bool // the same from the socket; Linux 5.0
}

var allOffloads = offloads{true, true, true, true}

// A virtioHeader precedes each packet of the device (struct virtio_net_hdr, linux/virtio_net.h). A packet may be a
// burst: many packets of one size, of which the last may be smaller, with one set of headers for all.
type virtioHeader struct {
	flags, gso   uint8
	header       uint16 // length of the headers
	size         uint16 // of the payload of each packet of a burst
	start, check uint16 // where the checksummed part begins; where the checksum is, from there
}

const virtioSize = int(unsafe.Sizeof(virtioHeader{}))

func (h *virtioHeader) bytes() []byte {
	return (*[virtioSize]byte)(unsafe.Pointer(h))[:]
}

func readVirtio(b []byte) virtioHeader {
	n := binary.NativeEndian
	return virtioHeader{b[0], b[1], n.Uint16(b[2:]), n.Uint16(b[4:]), n.Uint16(b[6:]), n.Uint16(b[8:])}
}

// A tun is the open device. It has a single queue: with more queues, the kernel moves a connection to the queue on
// which the last packet of the connection came in (tun_flow_update, drivers/net/tun.c), and packets overtake each
// other.
type tun struct {
	file     *os.File
	raw      syscall.RawConn
	offloads offloads
}

// attach opens the device.
func attach(use offloads) (*tun, error) {
	fd, err := kernel.OpenTUN(device)
	if err != nil {
		return nil, err
	}
	t := &tun{offloads: use}
	t.setOffloads(fd)
	t.file = os.NewFile(uintptr(fd), device) // non-blocking: the runtime waits for packets
	if t.raw, err = t.file.SyscallConn(); err != nil {
		t.file.Close()
		return nil, fmt.Errorf("attaching to %s: %w", device, err)
	}
	return t, nil
}

// setOffloads has the kernel hand out bursts. An offload that the kernel lacks is turned off.
func (t *tun) setOffloads(fd int) {
	set := func(flags int) bool { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, flags) == nil }
	const tso, uso = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6, unix.TUN_F_USO4 | unix.TUN_F_USO6
	use := &t.offloads
	use.uso = use.tso && use.uso && set(tso|uso)
	use.tso = use.uso || use.tso && set(tso)
	if !use.tso {
		set(0)
	}
}

// writev is the system call, without the allocations of x/sys/unix's.
func writev(fd uintptr, iovs []unix.Iovec, brief bool) error {
	for {
		_, errno := syscall3(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&iovs[0])), uintptr(len(iovs)), brief)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// read is the system call.
func read(fd uintptr, b []byte) (int, error) {
	n, errno := syscall3(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), true)
	if errno != 0 {
		return 0, errno
	}
	return n, nil
}
