package command

import (
	"slices"
	"strings"
)

// private are the variables that no program gets: flanneld's settings, one of which is the password for etcd, and the
// means to speak to systemd in the name of flanneld (sd_notify(3), sd_listen_fds(3)).
var private = []string{"FLANNELD_*", "NOTIFY_SOCKET", "WATCHDOG_*", "LISTEN_*"}

// credentials are the variables that only commands of the operator get: what backends for clouds and their SDKs read.
var credentials = []string{"AWS_*", "GOOGLE_*", "ALIBABA_CLOUD_*", "TENCENTCLOUD_*", "ACCESS_KEY_*"}

// environment returns the variables of this process ("NAME=value") that a program gets.
func environment(all []string, operators bool) []string {
	return slices.DeleteFunc(slices.Clone(all), func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		return matches(name, private) || !operators && matches(name, credentials)
	})
}

// matches reports whether a name is among patterns, which may end in an asterisk.
func matches(name string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		prefix, open := strings.CutSuffix(pattern, "*")
		return name == pattern || open && strings.HasPrefix(name, prefix)
	})
}
