package main

import (
	"cmp"
	"fmt"
	"os"
	"strings"

	"github.com/flanneld/flanneld/pkg/bridge"
	"github.com/flanneld/flanneld/subnet"
)

// readdress prepares a bridge that has an address of an earlier subnet of this node, which the bridge plugin refuses.
// Where the bridge has no ports, the address goes, and the bridge plugin sets the new one. Where there are containers,
// readdress changes nothing, and returns what to do about it, for the error of ADD.
func (r *request) readdress(conf object, env subnet.EnvFile) (blocked string) {
	if conf.text("type") != "bridge" {
		return ""
	}
	all, err := bridge.All()
	if err != nil {
		fmt.Fprintf(os.Stderr, "flannel: %v\n", err)
		return ""
	}
	name := cmp.Or(conf.text("bridge"), "cni0") // the bridge plugin's default
	for _, b := range all {
		stale := b.Stale(env.Networks.Each(), env.Subnets.Each())
		if b.Name != name || len(stale) == 0 {
			continue
		}
		if b.Ports > 0 {
			var commands []string
			for _, c := range b.Remedy(stale) {
				command, _, _ := strings.Cut(c, "    #")
				commands = append(commands, command)
			}
			return b.Describe(stale, env.Subnets.String()) +
				". This lets new pods start, and shows the pods of the node, so that you can delete those with such addresses: " +
				strings.Join(commands, " && ")
		}
		for _, p := range stale {
			if err := b.RemoveAddr(p); err != nil {
				fmt.Fprintf(os.Stderr, "flannel: %v\n", err)
			}
		}
	}
	return ""
}
