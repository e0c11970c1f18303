package gce

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"google.golang.org/api/googleapi"

	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/plain"
)

// An operationError is why an operation has failed.
type operationError struct{ code, message string }

func (e operationError) Error() string { return e.code + ": " + e.message }

// incident matches what the API says of one error, which is different for the next.
var incident = regexp.MustCompile(` \(Code: '[^']*'\)`)

// refusal returns the reason and the message of an error that the API has returned.
func refusal(err error) (reason, message string, ok bool) {
	var operation operationError
	var answer *googleapi.Error
	switch {
	case errors.As(err, &operation):
		reason, message = operation.code, operation.message
	case !errors.As(err, &answer):
		return "", "", false
	case len(answer.Errors) > 0:
		reason, message = answer.Errors[0].Reason, answer.Message
	default:
		reason, message = fmt.Sprintf("HTTP status %d", answer.Code), answer.Message
	}
	return reason, incident.ReplaceAllString(message, ""), true
}

// missing matches what the API says of a permission.
var missing = regexp.MustCompile(`'(compute\.[A-Za-z.]+)' permission`)

// explain returns an error that says what the error of an API call means, and what to do. The text is the same while
// the cause is the same.
func (c *cloud) explain(ctx context.Context, method string, err error) error {
	if err == nil {
		return nil
	}
	reason, message, ok := refusal(err)
	if !ok {
		if _, err := c.login.Token(ctx); err != nil && ctx.Err() == nil { // then, nothing was asked
			return noCredentials(err)
		}
		return fmt.Errorf("Compute Engine's API does not answer %s (%s): can this node reach compute.googleapis.com, "+
			"through an external address, Cloud NAT or Private Google Access?", method, cloudroute.Cause(err))
	}
	said := plain.Text(message)
	project := plain.Shell(element(c.self, "projects"))
	switch reason {
	case "forbidden", "PERMISSIONS_ERROR":
		permission := "a permission"
		if m := missing.FindStringSubmatch(said); m != nil {
			permission = m[1]
		}
		return fmt.Errorf("the role of this node's service account lacks %s for %s: add it (backend/gce/README.md has "+
			"the whole role); Compute Engine says: %s", permission, method, said)
	case "insufficientPermissions":
		return fmt.Errorf("the access scopes of this instance do not permit %s: stop the instance, and gcloud compute "+
			"instances set-service-account %s --zone %s --project %s --scopes compute-rw; Compute Engine says: %s", method,
			plain.Shell(element(c.self, "instances")), plain.Shell(element(c.self, "zones")), project, said)
	case "accessNotConfigured":
		return fmt.Errorf("Compute Engine's API is off for the project of this node's service account: gcloud services "+
			"enable compute.googleapis.com --project %s; Google Cloud says: %s", project, said)
	case "authError", "required":
		return fmt.Errorf("Compute Engine refuses this node's credentials for %s (%s): check "+
			"GOOGLE_APPLICATION_CREDENTIALS, if it is set, or else the instance's service account; and the clock; "+
			"Compute Engine says: %s", method, reason, said)
	case "quotaExceeded", "QUOTA_EXCEEDED":
		return fmt.Errorf("the network is full, this node's pods cannot be reached through it: raise the quota \"Static "+
			"routes per network\" (STATIC_ROUTES_PER_NETWORK) at https://console.cloud.google.com/iam-admin/quotas, or use "+
			"the vxlan backend; Compute Engine says: %s", said)
	case "rateLimitExceeded", "userRateLimitExceeded", "RATE_LIMIT_EXCEEDED":
		return fmt.Errorf("Compute Engine throttles %s (%s): it is tried again, less and less often", method, reason)
	case "resourceNotReady", "RESOURCE_NOT_READY":
		return fmt.Errorf("%s must wait for another change of the network (%s): it is tried again", method, reason)
	}
	if strings.Contains(said, "hides the ") {
		return fmt.Errorf("the subnet of this node is inside the range of a subnet of the VPC network: choose a Network "+
			"that overlaps with none (gcloud compute networks subnets list); Compute Engine says: %s", said)
	}
	return fmt.Errorf("%s fails: Compute Engine says: %s: %s", method, plain.Text(reason), said)
}

// noMetadata is the error of the metadata server.
func noMetadata(err error) error {
	return fmt.Errorf("the metadata server does not answer (%s): gce is for instances of Google Cloud, and flanneld "+
		"needs the network of the host", cloudroute.Cause(err))
}

// noCredentials is the error of the search for credentials.
func noCredentials(err error) error {
	return fmt.Errorf("there are no Google Cloud credentials (%s): give the instance a service account with the role in "+
		"backend/gce/README.md, or set GOOGLE_APPLICATION_CREDENTIALS", cloudroute.Cause(err))
}
