package rtnl

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// Dump calls list, which reads a table of the kernel, until the table has not changed while it was read: at most ten
// times. Dump returns the result of the last call.
func Dump[T any](list func() ([]T, error)) (got []T, err error) {
	for range 10 {
		if got, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return got, err
}
