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

// Abilities are what of the kernel's offloads is used. Where one is missing,
// packets are moved one by one.
type abilities struct {
	tso        bool // many segments of a TCP stream at once, from and to the device
	uso        bool // the same for UDP; Linux 6.2
	udpSegment bool // many datagrams at once to the socket; Linux 4.18
	udpGRO     bool // the same from the socket; Linux 5.0
}

var everything = abilities{true, true, true, true}

// A virtioHeader precedes each packet of the device (struct virtio_net_hdr,
// linux/virtio_net.h). A packet may be a burst: many of one size, and the last
// one maybe smaller, with one header between them.
type virtioHeader struct {
	flags, gso   uint8
	header       uint16 // length of the headers
	size         uint16 // of the payload of each packet of a burst
	start, check uint16 // the checksum begins, and from there is written, here
}

const virtioSize = int(unsafe.Sizeof(virtioHeader{}))

func (h *virtioHeader) bytes() []byte {
	return (*[virtioSize]byte)(unsafe.Pointer(h))[:]
}

func readVirtio(b []byte) virtioHeader {
	n := binary.NativeEndian
	return virtioHeader{b[0], b[1], n.Uint16(b[2:]), n.Uint16(b[4:]), n.Uint16(b[6:]), n.Uint16(b[8:])}
}

// A queue is one of the device's.
type queue struct {
	file *os.File
	raw  syscall.RawConn
	able abilities
}

// attach opens one more queue of the device.
func attach(able abilities) (*queue, error) {
	fd, err := kernel.OpenTUN(device)
	if err != nil {
		return nil, err
	}
	q := &queue{able: able}
	q.offload(fd)
	q.file = os.NewFile(uintptr(fd), device) // non-blocking: the runtime waits for it
	if q.raw, err = q.file.SyscallConn(); err != nil {
		q.file.Close()
		return nil, fmt.Errorf("attaching to %s: %w", device, err)
	}
	return q, nil
}

// offload has the kernel hand out bursts, as far as it can.
func (q *queue) offload(fd int) {
	set := func(flags int) bool { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, flags) == nil }
	const tso, uso = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6, unix.TUN_F_USO4 | unix.TUN_F_USO6
	q.able.uso = q.able.tso && q.able.uso && set(tso|uso)
	q.able.tso = q.able.uso || q.able.tso && set(tso)
	if !q.able.tso {
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
