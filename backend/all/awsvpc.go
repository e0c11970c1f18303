//go:build !no_awsvpc

package all

import _ "github.com/flanneld/flanneld/backend/awsvpc"
