package network

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

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

// Each of the first changes to the rules is said, then that there is no end of
// them, then nothing, then the end.
func TestQuarrel(t *testing.T) {
	state := klog.CaptureState()
	defer state.Restore()
	var fs flag.FlagSet
	klog.InitFlags(&fs)
	fs.Set("logtostderr", "false")
	fs.Set("one_output", "true")
	var log bytes.Buffer
	klog.SetOutput(&log)
	var q quarrel
	for i := range 2 * quarrelTimes {
		q.say(false, "iptables")
		klog.Flush()
		if got := strings.Count(log.String(), "\n"); got != min(i+1, quarrelTimes) {
			t.Errorf("after %d changes, %d lines", i+1, got)
		}
	}
	if want := fmt.Sprintf("the last %d checks", quarrelTimes); !strings.Contains(log.String(), want) {
		t.Errorf("not said: %s:\n%s", want, log.String())
	}
	log.Reset()
	q.say(true, "iptables")
	q.say(true, "iptables")
	klog.Flush()
	if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "nobody changes ours") {
		t.Errorf("the end is said as %q", got)
	}
}
