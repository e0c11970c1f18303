package pagetest

import (
	"encoding/json"
	"strings"
	"testing"
)

// options has a field of each kind that Keys distinguishes.
type options struct {
	// what the device
	// is called
	Name   string
	Secret string // of all nodes
	Port   int    // UDP
	On     bool   `json:"enable,omitempty"` // true|false

	// bounds
	Least, Most int

	// bounds of something else
	First, Last int

	// the underlay's
	MTU  int             `default:"the uplink's"`
	Rest json.RawMessage `json:"rest" default:"{\"Type\": \"udp\"}"` // passed on
	List []string        // of tables
}

func TestKeys(t *testing.T) {
	const want = "| key | default | meaning |\n| --- | --- | --- |\n" +
		"| `Name` | `flannel.1` | what the device is called |\n" +
		"| `Secret` | none | of all nodes |\n" +
		"| `Port` | 0 | UDP |\n" +
		"| `enable` | true | true\\|false |\n" +
		"| `Least`, `Most` | 0, 9 | bounds |\n" +
		"| `First`, `Last` | 7 | bounds of something else |\n" +
		"| `MTU` | the uplink's | the underlay's |\n" +
		"| `rest` | `{\"Type\": \"udp\"}` | passed on |\n" +
		"| `List` | none | of tables |\n"
	if got := Keys(t, options{Name: "flannel.1", On: true, Most: 9, First: 7, Last: 7}); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

type unexplained struct{ Port int }

func TestKeysRefused(t *testing.T) {
	files := []string{"keys_test.go"}
	if _, err := keys(files, options{MTU: 1500}); err == nil || !strings.Contains(err.Error(), "MTU has two defaults") {
		t.Errorf("a default both as a value and in words: %v", err)
	}
	if _, err := keys(files, unexplained{}); err == nil || !strings.Contains(err.Error(), "`Port` has no comment") {
		t.Errorf("a field without a comment: %v", err)
	}
	if _, err := keys(files, struct{}{}); err == nil {
		t.Error("a struct that is not declared: no error")
	}
}
