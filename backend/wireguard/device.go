package wireguard

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// A device is a WireGuard device, wherever packets are encrypted.
type device interface {
	// Device returns what it holds, secrets too. errGone says that there is no
	// such device any more.
	Device() (*wgtypes.Device, error)
	// Configure changes what it holds.
	Configure(wgtypes.Config) error
	// Gone is closed when the device is of no more use. It may be nil.
	Gone() <-chan struct{}
	// Close ends what was done for the device, which stays.
	Close()
}

var errGone = errors.New("there is no such device")

// kernelDevice is one of the kernel's.
type kernelDevice struct {
	name   string
	client *wgctrl.Client
}

func openKernel(name string) (device, error) {
	client, err := wgctrl.New()
	if err != nil {
		return nil, fmt.Errorf("generic netlink: %w", err)
	}
	return &kernelDevice{name, client}, nil
}

func (d *kernelDevice) Device() (*wgtypes.Device, error) {
	have, err := d.client.Device(d.name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && have.Type != wgtypes.LinuxKernel {
		return nil, errGone
	}
	return have, err
}

func (d *kernelDevice) Configure(c wgtypes.Config) error { return d.client.ConfigureDevice(d.name, c) }

func (d *kernelDevice) Gone() <-chan struct{} { return nil }

func (d *kernelDevice) Close() { d.client.Close() }
