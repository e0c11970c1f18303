package subnet

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
)

func TestKeys(t *testing.T) {
	for _, c := range []struct{ key, ipv4, ipv6, text string }{
		{"10.5.34.0-24", "10.5.34.0/24", "", "10.5.34.0/24"},
		{"10.5.34.0-24&fc00:0:0:22::-64", "10.5.34.0/24", "fc00:0:0:22::/64", "10.5.34.0/24,fc00:0:0:22::/64"},
		{"0.0.0.0-0&fc00:0:0:22::-64", "", "fc00:0:0:22::/64", "fc00:0:0:22::/64"},
		{"10.5.0.4-30&fd00::4-126", "10.5.0.4/30", "fd00::4/126", "10.5.0.4/30,fd00::4/126"},
	} {
		var want Subnets
		if c.ipv4 != "" {
			want.IPv4 = netip.MustParsePrefix(c.ipv4)
		}
		if c.ipv6 != "" {
			want.IPv6 = netip.MustParsePrefix(c.ipv6)
		}
		got, err := ParseKey(c.key)
		if err != nil || got != want {
			t.Errorf("%s: got %v, %v", c.key, got, err)
		}
		if want.Key() != c.key {
			t.Errorf("%v has the key %s, want %s", want, want.Key(), c.key)
		}
		if want.String() != c.text {
			t.Errorf("%s prints as %s, want %s", c.key, want, c.text)
		}
	}
}

func TestKeyErrors(t *testing.T) {
	const form = " is not of the form 10.5.34.0-24 or 10.5.34.0-24&fc00:0:0:22::-64"
	for _, c := range []struct{ key, want string }{
		{"", `""` + form},
		{"config", `"config"` + form},
		{"10.5.34.0/24", `"10.5.34.0/24"` + form},
		{"10.5.34.0-24&", `"10.5.34.0-24&"` + form},
		{"&fc00::-64", `"&fc00::-64"` + form},
		{"10.5.34.0-24&10.5.35.0-24", `"10.5.34.0-24&10.5.35.0-24"` + form},
		{"10.5.34.0-24\n", `"10.5.34.0-24\n"` + form},
		{"10.5.34.0--1", `"10.5.34.0--1"` + form},
		{"10.5.34.0-33", `"10.5.34.0/33" is not a subnet`},
		{"10.5.34-24", `"10.5.34/24" is not a subnet`},
		{"10.5.34.0-024", `"10.5.34.0/024" is not a subnet`},
		{"10.5.34.1-24", `10.5.34.1/24 has host bits set: should it be 10.5.34.0/24?`},
		{"10.5.34.0-24&fc00:0:0:22::1-64", `fc00:0:0:22::1/64 has host bits set: should it be fc00:0:0:22::/64?`},
		{"10.5.34.0-24&fc00:::-64", `"fc00:::/64" is not a subnet`},
		{"10.5.34.0-0", `10.5.34.0/0 cannot be a node's subnet`},
		{"10.5.34.0-24&::-0", `::/0 cannot be a node's subnet`},
		{"0.0.0.0-0", `"0.0.0.0-0" names no subnet`},
	} {
		got, err := ParseKey(c.key)
		if err == nil {
			t.Errorf("%q: no error, but %v", c.key, got)
		} else if err.Error() != c.want {
			t.Errorf("%q:\n got %s\nwant %s", c.key, err, c.want)
		}
	}
}

func FuzzKey(f *testing.F) {
	for _, seed := range []string{"10.5.34.0-24", "10.5.34.0-24&fc00:0:0:22::-64", "0.0.0.0-0&fc00:0:0:22::-64",
		"::ffff:1-2"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, key string) {
		s, err := ParseKey(key)
		if err != nil {
			return
		}
		again, err := ParseKey(s.Key())
		if err != nil || again != s || len(s.Each()) == 0 {
			t.Errorf("%q is %v with the key %q, which is %v, %v", key, s, s.Key(), again, err)
		}
	})
}

