package cloud

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	_ "github.com/flanneld/flanneld/backend/tencentvpc"
)

var tencent = provider{
	backend: "tencent-vpc", tables: true, ipv4Only: true,
	new: func() (*State, http.Handler) { s := NewTencent(); return s.State, s },
	env: func(url, nothing string) map[string]string {
		return map[string]string{"TENCENTCLOUD_ENDPOINT": url, "TENCENTCLOUD_METADATA_ENDPOINT": url, "ACCESS_KEY_ID": "",
			"HOME": nothing}
	},
	clear: "TENCENTCLOUD_",
	command: map[Action]string{Create: "tccli vpc CreateRoutes ", Replace: "tccli vpc ReplaceRoutes ",
		Delete: "tccli vpc DeleteRoutes "},
	mine: "no network interface of this instance has the address of the uplink eth0 198.18.0.1, fd18::1, mtu 9001; they have 198.18.0.9: …",
	silent: [2]string{"the instance metadata service does not answer (EOF): …",
		"Tencent Cloud's API in ap-test does not answer …"},
	noTable: "there is no such route table in the VPC " + TencentVPC + ": correct RouteTableID in the network's " +
		"configuration, or leave it out to have the table found",
	badID: "rtb-00000bad",
	trouble: []trouble{
		{"no permission", Create, NotPermitted, "Route table %s",
			"the CAM policy of this node's role or API key lacks vpc:CreateRoutes: add it (backend/tencentvpc/README.md has the whole policy); Tencent Cloud says: you are not authorized to perform operation (vpc:CreateRoutes); resource (qcs::vpc:ap-test:uin/100000000001:rtb/*) has no permission"},
		{"no permission to read", Read, NotPermitted, "Route tables",
			"the CAM policy of this node's role or API key lacks vpc:DescribeRouteTables: …"},
		{"the API away", Read, Reset, "Route tables",
			"Tencent Cloud's API in ap-test does not answer DescribeRouteTables (EOF): can this node reach vpc.tencentcloudapi.com, or what TENCENTCLOUD_ENDPOINT names, through a NAT gateway or a public address?"},
		{"the API broken", Read, Broken, "Route tables",
			"DescribeRouteTables fails: Tencent Cloud says: InternalError: An internal error has occurred: ."},
		{"bad credentials", Read, BadCredentials, "Route tables",
			"Tencent Cloud refuses this node's credentials for DescribeRouteTables (AuthFailure.SecretIdNotFound): check …"},
		{"throttling", Read, Throttled, "Route tables",
			"Tencent Cloud throttles DescribeRouteTables (RequestLimitExceeded.UinLimitExceeded): it is tried again, less and less often"},
		{"the table gone", Create, NoTable, "Route table %s",
			"CreateRoutes fails (ResourceNotFound): correct RouteTableID …"},
		{"the table full", Create, Full, "Route table %s",
			`the table is full, this node's pods cannot be reached through it: have the quota route-table-max-policies raised, which tccli vpc DescribeVpcLimits --region ap-test …`},
		{"no metadata", Metadata, Reset, "Tencent Cloud",
			"the instance metadata service does not answer (EOF): tencent-vpc is for CVM instances, whose DNS servers know metadata.tencentyun.com"},
	},
}

// newTencent returns a region whose environment names no API key, and its server.
func newTencent(t *testing.T) (*region, *Tencent) {
	var s *Tencent
	p := tencent
	p.new = func() (*State, http.Handler) { s = NewTencent(); return s.State, s }
	r := newRegion(t, p)
	return r, s
}

var subnet1 = netip.MustParsePrefix("10.5.1.0/24")

// TestTencentTables: those of the configuration, or that of the subnet, or the VPC's default one.
func TestTencentTables(t *testing.T) {
	for _, test := range []struct {
		name, keys string
		tables     func(*region) (used, unused []string)
		calls      int // to read the tables once
	}{
		{"default", "", func(r *region) ([]string, []string) {
			return []string{r.Main()}, []string{r.AddTable("subnet-2")}
		}, 1},
		{"of the subnet", "", func(r *region) ([]string, []string) {
			return []string{r.AddTable("subnet-2", "subnet-1")}, []string{r.Main()}
		}, 1},
		{"several, in pages", `, "RouteTableID": [%q, %q, %q]`, func(r *region) ([]string, []string) {
			r.PageSize = 2
			return []string{r.AddTable("subnet-2"), r.Main(), r.AddTable()}, []string{r.AddTable("subnet-1")}
		}, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			r, _ := newTencent(t)
			used, unused := test.tables(r)
			var ids []any
			for _, id := range used {
				ids = append(ids, id)
			}
			keys := test.keys
			if keys != "" {
				keys = fmt.Sprintf(keys, ids...)
			}
			synctest.Test(t, func(t *testing.T) {
				work(t, r.config(keys), mine).know(mine)
				pass(10 * time.Second)
				for _, id := range used {
					r.expectRoutes(t, id, "10.5.1.0/24 "+r.hop)
				}
				for _, id := range unused {
					r.expectRoutes(t, id)
				}
				if n := r.Calls(Read); n != test.calls {
					t.Errorf("it took %d calls of DescribeRouteTables, want %d", n, test.calls)
				}
			})
		})
	}
}

