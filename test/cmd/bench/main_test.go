package main

import (
	"strings"
	"testing"
	"time"
)

func TestSettingsCheck(t *testing.T) {
	for _, c := range []struct {
		what      string
		change    func(*settings)
		arguments []string
		want      string // what the error begins with; "": none
	}{
		{"the defaults", func(*settings) {}, nil, ""},
		{"nothing to measure", func(s *settings) { s.runs, s.starts, s.idlers = 0, 0, 0 }, nil, ""},
		{"an argument", func(*settings) {}, []string{"quick"}, `unexpected arguments ["quick"]`},
		{"fewer runs than none", func(s *settings) { s.runs = -1 }, nil, "-runs and"},
		{"fewer starts than none", func(s *settings) { s.starts = -1 }, nil, "-runs and"},
		{"no peers", func(s *settings) { s.base = 0 }, nil, "-base and"},
		{"too many peers", func(s *settings) { s.base = maxPeers }, nil, "-base and"},
		{"fewer idle peers than none", func(s *settings) { s.idlers = -1 }, nil, "-idle-peers is"},
		{"too many idle peers", func(s *settings) { s.idlers = maxPeers + 1 }, nil, "-idle-peers is"},
		{"not idle", func(s *settings) { s.idle = 0 }, nil, "-idle is"},
	} {
		s := settings{runs: 3, starts: 15, base: 5000, burst: 500, idlers: 100, idle: time.Minute}
		c.change(&s)
		switch err := s.check(c.arguments); {
		case err == nil && c.want != "":
			t.Errorf("%s: no error, want %q", c.what, c.want)
		case err != nil && (c.want == "" || !strings.HasPrefix(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", c.what, err, c.want)
		}
	}
}
