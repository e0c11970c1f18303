// Command flannel is the CNI plugin that gives a container an address of this node's subnet. The container runtime
// executes it for each container. The plugin reads subnet.env, which flanneld writes, and runs another plugin, its
// delegate, which sets up the interface.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"
	cniversion "github.com/containernetworking/cni/pkg/version"
)

// version is set when the program is linked: -ldflags "-X main.version=v1.2.3".
var version = "unknown"

// about is the text that the plugin prints when a person runs it.
const about = `flannel %s is a CNI plugin: the container runtime executes it, if a file in
/etc/cni/net.d has "type": "flannel". To check whether the plugin is ready:
  echo '{"cniVersion": "1.1.0", "name": "cbr0", "type": "flannel"}' |
    CNI_COMMAND=STATUS CNI_PATH=/opt/cni/bin /opt/cni/bin/flannel
To install the plugin and its configuration where the runtime finds them:
  flannel install --help`

func main() {
	if name := filepath.Base(os.Args[0]); copyCommands[name] {
		if err := runCopy(name, os.Args[1:]); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) == 2 && (os.Args[1] == "--version" || os.Args[1] == "-version") {
		fmt.Println(version)
		return
	}
	if len(os.Args) > 1 && os.Args[1] == "install" { // a container runtime passes no arguments
		if err := runInstall(os.Args[2:]); err != nil {
			fmt.Fprintf(os.Stderr, "flannel install: %v\n", err)
			os.Exit(1)
		}
		return
	}
	skel.PluginMainFuncs(skel.CNIFuncs{Add: add, Del: del, Check: check, Status: status, GC: collect},
		cniversion.All, fmt.Sprintf(about, version))
}
