package cloudroute

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/flanneld/flanneld/pkg/plain"
)

// Cause returns why an API or a metadata service did not answer, as one line fit to be shown. The text is the same while
// the cause is: it has none of the ports and numbers that change from attempt to attempt.
func Cause(err error) string { return plain.Text(strings.Join(strings.Fields(innermost(err)), " ")) }

func innermost(err error) string {
	var socket *net.OpError
	var name *net.DNSError
	var timeout net.Error
	var status interface {
		error
		HTTPStatusCode() int
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "no answer in time"
	case errors.As(err, &name):
		return name.Err + ": " + name.Name
	case errors.As(err, &socket):
		return socket.Op + ": " + socket.Err.Error()
	case errors.As(err, &status) && status.HTTPStatusCode() != 0:
		return fmt.Sprintf("HTTP status %d", status.HTTPStatusCode())
	}
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return err.Error()
}
