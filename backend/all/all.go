// Package all, which other programs may import, registers every backend. Build tags leave out those for clouds, with
// their SDKs: no_awsvpc, no_gce, no_alivpc, no_tencentvpc.
package all

import (
	_ "github.com/flanneld/flanneld/backend/alloc"
	_ "github.com/flanneld/flanneld/backend/extension"
	_ "github.com/flanneld/flanneld/backend/hostgw"
	_ "github.com/flanneld/flanneld/backend/ipip"
	_ "github.com/flanneld/flanneld/backend/ipsec"
	_ "github.com/flanneld/flanneld/backend/udp"
	_ "github.com/flanneld/flanneld/backend/vxlan"
	_ "github.com/flanneld/flanneld/backend/wireguard"
)
