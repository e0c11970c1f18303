package rtnl

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// EachMessage calls f for each message of a datagram, until f fails. A datagram that ends within a message is an
// error.
func EachMessage(b []byte, f func(h unix.NlMsghdr, body []byte) error) error {
	for len(b) >= unix.NLMSG_HDRLEN {
		h := unix.NlMsghdr{
			Len:   binary.NativeEndian.Uint32(b),
			Type:  binary.NativeEndian.Uint16(b[4:]),
			Flags: binary.NativeEndian.Uint16(b[6:]),
			Seq:   binary.NativeEndian.Uint32(b[8:]),
			Pid:   binary.NativeEndian.Uint32(b[12:]),
		}
		if h.Len < unix.NLMSG_HDRLEN || int(h.Len) > len(b) {
			return fmt.Errorf("netlink: a message of %d bytes in %d", h.Len, len(b))
		}
		if err := f(h, b[unix.NLMSG_HDRLEN:h.Len]); err != nil {
			return err
		}
		b = b[min(Align(int(h.Len)), len(b)):]
	}
	return nil
}

// attrType masks the flags out of an attribute's type (NLA_TYPE_MASK, linux/netlink.h).
const attrType = 0x3fff

// EachAttr calls f for each attribute (struct rtattr) in b. The kind has no NLA_F_* flags.
func EachAttr(b []byte, f func(kind uint16, value []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&attrType, b[unix.SizeofRtAttr:n])
		b = b[min(Align(n), len(b)):]
	}
}

// Align rounds n up to where the next message or attribute begins.
func Align(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }
