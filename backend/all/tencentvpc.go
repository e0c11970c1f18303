//go:build !no_tencentvpc

package all

import _ "github.com/flanneld/flanneld/backend/tencentvpc"