// TestTencentQuiet: where no other node has a route in the network, a node does not ask about addresses.
func TestTencentQuiet(t *testing.T) {
	r, _ := newTencent(t)
	r.Put(r.Main(), route("10.6.0.0/24", "198.18.0.2"))
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(10 * time.Minute)
		if n := r.Calls(Addresses); n > 0 {
			t.Errorf("there were %d questions about addresses", n)
		}
	})
}

// TestTencentRole: the credentials of the role, which are valid for an hour, are renewed before they expire, and used
// as long as the metadata service does not answer.
func TestTencentRole(t *testing.T) {
	r, s := newTencent(t)
	synctest.Test(t, func(t *testing.T) {
		start, asked := time.Now(), 0
		s.Expires = func() time.Time {
			asked++
			return start.Add(time.Duration(asked) * time.Hour)
		}
		work(t, r.config(""), mine).know(mine)
		pass(5 * time.Hour)
		r.log.expect(t, found, r.said(Create, ""))
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
		if s.Key() != "AKIDrole" || asked < 5 || asked > 6 {
			t.Errorf("in 5 hours, credentials were asked for %d times; the last key is %s", asked, s.Key())
		}
		r.Fail(Metadata, Reset)
		pass(55*time.Minute + 30*time.Second) // new ones are wanted by now, and the old ones are valid
		r.Remove(r.Main(), subnet1)
		pass(4 * time.Minute)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
	})
}

// TestTencentKeys: which key is used, where there are several.
func TestTencentKeys(t *testing.T) {
	file := filepath.Join(t.TempDir(), "credentials")
	if err := os.WriteFile(file, []byte("[default]\nsecret_id = AKIDfile\nsecret_key = k\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, keys string
		env        map[string]string
		want       string // the key, or an error
	}{
		{"configuration", `, "AccessKeyID": "AKIDconfig", "AccessKeySecret": "k"`,
			map[string]string{"ACCESS_KEY_ID": "AKIDaccess", "ACCESS_KEY_SECRET": "k"}, "AKIDconfig"},
		{"upstream's variables", "", map[string]string{"ACCESS_KEY_ID": "AKIDaccess", "ACCESS_KEY_SECRET": "k",
			"TENCENTCLOUD_SECRET_ID": "AKIDenv", "TENCENTCLOUD_SECRET_KEY": "k"}, "AKIDaccess"},
		{"the SDK's variables", "", map[string]string{"TENCENTCLOUD_SECRET_ID": "AKIDenv", "TENCENTCLOUD_SECRET_KEY": "k",
			"TENCENTCLOUD_CREDENTIALS_FILE": file}, "AKIDenv"},
		{"a file", "", map[string]string{"TENCENTCLOUD_CREDENTIALS_FILE": file}, "AKIDfile"},
		{"the role", "", nil, "AKIDrole"},
		{"half a key", "", map[string]string{"ACCESS_KEY_ID": "AKIDaccess"},
			"E Tencent Cloud: there are no Tencent Cloud credentials (ACCESS_KEY_ID and ACCESS_KEY_SECRET belong together, and only one is set): …"},
		{"no such file", "", map[string]string{"TENCENTCLOUD_CREDENTIALS_FILE": file + "x"},
			"E Tencent Cloud: there are no Tencent Cloud credentials (…): …"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r, s := newTencent(t)
			os.Unsetenv("TENCENTCLOUD_CREDENTIALS_FILE") // newRegion restores it
			for key, value := range test.env {
				t.Setenv(key, value)
			}
			synctest.Test(t, func(t *testing.T) {
				work(t, r.config(test.keys), mine)
				pass(10 * time.Minute)
				if strings.HasPrefix(test.want, "E ") {
					r.log.expect(t, test.want)
				} else if s.Key() != test.want {
					t.Errorf("the key is %q, want %q", s.Key(), test.want)
				}
			})
		})
	}
}

