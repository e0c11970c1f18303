package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/flanneld/flanneld/pkg/atomicfile"
)

// An attachment is one interface of one container.
type attachment struct{ containerID, ifName string }

// ifNameKey is the key of a record that names the interface. Delegates and flannel's plugin ignore this key; records of
// flannel's plugin do not have it.
const ifNameKey = "flannelIfName"

// records is the directory of the records. A record is the delegate's configuration at the time of ADD, one file for
// each attachment. DEL uses the record, so that it undoes what ADD did even if the configuration or subnet.env has
// changed.
//
// The file is called CONTAINERID, as in flannel's plugin, so that each of the two plugins finds the other's records.
// The file for a second interface of a container is called CONTAINERID:IFNAME. Neither part can contain a colon.
type records string

// find returns the path and the content of the record of an attachment. The error is fs.ErrNotExist if there is none.
func (dir records) find(a attachment) (path string, conf object, err error) {
	for _, name := range []string{a.containerID + ":" + a.ifName, a.containerID} {
		path = filepath.Join(string(dir), name)
		conf, err = read(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if owner := conf.text(ifNameKey); owner != "" && owner != a.ifName {
			continue
		}
		return path, conf, err
	}
	return "", nil, fs.ErrNotExist
}

// errBroken is the error for a record that cannot be used.
var errBroken = errors.New("not the configuration of a plugin")

func read(path string) (object, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var conf object
	if json.Unmarshal(text, &conf) != nil || conf.text("type") == "" {
		return nil, fmt.Errorf("%s: %w", path, errBroken)
	}
	return conf, nil
}

// place returns the path for a new record: the file of the attachment, if it has one. A record without an interface
// name may belong to another interface.
func (dir records) place(a attachment) string {
	path := filepath.Join(string(dir), a.containerID)
	conf, err := read(path)
	if errors.Is(err, fs.ErrNotExist) || conf.text(ifNameKey) == a.ifName {
		return path
	}
	return path + ":" + a.ifName
}

// write writes a record atomically. Only root can read the record, since the user's configuration may have secrets.
func (dir records) write(path string, a attachment, conf object) error {
	if err := os.MkdirAll(string(dir), 0o700); err != nil {
		return err
	}
	conf.set(ifNameKey, a.ifName)
	text, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, text, 0o600)
}

// of returns the attachments of a network whose records name the network and the interface. Records of flannel's plugin
// do not name the interface.
func (dir records) of(network string) ([]attachment, error) {
	files, err := os.ReadDir(string(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var found []attachment
	for _, f := range files {
		id, _, _ := strings.Cut(f.Name(), ":")
		conf, err := read(filepath.Join(string(dir), f.Name()))
		if err != nil || id == "" || strings.HasPrefix(id, ".") {
			continue // removed meanwhile, not a record, or a temporary file
		}
		if ifName := conf.text(ifNameKey); ifName != "" && conf.text("name") == network {
			found = append(found, attachment{id, ifName})
		}
	}
	return found, err
}
