package awsvpc

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/smithy-go"

	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/plain"
)

// explain returns an error that says what the error of an API call means, and what to do. The text is the same while
// the cause is the same: it has none of the numbers that AWS gives to requests.
func (c *cloud) explain(ctx context.Context, action string, err error) error {
	if err == nil {
		return nil
	}
	var refusal smithy.APIError
	if !errors.As(err, &refusal) {
		if _, err := c.login.Retrieve(ctx); err != nil && ctx.Err() == nil { // then, nothing was asked
			return noCredentials(err)
		}
		return fmt.Errorf("EC2's API in %s does not answer %s (%s): can this node reach it, through a NAT gateway "+
			"or a VPC endpoint for EC2?", c.region, action, cloudroute.Cause(err))
	}
	said := refusal.ErrorMessage()
	if end := strings.Index(said, " Encoded authorization failure message:"); end >= 0 {
		said = said[:end]
	}
	said = plain.Text(said)
	switch refusal.ErrorCode() {
	case "UnauthorizedOperation":
		return fmt.Errorf("the IAM policy of this node's role lacks ec2:%s: add it (backend/awsvpc/README.md has "+
			"the whole policy); EC2 says: %s", action, said)
	case "AuthFailure", "ExpiredToken", "InvalidClientTokenId", "InvalidAccessKeyId", "MissingAuthenticationToken",
		"RequestExpired", "SignatureDoesNotMatch":
		return fmt.Errorf("EC2 refuses this node's credentials for %s (%s): check AWS_ACCESS_KEY_ID and its like, "+
			"if they are set, or else the instance's role; and the clock; EC2 says: %s",
			action, refusal.ErrorCode(), said)
	case "RouteLimitExceeded":
		return fmt.Errorf("the table is full, this node's pods cannot be reached through it: raise the quota "+
			"\"Routes per route table\" (1000 at most), "+
			"aws service-quotas request-service-quota-increase --service-code vpc --quota-code L-93826ACB --region "+
			"%s --desired-value 1000, or use the vxlan backend; EC2 says: %s", c.region, said)
	case "InvalidRouteTableID.NotFound", "InvalidRouteTableID.Malformed":
		return c.noTable()
	case "RequestLimitExceeded", "Throttling", "ThrottlingException", "RequestThrottled", "RequestThrottledException",
		"TooManyRequestsException":
		return fmt.Errorf("EC2 throttles %s (%s): it is tried again, less and less often", action, refusal.ErrorCode())
	}
	return fmt.Errorf("%s fails: EC2 says: %s: %s", action, plain.Text(refusal.ErrorCode()), said)
}

// noTable is the error about a table that does not exist.
func (c *cloud) noTable() error {
	return fmt.Errorf("there is no such route table in %s (InvalidRouteTableID): correct RouteTableID in the "+
		"network's configuration, or leave it out to have the table found", c.region)
}

// noMetadata is the error of the instance metadata service.
func noMetadata(err error) error {
	return fmt.Errorf("the instance metadata service does not answer (%s): aws-vpc is for EC2 instances; in a "+
		"container without the host's network, "+
		"two hops must be allowed: aws ec2 modify-instance-metadata-options --http-endpoint enabled "+
		"--http-put-response-hop-limit 2 --instance-id …", cloudroute.Cause(err))
}

// noCredentials is the error of the search for credentials.
func noCredentials(err error) error {
	return fmt.Errorf("there are no AWS credentials (%s): give the instance a role with the policy in "+
		"backend/awsvpc/README.md, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", cloudroute.Cause(err))
}

// code returns the code of an error that the API has returned; "" for other errors.
func code(err error) string {
	var refusal smithy.APIError
	if !errors.As(err, &refusal) {
		return ""
	}
	return refusal.ErrorCode()
}

// outdated reports whether a step failed because the route exists already, or exists no longer.
func outdated(err error) bool {
	var refusal smithy.APIError
	if !errors.As(err, &refusal) {
		return false
	}
	switch refusal.ErrorCode() {
	case "RouteAlreadyExists", "InvalidRoute.NotFound":
		return true
	case "InvalidParameterValue": // of ReplaceRoute
		return strings.HasPrefix(refusal.ErrorMessage(), "There is no route defined for ")
	}
	return false
}
