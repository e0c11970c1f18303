package e2e

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// render returns what helm makes of the chart.
func render(t *testing.T, l *lab.Lab, set ...string) (string, error) {
	t.Helper()
	args := []string{"template", "flannel", "../../chart/flannel", "--namespace=kube-flannel"}
	for _, s := range set {
		args = append(args, "--set-json", s)
	}
	out, err := exec.Command(labtest.Must(l.Program("bin/helm"))(t), args...).CombinedOutput()
	return string(out), err
}

// TestChart: the API server takes the manifest and whatever the chart makes,
// and flanneld takes the configuration in it.
func TestChart(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, "{}")
	k := labtest.Must(l.NewKube(ctx, "10.5.0.0/16"))(t)
	labtest.Do(t, k.Apply(ctx, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-flannel"}}`))

	manifest := string(labtest.Must(os.ReadFile("../../Documentation/kube-flannel.yml"))(t))
	labtest.Do(t, k.DryRun(ctx, manifest))
	checkToken(t, manifest)
	for name, c := range map[string]struct {
		set  []string
		want string // the network's configuration
	}{
		"as it is": {nil, `{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}`},
		"dual stack": {[]string{`podCidrv6="fd00:244::/48"`},
			`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:244::/48", "Backend": {"Type": "vxlan"}}`},
		"IPv6 alone": {[]string{`podCidr=""`, `podCidrv6="fd00:244::/48"`},
			`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:244::/48", "Backend": {"Type": "vxlan"}}`},
		"all": {[]string{
			`backend={"Type": "vxlan", "DirectRouting": true, "Port": 4789}`, `mtu=1400`, `nftables=true`, `ipMasq=false`,
			`args=["--iface-regex=^en.*", "--v=2"]`, `image={"name": "registry.invalid:5000/a/b", "tag": "v9", "pullPolicy": "Always", "pullSecrets": [{"name": "s"}]}`,
			`resources={"limits": {"memory": "100Mi"}}`, `nodeSelector={"a/b": "c"}`, `tolerations=[{"key": "k", "operator": "Exists"}]`, `maxUnavailable=3`,
			`cni={"binDir": "/usr/lib/cni", "confDir": "/etc/cni/other", "confName": "20-x.conflist"}`, `healthz={"ip": "0.0.0.0", "port": 8081}`, `priorityClassName="system-cluster-critical"`,
			`metrics={"annotations": true}`,
		}, `{"Network": "10.244.0.0/16", "EnableNFTables": true, "Backend": {"Type": "vxlan", "DirectRouting": true, "Port": 4789, "MTU": 1400}}`},
	} {
		text, err := render(t, l, c.set...)
		if err != nil {
			t.Errorf("%s: %v: %s", name, err, text)
			continue
		}
		if err := k.DryRun(ctx, text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got, want := labtest.Must(subnet.ParseConfig(netConf(t,
			text)))(t), labtest.Must(subnet.ParseConfig([]byte(c.want)))(t)
		var gotBackend, wantBackend map[string]any
		labtest.Do(t, yaml.Unmarshal(got.Backend, &gotBackend))
		labtest.Do(t, yaml.Unmarshal(want.Backend, &wantBackend))
		if got.Networks() != want.Networks() || got.EnableNFTables != want.EnableNFTables || len(got.Warnings) > 0 ||
			len(gotBackend) != len(wantBackend) {
			t.Errorf("%s: the configuration is %s, want %s", name, netConf(t, text), c.want)
		}
		for key, value := range wantBackend {
			if gotBackend[key] != value {
				t.Errorf("%s: the backend's %s is %v, want %v", name, key, gotBackend[key], value)
			}
		}
	}
	for set, want := range map[string]string{
		`podCidr=""`:          "podCidr, podCidrv6: at least one is needed",
		`podCidr="10.244"`:    "/podCidr",
		`mtu="1400"`:          "/mtu",
		`backend="vxlan"`:     "/backend",
		`nftable=true`:        "nftable",
		`cni={"plugins": []}`: "/cni/plugins",
	} {
		if text, err := render(t, l, set); err == nil || !strings.Contains(text, want) {
			t.Errorf("%s: helm says %q, want %q in it", set, text, want)
		}
	}
}

// netConf returns the network's configuration in the ConfigMap.
func netConf(t *testing.T, text string) []byte {
	t.Helper()
	var o struct{ Data map[string]string }
	object(t, text, "ConfigMap", &o)
	return []byte(o.Data["net-conf.json"])
}

// object reads the first object of a kind in a manifest.
func object(t *testing.T, text, kind string, into any) {
	t.Helper()
	for doc := range strings.SplitSeq(text, "\n---\n") {
		var o struct{ Kind string }
		labtest.Do(t, yaml.Unmarshal([]byte(doc), &o))
		if o.Kind == kind {
			labtest.Do(t, yaml.Unmarshal([]byte(doc), into))
			return
		}
	}
	t.Fatalf("no %s in\n%s", kind, text)
}

// checkToken: no container but flanneld's gets the token of the service account, not even the container that runs only
// at the start.
func checkToken(t *testing.T, manifest string) {
	t.Helper()
	type container struct {
		Name         string
		VolumeMounts []struct{ Name, MountPath string }
	}
	var ds struct {
		Spec struct {
			Template struct {
				Spec struct {
					AutomountServiceAccountToken *bool
					InitContainers, Containers   []container
					Volumes                      []struct {
						Name      string
						Projected *struct{}
					}
				}
			}
		}
	}
	object(t, manifest, "DaemonSet", &ds)
	spec := ds.Spec.Template.Spec
	if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		t.Error("Kubernetes mounts the token into every container")
	}
	var have []string
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		for _, m := range c.VolumeMounts {
			for _, v := range spec.Volumes {
				if v.Name == m.Name && v.Projected != nil {
					have = append(have, c.Name+" "+m.MountPath)
				}
			}
		}
	}
	if want := []string{"kube-flannel " + serviceAccountDir}; !slices.Equal(have, want) {
		t.Errorf("the token is mounted in %q, want %q", have, want)
	}
}
