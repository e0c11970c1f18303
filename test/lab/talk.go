package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Dial is net.Dialer's DialContext from inside the namespace, for numeric
// addresses.
func (ns *Namespace) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, Patiently(2*time.Second))
	defer cancel()
	err = ns.Do(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// mirrorPort is where Mirror answers.
const mirrorPort = 7007

// Mirror answers each call, over TCP or UDP, with the address that the call came from, until the lab closes.
func (ns *Namespace) Mirror() error {
	var tcp net.Listener
	var udp *net.UDPConn
	err := ns.Do(func() (err error) {
		if tcp, err = net.Listen("tcp", fmt.Sprintf(":%d", mirrorPort)); err != nil {
			return err
		}
		ns.own(tcp)
		if udp, err = net.ListenUDP("udp", &net.UDPAddr{Port: mirrorPort}); err != nil {
			return err
		}
		ns.own(udp)
		return nil
	})
	if err != nil {
		return fmt.Errorf("%s: %w", ns.Name, err)
	}
	go func() {
		for {
			conn, err := tcp.Accept()
			if err != nil {
				return // closed
			}
			io.WriteString(conn, conn.RemoteAddr().String())
			conn.Close()
		}
	}()
	go func() {
		var buf [64]byte
		for {
			_, from, err := udp.ReadFromUDPAddrPort(buf[:])
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil { // not an ICMP error that came back for an answer
				udp.WriteToUDPAddrPort([]byte(from.String()), from)
			}
		}
	}()
	return nil
}

// SeenAs calls the mirror at dst over network, "tcp" or "udp", and returns the
// address that it saw: this namespace's own, or the node's after SNAT.
func (ns *Namespace) SeenAs(ctx context.Context, network string, dst netip.Addr) (netip.Addr, error) {
	conn, err := ns.Dial(ctx, network, netip.AddrPortFrom(dst, mirrorPort).String())
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%s: %w", ns.Name, err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(Patiently(2 * time.Second)))
	if network == "udp" {
		if _, err := io.WriteString(conn, "who am I?"); err != nil {
			return netip.Addr{}, fmt.Errorf("%s: %w", ns.Name, err)
		}
	}
	var buf [64]byte
	n, err := conn.Read(buf[:])
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%s: %w", ns.Name, err)
	}
	seen, err := netip.ParseAddrPort(string(buf[:n]))
	return seen.Addr().Unmap(), err
}

// Throughput measures with iperf3 for so many seconds, TCP from this namespace
// to dst, which is an address of server. It returns bits per second as received.
func (ns *Namespace) Throughput(ctx context.Context, server *Namespace, dst netip.Addr, seconds int) (float64, error) {
	s := exec.CommandContext(ctx, "iperf3", "--server", "--one-off", "--forceflush", "--bind", dst.String())
	r, w := io.Pipe()
	s.Stdout, s.Stderr = w, w
	sp, err := server.Launch(s)
	if err != nil {
		return 0, err
	}
	defer sp.Kill()
	go func() {
		<-sp.done
		w.Close()
	}()
	lines := bufio.NewScanner(r)
	for lines.Scan() && !strings.Contains(lines.Text(), "listening") {
	}
	go io.Copy(io.Discard, r)

	var out, errs bytes.Buffer
	c := exec.CommandContext(ctx, "iperf3", "--client", dst.String(), "--time", strconv.Itoa(seconds), "--json",
		"--connect-timeout", "2000")
	c.Stdout, c.Stderr = &out, &errs
	cp, err := ns.Launch(c)
	if err != nil {
		return 0, err
	}
	waitErr := cp.Wait()
	var report struct {
		Error string
		End   struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	if err := json.Unmarshal(out.Bytes(), &report); err != nil || report.Error != "" || waitErr != nil {
		return 0, fmt.Errorf("%s: iperf3 to %s: %s %w", ns.Name, dst, report.Error, errors.Join(waitErr, err))
	}
	return report.End.Received.BitsPerSecond, nil
}
