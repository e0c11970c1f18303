package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// memoryFiles are the files of a control group that limit memory, in one of the two versions of control groups.
type memoryFiles struct {
	root  string // the hierarchy
	limit string // bytes that its processes may use, with what the kernel allocates for them
	swap  string // 0 keeps them from using swap
	peak  string // the greatest usage
	kills string // has a line "oom_kill N": how many of its processes the OOM killer has killed
}

var (
	memoryV1 = memoryFiles{cgroupRoot + "/memory", "memory.limit_in_bytes", "memory.swappiness",
		"memory.max_usage_in_bytes", "memory.oom_control"}
	memoryV2 = memoryFiles{cgroupRoot, "memory.max", "memory.swap.max", "memory.peak", "memory.events"}
)

// findMemoryFiles returns the files of this machine, on which control groups can limit memory. An error wraps
// errors.ErrUnsupported if they cannot.
func findMemoryFiles() (memoryFiles, error) {
	if _, err := os.Stat(filepath.Join(memoryV1.root, memoryV1.limit)); err == nil {
		return memoryV1, nil
	}
	controllers, err := os.ReadFile(cgroupRoot + "/cgroup.controllers")
	if err != nil || !strings.Contains(string(controllers), "memory") {
		return memoryFiles{}, fmt.Errorf("%w: no control groups in %s limit memory", errors.ErrUnsupported, cgroupRoot)
	}
	return memoryV2, os.WriteFile(cgroupRoot+"/cgroup.subtree_control", []byte("+memory"), 0)
}

// LimitMemory sets how many bytes of memory the daemon and the programs that it runs may use together. The first call
// must come before Start. An error wraps errors.ErrUnsupported if the kernel cannot limit memory.
func (d *Daemon) LimitMemory(most int64) (err error) {
	if d.memory.root == "" {
		if d.memory, err = findMemoryFiles(); err != nil {
			return err
		}
	}
	if err := os.Mkdir(d.memoryFile(""), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	err = d.setMemory(d.memory.swap, 0)
	if errors.Is(err, os.ErrNotExist) { // the kernel has no swap
		err = nil
	}
	return errors.Join(err, d.setMemory(d.memory.limit, most))
}

// MemoryPeak returns the most memory that the daemon and its programs have used together, in bytes.
func (d *Daemon) MemoryPeak() (int64, error) { return d.readMemory(d.memory.peak) }

// OOMKills returns how often the OOM killer has killed the daemon or one of its programs for the limit.
func (d *Daemon) OOMKills() (int, error) {
	text, err := os.ReadFile(d.memoryFile(d.memory.kills))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if number, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.Atoi(strings.TrimSpace(number))
		}
	}
	return 0, fmt.Errorf("%s does not tell how many were killed: %s", d.memoryFile(d.memory.kills), text)
}

// memoryFile is the path of a file of the daemon's control group.
func (d *Daemon) memoryFile(name string) string {
	return filepath.Join(d.memory.root, d.node.Namespace.Name+"-flanneld", name)
}

func (d *Daemon) setMemory(file string, bytes int64) error {
	return os.WriteFile(d.memoryFile(file), []byte(strconv.FormatInt(bytes, 10)), 0)
}

func (d *Daemon) readMemory(file string) (int64, error) {
	text, err := os.ReadFile(d.memoryFile(file))
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
}
