package alivpc

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/alibabacloud-go/tea/dara"

	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/plain"
)

// explain returns an error that says what the error of an API call means, and what to do. The text is the same while
// the cause is the same: it has none of the IDs that the cloud gives to requests.
func (c *cloud) explain(p product, action string, err error) error {
	var missing *loginError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &missing):
		return noCredentials(missing.error)
	case code(err) == "":
		_, host := c.api.endpoint(p, c.api.region)
		return fmt.Errorf("Alibaba Cloud's API in %s does not answer %s (%s): can this node reach %s? Another address can "+
			"be set with %s_ENDPOINT; ALIBABA_CLOUD_VPC_ENDPOINT_ENABLED=false chooses the one on the internet",
			plain.Text(c.api.region), action, cloudroute.Cause(err), plain.Text(host), strings.ToUpper(p.name))
	}
	code, said := plain.Text(code(err)), plain.Text(message(err))
	switch {
	case isForbidden(err):
		return fmt.Errorf("the RAM policy of this node's role lacks %s:%s: add it (backend/alivpc/README.md has the whole "+
			"policy); Alibaba Cloud says: %s", p.name, action, said)
	case isRejected(err):
		return fmt.Errorf("Alibaba Cloud refuses this node's credentials for %s (%s): check ACCESS_KEY_ID and its like, if "+
			"they are set, or else the instance's RAM role; and the clock; Alibaba Cloud says: %s", action, code, said)
	case strings.HasPrefix(code, "QuotaExceeded"):
		return fmt.Errorf("the table is full, this node's pods cannot be reached through it: raise the quota "+
			"vpc_quota_route_entrys_num, aliyun quotas CreateQuotaApplication --ProductCode vpc --QuotaActionCode "+
			"vpc_quota_route_entrys_num --DesireValue 400 --Reason flannel, or use the vxlan backend; Alibaba Cloud says: %s",
			said)
	case isNoTable(err):
		return fmt.Errorf("there is no such route table in %s (InvalidRouteTableId): correct RouteTableID in the network's "+
			"configuration, or leave it out to have the table found", plain.Text(c.api.region))
	case strings.HasPrefix(code, "Throttling"):
		return fmt.Errorf("Alibaba Cloud throttles %s (%s): it is tried again, less and less often", action, code)
	}
	return fmt.Errorf("%s fails: Alibaba Cloud says: %s: %s", action, code, said)
}

// noMetadata is the error of the metadata service.
func noMetadata(err error) error {
	return fmt.Errorf("the instance metadata service does not answer (%s): ali-vpc is for ECS instances in a VPC; the "+
		"service must be on: aliyun ecs ModifyInstanceMetadataOptions --HttpEndpoint enabled --InstanceId …", cloudroute.Cause(err))
}

// A loginError is the error of the search for credentials.
type loginError struct{ error }

// noCredentials is the error of the search for credentials.
func noCredentials(err error) error {
	return fmt.Errorf("there are no credentials of Alibaba Cloud (%s): give the instance a RAM role with the policy in "+
		"backend/alivpc/README.md, or set ACCESS_KEY_ID and ACCESS_KEY_SECRET", cloudroute.Cause(err))
}

// code returns the code of an error that the API has returned; "" for other errors.
func code(err error) string {
	var refusal dara.ResponseError
	if !errors.As(err, &refusal) {
		return ""
	}
	if text := dara.StringValue(refusal.GetCode()); text != "" {
		return text
	}
	return fmt.Sprintf("HTTP status %d", dara.IntValue(refusal.GetStatusCode()))
}

// message returns what the API says beside the code, without the ID of the request.
func message(err error) string {
	var refusal dara.ResponseError
	if !errors.As(err, &refusal) {
		return ""
	}
	text, _ := refusal.GetData()["Message"].(string)
	return text
}

// isForbidden reports whether the policy lacks a permission.
func isForbidden(err error) bool {
	var refusal dara.ResponseError
	return errors.As(err, &refusal) && (code(err) == "Forbidden.RAM" || strings.HasPrefix(code(err), "NoPermission") ||
		code(err) == "Forbidden" && dara.IntValue(refusal.GetStatusCode()) == http.StatusForbidden)
}

// isRejected reports whether the API does not accept the credentials.
func isRejected(err error) bool {
	return slices.ContainsFunc([]string{"InvalidAccessKeyId", "InvalidSecurityToken", "MissingSecurityToken",
		"SignatureDoesNotMatch", "IncompleteSignature", "InvalidTimeStamp", "SignatureNonceUsed", "Forbidden.AccessKey"},
		func(prefix string) bool { return strings.HasPrefix(code(err), prefix) })
}

func isNoTable(err error) bool { return strings.EqualFold(code(err), "InvalidRouteTableId.NotFound") }

// isBusy reports whether a change was refused because the VPC makes another change.
func isBusy(err error) bool {
	switch c := code(err); c {
	case "TaskConflict", "OperationConflict", "IncorrectRouteEntryStatus", "IncorrcetRouteEntryStatus",
		"InvalidStatus.RouteEntry", "IncorrectVpcStatus", "IncorrectVSwitchStatus", "LastTokenProcessing",
		"OperationFailed.LastTokenProcessing", "OperationFailed.DistibuteLock", "SystemBusy":
		return true
	default:
		return strings.HasPrefix(c, "IncorrectStatus.")
	}
}

// isOutdated reports whether a step failed because the route exists already, or exists no longer.
func isOutdated(err error) bool {
	switch code(err) {
	case "RouterEntryConflict.Duplicated", "InvalidCIDRBlock.Duplicate", "InvalidRouteEntry.Duplicate",
		"Duplicated.VpcNextHop", "InvalidRouteEntry.NotFound", "InvalidRouteEntryId.NotFound", "InvalidRouteEntry":
		return true
	}
	return false
}
