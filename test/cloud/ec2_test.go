package cloud

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	_ "github.com/flanneld/flanneld/backend/awsvpc"
)

var aws = provider{
	backend: "aws-vpc", tables: true,
	new: func() (*State, http.Handler) { s := NewEC2(); return s.State, s },
	env: func(url, nothing string) map[string]string {
		return map[string]string{"AWS_ENDPOINT_URL_EC2": url, "AWS_EC2_METADATA_SERVICE_ENDPOINT": url,
			"AWS_CONFIG_FILE": nothing, "AWS_SHARED_CREDENTIALS_FILE": nothing}
	},
	clear: "AWS_",
	command: map[Action]string{Create: "aws ec2 create-route ", Replace: "aws ec2 replace-route ",
		Delete: "aws ec2 delete-route "},
	mine: "no network interface of this instance has the address of the uplink eth0 198.18.0.1, fd18::1, mtu 9001; they have 198.18.0.9: …",
	silent: [2]string{"the instance metadata service does not answer (EOF): …",
		"EC2's API in eu-test-1 does not answer …"},
	cannot: "the IAM policy of this node's role lacks ec2:ModifyNetworkInterfaceAttribute: ",
	fix:    "aws ec2 modify-network-interface-attribute --no-source-dest-check --network-interface-id %s",
	noTable: "there is no such route table in eu-test-1 (InvalidRouteTableID): correct RouteTableID in the network's " +
		"configuration, or leave it out to have the table found",
	badID: "rtb-00000000000000bad",
	trouble: []trouble{
		{"no permission", Create, NotPermitted, "Route table %s",
			"the IAM policy of this node's role lacks ec2:CreateRoute: add it (backend/awsvpc/README.md has the whole policy); EC2 says: You are not authorized to perform this operation."},
		{"no permission to read", Read, NotPermitted, "Route tables",
			"the IAM policy of this node's role lacks ec2:DescribeRouteTables: …"},
		{"the API away", Read, Reset, "Route tables",
			"EC2's API in eu-test-1 does not answer DescribeRouteTables (EOF): can this node reach it, through a NAT gateway or a VPC endpoint for EC2?"},
		{"the API broken", Read, Broken, "Route tables",
			"DescribeRouteTables fails: EC2 says: InternalError: An internal error has occurred"},
		{"bad credentials", Read, BadCredentials, "Route tables",
			"EC2 refuses this node's credentials for DescribeRouteTables (AuthFailure): check …"},
		{"the table gone", Create, NoTable, "Route table %s",
			"there is no such route table in eu-test-1 (InvalidRouteTableID): …"},
		{"the table full", Create, Full, "Route table %s",
			`the table is full, this node's pods cannot be reached through it: raise the quota "Routes per route table" (1000 at most), aws service-quotas …`},
		{"no metadata", Metadata, Reset, "AWS", "the instance metadata service does not answer (EOF): …--http-put-response-hop-limit 2 --instance-id …"},
	},
}

// TestEC2Tables: those of the configuration, or that of the subnet, or the VPC's main one.
func TestEC2Tables(t *testing.T) {
	for _, test := range []struct {
		name, keys         string
		tables             func(*region) (used, unused []string)
		described, another int // calls at the start, and in the next 5 minutes
	}{
		{"main", "", func(r *region) ([]string, []string) {
			return []string{r.Main()}, []string{r.AddTable("subnet-2")}
		}, 2, 5},
		{"of the subnet", "", func(r *region) ([]string, []string) {
			return []string{r.AddTable("subnet-2", "subnet-1")}, []string{r.Main()}
		}, 1, 5},
		{"one", `, "RouteTableID": %q`, func(r *region) ([]string, []string) {
			return []string{r.AddTable("subnet-2")}, []string{r.Main()}
		}, 1, 5},
		{"several", `, "RouteTableID": [%q, %q, %q]`, func(r *region) ([]string, []string) {
			return []string{r.AddTable("subnet-2"), r.Main(), r.AddTable()}, []string{r.AddTable("subnet-1")}
		}, 1, 5},
		{"in pages", `, "RouteTableID": [%q, %q, %q]`, func(r *region) ([]string, []string) {
			r.PageSize = 2
			return []string{r.AddTable(), r.AddTable(), r.AddTable()}, []string{r.Main()}
		}, 2, 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRegion(t, aws)
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
				pass(2 * time.Second)
				n.know(r.dual())
				for _, id := range used {
					r.expectRoutes(t, id, "10.5.1.0/24 "+r.hop, "fd05:0:0:1::/64 "+r.hop)
				}
				for _, id := range unused {
					r.expectRoutes(t, id)
				}
				if calls := r.Calls(Read); calls != test.described {
					t.Errorf("it took %d calls of DescribeRouteTables, want %d", calls, test.described)
				}
				pass(5 * time.Minute)
				if calls := r.Calls(Read) - test.described; calls < 4*test.another/5 || calls > 7*test.another/5 {
					t.Errorf("5 minutes take %d calls of DescribeRouteTables, want about %d", calls, test.another)
				}
				if calls := r.Calls(Create); calls != 2*len(used) || r.Calls(Forward) != 1 || r.Calls(Replace)+r.Calls(Delete) > 0 {
					t.Errorf("where nothing changes, there were changes; CreateRoute was called %d times", calls)
				}
			})
		})
	}
}

// TestEC2Throttling: whatever is throttled is logged once. The clock is the real one: the SDK counts the nanoseconds
// until it may ask again.
func TestEC2Throttling(t *testing.T) {
	r := newRegion(t, aws)
	r.Fail(All, Throttled)
	n := work(t, r.config(""), mine)
	n.know(mine)
	throttled := []string{"Forwarding: EC2 throttles ModifyNetworkInterfaceAttribute", "Route tables: EC2 throttles DescribeRouteTables"}
	eventually(t, "two looks that fail", func() bool { return r.Calls(Read) > 5 && r.count(throttled[1]) > 0 })
	r.Fail(All, "")
	eventually(t, "the route", func() bool { return slices.Equal(r.Routes(r.Main()), []string{"10.5.1.0/24 " + r.hop}) })
	n.stop()
	for _, text := range throttled {
		if n := r.count(text + " (RequestLimitExceeded): it is tried again, less and less often"); n != 1 {
			t.Errorf("%s is said %d times", text, n)
		}
	}
}
