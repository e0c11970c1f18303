package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// StartDocker starts a Docker engine on a node, with these options and files of
// its own, and returns when it answers.
func (n *Node) StartDocker(ctx context.Context, options ...string) error {
	if err := addCgroup(n.Namespace.Name); err != nil {
		return err
	}
	if err := n.Do(n.mountFiles); err != nil {
		return fmt.Errorf("%s: %w", n.Hostname, err)
	}
	data := filepath.Join(n.Dir, "disk/docker")
	if err := os.MkdirAll(data, 0o711); err != nil {
		return err
	}
	n.dockerd = append([]string{"--data-root=" + data, "--cgroup-parent=/" + n.Namespace.Name}, options...)
	return n.launchDocker(ctx)
}

// RestartDocker stops the node's Docker engine, and starts it again.
func (n *Node) RestartDocker(ctx context.Context) error {
	if err := n.docker.Stop(ctx); err != nil {
		return err
	}
	return n.launchDocker(ctx)
}

func (n *Node) launchDocker(ctx context.Context) error {
	proc, err := n.launch("dockerd", n.dockerd...)
	if err != nil {
		return err
	}
	n.docker = proc
	return Poll(ctx, "dockerd on "+n.Hostname, func() error {
		if proc.Exited() {
			return fmt.Errorf("it has exited\n%s", tail(n.logOf("dockerd")))
		}
		_, err := n.Docker(ctx, "version")
		return err
	})
}

// Docker runs a command of the client that comes with the engine.
func (n *Node) Docker(ctx context.Context, line string) (string, error) {
	return n.Run(ctx, "env DOCKER_HOST=unix:///run/docker.sock PATH=/usr/bin:"+os.Getenv("PATH")+" docker "+line)
}

// RunEcho has the node's Docker run a container that answers who it is, and
// returns its addresses, IPv4's first.
func (n *Node) RunEcho(ctx context.Context, name string) ([]string, error) {
	image, err := n.lab.makeImage(ctx, echoImage)
	if err != nil {
		return nil, err
	}
	if _, err := n.Docker(ctx, "load --input "+image); err != nil {
		return nil, err
	}
	tag := strings.TrimPrefix(echoImage, "docker.io/")
	if _, err := n.Docker(ctx, "run --detach --hostname="+name+" --name="+name+" "+tag); err != nil {
		return nil, err
	}
	text, err := n.Docker(ctx, "inspect "+name)
	if err != nil {
		return nil, err
	}
	var found []struct {
		NetworkSettings struct{ IPAddress, GlobalIPv6Address string }
	}
	if err := json.Unmarshal([]byte(text), &found); err != nil || len(found) != 1 {
		return nil, fmt.Errorf("docker inspect: %w: %s", err, text)
	}
	var ips []string
	for _, ip := range []string{found[0].NetworkSettings.IPAddress, found[0].NetworkSettings.GlobalIPv6Address} {
		if ip != "" {
			ips = append(ips, ip)
		}
	}
	return ips, nil
}
