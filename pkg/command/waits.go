package command

import (
	"cmp"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// DefaultNotice is after which time the log says what is waited for.
const DefaultNotice = 5 * time.Second

// Waits logs what is waited for if that takes long, and that the wait is over. If the same takes long again and again,
// the log has the first time only, until it takes a short time again. The zero value is ready to use, by several
// goroutines, too. It must not be copied.
type Waits struct {
	Notice time.Duration // what is long; 0: DefaultNotice

	mu   sync.Mutex
	long map[string]bool // what has taken long the last time, by its key
}

// Begin begins a wait. key is what distinguishes the wait from others; what ("a program") and details, which are keys
// and values, say in the log what is waited for. The caller calls end when the wait is over, with an error if the caller
// has given up.
func (w *Waits) Begin(log klog.Logger, key, what string, details ...any) (end func(error)) {
	begun, logged, over := time.Now(), false, false
	notice := time.AfterFunc(cmp.Or(w.Notice, DefaultNotice), func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if over || w.long[key] {
			return
		}
		if w.long == nil {
			w.long = map[string]bool{}
		}
		w.long[key], logged = true, true
		log.Info("Waiting for "+what, details...)
	})
	return func(err error) {
		short := notice.Stop()
		w.mu.Lock()
		defer w.mu.Unlock()
		over = true
		if logged {
			details = append(details, "after", time.Since(begun).Round(time.Millisecond).String())
			if err != nil {
				details = append(details, "reason", err.Error())
			}
			log.Info("The wait is over", details...)
		}
		if short && err == nil {
			delete(w.long, key)
		}
	}
}
