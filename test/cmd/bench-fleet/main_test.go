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
		{"the smallest", func(s *settings) { s.within, s.rest, s.patient = 0, time.Second, time.Second }, nil, ""},
		{"an argument", func(*settings) {}, []string{"joins"}, `unexpected arguments ["joins"]`},
		{"proxies", func(s *settings) { s.proxies = maxProxies }, nil, ""},
		{"fewer proxies than none", func(s *settings) { s.proxies = -1 }, nil, "-proxies is"},
		{"too many proxies", func(s *settings) { s.proxies = maxProxies + 1 }, nil, "-proxies is"},
		{"proxies of an API server", func(s *settings) { s.proxies, s.store = 1, "kine" }, nil, "-proxies is for"},
		{"another API server", func(s *settings) { s.api, s.store = "other", "kubernetes" }, nil, ""},
		{"an API server beside etcd", func(s *settings) { s.api = "other" }, nil, "-apiserver is for"},
		{"a start before the beginning", func(s *settings) { s.within = -1 }, nil, "-within is"},
		{"no rest", func(s *settings) { s.rest = 0 }, nil, "-rest is"},
		{"no patience", func(s *settings) { s.patient = 0 }, nil, "-patience is"},
	} {
		s := settings{store: "etcd", api: newestAPI, within: time.Second, rest: time.Minute, patient: time.Minute}
		c.change(&s)
		switch err := s.check(c.arguments); {
		case err == nil && c.want != "":
			t.Errorf("%s: no error, want %q", c.what, c.want)
		case err != nil && (c.want == "" || !strings.HasPrefix(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", c.what, err, c.want)
		}
	}
}
