package main

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/test/lab"
)

// A backend is the Type in the configuration.
type backend string

const (
	vxlan  backend = "vxlan"
	hostgw backend = "host-gw"
)

// A peer is one of many, by its number.
type peer int

// maxPeers is how many there are addresses for.
const maxPeers = 60000

// subnet leaves 10.0.0.0/16 to this node.
func (p peer) subnet() netip.Prefix {
	n := p + 1<<8
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(n >> 8), byte(n)}), 24)
}

func (p peer) publicIP() netip.Addr {
	n := p + 1<<8
	return netip.AddrFrom4([4]byte{198, 19, byte(n >> 8), byte(n)})
}

func (p peer) mac() string { return fmt.Sprintf("0e:01:00:00:%02x:%02x", byte(p>>8), byte(p)) }

func (p peer) key() string {
	return lab.Prefix + "/subnets/" + p.subnet().Addr().String() + "-24"
}

func (p peer) value(b backend) string {
	data := ""
	if b == vxlan {
		data = fmt.Sprintf(`,"BackendData":{"VNI":1,"VtepMAC":%q}`, p.mac())
	}
	return fmt.Sprintf(`{"PublicIP":%q,"PublicIPv6":null,"BackendType":%q%s}`, p.publicIP(), b, data)
}

// empty leaves etcd with a configuration and no leases.
func (b *bench) empty(ctx context.Context, backend backend, nftables bool) error {
	b.node.Kill()
	if _, err := b.Etcd.Client.Delete(ctx, lab.Prefix, clientv3.WithPrefix()); err != nil {
		return err
	}
	return b.Etcd.Configure(ctx, fmt.Sprintf(`{"Network": "10.0.0.0/8", "SubnetLen": 24, "EnableNFTables": %t, "Backend": {"Type": %q}}`, nftables, backend))
}

// join writes the leases of the peers from one number to below another, many a
// transaction.
func (b *bench) join(ctx context.Context, backend backend, from, to int) error {
	const most = 100 // etcd's default for operations in a transaction is 128
	for ; from < to; from += most {
		var ops []clientv3.Op
		for p := peer(from); p < peer(min(from+most, to)); p++ {
			ops = append(ops, clientv3.OpPut(p.key(), p.value(backend)))
		}
		if _, err := b.Etcd.Client.Txn(ctx).Then(ops...).Commit(); err != nil {
			return err
		}
	}
	return nil
}

// each does something for many peers, one by one but some at a time, as nodes
// do that know nothing of each other.
func each(from, to int, do func(peer) error) error {
	todo := make(chan peer)
	errs := make(chan error, to-from)
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			for p := range todo {
				if err := do(p); err != nil {
					errs <- err
				}
			}
		})
	}
	for p := peer(from); p < peer(to); p++ {
		todo <- p
	}
	close(todo)
	group.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

// boot gives the node a new kernel, so to speak, from where etcd can be
// reached: the first packets after a link came up may be lost, and that takes a
// second. With host-gw all peers are on its link.
func (b *bench) boot(ctx context.Context, backend backend) error {
	if err := b.node.Reboot(ctx); err != nil {
		return err
	}
	if backend == hostgw {
		if err := b.node.Script(ctx, "addr add 198.19.255.254/16 dev eth0"); err != nil {
			return err
		}
	}
	conn, err := b.node.Dial(ctx, "tcp", strings.TrimPrefix(lab.Endpoint, "http://"))
	if err != nil {
		return err
	}
	return conn.Close()
}

// floor loads what n peers call for with the tools that are made for that, in
// the order in which the daemon does it, and returns how long they took.
func (b *bench) floor(ctx context.Context, backend backend, n int) (time.Duration, error) {
	var neighbours, fdb, routes bytes.Buffer
	for p := range peer(n) {
		base := p.subnet().Addr()
		if backend == hostgw {
			fmt.Fprintf(&routes, "route replace %s via %s dev eth0 proto 70\n", p.subnet(), p.publicIP())
			continue
		}
		fmt.Fprintf(&neighbours, "neigh replace %s lladdr %s dev flannel.1 nud permanent\n", base, p.mac())
		fmt.Fprintf(&fdb, "fdb replace %s dev flannel.1 dst %s self permanent\n", p.mac(), p.publicIP())
		fmt.Fprintf(&routes, "route replace %s via %s dev flannel.1 onlink proto 70\n", p.subnet(), base)
	}
	if backend == vxlan {
		err := b.node.Script(ctx,
			"link add flannel.1 mtu 1450 up type vxlan id 1 local "+b.node.IPv4.String()+" dev eth0 dstport 8472 nolearning",
			"addr add 10.0.1.0/32 dev flannel.1")
		if err != nil {
			return 0, err
		}
	}
	began := time.Now()
	for _, batch := range []struct {
		program string
		lines   *bytes.Buffer
	}{{"ip", &neighbours}, {"bridge", &fdb}, {"ip", &routes}} {
		if batch.lines.Len() == 0 {
			continue
		}
		cmd := exec.CommandContext(ctx, batch.program, "-batch", "-")
		cmd.Stdin = batch.lines
		p, err := b.node.Launch(cmd)
		if err == nil {
			err = p.Wait()
		}
		if err != nil {
			return 0, fmt.Errorf("%s -batch: %w", batch.program, err)
		}
	}
	return time.Since(began), nil
}