// What upstream writes, byte for byte, and what it means.
func TestAttrs(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")
	for _, c := range []struct {
		text string
		want Attrs
	}{
		{`{"PublicIP":"192.0.2.7","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:aa:bb:cc:dd:ee"}}`,
			Attrs{PublicIP: v4, BackendType: "vxlan", BackendData: json.RawMessage(`{"VNI":1,"VtepMAC":"0e:aa:bb:cc:dd:ee"}`)}},
		{`{"PublicIP":"192.0.2.7","PublicIPv6":null}`,
			Attrs{PublicIP: v4}},
		{`{"PublicIP":"192.0.2.7","PublicIPv6":"2001:db8::7","BackendType":"vxlan","BackendData":{"VNI":1},"BackendV6Data":{"VNI":2}}`,
			Attrs{PublicIP: v4, PublicIPv6: v6, BackendType: "vxlan", BackendData: json.RawMessage(`{"VNI":1}`),
				BackendV6Data: json.RawMessage(`{"VNI":2}`)}},
		{`{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::7","BackendType":"host-gw"}`,
			Attrs{PublicIPv6: v6, BackendType: "host-gw"}},
		{`{"PublicIP":"192.0.2.7","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"a\u0026b\u003c="}}`,
			Attrs{PublicIP: v4, BackendType: "wireguard", BackendData: json.RawMessage(`{"PublicKey":"a\u0026b\u003c="}`)}},
	} {
		var got Attrs
		if err := json.Unmarshal([]byte(c.text), &got); err != nil || !got.Equal(c.want) {
			t.Errorf("%s: got %+v, %v", c.text, got, err)
		}
		if text, err := json.Marshal(c.want); err != nil || string(text) != c.text {
			t.Errorf("%+v:\n got %s, %v\nwant %s", c.want, text, err, c.text)
		}
	}
}

// What operators and old versions write.
func TestAttrsAreReadLeniently(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")
	for _, c := range []struct {
		text string
		want Attrs
	}{
		{`{"PublicIP": "192.0.2.7"}`, Attrs{PublicIP: v4}},
		{`{"publicip": "192.0.2.7", "Unknown": {}}`, Attrs{PublicIP: v4}},
		{`{"PublicIP": "192.0.2.7", "PublicIPv6": "", "BackendData": null, "BackendV6Data": null}`, Attrs{PublicIP: v4}},
		{`{"PublicIP": "192.0.2.7", "PublicIPv6": "::"}`, Attrs{PublicIP: v4}},
		{`{"PublicIPv6": "2001:db8::7"}`, Attrs{PublicIPv6: v6}},
	} {
		var got Attrs
		if err := json.Unmarshal([]byte(c.text), &got); err != nil || !got.Equal(c.want) || got.BackendData != nil {
			t.Errorf("%s: got %+v, %v", c.text, got, err)
		}
	}
}

func TestAttrsErrors(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{`{}`, `neither PublicIP nor PublicIPv6 is set`},
		{`null`, `neither PublicIP nor PublicIPv6 is set`},
		{`{"PublicIP":"0.0.0.0","PublicIPv6":null}`, `neither PublicIP nor PublicIPv6 is set`},
		{`{"PublicIP":"2001:db8::7"}`, `PublicIP "2001:db8::7" is not an IPv4 address`},
		{`{"PublicIP":"192.0.2.7","PublicIPv6":"192.0.2.7"}`, `PublicIPv6 "192.0.2.7" is not an IPv6 address`},
		{`{"PublicIP":"192.0.2.7","PublicIPv6":"::ffff:192.0.2.7"}`, `PublicIPv6 "::ffff:192.0.2.7" is not an IPv6 address`},
		{`{"PublicIP":"192.0.2.7","PublicIPv6":"fe80::1%eth0"}`, `PublicIPv6 "fe80::1%eth0" is not an IPv6 address`},
		{`{"PublicIP":"192.0.2"}`, `PublicIP "192.0.2" is not an IPv4 address`},
		{`{"PublicIP":"192.0.2.7"`, `unexpected end of JSON input`},
		{`{"PublicIP":7}`, `json: cannot unmarshal number into Go struct field record.PublicIP of type string`},
	} {
		got := Attrs{BackendType: "untouched"}
		err := json.Unmarshal([]byte(c.text), &got)
		if err == nil {
			t.Errorf("%s: no error, but %+v", c.text, got)
		} else if err.Error() != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.text, err, c.want)
		}
		if !got.Equal(Attrs{BackendType: "untouched"}) {
			t.Errorf("%s: left %+v behind", c.text, got)
		}
	}
}

