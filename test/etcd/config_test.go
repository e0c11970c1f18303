package etcd_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/subnet"
)

type configured struct {
	cfg *subnet.Config
	err error
}

func TestConfigIsWaitedFor(t *testing.T) {
	s := newSite(t)
	m := s.manager("a")
	done := make(chan configured, 1)
	go func() {
		cfg, err := m.Config(s.t.Context())
		done <- configured{cfg, err}
	}()
	log.await(t, 1, "etcdctl put "+s.prefix+"/config VALUE", `exampleValue="{\"Network\": \"10.5.0.0/16\", \"Backend\": {\"Type\": \"vxlan\"}}"`)
	s.put("config", small)
	if got := receive(t, done); got.err != nil || got.cfg.BackendType != "vxlan" || got.cfg.IPv4.SubnetLen != 24 {
		t.Errorf("got %+v, %v", got.cfg, got.err)
	}
}

func TestConfigThatCannotWork(t *testing.T) {
	s := newSite(t)
	m := s.manager("a")
	for value, want := range map[string]string{
		`{"Network": "10.5.0.0/29"}`: "Network 10.5.0.0/29 is too small",
		`{"Network": 7}`:             "Network: got a number",
		"":                           "not valid JSON",
	} {
		s.put("config", value)
		_, err := m.Config(s.ctx())
		if err == nil || !strings.HasPrefix(err.Error(), "etcd key "+s.prefix+"/config: ") ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", value, err, want)
		}
	}
}

func TestConfigChanges(t *testing.T) {
	s := newSite(t)
	m := s.manager("a")
	s.put("config", small)
	if _, err := m.Config(s.ctx()); err != nil {
		t.Fatal(err)
	}
	s.put("config", `{"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}`) // before anybody asks
	configs := m.Configs(s.t.Context())
	if got := receive(t, configs); got.BackendType != "host-gw" {
		t.Errorf("got %+v", got)
	}
	for _, refused := range []struct{ value, why string }{
		{`{"Network": "10.5.0.0/29"}`, "Network 10.5.0.0/29 is too small"},
		{"", "not valid JSON"}, // last: an empty value and then no key are two things
	} {
		s.put("config", refused.value)
		log.await(t, 1, "The new configuration is refused; the old one stays in force", "etcd key "+s.prefix+"/config: "+refused.why)
	}
	s.delete("config")
	log.await(t, 1, "The configuration was deleted", s.prefix+"/config")
	s.put("config", `{"Network": "10.6.0.0/16"}`)
	if got := receive(t, configs); got.Networks().String() != "10.6.0.0/16" {
		t.Errorf("got %+v", got)
	}
}

func TestEtcdIsWaitedFor(t *testing.T) {
	s := newOwnSite(t)
	socket := filepath.Join(t.TempDir(), "etcd")
	o := s.options("a")
	o.Endpoints = []string{"unix://" + socket}
	m := s.managerWith(o)
	done := make(chan configured, 1)
	go func() {
		cfg, err := m.Config(s.t.Context())
		done <- configured{cfg, err}
	}()
	log.await(t, 1, socket, `operation="read the network's configuration"`)
	s.up()
	s.put("config", small)
	relay, err := newRelay("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer relay.close()
	relay.point(s.server.addr())
	if got := receive(t, done); got.err != nil {
		t.Error(got.err)
	}
	log.await(t, 1, "is back", socket)
	if said, _ := log.lines(socket, "cannot be used"); len(said) != 1 {
		t.Errorf("said more than once:\n%s", strings.Join(said, "\n"))
	}
}
