package subnet

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/pagetest"
)

// read parses and divides a configuration.
func read(text string) (*Config, error) {
	c, err := ParseConfig([]byte(text))
	if err == nil {
		err = c.Divide()
	}
	return c, err
}

func pool(network string, length int, lowest, highest string) Pool {
	return Pool{SubnetLen: length, divided: true, Ranges: []Range{{Network: netip.MustParsePrefix(network),
		Min: netip.MustParseAddr(lowest), Max: netip.MustParseAddr(highest)}}}
}

// join returns a pool of several networks.
func join(pools ...Pool) Pool {
	for _, p := range pools[1:] {
		pools[0].Ranges = append(pools[0].Ranges, p.Ranges...)
	}
	return pools[0]
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		text       string
		ipv4, ipv6 Pool
	}{
		{text: `{"Network": "10.5.0.0/16"}`, ipv4: pool("10.5.0.0/16", 24, "10.5.1.0", "10.5.255.0")},
		{text: `{"EnableIPv4": null, "Network": "10.5.0.0/16"}`, ipv4: pool("10.5.0.0/16", 24, "10.5.1.0", "10.5.255.0")},
		{text: `{"network": "10.5.0.0/16", "SUBNETLEN": 26}`, ipv4: pool("10.5.0.0/16", 26, "10.5.0.64", "10.5.255.192")},
		{text: `{"Network": "10.0.0.0/8"}`, ipv4: pool("10.0.0.0/8", 24, "10.0.1.0", "10.255.255.0")},
		{text: `{"Network": "10.5.0.0/22"}`, ipv4: pool("10.5.0.0/22", 24, "10.5.1.0", "10.5.3.0")},
		{text: `{"Network": "10.5.0.0/23"}`, ipv4: pool("10.5.0.0/23", 25, "10.5.0.128", "10.5.1.128")},
		{text: `{"Network": "10.5.0.0/28"}`, ipv4: pool("10.5.0.0/28", 30, "10.5.0.4", "10.5.0.12")},
		{text: `{"Network": "10.5.0.0/16", "SubnetMin": "10.5.10.0", "SubnetMax": "10.5.20.0"}`,
			ipv4: pool("10.5.0.0/16", 24, "10.5.10.0", "10.5.20.0")},
		{text: `{"Network": "10.5.0.0/16", "SubnetMin": "10.5.0.0", "SubnetMax": "10.5.0.0"}`,
			ipv4: pool("10.5.0.0/16", 24, "10.5.0.0", "10.5.0.0")},
		{text: `{"Network": "10.5.0.0/16", "SubnetMin": "0.0.0.0"}`, ipv4: pool("10.5.0.0/16", 24, "10.5.1.0", "10.5.255.0")},
		{text: `{"EnableIPv4": true, "Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}`,
			ipv4: pool("10.5.0.0/16", 24, "10.5.1.0", "10.5.255.0"),
			ipv6: pool("fd00:5::/48", 64, "fd00:5:0:1::", "fd00:5:0:ffff::")},
		{text: `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "IPv6SubnetLen": 80, "IPv6SubnetMin": "fd00:5:0:0:7::", "IPv6SubnetMax": "fd00:5:0:0:9::"}`,
			ipv6: pool("fd00:5::/48", 80, "fd00:5:0:0:7::", "fd00:5:0:0:9::")},
		{text: `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/63"}`,
			ipv6: pool("fd00:5::/63", 65, "fd00:5:0:0:8000::", "fd00:5:0:1:8000::")},
		{text: `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/124"}`,
			ipv6: pool("fd00:5::/124", 126, "fd00:5::4", "fd00:5::c")},
		{text: `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "::/1", "IPv6SubnetLen": 3}`,
			ipv6: pool("::/1", 3, "2000::", "6000::")},
		{text: `{"Network": "10.5.0.0/16", "SubnetMin": "10.5.10.0", "EnableIPv6": true, "IPv6Network": "fd05::/48", "Networks": ["10.7.0.0/20", "fd07::/56", "10.6.0.0/16"]}`,
			ipv4: join(pool("10.5.0.0/16", 24, "10.5.10.0", "10.5.255.0"), pool("10.7.0.0/20", 24, "10.7.1.0", "10.7.15.0"),
				pool("10.6.0.0/16", 24, "10.6.1.0", "10.6.255.0")),
			ipv6: join(pool("fd05::/48", 64, "fd05:0:0:1::", "fd05:0:0:ffff::"), pool("fd07::/56", 64, "fd07:0:0:1::", "fd07:0:0:ff::"))},
	} {
		got, err := read(c.text)
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		if !reflect.DeepEqual(got.IPv4, c.ipv4) || !reflect.DeepEqual(got.IPv6, c.ipv6) {
			t.Errorf("%s:\n got %+v %+v\nwant %+v %+v", c.text, got.IPv4, got.IPv6, c.ipv4, c.ipv6)
		}
		if len(got.Warnings) > 0 {
			t.Errorf("%s: warnings %q", c.text, got.Warnings)
		}
	}
}

