// Package all, which other programs may import, registers every backend.
package all

import (
	_ "github.com/flanneld/flanneld/backend/alloc"
	_ "github.com/flanneld/flanneld/backend/awsvpc"
	_ "github.com/flanneld/flanneld/backend/extension"
	_ "github.com/flanneld/flanneld/backend/hostgw"
	_ "github.com/flanneld/flanneld/backend/ipip"
	_ "github.com/flanneld/flanneld/backend/ipsec"
	_ "github.com/flanneld/flanneld/backend/udp"
	_ "github.com/flanneld/flanneld/backend/vxlan"
	_ "github.com/flanneld/flanneld/backend/wireguard"
)
