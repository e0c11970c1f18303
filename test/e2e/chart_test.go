package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// render returns what helm makes of the chart with values, each KEY=JSON.
func render(t *testing.T, set ...string) (string, error) {
	t.Helper()
	return renderWith(t, asFlags(set)...)
}

// renderWith returns what helm makes of the chart with these flags.
func renderWith(t *testing.T, flags ...string) (string, error) {
	t.Helper()
	args := append([]string{"template", "flannel", "../../chart/flannel", "--namespace=kube-flannel"}, flags...)
	out, err := exec.Command(labtest.Must(lab.Program("bin/helm"))(t), args...).CombinedOutput()
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
	checkToken(t, manifest, "kube-flannel")
	labtest.Do(t, k.Apply(ctx, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-system"}}`))
	labtest.Do(t, k.DryRun(ctx, string(labtest.Must(os.ReadFile("../../Documentation/kube-flannel-kube-system.yml"))(t))))
	for name, c := range map[string]struct {
		set  []string
		want string // the network's configuration
	}{
		"as it is": {nil, `{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}`},
		"dual stack": {[]string{`podCidrv6="fd00:244::/48"`},
			`{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:244::/48", "Backend": {"Type": "vxlan"}}`},
		"several networks": {[]string{`flannel.networks=["10.245.0.0/16"]`, `flannel.nonMasqueradeCIDRs=["172.16.0.0/12"]`},
			`{"Network": "10.244.0.0/16", "Networks": ["10.245.0.0/16"], "NonMasqueradeCIDRs": ["172.16.0.0/12"],
			"Backend": {"Type": "vxlan"}}`},
		"IPv6 alone": {[]string{`podCidr=""`, `podCidrv6="fd00:244::/48"`},
			`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:244::/48", "Backend": {"Type": "vxlan"}}`},
		"all": {[]string{
			`flannel.directRouting=true`, `flannel.backendPort=4789`, `flannel.mtu=1400`, `flannel.backendOptions={"Learning": true}`,
			`flannel.enableNFTables=true`, `flannel.args=["--kube-subnet-mgr"]`, `flannel.extraArgs=["--iface-regex=^en.*", "--v=2"]`,
			`flannel.image={"repository": "registry.invalid:5000/a/b", "tag": "v9", "pullPolicy": "Always"}`,
			`flannel.flannel_cni.image={"repository": "registry.invalid:5000/a/c", "tag": "v8"}`,
			`global.imagePullSecrets=[{"name": "s"}]`, `flannel.resources={"limits": {"memory": "100Mi"}}`,
			`flannel.nodeSelector={"a/b": "c"}`, `flannel.tolerations=[{"key": "k", "operator": "Exists"}]`,
			`flannel.updateStrategy={"rollingUpdate": {"maxUnavailable": 3}}`, `flannel.cniBinDir="/usr/lib/cni"`,
			`flannel.cniConfDir="/etc/cni/other"`, `flannel.cniConfName="20-x.conflist"`,
			`flannel.healthz={"ip": "0.0.0.0", "port": 8081}`, `flannel.priorityClassName="system-cluster-critical"`,
			`flannel.podLabels={"a": "b"}`, `flannel.podAnnotations={"c/d": "e"}`, `flannel.selectorLabels={"tier": "node"}`,
			`flannel.extraEnv=[{"name": "GOGC", "value": "100"}]`, `flannel.extraVolumes=[{"name": "run-all", "emptyDir": {}}]`,
			`flannel.extraVolumeMounts=[{"name": "run-all", "mountPath": "/var/run"}]`, `metrics={"annotations": true}`,
			`netpol={"enabled": true, "args": ["--v=0"], "resources": {"limits": {"memory": "200Mi"}}}`,
		}, `{"Network": "10.244.0.0/16", "EnableNFTables": true,
			"Backend": {"Type": "vxlan", "DirectRouting": true, "Port": 4789, "MTU": 1400, "Learning": true}}`},
		"on delete, nothing installed": {[]string{
			`flannel.updateStrategy={"type": "OnDelete"}`, `flannel.skipCNIConfigInstallation=true`, `flannel.healthz.port=0`,
		}, `{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}`},
	} {
		text, err := render(t, c.set...)
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
		if !got.Networks().Equal(want.Networks()) || !slices.Equal(got.NonMasqueradeCIDRs, want.NonMasqueradeCIDRs) ||
			got.EnableNFTables != want.EnableNFTables || len(got.Warnings) > 0 ||
			!maps.Equal(gotBackend, wantBackend) {
			t.Errorf("%s: the configuration is %s, want %s", name, netConf(t, text), c.want)
		}
	}
	for set, want := range map[string]string{
		`podCidr=""`:                        "podCidr, podCidrv6: at least one is needed",
		`podCidr="10.244"`:                  "/podCidr",
		`flannel.mtu="1400 bytes"`:          "/flannel/mtu",
		`flannel.enableNFTables="false"`:    "/flannel/enableNFTables", // flannel's chart takes it for true
		`flannel.backend=null`:              "missing property 'backend'",
		`flannel.image=null`:                "missing property 'image'",
		`netpol=null`:                       "missing property 'netpol'",
		`flannel.backend={"Type": "vxlan"}`: "/flannel/backend",
		`backend={"Type": "vxlan"}`:         "backend",
		`flannel.enableNftables=true`:       "enableNftables",
		`flannel.healthz.probe={}`:          "probe",
		`flannel.cniConf="{\"name\": 1"`:    "flannel.cniConf: want JSON",
		`netpol.image.repository=""`:        "/netpol/image/repository",
		`netpol.port=9080`:                  "port",
	} {
		if text, err := render(t, set); err == nil || !strings.Contains(text, want) {
			t.Errorf("%s: helm says %q, want %q in it", set, text, want)
		}
	}
}

// TestChartValues: the chart takes the values of flannel's chart as they are. Each value has the effect that it has
// there, on the network's configuration, the flags, the images and the mounts, and no other effect.
func TestChartValues(t *testing.T) {
	t.Parallel()
	labtest.NeedPrograms(t, "bin/helm")
	const flannelValues = "--values=testdata/flannel-values.yaml"
	base := rendered(t, flannelValues)
	for key, want := range map[string]string{
		"net-conf.Network": "10.244.0.0/16", "net-conf.Backend.Type": "vxlan",
		"cni-conf.name": "cbr0", "cni-conf.cniVersion": "0.3.1",
		"daemonset.metadata.name": "kube-flannel-ds", "daemonset.selector.matchLabels.app": "flannel",
		"pod.initContainers.install-cni-plugin.image":   "registry.invalid/flannel-cni-plugin:v1.9.1-flannel3",
		"pod.initContainers.install-cni-plugin.command": "cp -f /flannel /opt/cni/bin/flannel",
		"pod.containers.kube-flannel.image":             "registry.invalid/flannel:v0.28.9",
		"pod.containers.kube-flannel.command": "/opt/bin/flanneld --healthz-ip=127.0.0.1 --ip-masq --kube-subnet-mgr " +
			"--healthz-port=8081",
		"pod.containers.kube-flannel.livenessProbe.httpGet.path":               "/healthz",
		"pod.containers.kube-flannel.livenessProbe.httpGet.port":               "8081",
		"pod.containers.kube-flannel.readinessProbe.initialDelaySeconds":       "5",
		"pod.containers.kube-flannel.readinessProbe.httpGet.path":              "/readyz",
		"pod.containers.kube-flannel.resources.requests.cpu":                   "100m",
		"pod.containers.kube-flannel.volumeMounts./run/flannel.name":           "run",
		"pod.containers.kube-flannel.volumeMounts./run/xtables.lock.name":      "xtables-lock",
		"pod.containers.kube-flannel.volumeMounts./etc/kube-flannel.name":      "config",
		"pod.initContainers.install-cni-plugin.volumeMounts./opt/cni/bin.name": "cni-bin",
		"pod.containers.install-cni.volumeMounts./etc/cni/net.d.name":          "cni-conf",
		"pod.containers.install-cni.image":                                     "registry.invalid/flannel:v0.28.9",
		"pod.containers.install-cni.command": "/opt/bin/flannel install --program= --conf-name=10-flannel.conflist " +
			"--after=/run/flannel/subnet.env --keep",
		"pod.volumes.cni-bin.hostPath.path": "/opt/cni/bin", "pod.volumes.cni-conf.hostPath.path": "/etc/cni/net.d",
		"pod.volumes.run.hostPath.path": "/run/flannel", "pod.tolerations.0.effect": "NoExecute",
	} {
		if base[key] != want {
			t.Errorf("%s is %q, want %q", key, base[key], want)
		}
	}
	if _, ok := base["daemonset.selector.matchLabels.k8s-app"]; ok {
		t.Error("the selector is not the one of flannel's chart")
	}

	const wireguard = `flannel.backend="wireguard"`
	for _, c := range []struct {
		set  []string
		want string // the lines that differ
	}{
		{[]string{`podCidr="10.9.0.0/16"`}, "net-conf.Network=10.9.0.0/16"},
		{[]string{`podCidrv6="fd00:9::/48"`}, "net-conf.EnableIPv6=true net-conf.IPv6Network=fd00:9::/48"},
		{[]string{`global.imagePullSecrets=[{"name": "s"}]`}, "pod.imagePullSecrets.s.name=s"},
		{[]string{`flannel.image.repository="r.invalid/f"`},
			"pod.containers.install-cni.image=r.invalid/f:v0.28.9 pod.containers.kube-flannel.image=r.invalid/f:v0.28.9"},
		{[]string{`flannel.flannel_cni.image.tag="v2"`},
			"pod.initContainers.install-cni-plugin.image=registry.invalid/flannel-cni-plugin:v2"},
		{[]string{`flannel.cniBinDir="/usr/libexec/cni"`}, "pod.volumes.cni-bin.hostPath.path=/usr/libexec/cni"},
		{[]string{`flannel.cniConfDir="/etc/cni/x"`}, "pod.volumes.cni-conf.hostPath.path=/etc/cni/x"},
		{[]string{`flannel.enableNFTables=true`}, "net-conf.EnableNFTables=true"},
		{[]string{`flannel.args=["--kube-subnet-mgr", "--iface=eth1"]`},
			"pod.containers.kube-flannel.command=/opt/bin/flanneld --healthz-ip=127.0.0.1 --kube-subnet-mgr --iface=eth1 --healthz-port=8081"},
		{[]string{`flannel.args=["--kube-subnet-mgr", "--healthz-ip=0.0.0.0"]`},
			"pod.containers.kube-flannel.command=/opt/bin/flanneld --healthz-ip=127.0.0.1 --kube-subnet-mgr --healthz-ip=0.0.0.0 --healthz-port=8081 " +
				"pod.containers.kube-flannel.livenessProbe.httpGet.host=0.0.0.0 pod.containers.kube-flannel.readinessProbe.httpGet.host=0.0.0.0"},
		{[]string{`flannel.args=["--kube-subnet-mgr", "-healthz-ip", "$(IP)"]`},
			"-pod.containers.kube-flannel.livenessProbe.httpGet.host -pod.containers.kube-flannel.readinessProbe.httpGet.host " +
				"pod.containers.kube-flannel.command=/opt/bin/flanneld --healthz-ip=127.0.0.1 --kube-subnet-mgr -healthz-ip $(IP) --healthz-port=8081"},
		{[]string{`flannel.backend="host-gw"`, `flannel.vni=7`}, "net-conf.Backend.Type=host-gw"},
		{[]string{`flannel.backend="udp"`, `flannel.backendPort=9000`}, "net-conf.Backend.Port=9000 net-conf.Backend.Type=udp"},
		{[]string{`flannel.backendPort=4789`}, "net-conf.Backend.Port=4789"},
		{[]string{`flannel.mtu=1400`}, "net-conf.Backend.MTU=1400"},
		{[]string{`flannel.vni=4096`}, "net-conf.Backend.VNI=4096"},
		{[]string{`flannel.GBP=true`}, "net-conf.Backend.GBP=true"},
		{[]string{`flannel.directRouting=true`}, "net-conf.Backend.DirectRouting=true"},
		{[]string{`flannel.macPrefix="0E-2A"`}, "net-conf.Backend.MacPrefix=0E-2A"},
		{[]string{wireguard}, "net-conf.Backend.Type=wireguard"},
		{[]string{wireguard, `flannel.backendPort=51821`}, "net-conf.Backend.ListenPort=51821 net-conf.Backend.Type=wireguard"},
		{[]string{wireguard, `flannel.backendPortv6=51822`}, "net-conf.Backend.ListenPortV6=51822 net-conf.Backend.Type=wireguard"},
		{[]string{wireguard, `flannel.mtu=1400`}, "net-conf.Backend.MTU=1400 net-conf.Backend.Type=wireguard"},
		{[]string{wireguard, `flannel.psk="k"`}, "net-conf.Backend.PSK=k net-conf.Backend.Type=wireguard"},
		{[]string{wireguard, `flannel.psk=0`}, "net-conf.Backend.Type=wireguard"},
		{[]string{wireguard, `flannel.tunnelMode="\"auto\""`}, // flannel's chart needs the inner quotes
			"net-conf.Backend.Mode=auto net-conf.Backend.Type=wireguard"},
		{[]string{wireguard, `flannel.tunnelMode="auto"`}, "net-conf.Backend.Mode=auto net-conf.Backend.Type=wireguard"},
		{[]string{wireguard, `flannel.keepaliveInterval=25`},
			"net-conf.Backend.PersistentKeepaliveInterval=25 net-conf.Backend.Type=wireguard"},
		{[]string{`flannel.cniConf="{\"name\": \"n\", \"cniVersion\": \"0.3.1\", \"plugins\": [{\"type\": \"flannel\"}]}"`},
			"-cni-conf.plugins.0.delegate.hairpinMode -cni-conf.plugins.0.delegate.isDefaultGateway cni-conf.name=n"},
		{[]string{`flannel.resources.limits.memory="1Gi"`}, "pod.containers.kube-flannel.resources.limits.memory=1Gi"},
		{[]string{`flannel.healthz.livenessProbe.periodSeconds=31`},
			"pod.containers.kube-flannel.livenessProbe.periodSeconds=31"},
		{[]string{`flannel.healthz.readinessProbe.failureThreshold=9`},
			"pod.containers.kube-flannel.readinessProbe.failureThreshold=9"},
		{[]string{`flannel.tolerations=[{"effect": "NoExecute", "operator": "Exists"}]`},
			"-pod.tolerations.1.effect -pod.tolerations.1.operator"},
		{[]string{`flannel.nodeSelector={"a/b": "c"}`}, "pod.nodeSelector.a/b=c"},
	} {
		got := changes(base, rendered(t, append([]string{flannelValues}, asFlags(c.set)...)...))
		if got != c.want {
			t.Errorf("%q makes this difference:\n%s\nwant\n%s", c.set, got, c.want)
		}
	}

	// Texts in the place of numbers, such as helm --set-string makes them.
	for values, texts := range map[string]string{
		`{"backendPort": 4789, "mtu": 1400, "vni": 4096, "GBP": true, "directRouting": false, "healthz": {"port": 9000},
			"enableNFTables": true, "skipCNIConfigInstallation": true}`: `{"backendPort": "4789", "mtu": "1400", "vni": "4096",
			"GBP": "true", "directRouting": "false", "healthz": {"port": "9000"},
			"enableNFTables": "true", "skipCNIConfigInstallation": "true"}`,
		`{"backend": "wireguard", "backendPort": 1, "backendPortv6": 2, "mtu": 0, "keepaliveInterval": 25, "healthz": {"port": 0}}`: `{
			"backend": "wireguard", "backendPort": "1", "backendPortv6": "2", "mtu": "", "keepaliveInterval": "25", "healthz": {"port": "0"}}`,
	} {
		want := rendered(t, flannelValues, "--set-json", "flannel="+values)
		got := rendered(t, flannelValues, "--set-json", "flannel="+texts)
		if d := changes(want, got); d != "" {
			t.Errorf("%s makes this difference: %s", texts, d)
		}
	}

	// Versions of flannel's chart before 0.27 have another name for the plugin's image.
	former := rendered(t, "--set-json", `flannel.image_cni={"repository": "r.invalid/p", "tag": "v1"}`)
	if got := former["pod.initContainers.install-cni-plugin.image"]; got != "r.invalid/p:v1" {
		t.Errorf("with image_cni, the plugin's image is %q", got)
	}

	// These take away many lines.
	off := rendered(t, flannelValues, "--set-json", `flannel.healthz.port=0`)
	if got := off["pod.containers.kube-flannel.command"]; got != "/opt/bin/flanneld --ip-masq --kube-subnet-mgr" {
		t.Errorf("with healthz.port 0 the command is %q", got)
	}
	for key := range off {
		if strings.Contains(key, "Probe") {
			t.Errorf("with healthz.port 0 there is %s", key)
		}
	}
	skip := rendered(t, flannelValues, "--set-json", `flannel.skipCNIConfigInstallation=true`)
	for key, value := range skip {
		if strings.Contains(key, "install-cni.") || value == "/etc/cni/net.d" {
			t.Errorf("with skipCNIConfigInstallation there is %s %s", key, value)
		}
	}
	if skip["pod.initContainers.install-cni-plugin.command"] == "" {
		t.Error("with skipCNIConfigInstallation the plugin is not installed")
	}

	// This adds a container, and nothing else to the pod.
	const netpol = "pod.containers.kube-network-policies."
	on := rendered(t, flannelValues, "--set-json", `netpol.enabled=true`)
	for key, want := range map[string]string{
		"image": "registry.invalid/kube-network-policies:v1.0.0", "command": "/bin/netpol --v=2",
		"env.MY_NODE_NAME.valueFrom.fieldRef.fieldPath": "spec.nodeName",
		"resources.requests.cpu":                        "100m",
		"securityContext.capabilities.add":              "NET_ADMIN",
		"securityContext.allowPrivilegeEscalation":      "false",
	} {
		if got := on[netpol+key]; got != want {
			t.Errorf("with netpol.enabled %s is %q, want %q", key, got, want)
		}
	}
	maps.DeleteFunc(on, func(key, _ string) bool { return strings.HasPrefix(key, netpol) })
	if got := changes(base, on); got != "" {
		t.Errorf("netpol.enabled makes this difference outside its container: %s", got)
	}
	text := labtest.Must(render(t, `netpol.enabled=true`))(t)
	checkToken(t, text, "kube-flannel", "kube-network-policies")
	const right = "resources: [networkpolicies]"
	if off := labtest.Must(render(t))(t); !strings.Contains(text, right) || strings.Contains(off, right) {
		t.Error("the right to read NetworkPolicies does not come and go with netpol.enabled")
	}
	if want := "--hostname-override=$(MY_NODE_NAME)"; !strings.Contains(text, want) {
		t.Errorf("without a value for netpol.args there is no %s", want)
	}
}

// asFlags returns the flags that set values, each KEY=JSON.
func asFlags(set []string) []string {
	var flags []string
	for _, s := range set {
		flags = append(flags, "--set-json", s)
	}
	return flags
}

// rendered returns what the chart makes with these flags of helm, as paths and values: of the DaemonSet, of its pod, and
// of the two files in the ConfigMap.
func rendered(t *testing.T, flags ...string) map[string]string {
	t.Helper()
	text, err := renderWith(t, append(flags, "--set=restartOnChange=false")...)
	if err != nil {
		t.Fatalf("%q: %v: %s", flags, err, text)
	}
	out := map[string]string{}
	var ds struct {
		Metadata any
		Spec     struct {
			Selector any
			Template struct{ Metadata, Spec any }
		}
	}
	object(t, text, "DaemonSet", &ds)
	var config struct{ Data map[string]string }
	object(t, text, "ConfigMap", &config)
	flatten(out, "daemonset.metadata", ds.Metadata)
	flatten(out, "daemonset.selector", ds.Spec.Selector)
	flatten(out, "pod.metadata", ds.Spec.Template.Metadata)
	flatten(out, "pod", ds.Spec.Template.Spec)
	for file, text := range config.Data {
		var content any
		labtest.Do(t, json.Unmarshal([]byte(text), &content))
		flatten(out, strings.TrimSuffix(file, ".json"), content)
	}
	return out
}

// flatten puts what is in value into out, by paths that begin with path. An object in a list goes by its mountPath or
// name, where it has one. A list of texts is one value.
func flatten(out map[string]string, path string, value any) {
	switch value := value.(type) {
	case map[string]any:
		for key, v := range value {
			flatten(out, path+"."+key, v)
		}
	case []any:
		var texts []string
		for i, v := range value {
			o, ok := v.(map[string]any)
			if !ok {
				texts = append(texts, fmt.Sprint(v))
				continue
			}
			key := strconv.Itoa(i)
			for _, k := range []string{"name", "mountPath"} {
				if name, ok := o[k].(string); ok {
					key = name
				}
			}
			flatten(out, path+"."+key, v)
		}
		if texts != nil {
			out[path] = strings.Join(texts, " ")
		}
	default:
		out[path] = fmt.Sprint(value)
	}
}

// changes returns what is new or other in b, sorted, and the keys that it lacks with a minus.
func changes(a, b map[string]string) string {
	var lines []string
	for key, value := range b {
		if former, ok := a[key]; !ok || former != value {
			lines = append(lines, key+"="+value)
		}
	}
	for key := range a {
		if _, ok := b[key]; !ok {
			lines = append(lines, "-"+key)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, " ")
}

// TestHelmUpgrade: helm upgrades a release of flannel's chart to ours with the values that it has, and rolls it back.
// The DaemonSet stays the same object. So it does where the manifest without a release is replaced by kubectl.
func TestHelmUpgrade(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, "{}")
	k := labtest.Must(l.NewKube(ctx, ""))(t)
	state := func(namespace string) (uid, image, selector string) {
		t.Helper()
		fields := strings.Split(labtest.Must(k.Kubectl(ctx, "--namespace="+namespace, "get", flannelDaemonSet, "--output=jsonpath="+
			`{.metadata.uid}|{.spec.template.spec.containers[0].image}|{.spec.selector.matchLabels}`))(t), "|")
		return fields[0], fields[1], fields[2]
	}
	const ours, values = "../../chart/flannel", "--values=testdata/flannel-values.yaml"
	const image = "--set=flannel.image.repository=docker.io/flanneld/flannel,flannel.image.tag=v9"

	release := func(args ...string) string {
		t.Helper()
		return labtest.Must(k.Helm(ctx, append(args, "--namespace=kube-flannel")...))(t)
	}
	for repository, warned := range map[string]bool{"ghcr.io/flannel-io/flannel": true, "docker.io/flanneld/flannel": false} {
		notes := release("install", "flannel", ours, "--dry-run=server", "--set=flannel.image.repository="+repository)
		if strings.Contains(notes, "WARNING: flannel.image is "+repository) != warned {
			t.Errorf("with the image %s, helm says\n%s", repository, notes)
		}
	}
	for _, apply := range []string{"--server-side=true", "--server-side=false"} { // as Helm 4 and Helm 3 do it
		release("install", "flannel", "testdata/flannel-chart", values, "--create-namespace", apply)
		uid, formerImage, selector := state("kube-flannel")
		release("upgrade", "flannel", ours, values, image)
		if u, i, s := state("kube-flannel"); u != uid || i != "docker.io/flanneld/flannel:v9" || s != selector {
			t.Errorf("%s: after the upgrade, the DaemonSet %s (was %s) has %s and selects %s (was %s)", apply, u, uid, i, s, selector)
		}
		release("rollback", "flannel", "1")
		if u, i, s := state("kube-flannel"); u != uid || i != formerImage || s != selector {
			t.Errorf("%s: after the rollback, the DaemonSet %s (was %s) has %s (was %s) and selects %s",
				apply, u, uid, i, formerImage, s)
		}
		release("uninstall", "flannel")
	}

	labtest.Do(t, k.Apply(ctx, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-system"}}`))
	for selector, set := range map[string]string{
		`{"app":"flannel"}`:                     "restartOnChange=true",
		`{"app":"flannel","tier":"node"}`:       "flannel.selectorLabels.tier=node",
		`{"app":"flannel","k8s-app":"flannel"}`: "flannel.selectorLabels.k8s-app=flannel",
	} {
		flags := []string{"template", "flannel", "--namespace=kube-system", values, image}
		text := labtest.Must(k.Helm(ctx, append(flags, "testdata/flannel-chart", "--set-json=selector="+selector)...))(t)
		text = strings.ReplaceAll(text, "labels: {app: flannel, tier: node}", "labels: {app: flannel, tier: node, k8s-app: flannel}")
		labtest.Must(k.KubectlApply(ctx, text))(t)
		uid, _, _ := state("kube-system")
		labtest.Must(k.KubectlApply(ctx, labtest.Must(k.Helm(ctx, append(flags, ours, "--set="+set)...))(t)))(t)
		if u, i, s := state("kube-system"); u != uid || i != "docker.io/flanneld/flannel:v9" || s != selector {
			t.Errorf("%s: after the change, the DaemonSet %s (was %s) has %s and selects %s", selector, u, uid, i, s)
		}
		labtest.Must(k.Kubectl(ctx, "--namespace=kube-system", "delete", flannelDaemonSet))(t)
	}

	// A DaemonSet for each architecture, which the manifest for kube-system would not replace, is deleted first.
	text := labtest.Must(k.Helm(ctx, "template", "flannel", "testdata/flannel-chart", "--namespace=kube-system", values,
		`--set-json=selector={"app": "flannel", "tier": "node"}`))(t)
	labtest.Must(k.KubectlApply(ctx, strings.ReplaceAll(text, "name: kube-flannel-ds", "name: kube-flannel-ds-amd64")))(t)
	labtest.Must(k.Kubectl(ctx, "--namespace=kube-system", "delete", "daemonset", "--selector=app=flannel"))(t)
	labtest.Must(k.KubectlApply(ctx, string(labtest.Must(os.ReadFile("../../Documentation/kube-flannel-kube-system.yml"))(t))))(t)
	got := labtest.Must(k.Kubectl(ctx, "--namespace=kube-system", "get", "daemonsets", "--output=name"))(t)
	if strings.TrimSpace(got) != "daemonset.apps/kube-flannel-ds" {
		t.Errorf("these DaemonSets are there: %s", got)
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

// checkToken: only these containers get the token of the service account, and not those that run only at the start.
func checkToken(t *testing.T, manifest string, containers ...string) {
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
	var want []string
	for _, c := range containers {
		want = append(want, c+" "+serviceAccountDir)
	}
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
	if !slices.Equal(have, want) {
		t.Errorf("the token is mounted in %q, want %q", have, want)
	}
}
