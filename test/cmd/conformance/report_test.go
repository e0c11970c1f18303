package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// junit is a report of Ginkgo's, shortened.
const junit = `<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="7">
 <testsuite name="Kubernetes e2e suite" tests="7">
  <testcase name="[SynchronizedBeforeSuite]" status="passed" time="1"></testcase>
  <testcase name="[It] [sig-network] DNS works [Conformance] [sig-network, Conformance]" status="passed" time="12.5"></testcase>
  <testcase name="[It] [sig-network] Services lie [Conformance]" status="timedout" time="60"><failure message="it">why</failure></testcase>
  <testcase name="[It] [sig-network] Services restart" status="skipped" time="0"><skipped message="skipped - needs SSH"></skipped></testcase>
  <testcase name="[It] [sig-network] LoadBalancers [Feature:LoadBalancer] work" status="skipped" time="0"><skipped message="skipped"></skipped></testcase>
  <testcase name="[It] [sig-network] Networking talks" status="skipped" time="0"><skipped message="skipped"></skipped></testcase>
  <testcase name="[It] [sig-apps] Jobs end" status="skipped" time="0"><skipped message="skipped"></skipped></testcase>
 </testsuite>
</testsuites>`

// TestReport: the report has every test of networking, with the reason where it was not run.
func TestReport(t *testing.T) {
	file := filepath.Join(t.TempDir(), "junit.xml")
	if err := os.WriteFile(file, []byte(junit), 0o644); err != nil {
		t.Fatal(err)
	}
	all, err := readJUnit(file, suiteTests)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	all.print(&out)
	want := `  passed   DNS works [Conformance] [sig-network, Conformance] (12 s)
  FAILED   Services lie [Conformance] (timedout, 60 s)
  skipped  Services restart: needs SSH
  not run:   1 are no conformance tests: TESTS=network
  not run:   1 need LoadBalancer: a cloud's load balancers
`
	if out.String() != want {
		t.Errorf("the report is\n%swant\n%s", out.String(), want)
	}
	if got, want := all.sum(), "1 passed, 1 failed, 1 skipped, 2 not selected"; got != want {
		t.Errorf("the sum is %q, want %q", got, want)
	}
	if all[0].took != 12500*time.Millisecond {
		t.Errorf("the first test took %v", all[0].took)
	}
}

// TestProgress: a line for each test that has ended, wherever the output is cut.
func TestProgress(t *testing.T) {
	const output = "SSS\n------\n• [1.5 seconds]\n[sig-network] DNS works\ndns.go:1\n" +
		"• [FAILED] [60.2 seconds]\n[sig-network] Services lie\n"
	const want = "  [1.5 seconds] [sig-network] DNS works\n  [FAILED] [60.2 seconds] [sig-network] Services lie\n"
	for cut := range len(output) {
		var out strings.Builder
		p := newProgress(&out)
		p.Write([]byte(output[:cut]))
		p.Write([]byte(output[cut:]))
		if out.String() != want {
			t.Fatalf("cut after %d bytes the progress is\n%swant\n%s", cut, &out, want)
		}
	}
}
