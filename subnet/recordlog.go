package subnet

import (
	"hash/maphash"
	"iter"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

const (
	// recordRest is the least time between two log lines about one record, which any node may write again and again.
	recordRest = time.Minute

	// recordLines is how many lines are logged within recordRest about all records.
	recordLines = 20
)

// A RecordLog logs what is wrong with records of a store, each known by a name. Its lines are few, whatever programs
// write into the store: one line a minute about a record, and 20 lines a minute about all records. It remembers the
// records that it has logged until Forget or ForgetOthers. Its methods may be called from any goroutine.
type RecordLog struct {
	log  klog.Logger
	seed maphash.Seed

	mu     sync.Mutex
	logged map[uint64]loggedRecord // by the hash of the record's name, which may be long
	swept  time.Time               // when sweep ran last
	minute time.Time               // when the minute of lines began
	lines  int                     // in this minute
}

// A loggedRecord is a record that was logged.
type loggedRecord struct {
	state uint64    // the hash of the state that was logged
	at    time.Time // when
	gone  bool      // the record no longer exists: the entry is kept until recordRest is over
}

// NewRecordLog returns a RecordLog that logs to log.
func NewRecordLog(log klog.Logger) *RecordLog {
	return &RecordLog{log: log, seed: maphash.MakeSeed(), logged: map[uint64]loggedRecord{}}
}

// Error logs an error about a record, unless it has logged the same state of the record, or anything about the record
// within a minute. The state is comparable: a revision, or the text of the error.
func (l *RecordLog) Error(record string, state any, err error, message string, keysAndValues ...any) {
	if l.due(record, state) {
		l.log.WithCallDepth(1).Error(err, message, keysAndValues...)
	}
}

// due reports whether there is to be a line about a record, and counts the line.
func (l *RecordLog) due(record string, state any) bool {
	now := time.Now()
	key, is := maphash.String(l.seed, record), maphash.Comparable(l.seed, state)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sweep()
	before, known := l.logged[key]
	switch {
	case known && !before.gone && before.state == is:
		return false
	case known && now.Sub(before.at) < recordRest:
		return false
	}
	if now.Sub(l.minute) >= recordRest {
		l.minute, l.lines = now, 0
	}
	if l.lines++; l.lines > recordLines {
		if l.lines == recordLines+1 {
			l.log.Error(nil, "More records have errors; they are not logged", "records", recordLines, "within", recordRest)
		}
		return false
	}
	l.logged[key] = loggedRecord{state: is, at: now}
	return true
}

// Forget records that a record no longer exists, or that nothing is wrong with it.
func (l *RecordLog) Forget(record string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.forget(maphash.String(l.seed, record))
	l.sweep()
}

// ForgetOthers records that no other records exist than these.
func (l *RecordLog) ForgetOthers(records iter.Seq[string]) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.logged) == 0 {
		return
	}
	exists := map[uint64]bool{}
	for record := range records {
		exists[maphash.String(l.seed, record)] = true
	}
	for key := range l.logged {
		if !exists[key] {
			l.forget(key)
		}
	}
	l.sweep()
}

// Len returns how many records are remembered.
func (l *RecordLog) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.logged)
}

// forget drops a record, or has sweep drop it once it may be logged again. The caller holds l.mu.
func (l *RecordLog) forget(key uint64) {
	r, known := l.logged[key]
	switch {
	case !known:
	case time.Since(r.at) >= recordRest:
		delete(l.logged, key)
	default:
		r.gone = true
		l.logged[key] = r
	}
}

// sweep drops records that are gone, once per recordRest. The caller holds l.mu.
func (l *RecordLog) sweep() {
	if time.Since(l.swept) < recordRest {
		return
	}
	l.swept = time.Now()
	for key, r := range l.logged {
		if r.gone && time.Since(r.at) >= recordRest {
			delete(l.logged, key)
		}
	}
}