func TestConfigErrors(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{``, `not valid JSON at line 1, column 0: unexpected end of JSON input`},
		{"{\n  \"Network\": \"10.5.0.0/16\",\n}",
			`not valid JSON at line 3, column 1: invalid character '}' looking for beginning of object key string`},
		{`{} {}`, `not valid JSON at line 1, column 4: invalid character '{' after top-level value`},
		{`[]`, `got a array, want an object {…}`},
		{`null`, `got null, want an object {…}`},
		{`{"Network": 10}`, `Network: got a number, want a text in quotes`},
		{`{"SubnetLen": "24"}`, `SubnetLen: got a string, want a whole number`},
		{`{"SubnetLen": 24.5}`, `SubnetLen: got a number 24.5, want a whole number`},
		{`{"EnableIPv6": "yes"}`, `EnableIPv6: got a string, want true or false`},
		{`{"EnableIPv4": 1}`, `EnableIPv4: got a number, want true or false`},
		{`{}`, `Network is missing: an IPv4 network such as 10.5.0.0/16`},
		{`{"EnableIPv4": false}`, `EnableIPv4 and EnableIPv6 are both false: at least one must be true`},
		{`{"Network": "10.5.0.0"}`, `Network "10.5.0.0" is not an IPv4 network such as 10.5.0.0/16`},
		{`{"Network": "10.5.0.0/33"}`, `Network "10.5.0.0/33" is not an IPv4 network such as 10.5.0.0/16`},
		{`{"Network": "0.0.0.0/0"}`, `Network "0.0.0.0/0" is not an IPv4 network such as 10.5.0.0/16`},
		{`{"Network": "fd00:5::/48"}`, `Network "fd00:5::/48" is not an IPv4 network such as 10.5.0.0/16`},
		{`{"Network": "10.5.0.0/29"}`, `Network 10.5.0.0/29 is too small: /28 is the longest that can be divided`},
		{`{"Network": "10.5.0.0/16", "SubnetLen": 17}`,
			`SubnetLen 17 does not suit Network 10.5.0.0/16: 18 to 30 are allowed`},
		{`{"Network": "10.5.0.0/16", "SubnetLen": 31}`,
			`SubnetLen 31 does not suit Network 10.5.0.0/16: 18 to 30 are allowed`},
		{`{"Network": "10.5.0.0/16", "SubnetLen": -1}`,
			`SubnetLen -1 does not suit Network 10.5.0.0/16: 18 to 30 are allowed`},
		{`{"Network": "10.5.0.0/16", "SubnetMin": "ten"}`, `SubnetMin "ten" is not an IPv4 address`},
		{`{"Network": "10.5.0.0/16", "SubnetMax": "fd00::"}`, `SubnetMax "fd00::" is not an IPv4 address`},
		{`{"Network": "10.5.0.0/16", "SubnetMin": "10.6.1.0"}`, `SubnetMin 10.6.1.0 is outside Network 10.5.0.0/16`},
		{`{"Network": "10.5.0.0/16", "SubnetMax": "10.6.1.0"}`, `SubnetMax 10.6.1.0 is outside Network 10.5.0.0/16`},
		{`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.7"}`,
			`SubnetMin 10.5.1.7 is not the base of a /24 subnet: should it be 10.5.1.0?`},
		{`{"Network": "10.5.0.0/16", "SubnetMax": "10.5.20.0", "SubnetLen": 18}`,
			`SubnetMax 10.5.20.0 is not the base of a /18 subnet: should it be 10.5.0.0?`},
		{`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.20.0", "SubnetMax": "10.5.10.0"}`,
			`SubnetMin 10.5.20.0 is above SubnetMax 10.5.10.0`},
		{`{"Network": "10.5.0.0/16", "EnableIPv6": true}`, `IPv6Network is missing: an IPv6 network such as fd00:5::/48`},
		{`{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "10.6.0.0/16"}`,
			`IPv6Network "10.6.0.0/16" is not an IPv6 network such as fd00:5::/48`},
		{`{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "::ffff:10.5.0.0/112"}`,
			`IPv6Network "::ffff:10.5.0.0/112" is not an IPv6 network such as fd00:5::/48`},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/125"}`,
			`IPv6Network fd00:5::/125 is too small: /124 is the longest that can be divided`},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "IPv6SubnetLen": 127}`,
			`IPv6SubnetLen 127 does not suit IPv6Network fd00:5::/48: 50 to 126 are allowed`},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "IPv6SubnetMin": "10.5.0.0"}`,
			`IPv6SubnetMin "10.5.0.0" is not an IPv6 address`},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "IPv6SubnetMin": "fd00:5:0:1::%eth0"}`,
			`IPv6SubnetMin "fd00:5:0:1::%eth0" is not an IPv6 address`},
		{`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "IPv6SubnetMax": "fd00:5:0:1::1"}`,
			`IPv6SubnetMax fd00:5:0:1::1 is not the base of a /64 subnet: should it be fd00:5:0:1::?`},
		{`{"Network": "10.5.0.0/16", "Networks": "10.6.0.0/16"}`, `Networks: got a string, want a list of texts in quotes`},
		{`{"Network": "10.5.0.0/16", "Networks": [10]}`, `Networks: got a number, want a text in quotes`},
		{`{"Network": "10.5.0.0/16", "Networks": ["10.6.0.0"]}`, `Networks "10.6.0.0" is not an IPv4 network such as 10.5.0.0/16`},
		{`{"Network": "10.5.0.0/16", "Networks": ["::/0"]}`, `Networks "::/0" is not an IPv6 network such as fd00:5::/48`},
		{`{"Network": "10.5.0.0/16", "Networks": ["10.5.128.0/17"]}`,
			`Networks 10.5.128.0/17 overlaps 10.5.0.0/16: each network must be apart from the others`},
		{`{"Network": "10.5.0.0/16", "Networks": ["10.6.0.0/16", "10.6.0.0/16"]}`,
			`Networks 10.6.0.0/16 overlaps 10.6.0.0/16: each network must be apart from the others`},
		{`{"Network": "10.5.0.0/16", "Networks": ["10.6.0.0/23"]}`,
			`SubnetLen 24 does not suit Networks 10.6.0.0/23: 25 to 30 are allowed`},
		{`{"Network": "10.5.0.0/16", "NonMasqueradeCIDRs": ["172.16.0.1"]}`,
			`NonMasqueradeCIDRs "172.16.0.1" is not a prefix such as 172.16.0.0/12 or fd00::/8`},
		{`{"Network": "10.5.0.0/16", "Backend": "vxlan"}`, `Backend: got a string, want an object {…}`},
		{`{"Network": "10.5.0.0/16", "Backend": {}}`, `Backend has no Type: {"Type": "vxlan"}, for example`},
		{`{"Network": "10.5.0.0/16", "Backend": {"Type": 1}}`, `Backend: Type: got a number, want a text in quotes`},
	} {
		got, err := read(c.text)
		if err == nil {
			t.Errorf("%s: no error, but %+v", c.text, got)
		} else if err.Error() != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.text, err, c.want)
		}
	}
}

func TestConfigWarnings(t *testing.T) {
	const known = "EnableIPv4, Network, SubnetLen, SubnetMin, SubnetMax, EnableIPv6, IPv6Network, IPv6SubnetLen, IPv6SubnetMin, IPv6SubnetMax, Networks, NonMasqueradeCIDRs, EnableNFTables, Backend"
	for _, c := range []struct {
		text string
		want []string
	}{
		{`{"Network": "10.5.0.0/16", "Netwrok": "", "Comment": "mine"}`, []string{
			`unknown key "Comment" is ignored: known are ` + known,
			`unknown key "Netwrok" is ignored: known are ` + known}},
		{`{"Network": "10.5.3.4/16"}`, []string{`Network 10.5.3.4/16 is taken as 10.5.0.0/16`}},
		{`{"Network": "10.5.0.0/16", "IPv6Network": "fd00:5::/48"}`,
			[]string{`IPv6Network "fd00:5::/48" is ignored: EnableIPv6 is false`}},
		{`{"Network": "10.5.0.0/16", "EnableIPv6": false, "IPv6Network": "::/0"}`, nil},
		{`{"EnableIPv4": false, "Network": "0.0.0.0/0", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}`, nil},
		{`{"Network": "10.5.0.0/16", "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::1/48"}`, []string{
			`Network "10.5.0.0/16" is ignored: EnableIPv4 is false`,
			`IPv6Network fd00:5::1/48 is taken as fd00:5::/48`}},
		{`{"Network": "10.5.0.0/16", "Networks": ["10.6.0.1/16", "fd06::/48"], "NonMasqueradeCIDRs": ["172.16.0.1/12"]}`, []string{
			"Networks 10.6.0.1/16 is taken as 10.6.0.0/16", "Networks fd06::/48 is ignored: EnableIPv6 is false",
			"NonMasqueradeCIDRs 172.16.0.1/12 is taken as 172.16.0.0/12"}},
	} {
		got, err := read(c.text)
		if err != nil || !slices.Equal(got.Warnings, c.want) {
			t.Errorf("%s: %v\n got %q\nwant %q", c.text, err, got.Warnings, c.want)
		}
	}
}

func TestConfigBackend(t *testing.T) {
	for _, c := range []struct{ text, kind, raw string }{
		{`{"Network": "10.5.0.0/16"}`, "udp", ""},
		{`{"Network": "10.5.0.0/16", "Backend": null}`, "udp", ""},
		{`{"Network": "10.5.0.0/16", "Backend": {"type": "vxlan", "VNI": 7}}`, "vxlan", `{"type": "vxlan", "VNI": 7}`},
		{`{"Network": "10.5.0.0/16", "Backend": {"Type": "VxLAN"}}`, "vxlan", `{"Type": "VxLAN"}`},
	} {
		got, err := read(c.text)
		if err != nil || got.BackendType != c.kind || string(got.Backend) != c.raw || got.EnableNFTables {
			t.Errorf("%s: %+v, %v", c.text, got, err)
		}
	}
	if got, err := read(`{"Network": "10.5.0.0/16", "EnableNFTables": true}`); err != nil || !got.EnableNFTables {
		t.Errorf("EnableNFTables: %+v, %v", got, err)
	}
}

func TestConfigFits(t *testing.T) {
	const v4, v6 = `"Network": "10.5.0.0/16", "SubnetMin": "10.5.10.0", "SubnetMax": "10.5.20.0"`,
		`"EnableIPv6": true, "IPv6Network": "fd00:5::/48"`
	for _, c := range []struct {
		config  string
		subnets string
		want    bool
	}{
		{v4, "10.5.10.0/24", true},
		{v4, "10.5.20.0/24", true},
		{v4, "10.5.9.0/24", false},
		{v4, "10.5.21.0/24", false},
		{v4, "10.5.12.0/25", false},
		{v4, "10.5.12.0/23", false},
		{v4, "10.6.12.0/24", false},
		{v4, "", false},
		{v4, "10.5.10.0/24 fd00:5:0:1::/64", false},
		{v4, "fd00:5:0:1::/64", false},
		{v4 + "," + v6, "10.5.10.0/24 fd00:5:0:1::/64", true},
		{v4 + "," + v6, "10.5.10.0/24", false},
		{v4 + "," + v6, "fd00:5:0:1::/64", false},
		{v4 + "," + v6, "10.5.10.0/24 fd00:5::/64", false},
		{`"EnableIPv4": false, ` + v6, "fd00:5:0:1::/64", true},
		{`"EnableIPv4": false, ` + v6, "10.5.10.0/24 fd00:5:0:1::/64", false},
	} {
		cfg, err := read("{" + c.config + "}")
		if err != nil {
			t.Fatal(err)
		}
		var s Subnets
		for _, text := range strings.Fields(c.subnets) {
			if p := netip.MustParsePrefix(text); p.Addr().Is4() {
				s.IPv4 = p
			} else {
				s.IPv6 = p
			}
		}
		if got := cfg.Fits(s); got != c.want {
			t.Errorf("%s fits {%s}: %v", c.subnets, c.config, got)
		}
	}
}

func FuzzConfig(f *testing.F) {
	for _, seed := range []string{
		`{"Network": "10.5.0.0/16"}`,
		`{"Network": "10.5.3.0/28", "SubnetLen": 30, "SubnetMin": "10.5.3.4", "SubnetMax": "10.5.3.8"}`,
		`{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "IPv6SubnetLen": 80}`,
		`{"EnableIPv6": true, "Network": "255.255.0.0/16", "IPv6Network": "ffff::/16", "Backend": {"Type": "vxlan"}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := read(string(text))
		if err != nil {
			return
		}
		if len(c.Each()) == 0 || c.BackendType == "" {
			t.Fatalf("nothing is on: %+v", c)
		}
		for _, p := range c.Each() {
			for _, r := range p.Ranges {
				for _, a := range []netip.Addr{r.Min, r.Max} {
					if s := netip.PrefixFrom(a, p.SubnetLen); !p.Fits(s) || !r.Network.Overlaps(s) || s != s.Masked() {
						t.Errorf("%+v does not fit its own bound %v", p, s)
					}
				}
			}
			var taken []netip.Prefix
			for _, s := range p.Free(nil, 5) {
				if r, ok := p.Range(s); !ok || !p.Fits(s) || s.Bits() < r.Network.Bits() || !r.Network.Contains(last(s)) {
					t.Errorf("%+v hands out %v", p, s)
				}
				taken = append(taken, s)
			}
			if len(taken) == 0 {
				t.Errorf("%+v holds no subnet", p)
			}
			for _, s := range p.Free(taken, 5) {
				if slices.ContainsFunc(taken, s.Overlaps) {
					t.Errorf("%+v hands out %v again", p, s)
				}
			}
		}
	})
}

// The documentation lists the keys as they are.
func TestReference(t *testing.T) {
	pagetest.Part(t, "../Documentation/configuration.md", "keys", pagetest.Keys(t, defaults), *update)
}
