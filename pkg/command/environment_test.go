package command

import (
	"slices"
	"testing"
)

func TestEnvironment(t *testing.T) {
	all := []string{
		"PATH=/bin", "FLANNELD_ETCD_PASSWORD=p", "FLANNELD_ETCD_ENDPOINTS=http://127.0.0.1:2379", "NODE_NAME=n1",
		"AWS_SECRET_ACCESS_KEY=k", "AWS_SESSION_TOKEN=t", "NOTIFY_SOCKET=/run/systemd/notify", "WATCHDOG_USEC=1",
		"ACCESS_KEY_SECRET=k", "ALIBABA_CLOUD_ACCESS_KEY_SECRET=k", "GOOGLE_APPLICATION_CREDENTIALS=f",
		"TENCENTCLOUD_SECRET_KEY=k", "WATCHDOG_PID=1", "LISTEN_FDS=1",
		"FLANNEL_MTU=1450", "NOTIFY_SOCKETS=", "EMPTY=", "XTABLES_LIBDIR=/lib",
	}
	before := slices.Clone(all)
	others := []string{"PATH=/bin", "NODE_NAME=n1", "FLANNEL_MTU=1450", "NOTIFY_SOCKETS=", "EMPTY=", "XTABLES_LIBDIR=/lib"}
	if got := environment(all, false); !slices.Equal(got, others) {
		t.Errorf("got %q", got)
	}
	credentials := []string{"AWS_SECRET_ACCESS_KEY=k", "AWS_SESSION_TOKEN=t", "ACCESS_KEY_SECRET=k",
		"ALIBABA_CLOUD_ACCESS_KEY_SECRET=k", "GOOGLE_APPLICATION_CREDENTIALS=f", "TENCENTCLOUD_SECRET_KEY=k"}
	if got := environment(all, true); !slices.Equal(got, slices.Insert(others, 2, credentials...)) {
		t.Errorf("got %q for commands of the operator", got)
	}
	if !slices.Equal(all, before) {
		t.Errorf("the argument was changed: %q", all)
	}
}