// TestLargeRecords: a record is read up to a size, and so are its backend data. What is larger is not looked into.
func TestLargeRecords(t *testing.T) {
	LimitData("large", 64<<10)
	defer delete(dataLimits, "large")
	record := func(backend, data string) []byte {
		return []byte(`{"PublicIP":"192.0.2.7","BackendType":"` + backend + `","BackendData":` + data + `}`)
	}
	text := func(bytes int) string { return `"` + strings.Repeat("x", bytes-2) + `"` }
	v6 := record("vxlan", `{},"BackendV6Data":`+text(MaxData+1))
	for _, c := range []struct {
		record []byte
		want   string // the error
	}{
		{record("vxlan", text(MaxData)), ""},
		{record("vxlan", text(MaxData+1)), "the backend data have 4097 bytes: more than 4096 are not read"},
		{v6, "the backend data have 4097 bytes: more than 4096 are not read"},
		{record("large", text(64<<10)), ""},
		{record("large", text(64<<10+1)), "the backend data have 65537 bytes: more than 65536 are not read"},
		{record("large", strings.Repeat("[", 3000)+strings.Repeat("]", 3000)),
			"the backend data have 6000 bytes: more than 4096 are not read, unless they are a text in quotes"},
		{record(strings.Repeat("x", maxType), "{}"), ""},
		{record(strings.Repeat("x", maxType+1), "{}"), "the backend's name has 65 bytes: more than 64 are not read"},
		{[]byte(strings.Repeat("nonsense", 1<<17)), "the record has 1048576 bytes: more than 135168 are not read"},
		{record("vxlan", "{}\x1b[2J"), `invalid character '\x1b' after object key:value pair`},
		{[]byte(`{"PublicIP":` + strings.Repeat("7", 10000) + `}`), "json: cannot unmarshal number into Go struct field record.PublicIP of type string"},
		{[]byte(`{"PublicIP":"` + strings.Repeat("7", 10000) + `"}`), `PublicIP "` + strings.Repeat("7", 200-len(`PublicIP "`)) + "…"},
	} {
		a, err := ParseAttrs(c.record)
		switch {
		case err == nil && c.want == "":
			if len(a.BackendData) == 0 {
				t.Errorf("%.100s is read as %+v", c.record, a)
			}
		case err == nil || err.Error() != c.want:
			t.Errorf("%.100s: %v, want %q", c.record, err, c.want)
		}
	}
}

func TestAttrsEqual(t *testing.T) {
	full := func() Attrs {
		return Attrs{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7"), "vxlan",
			json.RawMessage(`{"VNI":1}`), json.RawMessage(`{"VNI":2}`)}
	}
	for name, change := range map[string]func(*Attrs){
		"PublicIP":      func(a *Attrs) { a.PublicIP = a.PublicIP.Next() },
		"PublicIPv6":    func(a *Attrs) { a.PublicIPv6 = netip.Addr{} },
		"BackendType":   func(a *Attrs) { a.BackendType = "ipip" },
		"BackendData":   func(a *Attrs) { a.BackendData = nil },
		"BackendV6Data": func(a *Attrs) { a.BackendV6Data = json.RawMessage(`{"VNI":3}`) },
	} {
		a, b := full(), full()
		if !a.Equal(b) {
			t.Fatal("equal attributes are not")
		}
		if change(&b); a.Equal(b) || b.Equal(a) {
			t.Errorf("%s makes no difference", name)
		}
	}
}

func FuzzAttrs(f *testing.F) {
	for _, seed := range []string{
		`{"PublicIP":"192.0.2.7","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1}}`,
		`{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::7","BackendV6Data": [1, 2] }`,
		`{"PublicIP":"192.0.2.7","BackendData":"a&b<\u2028"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var a Attrs
		if json.Unmarshal(text, &a) != nil {
			return
		}
		first, err := json.Marshal(a)
		if err != nil {
			t.Fatalf("%s was read but not written: %v", text, err)
		}
		var b Attrs
		if err := json.Unmarshal(first, &b); err != nil {
			t.Fatalf("%s became %s, which is not readable: %v", text, first, err)
		}
		if second, err := json.Marshal(b); err != nil || string(second) != string(first) {
			t.Errorf("%s became %s and then %s, %v", text, first, second, err)
		}
		// Writing brings backend data into compact form, and nothing else.
		a.BackendData, a.BackendV6Data, b.BackendData, b.BackendV6Data = nil, nil, nil, nil
		if !a.Equal(b) || len(a.PublicIPs()) == 0 {
			t.Errorf("%s: %+v became %+v", text, a, b)
		}
	})
}
