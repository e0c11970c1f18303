package cloud

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/alivpc"
)

var ali = provider{
	backend: "ali-vpc", tables: true,
	new: func() (*State, http.Handler) { c := NewAliCloud(); return c.State, c },
	env: func(url, _ string) map[string]string {
		backend.Register(aliHost(url).Type())
		return nil
	},
	clear: "ALIBABA_CLOUD_",
	command: map[Action]string{Create: "aliyun vpc CreateRouteEntry ", Replace: "aliyun vpc ModifyRouteEntry ",
		Delete: "aliyun vpc DeleteRouteEntry "},
	mine: "no network interface of this instance has the address of the uplink eth0 198.18.0.1, fd18::1, mtu 9001; they have 198.18.0.9: …",
	silent: [2]string{"the instance metadata service does not answer (EOF): …",
		"Alibaba Cloud's API in cn-test does not answer DescribeRouteEntryList (EOF): can this node reach 127.0.0.1:…? …VPC_ENDPOINT; …"},
	cannot:  "the RAM policy of this node's role lacks ecs:DescribeNetworkInterfaces: ",
	fix:     "aliyun ecs ModifyNetworkInterfaceAttribute --SourceDestCheck false --NetworkInterfaceId eni-…%.0s",
	noTable: "there is no such route table in cn-test (InvalidRouteTableId): correct RouteTableID in the network's configuration, or leave it out to have the table found",
	badID:   "vtb-t4nbad",
	trouble: []trouble{
		{"no permission", Create, NotPermitted, "Route table %s",
			"the RAM policy of this node's role lacks vpc:CreateRouteEntry: add it (backend/alivpc/README.md has the whole policy); Alibaba Cloud says: User not authorized to operate on the specified resource, or this API doesn't support RAM."},
		{"no permission to read", Read, NotPermitted, "Route tables",
			"the RAM policy of this node's role lacks vpc:DescribeRouteTableList: …"},
		{"the API away", Read, Reset, "Route tables", "Alibaba Cloud's API in cn-test does not answer DescribeRouteTableList (EOF): …"},
		{"the API broken", Read, Broken, "Route tables",
			"DescribeRouteTableList fails: Alibaba Cloud says: InternalError: The request processing has failed due to some unknown error."},
		{"bad credentials", Read, BadCredentials, "Route tables",
			"Alibaba Cloud refuses this node's credentials for DescribeRouteTableList (InvalidAccessKeyId.NotFound): check ACCESS_KEY_ID …"},
		{"throttled", Read, Throttled, "Route tables",
			"Alibaba Cloud throttles DescribeRouteTableList (Throttling.User): it is tried again, less and less often"},
		{"the table gone", Create, NoTable, "Route table %s", "there is no such route table in cn-test (InvalidRouteTableId): …"},
		{"the table full", Create, Full, "Route table %s",
			"the table is full, this node's pods cannot be reached through it: raise the quota vpc_quota_route_entrys_num, aliyun quotas …"},
		{"a change that does not end", Create, Busy, "Route table %s",
			"the VPC has refused to change a route for a long time (TaskConflict): look for …"},
		{"no metadata", Metadata, Reset, "Alibaba Cloud", "the instance metadata service does not answer (EOF): …--HttpEndpoint enabled --InstanceId …"},
	},
}

// aliHost returns a host for which the server at a URL is Alibaba Cloud.
func aliHost(url string) alivpc.Host {
	return alivpc.Host{VPCEndpoint: url, ECSEndpoint: url, Metadata: url}
}

// newAli returns a region on Alibaba Cloud, and its server. The host may be changed.
func newAli(t *testing.T, change ...func(*alivpc.Host)) (*region, *AliCloud) {
	t.Helper()
	var c *AliCloud
	p := ali
	p.new = func() (*State, http.Handler) { c = NewAliCloud(); return c.State, c }
	p.env = func(url, _ string) map[string]string {
		h := aliHost(url)
		for _, f := range change {
			f(&h)
		}
		backend.Register(h.Type())
		return nil
	}
	return newRegion(t, p), c
}

