//go:build !no_gce

package all

import _ "github.com/flanneld/flanneld/backend/gce"
