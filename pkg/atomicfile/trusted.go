package atomicfile

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// ReadTrusted returns the content of a file that only root, and the user of this process, can have written: the file
// and its directory belong to one of the two, and nobody else may write to them. The file must be a regular one of at
// most limit bytes, and no symbolic link.
func ReadTrusted(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	case info.Size() > limit:
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	for _, i := range []fs.FileInfo{info, dir} {
		if owner := i.Sys().(*syscall.Stat_t).Uid; owner != 0 && int(owner) != os.Geteuid() || othersWrite(i.Mode()) {
			return nil, fmt.Errorf("%s is not trusted, since other users than root can write to it or to its directory: "+
				"chown root, chmod go-w", path)
		}
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// othersWrite reports whether others than the owner may change a file, or replace other users' files in a directory.
func othersWrite(mode fs.FileMode) bool {
	return mode.Perm()&0o022 != 0 && !(mode.IsDir() && mode&fs.ModeSticky != 0)
}
