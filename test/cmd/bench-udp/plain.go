package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/test/lab"
)

// A plain relay is the least that carries packets in user space: one packet a
// system call, a thread each way. It is what a proxy's figures are to be compared
// with, waking up included, and sends what the udp backend sends.
const plain = "plain"

const relayDevice, relayPort = "flannel0", 8285

// connect has both nodes of a track run relays.
func connect(ctx context.Context, a, b *lab.Node) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, n := range [][2]*lab.Node{{a, b}, {b, a}} {
		err := n[0].Script(ctx,
			"tuntap add "+relayDevice+" mode tun",
			"link set "+relayDevice+" up mtu 1472",
			"route add 10.5.0.0/16 dev "+relayDevice)
		if err != nil {
			return err
		}
		relay := exec.Command(self, "-relay", n[0].IPv4.String()+","+n[1].IPv4.String())
		relay.Stderr = os.Stderr
		if _, err := n[0].Launch(relay); err != nil {
			return err
		}
	}
	return nil
}

// relay moves packets until the process is killed, or something is wrong.
func relay(from, to netip.Addr) error {
	tun, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	request, err := unix.NewIfreq(relayDevice)
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(tun, unix.TUNSETIFF, request); err != nil {
		return fmt.Errorf("%s: %w", relayDevice, err)
	}
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(socket, &unix.SockaddrInet4{Addr: from.As4(), Port: relayPort}); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	if err := unix.Connect(socket, &unix.SockaddrInet4{Addr: to.As4(), Port: relayPort}); err != nil {
		return fmt.Errorf("%s: %w", to, err)
	}
	go move(tun, socket)
	move(socket, tun)
	return nil
}

// move hands on what it reads. What is refused is lost, as packets are.
func move(from, to int) {
	b := make([]byte, 65536)
	for {
		if n, err := unix.Read(from, b); err == nil {
			_, _ = unix.Write(to, b[:n])
		}
	}
}
