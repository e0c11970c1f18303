package kube

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2/textlogger"

	"github.com/flanneld/flanneld/subnet"
)

// dataNode returns a Node like peerNode with other backend data.
func dataNode(i int, data string) testNode {
	n := peerNode(i)
	n.annotations = slices.DeleteFunc(n.annotations, func(a string) bool {
		return strings.HasPrefix(a, "flannel.alpha.coreos.com/backend-data=")
	})
	n.annotations = append(n.annotations, "flannel.alpha.coreos.com/backend-data="+data)
	return n
}

// TestRefusedAnnotations: annotations that cannot be read are no lease, and one short line, whatever is in them.
func TestRefusedAnnotations(t *testing.T) {
	large := `"` + strings.Repeat("x", subnet.MaxData) + `"`
	for name, c := range map[string]struct{ backend, data, v6, want string }{
		"what is right":    {"vxlan", `{"VNI":1}`, "", ""},
		"none":             {"host-gw", "null", "", ""},
		"no JSON":          {"vxlan", "\n\x1b[2Jforged", "", `the backend data "\n\x1b[2Jforged" are not JSON`},
		"no JSON for IPv6": {"vxlan", `{"VNI":1}`, "{", `the backend data "{" are not JSON`},
		"two documents":    {"vxlan", `{}{}`, "", `the backend data "{}{}" are not JSON`},
		"a large document": {"vxlan", large, "", "the backend data have 4098 bytes: more than 4096 are not read"},
		"a large backend":  {strings.Repeat("x", 1<<18), "", "", "the backend's name has 262144 bytes: more than 64 are not read"},
	} {
		all := map[string]string{managed: "true", publicIP: "198.18.0.2", backendType: c.backend, backendData: c.data, backendV6Data: c.v6}
		annotation := func(name string) string { return all[name] }
		_, err := readAttrs(annotation)
		switch a := attrsOf(annotation); {
		case c.want == "" && (err != nil || len(a.PublicIPs()) != 1):
			t.Errorf("%s: %+v, %v", name, a, err)
		case c.want != "" && (err == nil || err.Error() != c.want || !a.Equal(subnet.Attrs{})):
			t.Errorf("%s: %+v, %v; want %s", name, a, err, c.want)
		}
	}
}

// checkedPeers returns a store of Nodes, the peers that it fills, and what was logged since the last call.
func checkedPeers() (checkedNodes, *peers, func() []string) {
	var text bytes.Buffer
	log := textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&text)))
	m := testManager(onlyIPv4)
	m.log, m.records, m.ownRecords = log, subnet.NewRecordLog(log), subnet.NewRecordLog(log)
	p := newPeers(m)
	return checkedNodes{p, m}, p, func() []string {
		defer text.Reset()
		return slices.Collect(strings.Lines(text.String()))
	}
}

// TestNodesWithRefusedAnnotations: a Node whose annotations are refused is no peer; the others are. The log has a line
// a minute about it, and nothing is remembered of Nodes that are gone or right.
func TestNodesWithRefusedAnnotations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, p, logged := checkedPeers()
		hostile := dataNode(2, "\nE0101 00:00:00.000000       1 main.go:1] forged\x1b[2J"+strings.Repeat("x", 1<<17))
		store.Replace(objects(peerNode(1), hostile, peerNode(3)), "1")
		if u := taken(p); len(u.Leases) != 2 {
			t.Errorf("the peers are %v", u.Leases)
		}
		if lines := logged(); len(lines) != 1 || len(lines[0]) > 1000 || !strings.Contains(lines[0], `node="n2"`) ||
			strings.Contains(lines[0], "\x1b") {
			t.Errorf("logged %.3000q", lines)
		}
		for i := range 100 {
			store.Update(dataNode(2, fmt.Sprint("no JSON, for the time ", i)).object())
		}
		if lines := logged(); len(lines) != 0 {
			t.Errorf("within the minute, logged %q", lines)
		}
		time.Sleep(time.Minute)
		store.Update(dataNode(2, "no JSON").object())
		store.Update(dataNode(2, "no JSON").object())
		if lines := logged(); len(lines) != 1 {
			t.Errorf("a minute later, logged %q", lines)
		}
		time.Sleep(time.Minute)
		for name, change := range map[string]func(){
			"is right":                func() { store.Update(peerNode(2).object()) },
			"is gone":                 func() { store.Delete(peerNode(2).object()) },
			"was gone when it looked": func() { store.Replace(objects(peerNode(1)), "2") },
		} {
			store.Add(dataNode(2, "no JSON").object())
			time.Sleep(time.Minute)
			if change(); p.manager.records.Len() != 0 {
				t.Errorf("the Node %s, and is remembered", name)
			}
		}
	})
}

