package firewall

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestBridgeNetfilter(t *testing.T) {
	dir := t.TempDir()
	if err := bridgeNetfilter(dir); err != nil {
		t.Errorf("the folder is there: %v", err)
	}
	err := bridgeNetfilter(filepath.Join(dir, "bridge"))
	for _, w := range []string{"modprobe br_netfilter", "/etc/modules-load.d", filepath.Join(dir, "bridge")} {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("%q is not in: %v", w, err)
		}
	}
}
