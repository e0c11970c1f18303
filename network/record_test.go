package network

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/subnet"
)

// A recordReader is a node with one of the backends, which reads records of peers.
type recordReader struct {
	setup
	own subnet.Lease
}

// recordReaders returns a node with each of the backends, of both families where the backend has both.
func recordReaders(t testing.TB) map[string]recordReader {
	uplink, err := backendtest.ParseUplink("eth0 1500 198.18.0.1/24 fd18::1/64")
	if err != nil {
		t.Fatal(err)
	}
	more := map[string]string{"ipsec": `, "PSK": "` + strings.Repeat("x", 96) + `"`}
	data := map[string]string{
		"vxlan":     `{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}`,
		"wireguard": `{"PublicKey":"YmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmI=","Port":51820}`,
	}
	all := map[string]recordReader{}
	for _, b := range backend.Types() {
		families := `"EnableIPv6": true, "IPv6Network": "fd05::/48", `
		if b.Name == "ipip" || b.Name == "tencent-vpc" {
			families = ""
		}
		cfg, err := subnet.ParseConfig(fmt.Appendf(nil, `{"Network": "10.5.0.0/16", %s"Backend": {"Type": %q%s}}`, families, b.Name, more[b.Name]))
		if err != nil {
			t.Fatal(err)
		}
		r := recordReader{setup: setup{cfg: cfg, uplink: uplink}}
		if r.backend, err = backend.New(cfg, uplink); err != nil {
			t.Fatal(err)
		}
		own := `{"PublicIP":"198.18.0.1","PublicIPv6":"fd18::1","BackendType":"` + b.Name + `"`
		if d := data[b.Name]; d != "" {
			own += `,"BackendData":` + d + `,"BackendV6Data":` + d
		}
		r.own = lease("10.5.1.0-24&fd05:0:0:1::-64", own+"}")
		all[b.Name] = r
	}
	return all
}

// shown returns why a text is not fit to be shown; "" if it is.
func shown(text string) string {
	switch {
	case !utf8.ValidString(text):
		return "it is not UTF-8"
	case strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }):
		return "it is not one printable line"
	case len(text) > 3000:
		return "it is long"
	}
	return ""
}

