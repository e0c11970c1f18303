//go:build !no_alivpc

package all

import _ "github.com/flanneld/flanneld/backend/alivpc"
