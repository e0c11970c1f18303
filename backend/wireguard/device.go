package wireguard

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// A device is a WireGuard device, of the kernel or in this process.
type device interface {
	// Device returns the configuration, with the secrets. The error is errGone if the device no longer exists.
	Device() (*wgtypes.Device, error)
	// Configure changes the configuration.
	Configure(wgtypes.Config) error
	// Gone is closed when the device can no longer be used. The channel may be nil.
	Gone() <-chan struct{}
	// Close ends the work for the device. The device stays.
	Close()
}

var errGone = errors.New("there is no such device")

// A kernelDevice is a device of the kernel.
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
