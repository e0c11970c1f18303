package command

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2"
)

// Each long wait is logged when it begins to be long and when it is over, unless the wait before it was long, too.
func TestWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, log := logged(t)
		var w Waits
		wait := func(key string, d time.Duration, err error) {
			end := w.Begin(klog.FromContext(ctx), key, "a program", "program", key)
			time.Sleep(d)
			synctest.Wait()
			end(err)
		}
		seen := 0
		expect := func(what string, want ...string) {
			t.Helper()
			all := log.String()
			got := strings.Split(strings.TrimSpace(all[seen:]), "\n")
			seen = len(all)
			if len(want) == 0 && got[0] == "" {
				return
			}
			ok := len(got) == len(want)
			for i := range want {
				ok = ok && strings.HasSuffix(got[i], "] "+want[i])
			}
			if !ok {
				t.Errorf("%s: logged\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
		wait("a", 4*time.Second, nil)
		wait("a", 4*time.Second, errors.New("refused"))
		expect("short waits")
		const waiting = `"Waiting for a program" program="a"`
		wait("a", 7*time.Second, nil)
		expect("a long wait", waiting, `"The wait is over" program="a" after="7s"`)
		wait("a", time.Minute, errors.New("killed"))
		wait("a", time.Second, errors.New("killed"))
		wait("a", time.Minute, nil)
		expect("long waits after it")
		wait("b", time.Minute, errors.New("killed"))
		expect("another", strings.Replace(waiting, `"a"`, `"b"`, 1),
			`"The wait is over" program="b" after="1m0s" reason="killed"`)
		wait("a", time.Second, nil)
		expect("a short wait")
		end := w.Begin(klog.FromContext(ctx), "a", "a program", "program", "a")
		time.Sleep(6 * time.Second)
		synctest.Wait()
		expect("the beginning of a long wait", waiting)
		end(nil)
		expect("its end", `"The wait is over" program="a" after="6s"`)
		wait("a", time.Second, nil)
		wait("b", time.Second, nil)
		if len(w.long) > 0 {
			t.Errorf("remembers %v", w.long)
		}
	})
}
