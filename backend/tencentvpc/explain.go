package tencentvpc

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"

	tcerr "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/errors"

	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
)

// requestID matches the numbers that Tencent Cloud gives to requests, in messages.
var requestID = sync.OnceValue(func() *regexp.Regexp { // each daemon would need 60 kB for it
	return regexp.MustCompile(`(?i)\[request ?id:[^\]]*\]|\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b`)
})

// explain returns the code of an error of the API, and an error that says what it means and what to do. Its text is the
// same while the cause is the same.
func (c *cloud) explain(action string, err error) (code string, explained error) {
	if err == nil {
		return "", nil
	}
	var refusal *tcerr.TencentCloudSDKError
	if !errors.As(err, &refusal) || strings.HasPrefix(refusal.Code, "ClientError.") {
		return "", c.noAnswer(action, err, refusal)
	}
	code = refusal.Code
	said := plain.Text(strings.TrimSpace(requestID().ReplaceAllString(refusal.Message, "")))
	class, _, _ := strings.Cut(code, ".")
	switch {
	case class == "UnauthorizedOperation", code == "AuthFailure.UnauthorizedOperation":
		return code, fmt.Errorf("the CAM policy of this node's role or API key lacks vpc:%s: add it "+
			"(backend/tencentvpc/README.md has the whole policy); Tencent Cloud says: %s", action, said)
	case class == "AuthFailure":
		return code, fmt.Errorf("Tencent Cloud refuses this node's credentials for %s (%s): check the key in the configuration, "+
			"ACCESS_KEY_ID and TENCENTCLOUD_SECRET_ID, if they are set, or else the instance's role; and the clock; "+
			"Tencent Cloud says: %s", action, plain.Text(code), said)
	case class == "RequestLimitExceeded", code == "LimitExceeded.ActionLimited":
		return code, fmt.Errorf("Tencent Cloud throttles %s (%s): it is tried again, less and less often", action, plain.Text(code))
	case class == "LimitExceeded":
		return code, fmt.Errorf("the table is full, this node's pods cannot be reached through it: have the quota "+
			"route-table-max-policies raised, which tccli vpc DescribeVpcLimits --region %s --LimitTypes "+
			`'["route-table-max-policies"]' shows, or use the vxlan backend; Tencent Cloud says: %s`, c.region, said)
	case strings.HasSuffix(code, "MutexTaskRunning"), strings.HasSuffix(code, "MutexOperationTaskRunning"):
		return code, fmt.Errorf("%s waits for another task in the VPC (%s): it is tried again", action, plain.Text(code))
	}
	if hint := hints[code]; hint != "" {
		return code, fmt.Errorf("%s fails (%s): %s; Tencent Cloud says: %s", action, code, hint, said)
	}
	return code, fmt.Errorf("%s fails: Tencent Cloud says: %s: %s", action, plain.Text(code), said)
}

const noTableHint = "correct RouteTableID in the network's configuration, or leave it out to have the table found"

// hints are what to do about some errors of the API.
var hints = map[string]string{
	"ResourceNotFound":              noTableHint,
	"InvalidRouteTableId.NotFound":  noTableHint,
	"InvalidRouteTableId.Malformed": noTableHint,
	"InvalidParameterValue.VpcCidrConflict": "the subnet of this node overlaps the addresses of the VPC: " +
		"choose another Network",
	"UnsupportedOperation.ConflictWithDockerRoute": "the subnet of this node overlaps a container network of TKE in the VPC: " +
		"choose another Network",
	"UnsupportedOperation.EcmpWithCcnRoute": "the Cloud Connect Network has a route to the subnet of this node, too: " +
		"disable that route, or choose another Network",
	"UnsupportedOperation.CcnNotAttached": "the VPC belongs to no Cloud Connect Network: attach it to one, " +
		"or set PublishToCCN to false",
}

// noAnswer is the error of a call that the API has not answered.
func (c *cloud) noAnswer(action string, err error, local *tcerr.TencentCloudSDKError) error {
	what := cloudroute.Cause(err)
	if local != nil && local.Unwrap() == nil { // the SDK has put the whole answer into the message
		what = "the answer is none of the API: " + plain.Text(local.Code)
	}
	return fmt.Errorf("Tencent Cloud's API in %s does not answer %s (%s): can this node reach vpc.tencentcloudapi.com, "+
		"or what TENCENTCLOUD_ENDPOINT names, through a NAT gateway or a public address?", c.region, action, what)
}

// noTable is the error about a table that does not exist.
func noTable(vpc string) error {
	return fmt.Errorf("there is no such route table in the VPC %s: "+noTableHint, plain.Text(vpc))
}

// noMetadata is the error of the instance metadata service.
func noMetadata(err error) error {
	return fmt.Errorf("the instance metadata service does not answer (%s): tencent-vpc is for CVM instances, whose DNS "+
		"servers know metadata.tencentyun.com", cloudroute.Cause(err))
}

// noCredentials is the error of the search for credentials.
func noCredentials(err error) error {
	return fmt.Errorf("there are no Tencent Cloud credentials (%s): give the instance a role with the policy in "+
		"backend/tencentvpc/README.md, or set ACCESS_KEY_ID and ACCESS_KEY_SECRET", cloudroute.Cause(err))
}

// notMine is the error about an uplink that is none of the instance's interfaces.
func notMine(uplink iface.Uplink, others []string) error {
	return fmt.Errorf("no network interface of this instance has the address of the uplink %s; they have %s: "+
		"have --iface name one that has, or restart flanneld once it is attached",
		uplink, plain.Text(strings.Join(others, ", ")))
}

// outdated reports whether a step failed because the route exists already, or exists no longer.
func outdated(v cloudroute.Verb, code string) bool {
	switch code {
	case "InvalidParameterValue.Duplicate", "UnsupportedOperation.RecordExists":
		return v != cloudroute.Delete
	case "InvalidRouteId.NotFound", "UnsupportedOperation.RecordNotExists", "ResourceNotFound":
		return v != cloudroute.Create
	}
	return false
}