// TestAliTables: those of the configuration, or that of the vSwitch, or the VPC's system route table; in pages, too.
func TestAliTables(t *testing.T) {
	for _, test := range []struct {
		name, keys string
		tables     func(*region) (used, unused []string)
		read       int // calls at the start
	}{
		{"system", "", func(r *region) ([]string, []string) {
			return []string{r.Main()}, []string{r.AddTable("subnet-2")}
		}, 2},
		{"of the vSwitch", "", func(r *region) ([]string, []string) {
			return []string{r.AddTable("subnet-2", "subnet-1")}, []string{r.Main()}
		}, 2},
		{"on the second page", "", func(r *region) ([]string, []string) {
			r.PageSize = 2
			unused := []string{r.Main(), r.AddTable(), r.AddTable()}
			return []string{r.AddTable("subnet-1")}, unused
		}, 3},
		{"one", `, "RouteTableID": %q`, func(r *region) ([]string, []string) {
			return []string{r.AddTable("subnet-2")}, []string{r.Main()}
		}, 1},
		{"several", `, "RouteTableID": [%q, %q, %q]`, func(r *region) ([]string, []string) {
			return []string{r.AddTable("subnet-2"), r.Main(), r.AddTable()}, []string{r.AddTable("subnet-1")}
		}, 3},
		{"entries in pages", "", func(r *region) ([]string, []string) {
			r.PageSize = 3
			for i := range 6 {
				r.Put(r.Main(), route(fmt.Sprintf("10.6.%d.0/24", i), "ngw-1"))
			}
			r.Put(r.Main(), route("10.5.1.0/24", r.hop))
			r.Put(r.Main(), route("fd05:0:0:1::/64", r.hop))
			return []string{r.Main()}, nil
		}, 4},
	} {
		t.Run(test.name, func(t *testing.T) {
			r, _ := newAli(t)
			used, unused := test.tables(r)
			var ids []any
			for _, id := range used {
				ids = append(ids, id)
			}
			keys := test.keys
			if strings.Contains(keys, "%") {
				keys = fmt.Sprintf(keys, ids...)
			}
			synctest.Test(t, func(t *testing.T) {
				n := work(t, r.dualConfig(keys), r.dual())
				n.know(r.dual())
				pass(40 * time.Second)
				for _, id := range used {
					routes := slices.DeleteFunc(r.Routes(id), func(route string) bool { return strings.HasSuffix(route, " ngw-1") })
					if want := []string{"10.5.1.0/24 " + r.hop, "fd05:0:0:1::/64 " + r.hop}; !slices.Equal(routes, want) {
						t.Errorf("%s has %q, want %q", id, routes, want)
					}
				}
				for _, id := range unused {
					r.expectRoutes(t, id)
				}
				if n := r.Calls(Read); n != test.read {
					t.Errorf("it took %d calls to read the tables, want %d", n, test.read)
				}
				n.stop()
				if said := r.errors(); len(said) > 0 {
					t.Errorf("it says\n%s", strings.Join(said, "\n"))
				}
			})
		})
	}
}

// TestAliVSwitchMoves: the vSwitch gets another route table, while a node runs.
func TestAliVSwitchMoves(t *testing.T) {
	r, _ := newAli(t)
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(time.Minute)
		other := r.AddTable("subnet-1")
		pass(15 * time.Minute)
		r.expectRoutes(t, other, "10.5.1.0/24 "+r.hop)
	})
}

// TestAliCredentials: of the configuration, before those of flannel's variables, the SDK's, and the instance's role.
func TestAliCredentials(t *testing.T) {
	const sdk = "ALIBABA_CLOUD_ACCESS_KEY_ID=sdk ALIBABA_CLOUD_ACCESS_KEY_SECRET=secret ALIBABA_CLOUD_SECURITY_TOKEN=token"
	for want, test := range map[string]struct{ keys, host, env string }{
		"configured ":                   {`, "AccessKeyID": "configured", "AccessKeySecret": "secret"`, "flannel", sdk},
		"flannel ":                      {"", "flannel", sdk},
		"sdk token":                     {"", "", sdk},
		"STS.EXAMPLE session4102444800": {"", "", ""},
	} {
		t.Run(want, func(t *testing.T) {
			r, c := newAli(t, func(h *alivpc.Host) { h.AccessKeyID, h.AccessKeySecret = test.host, test.host })
			for variable := range strings.FieldsSeq(test.env) {
				name, value, _ := strings.Cut(variable, "=")
				t.Setenv(name, value)
			}
			synctest.Test(t, func(t *testing.T) {
				work(t, r.config(test.keys), mine).know(mine)
				pass(20 * time.Second)
				r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
			})
			if got := c.UsedKeys(); !slices.Equal(got, []string{want}) {
				t.Errorf("it used %q", got)
			}
		})
	}
}

// TestAliNoCredentials: the log says how to get some; and nothing is sent without.
func TestAliNoCredentials(t *testing.T) {
	for name, test := range map[string]struct{ key, role, want string }{
		"no role":    {"", "", "the instance has no RAM role"},
		"other role": {"", "other", "the metadata have no such entry"},
		"half":       {"x", "", "of ACCESS_KEY_ID and ACCESS_KEY_SECRET, one is not set"},
	} {
		t.Run(name, func(t *testing.T) {
			r, c := newAli(t, func(h *alivpc.Host) { h.AccessKeyID, h.Role = test.key, test.role })
			c.NoRole = true
			synctest.Test(t, func(t *testing.T) {
				work(t, r.config(""), mine).know(mine)
				pass(time.Hour)
				r.log.expect(t, "E Alibaba Cloud: there are no credentials of Alibaba Cloud ("+test.want+"): give the instance a RAM role …")
			})
			if r.Calls(Read) > 0 {
				t.Error("without credentials, the API was called")
			}
		})
	}
}

