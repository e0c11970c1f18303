//go:build !no_alivpc

package settings

import (
	"os"
	"strings"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/alivpc"
)

// ACCESS_KEY_ID and ACCESS_KEY_SECRET are flannel's variables. Alibaba Cloud's tools have those that begin with
// ALIBABA_CLOUD, and its provider for Terraform VPC_ENDPOINT and ECS_ENDPOINT.
func init() {
	hosts = append(hosts, func() backend.Type {
		return alivpc.Host{
			AccessKeyID: os.Getenv("ACCESS_KEY_ID"), AccessKeySecret: os.Getenv("ACCESS_KEY_SECRET"),
			Role:        os.Getenv("ALIBABA_CLOUD_ECS_METADATA"),
			Public:      strings.EqualFold(os.Getenv("ALIBABA_CLOUD_VPC_ENDPOINT_ENABLED"), "false"),
			VPCEndpoint: os.Getenv("VPC_ENDPOINT"), ECSEndpoint: os.Getenv("ECS_ENDPOINT"),
			NeedToken: strings.EqualFold(os.Getenv("ALIBABA_CLOUD_IMDSV1_DISABLED"), "true"),
		}.Type()
	})
}
