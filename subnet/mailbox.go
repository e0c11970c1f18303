package subnet

import "sync"

// A Mailbox passes updates on to one reader. Updates that the reader has not received yet are merged into one, so
// that a slow reader never has a backlog. Its methods may be called from any goroutine.
type Mailbox struct {
	mu     sync.Mutex
	closed bool
	unread chan Update // holds one update at most
}

// NewMailbox returns an empty Mailbox.
func NewMailbox() *Mailbox { return &Mailbox{unread: make(chan Update, 1)} }

// C returns the channel on which the reader receives updates.
func (m *Mailbox) C() <-chan Update { return m.unread }

// Put merges an update into the unread one. The maps of the update belong to the Mailbox from then on, and to the
// reader once it has received them. Put drops an update that changes nothing, and all updates after Close.
func (m *Mailbox) Put(u Update) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !u.Snapshot && len(u.Leases)+len(u.Gone) == 0 {
		return
	}
	select {
	case unread := <-m.unread:
		unread.merge(u)
		u = unread
	default:
	}
	m.unread <- u // there is room: only Put sends, and it holds the lock
}

// Close drops the unread update and closes the channel.
func (m *Mailbox) Close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.closed = true
	select {
	case <-m.unread:
	default:
	}
	close(m.unread)
}

// merge adds a later update to this one. A snapshot replaces all that came before it.
func (u *Update) merge(later Update) {
	if later.Snapshot {
		*u = later
		return
	}
	for s := range later.Gone {
		u.Delete(s)
	}
	for _, l := range later.Leases {
		u.Put(l)
	}
	if u.Since.IsZero() {
		u.Since = later.Since
	}
}
