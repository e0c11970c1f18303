package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// BreakChecksums puts a device into the node's cable that does not compute the checksums inside of VXLAN that the node
// leaves to its devices, as some virtual hardware does not. It computes all others. The device stays for good.
func (n *Node) BreakChecksums(ctx context.Context) error {
	port, far, near := n.Hostname, n.Hostname+"x", n.Hostname+"y"
	err := n.lab.net.Script(ctx,
		"link set "+port+" nomaster",
		fmt.Sprintf("link add %s type veth peer name %s", near, far),
		"link set "+far+" master br0 up",
		"link set "+near+" up")
	if err != nil {
		return err
	}
	return n.lab.net.Do(func() error {
		var sides [2]*os.File
		for i, device := range []string{port, near} {
			if sides[i], err = frames(device); err != nil {
				return err
			}
			n.lab.net.own(sides[i])
		}
		go forward(sides[0], sides[1], true)
		go forward(sides[1], sides[0], false)
		return nil
	})
}

// Before each frame is what is left to do of checksums and segments (struct virtio_net_hdr).
const (
	virtioHeader  = 10
	checksumStart = 6 // at which byte of the header: where in the frame that begins which has no checksum yet
)

// frames opens a socket that takes the frames which arrive at a device, and sends frames through the device.
func frames(device string) (*os.File, error) {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	for _, option := range []int{unix.PACKET_VNET_HDR, unix.PACKET_IGNORE_OUTGOING} {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_PACKET, option, 1))
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err = errors.Join(err, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index})); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), device), nil
}

// forward sends on what arrives, until from is closed: with all checksums, or as BreakChecksums has it.
func forward(from, to *os.File, broken bool) {
	buf := make([]byte, virtioHeader+1<<16)
	for {
		size, err := from.Read(buf)
		if errors.Is(err, unix.ENETDOWN) {
			continue
		}
		if err != nil {
			return
		}
		if broken && isInTunnel(buf[virtioHeader:size], int(binary.NativeEndian.Uint16(buf[checksumStart:]))) {
			clear(buf[:virtioHeader])
		}
		_, _ = to.Write(buf[:size]) // a frame that cannot be sent is lost
	}
}

// isInTunnel reports whether a part of a frame is inside of VXLAN on flannel's port.
func isInTunnel(frame []byte, part int) bool {
	const ethernet, udp, port = 14, 8, 8472
	for _, ip := range []struct{ kind, protocol, header int }{{unix.ETH_P_IP, 9, 20}, {unix.ETH_P_IPV6, 6, 40}} {
		tunnel := ethernet + ip.header
		if part >= tunnel+udp && len(frame) >= part && int(binary.BigEndian.Uint16(frame[12:])) == ip.kind &&
			frame[ethernet+ip.protocol] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(frame[tunnel+2:]) == port {
			return true
		}
	}
	return false
}
