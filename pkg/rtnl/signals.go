package rtnl

import (
	"context"
	"errors"
)

// Signals sends a signal when there are notifications of the groups. Signals that nobody has received are merged into
// one. When ctx ends there are no more, and the channel stays open.
func Signals(ctx context.Context, groups ...int) (<-chan struct{}, error) {
	l, err := Listen(nil, groups...)
	if err != nil {
		return nil, err
	}
	changes := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	go func() {
		defer stop()
		buf := make([]byte, 1<<16)
		for {
			if _, err := l.Next(buf); err != nil && !errors.Is(err, ErrLost) {
				return
			}
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	}()
	return changes, nil
}
