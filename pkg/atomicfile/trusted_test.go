package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestReadTrusted(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(path string) error
		want  string // in the error; "": the content is returned
	}{
		"as written":             {func(string) error { return nil }, ""},
		"sticky directory":       {func(p string) error { return os.Chmod(filepath.Dir(p), 0o777|fs.ModeSticky) }, ""},
		"group may write":        {func(p string) error { return os.Chmod(p, 0o620) }, "not trusted"},
		"others may write":       {func(p string) error { return os.Chmod(p, 0o602) }, "not trusted"},
		"another user's":         {func(p string) error { return os.Chown(p, 12345, -1) }, "not trusted"},
		"another user's place":   {func(p string) error { return os.Chown(filepath.Dir(p), 12345, -1) }, "not trusted"},
		"directory of the group": {func(p string) error { return os.Chmod(filepath.Dir(p), 0o775) }, "not trusted"},
		"too long":               {func(p string) error { return os.WriteFile(p, []byte("12345"), 0o600) }, "more than 4 bytes"},
		"link": {func(p string) error {
			return errors.Join(os.Rename(p, p+".old"), os.Symlink(p+".old", p))
		}, "too many levels of symbolic links"},
		"FIFO, which nobody writes to": {func(p string) error {
			return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o600))
		}, "not a regular file"},
		"missing": {os.Remove, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			if strings.HasPrefix(name, "another") && os.Geteuid() != 0 {
				t.Skip("only root gives files away")
			}
			path := filepath.Join(t.TempDir(), "file")
			if err := errors.Join(os.Chmod(filepath.Dir(path), 0o755), Write(path, []byte("text"), 0o600), c.spoil(path)); err != nil {
				t.Fatal(err)
			}
			text, err := ReadTrusted(path, 4)
			if c.want == "" && (err != nil || string(text) != "text") {
				t.Errorf("got %q, %v", text, err)
			}
			if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %q, %v, want an error with %q", text, err, c.want)
			}
		})
	}
}
