package kernel

import (
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/fight"
)

// newFights returns the detector of fights over objects.
func newFights(log klog.Logger) *fight.Detector[Key, Object] {
	return fight.New[Key, Object](log, fight.Options{
		Times: 20,                    // by then it is no person who tries things
		Burst: 50 * time.Millisecond, // "ip route flush" alone goes ten rounds in two milliseconds before it gives up
		Calm:  time.Minute,
		Pace:  time.Second, // what is undone sooner waits for Retry

		Message: "Another program undoes a change again and again; restoring the change at most once per second",
		Key:     "command",
		Fix: "Find the other network manager on this host (`ip monitor all` shows each change), " +
			"and configure it to leave this object alone",
	})
}

// change returns what another program has undone: that an object is set, or that it is removed.
func (e *entry) change() Object {
	if e.want == nil {
		return removal{e.have}
	}
	return e.want
}

// A removal stands for the removal of an object that another program sets again.
type removal struct{ Object }

func (x removal) String() string { return x.Undo() }
