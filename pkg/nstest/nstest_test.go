package nstest

import (
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// A program can be started as soon as it is written, also while other tests start programs.
func TestWriteProgram(t *testing.T) {
	path := filepath.Join(t.TempDir(), "program")
	stop := make(chan struct{})
	var others sync.WaitGroup
	for range 4 {
		others.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = exec.Command(path).Run()
				}
			}
		})
	}
	for range 200 {
		WriteProgram(t, path, "#!/bin/sh\n")
		if err := exec.Command(path).Run(); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	others.Wait()
}
