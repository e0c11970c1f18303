package ipip

import (
	"testing"

	"github.com/flanneld/flanneld/backend/backendtest"
)

func TestGolden(t *testing.T) { backendtest.Golden(t) }

func TestReference(t *testing.T) { backendtest.Keys(t, options{}) }
