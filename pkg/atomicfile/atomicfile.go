// Package atomicfile replaces files as a whole: a reader sees the old content or the new, also after a crash. A failure
// has the same text each time that the cause is the same, so that it is logged once, however often it is retried.
package atomicfile

import (
	"errors"
	"io/fs"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
)

// Write replaces a file, or creates it, with exactly this mode. The directory must exist.
func Write(path string, content []byte, mode fs.FileMode) error {
	err := renameio.WriteFile(path, content, mode, renameio.WithTempDir(filepath.Dir(path)),
		renameio.WithStaticPermissions(mode))
	return NameError(err, path)
}

// NameError returns the error of a system call as one of writing the file: err names a temporary file, whose name
// differs each time. Other errors, and nil, are returned as they are.
func NameError(err error, path string) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err
	}
	return &fs.PathError{Op: "write", Path: path, Err: errno}
}
