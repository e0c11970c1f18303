package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// leftOut are tests that cannot pass here. Names are regular expressions.
var leftOut = []struct {
	name, reason string
	direct       bool // passes where packets between nodes leave through eth0 as they are
}{
	{name: "should forward PTR records lookup to upstream nameserver", reason: "need the Internet"},
	{name: "should implement NodePort and HealthCheckNodePort correctly when ExternalTrafficPolicy changes", direct: true,
		reason: "expect kube-proxy to masquerade as eth0, which the route to pods does not use: combination host-gw"},
}

// label matches the label of a test that needs what not every cluster has. Ginkgo appends labels to names.
var label = regexp.MustCompile(`\[Feature:([^\]]+)\]`)

// features says what that is.
var features = map[string]string{
	"IPv6DualStack":          "both families: combination dual-stack",
	"KubeProxyNFAcct":        "a kernel module",
	"LoadBalancer":           "a cloud's load balancers",
	"LocalhostNodePorts":     "a setting of kube-proxy",
	"NetworkPolicy":          "a program that enforces policies: combination netpol",
	"Networking-DNS":         "the Internet",
	"Networking-IPv4":        "the Internet",
	"Networking-IPv6":        "the Internet",
	"Networking-Performance": "iperf",
	"PerformanceDNS":         "thousands of Services",
	"SCTPConnectivity":       "the kernel's module sctp",
}

// results are those of one run.
type results []result

type result struct {
	name   string
	status string // passed, failed, skipped, or one of Ginkgo's other words for a failure
	reason string // of a test that is skipped; empty: it was not selected
	took   time.Duration
}

// suiteTests is how the names of the suite's tests of networking begin.
const suiteTests = "[It] [sig-network] "

// readJUnit reads the results of the tests whose names begin so.
func readJUnit(file, begin string) (results, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var report struct {
		Suites []struct {
			Cases []struct {
				Name    string  `xml:"name,attr"`
				Status  string  `xml:"status,attr"`
				Time    float64 `xml:"time,attr"`
				Skipped struct {
					Message string `xml:"message,attr"`
				} `xml:"skipped"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(text, &report); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var all results
	for _, suite := range report.Suites {
		for _, c := range suite.Cases {
			name, isTest := strings.CutPrefix(c.Name, begin)
			if !isTest && c.Status != "failed" {
				continue // what the suite does before and after the tests, and other tests
			}
			_, reason, _ := strings.Cut(c.Skipped.Message, " - ")
			all = append(all, result{name, c.Status, reason, time.Duration(c.Time * float64(time.Second))})
		}
	}
	return all, nil
}

// print lists what was run, and what was not for which reason.
func (all results) print(w io.Writer) {
	unselected := map[string]int{} // by reason
	for _, r := range all {
		switch {
		case r.status == "skipped" && r.reason != "":
			fmt.Fprintf(w, "  skipped  %s: %s\n", r.name, r.reason)
		case r.status == "skipped":
			unselected[r.whyNot()]++
		case r.status == "passed":
			fmt.Fprintf(w, "  passed   %s (%.0f s)\n", r.name, r.took.Seconds())
		default:
			fmt.Fprintf(w, "  FAILED   %s (%s, %.0f s)\n", r.name, r.status, r.took.Seconds())
		}
	}
	for _, reason := range slices.Sorted(maps.Keys(unselected)) {
		fmt.Fprintf(w, "  not run: %3d %s\n", unselected[reason], reason)
	}
}

// whyNot says why a test is not selected.
func (r result) whyNot() string {
	for _, l := range leftOut {
		if regexp.MustCompile(l.name).MatchString(r.name) {
			return l.reason
		}
	}
	if m := label.FindStringSubmatch(r.name); m != nil {
		return strings.TrimSuffix("need "+m[1]+": "+features[m[1]], ": ")
	}
	if !strings.Contains(r.name, "[Conformance]") {
		return "are no conformance tests: TESTS=network"
	}
	return "do not match FOCUS"
}

// sum counts.
func (all results) sum() string {
	var passed, failed, skipped, rest int
	for _, r := range all {
		switch {
		case r.status == "passed":
			passed++
		case r.status == "skipped" && r.reason == "":
			rest++
		case r.status == "skipped":
			skipped++
		default:
			failed++
		}
	}
	return fmt.Sprintf("%d passed, %d failed, %d skipped, %d not selected", passed, failed, skipped, rest)
}

// progress shows from the suite's output which test has ended, and how.
type progress struct {
	out     io.Writer
	pending []byte // the beginning of a line
	end     string // how a test ended whose name the next line has
}

func newProgress(out io.Writer) *progress { return &progress{out: out} }

func (p *progress) Write(text []byte) (int, error) {
	p.pending = append(p.pending, text...)
	for {
		line, rest, whole := bytes.Cut(p.pending, []byte("\n"))
		if !whole {
			return len(text), nil
		}
		p.pending = rest
		if p.end != "" {
			fmt.Fprintf(p.out, "  %s %s\n", p.end, line)
			p.end = ""
		}
		// Such as "• [12.3 seconds]", or "• [FAILED] [12.3 seconds]".
		if end, ok := bytes.CutPrefix(line, []byte("• ")); ok {
			p.end = string(end)
		}
	}
}