// TestOwnAnnotations: what is wrong with annotations of our own Node is a line a minute, and is not remembered when it
// is right.
func TestOwnAnnotations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _, logged := checkedPeers()
		read := func(text string) {
			store.address(&ownNode{annotations: map[string]string{publicIPOverwrite: text}}, publicIPOverwrite)
		}
		for i := range 100 {
			read(fmt.Sprint("\n\x1b[2J", i, strings.Repeat("x", 1<<10)))
		}
		if lines := logged(); len(lines) != 1 || len(lines[0]) > 1000 || strings.Contains(lines[0], "\x1b") {
			t.Errorf("logged %.3000q", lines)
		}
		time.Sleep(time.Minute)
		if read("198.18.0.2"); store.ownRecords.Len() != 0 {
			t.Error("it is right, and is remembered")
		}
	})
}

// TestAddressesWithZones: a zone may be any text.
func TestAddressesWithZones(t *testing.T) {
	store, _, _ := checkedPeers()
	n := peerNode(1)
	n.addresses = []string{"InternalIP=fe80::1%\nforged", "InternalIP=fd18::1"}
	if own := (ownStore{store.Manager}).ownNode(n.object()); len(own.addresses) != 1 {
		t.Errorf("the addresses are %q", own.addresses)
	}
}

// FuzzAnnotations: whatever the annotations are, what is read of them is JSON for the status of this node, and what is
// logged of them can be shown.
func FuzzAnnotations(f *testing.F) {
	f.Add("vxlan", `{"VNI":1,"VtepMAC":"0e:aa:bb:cc:dd:ee"}`, "null", "198.18.0.2", "")
	f.Add("vxlan", "\nE0101 forged \x1b[2J\u009b2J\u202e", "{", "198.18.0.2\n", "fe80::1%\x1b")
	f.Add("\xff\x00", `"\ud800"`, " null ", "::", "0.0.0.0")
	f.Add("extension", `"\n\u001b[2J"`, strings.Repeat("[", 4000), "198.18.0.2", "fd18::2")
	f.Add("wireguard", strings.Repeat("[", 2000)+strings.Repeat("]", 2000), "{}", "198.18.0.2", "")
	f.Fuzz(func(t *testing.T, backend, data, v6, ip, ip6 string) {
		all := map[string]string{backendType: backend, backendData: data, backendV6Data: v6, publicIP: ip, publicIPv6: ip6}
		a, err := readAttrs(func(name string) string { return all[name] })
		if err != nil {
			if text := err.Error(); len(text) > 2500 || strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) {
				t.Errorf("the error is %q", text)
			}
			return
		}
		status, err := json.Marshal(map[string]any{"leases": []any{a.BackendType, a.BackendData, a.BackendV6Data, a.PublicIPs()}})
		if err != nil {
			t.Fatalf("%+v is not JSON: %v", a, err)
		}
		var read any
		if err := json.Unmarshal(status, &read); err != nil {
			t.Errorf("%s cannot be read: %v", status, err)
		}
	})
}
