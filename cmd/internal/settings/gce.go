//go:build !no_gce

package settings

import (
	"os"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/gce"
)

// The variable is gcloud's.
func init() {
	hosts = append(hosts, func() backend.Type {
		return gce.Host{Endpoint: os.Getenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE")}.Type()
	})
}