// FuzzRecord reads a record, whatever it is, as each backend does: what is refused is refused with a text that can be
// shown; what is accepted becomes commands that can be shown, problems that can be shown, and a status that
// flannelctl can read.
func FuzzRecord(f *testing.F) {
	const key = "10.5.2.0-24&fd05:0:0:2::-64"
	record := func(backend, data string) string {
		return `{"PublicIP":"198.18.0.2","PublicIPv6":"fd18::2","BackendType":"` + backend + `","BackendData":` + data + `}`
	}
	const forged = `\nE0101 00:00:00.000000       1 main.go:1] \"forged\"\u001b[2J\u001b]0;title\u0007`
	for _, seed := range [][2]string{
		{key, record("vxlan", `{"VNI":1,"VtepMAC":"0e:00:00:00:00:02"}`)},
		{key, record("vxlan", `{"VNI":1,"VtepMAC":"`+forged+`"}`)},
		{key, record("vxlan", "{\"VNI\":\n\"\u009b2J\u202e\x7f\"}")},
		{key, record("vxlan", `{"VNI":`+strings.Repeat("7", 4000)+`}`)},
		{key, record("vxlan", `"`+strings.Repeat("x", 1<<20)+`"`)},
		{key, record("vxlan", strings.Repeat("[", 2000)+strings.Repeat("]", 2000))},
		{key, record("wireguard", `{"PublicKey":"3yKc4cRnbNs8kZrJLmsHZqwPsUdOBZFyEg/AcKB41BM=","Port":51820}`)},
		{key, record("wireguard", `{"PublicKey":"YmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmJiYmI=","Port":-1}`)},
		{key, record("wireguard", `{"PublicKey":["\u001b[2J",{"x":"`+forged+`"}]}`)},
		{key, record("extension", `"`+forged+`'; reboot; '$(reboot)"`)},
		{key, record("extension", `"`+strings.Repeat("x", 64<<10-2)+`"`)},
		{key, record("extension", strings.Repeat("[", 9999)+strings.Repeat("]", 9999))},
		{key, record(forged, "null")},
		{key, record(strings.Repeat("x", 1<<20), "null")},
		{key, "\nE0101 forged\x1b[2J"},
		{key, "{\"PublicIP\":\"198.18.0.2\",\"BackendType\":\"\xff\xfe\",\"BackendData\":\"\xff\"}"},
		{key, `{"PublicIP":"` + forged + `"}`},
		{key, `{"PublicIP":"224.0.0.5","PublicIPv6":"ff02::1"}`},
		{key, `{"PublicIP":"255.255.255.255","PublicIPv6":"::1"}`},
		{key, `{"PublicIP":"127.0.0.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}}`},
		{key, `{"PublicIP":"198.18.0.1"}`},
		{"0.0.0.0-0", record("host-gw", "null")},
		{"10.0.0.0-8", record("host-gw", "null")},
		{"169.254.169.254-32", record("host-gw", "null")},
		{"10.5.2.0-24\n\x1b[2J", record("host-gw", "null")},
		{strings.Repeat("9", 1<<20) + "-24", record("host-gw", "null")},
		{"10.5.2.0-24&fe80::-64", record("ipsec", "null")},
	} {
		f.Add(seed[0], []byte(seed[1]))
	}
	readers := recordReaders(f)
	manager := newManager("{}")
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		check := func(what, text string) {
			if why := shown(text); why != "" {
				t.Errorf("%s: %s: %.3000q", what, why, text)
			}
		}
		subnets, err := subnet.ParseKey(key)
		if err != nil {
			check("the error of the key", err.Error())
			return
		}
		attrs, err := subnet.ParseAttrs(value)
		if err != nil {
			check("the error of the value", err.Error())
			return
		}
		for name, r := range readers {
			asIs, likeUs := subnet.Lease{Subnets: subnets, Attrs: attrs}, subnet.Lease{Subnets: subnets, Attrs: attrs}
			likeUs.Attrs.BackendType = name
			for _, l := range []subnet.Lease{asIs, likeUs} {
				s := state{setup: r.setup, own: &r.own}
				plan := s.applyUpdate(snapshot(l))
				for _, objects := range plan.objects {
					for _, o := range objects {
						check(name+": a command", o.String())
						check(name+": a command", o.Undo())
					}
				}
				for _, p := range plan.problems {
					check(name+": a problem", p.text)
				}
				if _, err := r.backend.Peer(r.own, l); err != nil { // whatever the plan says of the lease
					check(name+": an error", err.Error())
				}
				v := view{Options: Options{Manager: manager}, state: &s}
				for _, c := range []struct{ sent, into any }{{v.status(), &Status{}}, {v.leaseList(), &[]Lease{}}} {
					w := httptest.NewRecorder()
					answer(w, c.sent, nil)
					if w.Code != http.StatusOK {
						t.Fatalf("%s: the answer is %d, %.300s", name, w.Code, w.Body)
					}
					if err := json.Unmarshal(w.Body.Bytes(), c.into); err != nil {
						t.Fatalf("%s: flannelctl cannot read the answer: %v", name, err)
					}
				}
				var list []Lease
				text, _ := json.Marshal(v.leaseList())
				if err := json.Unmarshal(text, &list); err != nil || len(list) != 1 || !sameLease(list[0].Lease(), l) {
					t.Errorf("%s: %.500q is read as %.500q, %v", name, value, text, err)
				}
			}
		}
	})
}

// sameLease reports whether flannelctl has read a lease as it was. JSON may differ in white space and escapes, and a name
// in what is not UTF-8.
func sameLease(got, want subnet.Lease) bool {
	same := func(a, b json.RawMessage) bool {
		x, errA := json.Marshal(a)
		y, errB := json.Marshal(b)
		return errA == nil && errB == nil && string(x) == string(y)
	}
	return got.Subnets == want.Subnets && slices.Equal(got.Attrs.PublicIPs(), want.Attrs.PublicIPs()) &&
		got.Attrs.BackendType == strings.ToValidUTF8(want.Attrs.BackendType, "\ufffd") &&
		same(got.Attrs.BackendData, want.Attrs.BackendData) && same(got.Attrs.BackendV6Data, want.Attrs.BackendV6Data)
}
