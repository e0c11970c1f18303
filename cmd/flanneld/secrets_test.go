package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// daemon runs flanneld at the highest log level until flanneld ends, or has logged a text so many times. daemon returns
// the whole log.
func daemon(t *testing.T, until string, times int, env []string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd, lines := start(ctx, t, env, append(args, "-v=10")...)
	var logged strings.Builder
	for lines.Scan() {
		logged.WriteString(lines.Text() + "\n")
		if strings.Contains(lines.Text(), until) {
			if times--; times == 0 {
				cancel()
			}
		}
	}
	cmd.Wait() // flanneld was killed, or has ended
	if times > 0 {
		t.Errorf("flanneld has not logged %q:\n%s", until, &logged)
	}
	return logged.String()
}

// TestSecretsStayOut: no secret is logged, at any log level and with any error.
func TestSecretsStayOut(t *testing.T) {
	const secret = "hunter2" // aHVudGVyMg== in base64, and dTpodW50ZXIy with the user's name
	refuses := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "no", http.StatusUnauthorized)
	}))
	defer refuses.Close()
	file := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	network := file("net-conf.json", `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}`)
	kubeconfig := func(user string) []string {
		text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q}}]\n"+
			"users: [{name: u, user: %s}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n",
			refuses.URL, user)
		return []string{"--kube-subnet-mgr", "--net-config-path=" + network, "--kubeconfig-file=" + file("kubeconfig", text)}
	}
	for _, c := range []struct {
		name, until string
		times       int
		env, args   []string
	}{
		{name: "a password for etcd, in the environment", until: "etcd", times: 4,
			env:  []string{"FLANNELD_ETCD_USERNAME=u", "FLANNELD_ETCD_PASSWORD=" + secret},
			args: []string{"--etcd-endpoints=" + refuses.URL}},
		{name: "a password for etcd, on the command line", until: "etcd", times: 4,
			args: []string{"--etcd-username=u", "--etcd-password=" + secret, "--etcd-endpoints=" + refuses.URL}},
		{name: "a password in a URL", until: "contains a user name", times: 1,
			args: []string{"--etcd-endpoints=http://u:" + secret + "@127.0.0.1:2379"}},
		{name: "a token for the API server", until: "provide credentials", times: 2,
			args: kubeconfig("{token: " + secret + "}")},
		{name: "a password for the API server", until: "provide credentials", times: 2,
			args: kubeconfig("{username: u, password: " + secret + "}")},
		{name: "a malformed kubeconfig", until: "kubeconfig", times: 1, args: kubeconfig("{token: [" + secret + "]}")},
		{name: "a malformed private key", until: "flanneld", times: 1,
			args: kubeconfig("{client-certificate-data: aHVudGVyMg==, client-key-data: aHVudGVyMg==}")},
	} {
		t.Run(c.name, func(t *testing.T) {
			env := append(c.env, "NODE_NAME=n1")
			log := daemon(t, c.until, c.times, env, c.args...)
			for _, text := range []string{secret, "aHVudGVyMg", "dTpodW50ZXIy"} {
				if strings.Contains(log, text) {
					t.Errorf("flanneld logs the secret, as %s:\n%s", text, log)
				}
			}
		})
	}
}

// TestOddSettings: flanneld runs with settings with which flannel runs, and logs a warning about each.
func TestOddSettings(t *testing.T) {
	log := daemon(t, "Check the settings", 2, nil, "--iptables-resync=0", "--etcd-endpoints=http://127.0.0.1:1,")
	for _, want := range []string{"iptables-resync", "an empty URL is left out"} {
		if !strings.Contains(log, want) {
			t.Errorf("nothing about %q:\n%s", want, log)
		}
	}
}
