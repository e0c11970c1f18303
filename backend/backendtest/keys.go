package backendtest

import (
	"reflect"
	"testing"

	"github.com/flanneld/flanneld/pkg/pagetest"
)

// Keys compares the README's table of keys with the struct that a backend reads
// them into, as its defaults are. "go test -update" writes the table.
func Keys(t *testing.T, defaults any) {
	t.Helper()
	table := "There are no keys beside `Type`."
	if reflect.TypeOf(defaults).NumField() > 0 {
		table = pagetest.Keys(t, defaults)
	}
	pagetest.Part(t, "README.md", "keys", table, *Update)
}
