package network

import (
	"os"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// deafen makes this process hear no more of routes from the kernel.
func deafen(t *testing.T) {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	for _, f := range files {
		fd, _ := strconv.Atoi(f.Name())
		for _, group := range []int{unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE} {
			// Whatever is no netlink socket says so.
			if heard(fd, group) && unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_DROP_MEMBERSHIP, group) == nil {
				left++
			}
		}
	}
	if left == 0 {
		t.Fatal("nobody listened to routes anyway")
	}
}

// heard tells whether a file is a netlink socket that is member of a group.
func heard(fd, group int) bool {
	var groups [4]uint32
	size := uint32(unsafe.Sizeof(groups))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_NETLINK, unix.NETLINK_LIST_MEMBERSHIPS,
		uintptr(unsafe.Pointer(&groups)), uintptr(unsafe.Pointer(&size)), 0)
	return errno == 0 && groups[(group-1)/32]>>((group-1)%32)&1 == 1
}

// What the kernel does not tell of is found all the same.
func TestKernelIsCompared(t *testing.T) {
	m := newManager(vxlanConfig)
	begin(t, m, func(o *Options) { o.KernelResync = 100 * time.Millisecond })
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	deafen(t)
	nstest.Run(t, "ip route del 10.5.2.0/24")
	eventually(t, "the route is back", func() bool { return route("10.5.2.0/24") != "" })
}

// Without end, somebody removes a route as soon as it is there. It is said, he
// does not get all of our time, and when he stops all is well.
func TestFight(t *testing.T) {
	m := newManager(vxlanConfig)
	begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	for removed := 0; removed < 22; {
		if route("10.5.2.0/24") == "" {
			continue
		}
		if _, err := nstest.Try("ip route del 10.5.2.0/24"); err == nil {
			removed++
		}
	}
	eventually(t, "the route is back for good", func() bool { return route("10.5.2.0/24") != "" })
}
