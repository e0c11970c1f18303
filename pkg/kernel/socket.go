package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// socket sends requests in batches, and dumps tables, over rtnetlink (rtnetlink(7)) or another protocol of netlink.
// It is for one goroutine.
type socket struct {
	fd  int
	pid uint32 // our address, which is in the notifications of changes that we caused
	seq uint32
	buf []byte
}

const (
	// A batch is one sendmsg: large enough that the system call costs nothing, small enough that its errors fit into
	// the receive buffer.
	batchMessages = 256
	receiveBuffer = 1 << 20
)

func newSocket(protocol int) (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	s := &socket{fd: fd, buf: make([]byte, 1<<16)}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		s.close()
		return nil, fmt.Errorf("netlink: %w", err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		s.close()
		return nil, fmt.Errorf("netlink: %w", err)
	}
	s.pid = name.(*unix.SockaddrNetlink).Pid
	// These options only help: old kernels, and processes with few capabilities, do without them.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1) // errors with a text
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1) // errors without the request
	return s, nil
}

func (s *socket) close() { unix.Close(s.fd) }

// A request is one netlink message to send, without its length and sequence.
type request struct {
	kind  uint16 // RTM_*, XFRM_MSG_*
	flags uint16 // NLM_F_*, without REQUEST and ACK
	body  []byte
}

// do sends the requests and returns the kernel's answer to each, in the same order. Only the last request of a batch
// asks for an acknowledgement: the kernel reports failures in any case.
func (s *socket) do(requests []request) ([]error, error) {
	results := make([]error, len(requests))
	var out []byte
	for start := 0; start < len(requests); start += batchMessages {
		batch := requests[start:min(start+batchMessages, len(requests))]
		first := s.seq + 1
		out = out[:0]
		for i, r := range batch {
			flags := r.flags | unix.NLM_F_REQUEST
			if i == len(batch)-1 {
				flags |= unix.NLM_F_ACK
			}
			s.seq++
			out = appendMessage(out, r.kind, flags, s.seq, r.body)
		}
		if err := s.send(out); err != nil {
			return nil, err
		}
		for done := false; !done; {
			err := s.receive(func(h unix.NlMsghdr, body []byte) error {
				if h.Type != unix.NLMSG_ERROR || h.Seq-first >= uint32(len(batch)) {
					return nil // of an earlier batch
				}
				results[start+int(h.Seq-first)] = ackError(h, body)
				done = done || h.Seq == s.seq
				return nil
			})
			if err != nil {
				return nil, err
			}
		}
	}
	return results, nil
}

// dump sends a dump request and calls each for every message of the answer. errInterrupted says that the kernel's
// tables changed meanwhile, so that the answer may lack something.
func (s *socket) dump(kind uint16, body []byte, each func(kind uint16, body []byte)) error {
	s.seq++
	if err := s.send(appendMessage(nil, kind, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, s.seq, body)); err != nil {
		return err
	}
	interrupted := false
	for done := false; !done; {
		err := s.receive(func(h unix.NlMsghdr, body []byte) error {
			if h.Seq != s.seq {
				return nil
			}
			interrupted = interrupted || h.Flags&unix.NLM_F_DUMP_INTR != 0
			switch h.Type {
			case unix.NLMSG_DONE:
				done = true
			case unix.NLMSG_ERROR:
				done = true
				return ackError(h, body)
			default:
				each(h.Type, body)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if interrupted {
		return errInterrupted
	}
	return nil
}

var errInterrupted = errors.New("the kernel's tables changed while they were read")

func (s *socket) send(b []byte) error {
	if err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("netlink: sending: %w", err)
	}
	return nil
}

// receive reads one datagram and calls each for every message in it.
func (s *socket) receive(each func(h unix.NlMsghdr, body []byte) error) error {
	for {
		n, _, err := unix.Recvfrom(s.fd, s.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("netlink: receiving: %w", err)
		}
		return rtnl.EachMessage(s.buf[:n], each)
	}
}

// ignore returns a classic BPF program that drops messages whose nlmsg_pid is own. The notifications of routes and
// neighbours carry the address of the socket that asked for the change, and our own changes can be thousands.
func ignore(own uint32) []unix.SockFilter {
	loaded := binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, own)) // as BPF loads it
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: uint32(unsafe.Offsetof(unix.NlMsghdr{}.Pid))},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: loaded},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
	}
}

// ackError returns what an NLMSG_ERROR message says: nil, an errno, or an errno with the kernel's text
// (NLMSGERR_ATTR_MSG).
func ackError(h unix.NlMsghdr, body []byte) error {
	if len(body) < 4 {
		return errors.New("netlink: short acknowledgement")
	}
	errno := -int32(binary.NativeEndian.Uint32(body))
	if errno == 0 {
		return nil
	}
	err := unix.Errno(errno)
	const header = 4 + unix.NLMSG_HDRLEN // NETLINK_CAP_ACK keeps the request's header
	if h.Flags&unix.NLM_F_ACK_TLVS == 0 || len(body) < header {
		return err
	}
	skip := header
	if h.Flags&unix.NLM_F_CAPPED == 0 {
		skip = 4 + rtnl.Align(int(binary.NativeEndian.Uint32(body[4:])))
	}
	if skip > len(body) {
		return err
	}
	text := ""
	rtnl.EachAttr(body[skip:], func(kind uint16, value []byte) {
		if kind == unix.NLMSGERR_ATTR_MSG {
			text = string(bytes.TrimRight(value, "\x00"))
		}
	})
	if text == "" {
		return err
	}
	return fmt.Errorf("%w (%s)", err, text)
}

// appendMessage appends one message with its header.
func appendMessage(b []byte, kind, flags uint16, seq uint32, body []byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(unix.NLMSG_HDRLEN+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, body...)
	return append(b, make([]byte, rtnl.Align(len(body))-len(body))...)
}

// appendAttr appends one attribute (struct rtattr), padded.
func appendAttr(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, rtnl.Align(len(value))-len(value))...)
}

func appendAttr32(b []byte, kind uint16, value uint32) []byte {
	return appendAttr(b, kind, binary.NativeEndian.AppendUint32(nil, value))
}
