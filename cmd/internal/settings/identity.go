package settings

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
)

// identity returns a text that identifies this machine, and stays the same when the daemon or the machine restarts. No
// single fact is enough: machines made from one disk image share the machine ID, containers share the product UUID of
// their host, and new VMs share the host name of their template. The text is a hash, because machine-id(5) requires
// that the machine ID stays confidential.
func identity() string {
	sum := sha256.New()
	for _, file := range []string{
		"/etc/machine-id",                 // systemd; written at first boot
		"/sys/class/dmi/id/product_uuid",  // firmware; only root can read it
		"/proc/device-tree/serial-number", // replaces the product UUID where there is no DMI
		"/proc/sys/kernel/hostname",       // host name of this UTS namespace
	} {
		text, _ := os.ReadFile(file) // a missing file counts as empty
		sum.Write(append(bytes.TrimSpace(text), 0))
	}
	return hex.EncodeToString(sum.Sum(nil)[:16])
}
