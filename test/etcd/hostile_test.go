package etcd_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/subnet"
)

// forged is what would be a line of its own in the log, and paint a terminal.
const forged = "\nE0101 00:00:00.000000       1 main.go:1] \"forged\"\x1b[2J\n"

// megabyte returns a record of a megabyte with the address.
func megabyte(ip string) string {
	return `{"PublicIP":"` + ip + `","PublicIPv6":null,"BackendType":"vxlan","BackendData":"` + strings.Repeat("x", 1<<20) + `"}`
}

// short fails the test unless the lines are n, and short.
func short(t *testing.T, lines []string, n int) {
	t.Helper()
	if len(lines) != n {
		t.Errorf("logged %d lines, want %d: %.3000q", len(lines), n, lines)
	}
	for _, line := range lines {
		if len(line) > 1500 || strings.ContainsAny(line, "\x1b") {
			t.Errorf("logged a line of %d bytes: %.3000q", len(line), line)
		}
	}
}

// TestRecordOfAMegabyte: it is no lease, and one short line in a minute, however often it is written; the records
// beside it are read.
func TestRecordOfAMegabyte(t *testing.T) {
	s := newSite(t)
	m := s.manager("a")
	s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
	s.put("subnets/10.5.2.0-24", megabyte("198.18.0.2"))
	s.put("subnets/10.5.3.0-24", forged)
	v := newView(t, m.Watch(s.t.Context()))
	v.until("10.5.1.0/24=198.18.0.1")
	for range 20 {
		s.put("subnets/10.5.2.0-24", megabyte("198.18.0.2"))
	}
	s.put("subnets/10.5.4.0-24", record("198.18.0.4"))
	v.until("10.5.1.0/24=198.18.0.1 10.5.4.0/24=198.18.0.4")
	lines, _ := log.lines(s.prefix+"/subnets/10.5.2.0-24", "cannot be read")
	short(t, lines, 1)
	lines, _ = log.lines(s.prefix+"/subnets/10.5.3.0-24", "cannot be read")
	short(t, lines, 1)
	s.put("subnets/10.5.2.0-24", record("198.18.0.2"))
	v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.2 10.5.4.0/24=198.18.0.4") // it is right again
}

// TestMegabytesInOurName: our own record is restored each time that another program writes over it, and that is one
// short line a minute.
func TestMegabytesInOurName(t *testing.T) {
	s := newSite(t)
	key, _, _ := kept(t, s)
	before := s.get(key)
	for _, value := range []string{megabyte("198.18.0.1"), forged, megabyte("198.18.0.1")} {
		s.putLeased(key, value)
		s.until(key, func(e entry) bool { return e.value == before.value })
	}
	lines, _ := log.lines(s.prefix, "was overwritten")
	short(t, lines, 1)
	for range 3 {
		s.delete(key)
		s.until(key, func(e entry) bool { return e.value == before.value })
	}
	lines, _ = log.lines(s.prefix, "was deleted") // which is another thing about the same record, within the minute
	short(t, lines, 0)
}

// TestHostileClaim: what a claim says of the node that holds our address is quoted and cut; a claim that is too large
// to be read is another node's.
func TestHostileClaim(t *testing.T) {
	for name, claim := range map[string]string{
		"a forged line": `{"Identity":"b","Hostname":"\nE0101 forged\u001b[2J"}`,
		"a long name":   `{"Identity":"b","Hostname":"` + strings.Repeat("x", 3000) + `"}`,
		"a megabyte":    `{"Identity":"a","Hostname":"` + strings.Repeat("x", 1<<20) + `"}`,
		"no JSON":       forged,
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			s := newSite(t)
			_, done, _ := kept(t, s)
			s.put("nodes/198.18.0.1", claim)
			if err := receive(t, done); !errors.Is(err, subnet.ErrLost) {
				t.Errorf("got %v, want %v", err, subnet.ErrLost)
			}
			lines, _ := log.lines(s.prefix, "Another node holds the public address")
			short(t, lines, 1)
		})
	}
}
