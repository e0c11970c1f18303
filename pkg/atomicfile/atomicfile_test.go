package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for _, content := range []string{"one", "another"} {
		if err := Write(path, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil || string(text) != content {
			t.Errorf("it has %q, %v", text, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
	}
	if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 1 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

// Whichever step fails, the error is the same each time, and names the file.
func TestErrors(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "directory"), 0o700); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "missing", "file"):         "no such file or directory",
		filepath.Join(dir, "directory"):               "file exists",
		filepath.Join("/proc", "a-file-that-is-none"): "no such file or directory",
	} {
		for range 2 {
			err := Write(path, []byte("text"), 0o600)
			if err == nil || err.Error() != "write "+path+": "+want {
				t.Errorf("got %v, want %s", err, want)
			}
		}
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
		t.Errorf("left behind: %v, %v", files, err)
	}
	if err := Write(filepath.Join(dir, "missing", "file"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("not recognised: %v", err)
	}
	other := errors.New("of no system call")
	if err := NameError(other, "path"); err != other || NameError(nil, "path") != nil {
		t.Errorf("got %v", err)
	}
}
