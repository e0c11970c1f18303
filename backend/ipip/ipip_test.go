package ipip

import (
	"testing"

	"github.com/flanneld/flanneld/backend/backendtest"
)

func TestGolden(t *testing.T) { backendtest.Golden(t) }
