package wireguard

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/atomicfile"
	"github.com/flanneld/flanneld/subnet"
)

// A secret is a private or preshared key. A secret is never logged.
type secret wgtypes.Key

// String hides the key.
func (secret) String() string { return "(secret)" }

// GoString hides the key.
func (secret) GoString() string { return "(secret)" }

func (s secret) public() wgtypes.Key { return wgtypes.Key(s).PublicKey() }

// UnmarshalText reads the output of "wg genpsk". An empty text is no key.
func (s *secret) UnmarshalText(text []byte) error {
	*s = secret{}
	if len(text) == 0 {
		return nil
	}
	key, err := wgtypes.ParseKey(strings.TrimSpace(string(text)))
	if err != nil {
		return errors.New("PSK is not a key of 32 bytes in base64, as wg genpsk prints one") // err shows the text
	}
	*s = secret(key)
	return nil
}

// DefaultKeyFile is the path of the node's private key, as flannel has it.
const DefaultKeyFile = "/run/flannel/wgkey"

// privateKey returns the key in a file. A file that is missing or empty gets a new key. Peers must never see two keys,
// nor a part of a key.
func privateKey(file string) (secret, error) {
	for range 2 {
		key, err := readKey(file)
		switch {
		case err == nil:
			return key, restrict(file)
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errEmpty):
			return secret{}, err
		}
		if err := makeKey(file, errors.Is(err, errEmpty)); err != nil {
			return secret{}, fmt.Errorf("making a private key: %w", err)
		}
	}
	return secret{}, fmt.Errorf("%s: another program deletes the private key", file)
}

var errEmpty = errors.New("the file is empty")

// readKey returns the key that a file holds, and changes nothing.
func readKey(file string) (secret, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return secret{}, fmt.Errorf("the private key: %w", err)
	}
	line := strings.TrimSpace(string(text))
	if line == "" {
		return secret{}, fmt.Errorf("the private key: %s: %w", file, errEmpty)
	}
	key, err := wgtypes.ParseKey(line)
	if err != nil { // err may show what there is
		return secret{}, fmt.Errorf("%s does not hold a private key: delete it, and a new one is made", file)
	}
	// As devices keep it, whatever it was (RFC 7748, section 5).
	key[0], key[31] = key[0]&248, key[31]&127|64
	return secret(key), nil
}

// restrict lets only the owner read a key.
func restrict(file string) error {
	info, err := os.Stat(file)
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		err = os.Chmod(file, 0o600)
	}
	if err != nil {
		return fmt.Errorf("the private key: %w", err)
	}
	return nil
}

// makeKey writes a new key to a file that is empty or missing. If two processes do so, the first wins.
func makeKey(file string, replace bool) error {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	text := []byte(key.String() + "\n")
	if replace {
		return atomicfile.Write(file, text, 0o600)
	}
	if err := create(file, text); !errors.Is(err, fs.ErrExist) {
		return atomicfile.NameError(err, file)
	}
	return nil
}

// create creates a file as a whole, for its owner only. The error is fs.ErrExist if the file exists.
func create(file string, text []byte) error {
	temp, err := os.CreateTemp(filepath.Dir(file), ".wgkey") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	_, err = temp.Write(text)
	if err = errors.Join(err, temp.Sync(), temp.Close()); err != nil {
		return err
	}
	return os.Link(temp.Name(), file)
}

// cleanup finds the private key, the endpoints of peers, and the sockets of a daemon that was killed.
func (h Host) cleanup(context.Context, *subnet.Config, subnet.Env) (backend.Cleanup, error) {
	files := []string{h.KeyFile, h.endpointFile(), filepath.Join(controlDir, "flannel-wg*.sock"),
		filepath.Join(controlDir, ".flanneld-*")}
	return backend.Cleanup{Files: files, Dirs: []string{controlDir}}, nil
}
