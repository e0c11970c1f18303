package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"
)

// An attachment is one interface of one container.
type attachment struct{ containerID, ifName string }

// ifNameKey in a record says which interface it is of. Delegates ignore it, as
// does upstream's plugin, whose records do not have it.
const ifNameKey = "flannelIfName"

// Records are the delegates' configurations as of ADD, a file for each
// attachment, so that DEL undoes what ADD did whatever has become of the
// configuration and of subnet.env. The value is their directory.
//
// As upstream has it, the file is called CONTAINERID, so that after a switch
// each plugin finds the other's. That name is enough for one interface only: a
// second one's file is called CONTAINERID:IFNAME. Neither part can contain a
// colon.
type records string

// find returns the file of an attachment and its content. The error is
// fs.ErrNotExist when there is none.
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

// errBroken is the error of a record that cannot be used.
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

// place returns the file that a new record goes to: the attachment's own when
// it has one. A record that does not say whose it is may be another interface's.
func (dir records) place(a attachment) string {
	path := filepath.Join(string(dir), a.containerID)
	conf, err := read(path)
	if errors.Is(err, fs.ErrNotExist) || conf.text(ifNameKey) == a.ifName {
		return path
	}
	return path + ":" + a.ifName
}

// write sets a record down: all of it or nothing, for root's eyes only, since
// the user's part may hold secrets.
func (dir records) write(path string, a attachment, conf object) error {
	if err := os.MkdirAll(string(dir), 0o700); err != nil {
		return err
	}
	conf.set(ifNameKey, a.ifName)
	text, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	return renameio.WriteFile(path, text, 0o600, renameio.WithTempDir(string(dir)), renameio.WithStaticPermissions(0o600))
}

// of returns the attachments of a network that have a record which says so.
// Upstream's do not name the interface.
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
			continue // gone meanwhile, foreign, or being written
		}
		if ifName := conf.text(ifNameKey); ifName != "" && conf.text("name") == network {
			found = append(found, attachment{id, ifName})
		}
	}
	return found, err
}
