package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
)

// readMemory reads what a process has of memory, and had at most.
func (r *result) readMemory(pid int) error {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		var key string
		var kib int
		if n, _ := fmt.Sscan(lines.Text(), &key, &kib); n < 2 {
			continue
		}
		switch key {
		case "VmRSS:":
			r.resident = kib
		case "RssAnon:":
			r.anonymous = kib
		case "VmHWM:":
			r.peak = kib
		}
	}
	return lines.Err()
}