// TestAliRoleRenewed: new credentials are there before the old ones end; and where the metadata service is away then,
// the old ones are used as long as they may be.
func TestAliRoleRenewed(t *testing.T) {
	r, c := newAli(t)
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		session := func(ends time.Time) string { return fmt.Sprintf("STS.EXAMPLE session%d", ends.Unix()) }
		first, second := start.Add(time.Hour), start.Add(2*time.Hour)
		c.RoleEnds = first
		work(t, r.config(""), mine).know(mine)
		pass(30 * time.Minute)
		c.mu.Lock()
		c.RoleEnds = second
		c.mu.Unlock()
		pass(15 * time.Minute)
		if got := c.UsedKeys(); !slices.Equal(got, []string{session(first)}) {
			t.Errorf("in the first 45 minutes, it used %q", got)
		}
		pass(14 * time.Minute)
		if got := c.UsedKeys(); !slices.Equal(got, []string{session(first), session(second)}) {
			t.Errorf("until the first end, it used %q", got)
		}
		r.log.expect(t, found, r.said(Create, ""))
		r.Fail(Metadata, Broken)
		pass(57 * time.Minute) // into the last 10 minutes of the second
		if got := c.UsedKeys(); !slices.Equal(got, []string{session(second)}) || r.count("credentials") > 0 {
			t.Errorf("while the metadata service is away, it used %q", got)
		}
		pass(30 * time.Minute)
		r.log.expect(t, "E This node in the cloud: the instance metadata service does not answer (HTTP status 503): …",
			"E Route tables: there are no credentials of Alibaba Cloud (HTTP status 503): …")
	})
}

// TestAliMetadataModes: a service without tokens, and one that forgets its tokens.
func TestAliMetadataModes(t *testing.T) {
	t.Run("no tokens", func(t *testing.T) {
		r, c := newAli(t)
		c.NoTokens = true
		synctest.Test(t, func(t *testing.T) {
			work(t, r.config(""), mine).know(mine)
			pass(20 * time.Second)
			r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
		})
	})
	t.Run("no tokens, which are wanted", func(t *testing.T) {
		r, c := newAli(t, func(h *alivpc.Host) { h.NeedToken = true })
		c.NoTokens = true
		synctest.Test(t, func(t *testing.T) {
			work(t, r.config(""), mine).know(mine)
			pass(time.Hour)
			r.log.expect(t, "E Alibaba Cloud: the instance metadata service does not answer (no token: HTTP status 403): …")
		})
	})
	t.Run("other tokens", func(t *testing.T) {
		r, c := newAli(t)
		synctest.Test(t, func(t *testing.T) {
			work(t, r.config(""), mine).know(mine)
			pass(20 * time.Second)
			c.mu.Lock()
			clear(c.tokens)
			c.mu.Unlock()
			pass(10 * time.Minute)
			r.log.expect(t, found, r.said(Create, ""))
		})
	})
}

// TestAliSecondInterface: the uplink is not the first network interface, so that routes must lead to it.
func TestAliSecondInterface(t *testing.T) {
	r, c := newAli(t)
	c.Secondary = true
	other, gone := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2")), r.Launch("subnet-1", netip.MustParseAddr("198.18.0.3"))
	r.hop = c.instances[0].eni
	r.Put(r.Main(), route("10.5.1.0/24", other))
	r.Put(r.Main(), route("10.5.3.0/24", gone))
	r.Put(r.Main(), route("10.5.4.0/24", other))
	r.Terminate(gone)
	synctest.Test(t, func(t *testing.T) {
		work(t, r.dualConfig(""), r.dual()).know(r.dual())
		pass(30 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "10.5.4.0/24 "+other, "fd05:0:0:1::/64 "+r.hop)
		r.log.expect(t, found, r.said(Delete, " --NextHopId "+gone),
			r.said(Replace, " --NewNextHopType NetworkInterface --NewNextHopId "+r.hop),
			r.said(Create, " --NextHopType NetworkInterface --NextHopId "+r.hop))
	})
}