// TestTencentECMP: a route to the subnet of this node that another program has put beside the node's own is removed, as
// Tencent Cloud would send half of the packets there.
func TestTencentECMP(t *testing.T) {
	r, s := newTencent(t)
	other := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(10 * time.Second)
		s.Beside(route("10.5.1.0/24", other))
		s.Beside(route("10.5.1.0/24", "nat-1"))
		pass(100 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
		r.log.expect(t, found, r.said(Create, ""), r.said(Delete, ""), r.said(Delete, ""))
	})
}

// TestTencentDuplicate: the route that a call would create is there, as if an earlier call had not been in vain.
func TestTencentDuplicate(t *testing.T) {
	r, s := newTencent(t)
	r.Before(func(a Action) {
		if a == Create {
			s.Beside(route("10.5.1.0/24", r.hop))
		}
	})
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(10 * time.Minute)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
		r.log.expect(t, found)
	})
}

// TestTencentDisabled: the route of this node is enabled again.
func TestTencentDisabled(t *testing.T) {
	r, s := newTencent(t)
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(10 * time.Second)
		s.Disable(subnet1)
		pass(10 * time.Minute)
		if n := r.Calls(Enable); n != 1 || r.Calls(Replace) > 0 {
			t.Errorf("a route is enabled %d times", n)
		}
		r.log.expect(t, found, r.said(Create, ""), "I tccli vpc EnableRoutes --RouteTableId "+r.Main()+` --RouteItemIds '["rti-…"]'`)
	})
}

// TestTencentCCN: the route of this node is published where the configuration says so, and withdrawn before it is deleted.
func TestTencentCCN(t *testing.T) {
	r, s := newTencent(t)
	synctest.Test(t, func(t *testing.T) {
		n := work(t, r.config(""), mine)
		n.know(mine)
		pass(10 * time.Minute)
		if s.Published(subnet1) {
			t.Error("a route is published")
		}
		n.stop()
		n = work(t, r.config(`, "PublishToCCN": true`), mine)
		n.know(mine)
		pass(10 * time.Minute)
		if n := r.Calls(Publish); n != 1 || !s.Published(subnet1) {
			t.Errorf("a route is published %d times", n)
		}
		n.stop()
		// Another lease.
		n = work(t, r.config(""), "10.5.2.0-24")
		n.know("10.5.2.0-24")
		pass(10 * time.Minute)
		n.stop()
		r.expectRoutes(t, r.Main(), "10.5.2.0/24 "+r.hop)
		r.log.expect(t, found, r.said(Create, ""), found, "I tccli vpc NotifyRoutes …", found, r.said(Delete, ""), r.said(Create, ""))
	})
}

// TestTencentGone: the routes of many instances that are gone are all removed, where a call may be about ten addresses.
func TestTencentGone(t *testing.T) {
	r, _ := newTencent(t)
	var kept []string
	for i := range 60 {
		hop := r.Launch("subnet-1", netip.AddrFrom4([4]byte{198, 18, 1, byte(i)}))
		r.Put(r.Main(), route(fmt.Sprintf("10.5.%d.0/24", 100+i), hop))
		if i%2 == 0 {
			r.Terminate(hop)
		} else {
			kept = append(kept, fmt.Sprintf("10.5.%d.0/24 %s", 100+i, hop))
		}
	}
	r.Put(r.Main(), route("10.6.0.0/24", "198.18.0.99")) // outside of the network
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(6 * time.Hour)
		r.expectRoutes(t, r.Main(), slices.Concat([]string{"10.5.1.0/24 " + r.hop}, kept, []string{"10.6.0.0/24 198.18.0.99"})...)
		if said := r.errors(); len(said) > 0 {
			t.Errorf("it says\n%s", strings.Join(said, "\n"))
		}
	})
}

// TestTencentBlind: where a node does not learn which addresses are in use, it deletes no routes of others, and keeps its
// own.
func TestTencentBlind(t *testing.T) {
	for _, fault := range []Fault{NotPermitted, Empty} {
		t.Run(string(fault), func(t *testing.T) {
			r, _ := newTencent(t)
			gone := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.3"))
			r.Put(r.Main(), route("10.5.3.0/24", gone))
			r.Terminate(gone)
			r.Fail(Addresses, fault)
			synctest.Test(t, func(t *testing.T) {
				work(t, r.config(""), mine).know(mine)
				pass(time.Hour)
				r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "10.5.3.0/24 "+gone+" blackhole")
				if fault == NotPermitted {
					r.log.expect(t, found, "E Routes of instances that are gone: the CAM policy of this node's role or API key "+
						"lacks vpc:DescribeVpcPrivateIpAddresses: …", r.said(Create, ""))
				}
				r.Fail(Addresses, "")
				pass(100 * time.Second)
				r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
			})
		})
	}
}