// TestAliStopped: the route of a node that has left goes once its instance is stopped, which can then be released.
func TestAliStopped(t *testing.T) {
	r, c := newAli(t)
	left, stopped := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2")), r.Launch("subnet-1", netip.MustParseAddr("198.18.0.3"))
	r.Put(r.Main(), route("10.5.2.0/24", left))
	r.Put(r.Main(), route("10.5.3.0/24", stopped))
	c.Stop(stopped)
	synctest.Test(t, func(t *testing.T) {
		n := work(t, r.config(""), mine)
		n.know(mine, "10.5.2.0-24", "10.5.3.0-24")
		pass(10 * time.Minute)
		if n := r.Calls(Look); n > 0 {
			t.Errorf("nodes have all subnets, and there were %d calls about their instances", n)
		}
		n.know(mine, "10.5.3.0-24")
		pass(10 * time.Minute)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "10.5.2.0/24 "+left, "10.5.3.0/24 "+stopped)
		c.Stop(left)
		pass(2 * time.Minute)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "10.5.3.0/24 "+stopped)
		r.log.expect(t, found, r.said(Create, ""), r.said(Delete, "10.5.2.0/24 --NextHopId "+left))
	})
}

// TestAliLate: a node that learns of its peers late asks for instances then, and at once.
func TestAliLate(t *testing.T) {
	r, _ := newAli(t)
	gone := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
	r.Put(r.Main(), route("10.5.2.0/24", gone))
	r.Terminate(gone)
	synctest.Test(t, func(t *testing.T) {
		n := work(t, r.config(""), mine)
		pass(20 * time.Second)
		if n := r.Calls(Look); n > 0 {
			t.Errorf("not knowing its peers, it made %d calls about instances", n)
		}
		n.know(mine)
		pass(10 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
	})
}

// TestAliMayNotLook: without the permission to ask for instances, leftovers stay, and the node's own routes are kept.
func TestAliMayNotLook(t *testing.T) {
	r, _ := newAli(t)
	gone := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
	other := r.AddTable()
	r.Put(r.Main(), route("10.5.2.0/24", gone))
	r.Terminate(gone)
	r.Fail(Look, NotPermitted)
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(fmt.Sprintf(`, "RouteTableID": [%q, %q]`, r.Main(), other)), mine).know(mine)
		pass(time.Hour)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "10.5.2.0/24 "+gone+" blackhole")
		r.expectRoutes(t, other, "10.5.1.0/24 "+r.hop)
		if said := r.errors(); len(said) != 1 || !match(said[0], "E Next hops in route table "+r.Main()+
			": the RAM policy of this node's role lacks ecs:DescribeInstanceStatus: …") {
			t.Errorf("it says\n%s", strings.Join(said, "\n"))
		}
		r.Fail(Look, "")
		pass(2 * time.Minute)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
	})
}

// TestAliForwards: the check of sources and destinations is off unless someone turns it on.
func TestAliForwards(t *testing.T) {
	r, c := newAli(t)
	c.instances[0].forwards = true
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(10 * time.Minute)
		if n := r.Calls(Forward); n != 1 {
			t.Errorf("there were %d calls, want one that looks", n)
		}
	})
}

// TestAliBusy: while the VPC makes another change, a node waits, and logs nothing.
func TestAliBusy(t *testing.T) {
	r, c := newAli(t)
	synctest.Test(t, func(t *testing.T) {
		c.mu.Lock()
		c.busy = time.Now().Add(20 * time.Second)
		c.mu.Unlock()
		work(t, r.dualConfig(""), r.dual()).know(r.dual())
		pass(50 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "fd05:0:0:1::/64 "+r.hop)
		r.log.expect(t, found, r.said(Create, ""), r.said(Create, ""))
		if n := r.Calls(Create); n < 3 || n > 20 || r.Calls(Read) > 3 {
			t.Errorf("it took %d attempts, and %d calls to read the routes", n, r.Calls(Read))
		}
	})
}

// TestAliManyStart: nodes that start at the same time wait for each other's changes.
func TestAliManyStart(t *testing.T) {
	r, _ := newAli(t)
	var keys, want []string
	for i := range 10 {
		keys = append(keys, fmt.Sprintf("10.5.%d.0-24", i+1))
		want = append(want, fmt.Sprintf("10.5.%d.0/24 %s", i+1, r.hop))
	}
	synctest.Test(t, func(t *testing.T) {
		for _, key := range keys {
			work(t, r.config(""), key).know(keys...)
		}
		pass(5 * time.Minute)
		r.expectRoutes(t, r.Main(), want...)
		if said := r.errors(); len(said) > 0 || r.Calls(Create) > 200 {
			t.Errorf("in %d attempts, the nodes say\n%s", r.Calls(Create), strings.Join(said, "\n"))
		}
	})
}

// TestAliHosted: an entry that a transit router manages is left alone.
func TestAliHosted(t *testing.T) {
	r, c := newAli(t)
	gone := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
	r.Put(r.Main(), route("10.5.2.0/24", gone))
	r.Terminate(gone)
	c.Hosted = map[netip.Prefix]bool{netip.MustParsePrefix("10.5.2.0/24"): true}
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(10 * time.Minute)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "10.5.2.0/24 "+gone+" blackhole")
	})
}
