package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/flanneld/flanneld/test/chart"
)

func (r result) print() {
	for _, l := range r.rests {
		fmt.Printf("\n%d nodes %s: %.1f requests (%.0f in one second), %.1f messages to watches, %.1f events, "+
			"%.1f KB in and %.1f KB out a second\n", r.nodes, l.what, l.requests, l.peak, l.messages, l.events, l.in/1000,
			l.out/1000)
		for _, kind := range slices.Sorted(maps.Keys(l.uses)) {
			u := l.uses[kind]
			fmt.Printf("  %s, beside what is taken without nodes: %.1f %% of a core, %.0f MiB\n", kind, 100*u.cpu,
				u.memory/(1<<20))
		}
	}
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "bad moment\tall right after\tpeak requests/s\trequests\trefused\tevents\tmessages\tMB out\t"+
		"other subnet\tprobe's slowest\tfailed\t")
	for _, o := range r.outcomes {
		took := fmt.Sprintf("%.1f s", o.took.Seconds())
		if o.never != nil {
			took = "not in " + took
		}
		fmt.Fprintf(w, "%s\t%s\t%.0f\t%.0f\t%.0f\t%.0f\t%.0f\t%.1f\t%d\t%.2f s\t%d\t\n", o.what, took, o.peak,
			o.total.requests, o.total.refused, o.total.events, o.total.messages, o.total.out/1e6, o.moved, o.slow.Seconds(),
			o.failed)
	}
	fmt.Fprintln(w)
	kinds := slices.Sorted(maps.Keys(r.outcomes[0].cpu))
	fmt.Fprintf(w, "CPU seconds of\t%s\t\n", strings.Join(kinds, "\t"))
	for _, o := range r.outcomes {
		fmt.Fprintf(w, "%s\t", o.what)
		for _, kind := range kinds {
			fmt.Fprintf(w, "%.1f\t", o.cpu[kind].Seconds())
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	for _, o := range r.outcomes {
		if o.never != nil {
			fmt.Printf("%s: %v\n", o.what, o.never)
		}
	}
}

// draw draws the figures over N.
func draw(store string, results []result) []byte {
	curves := []chart.Curve{
		{Name: "requests a second at rest"}, {Name: "the store's memory, MiB"},
	}
	times := map[string]int{}
	for _, r := range results {
		add := func(i int, value float64) {
			if value > 0 {
				curves[i].Points = append(curves[i].Points, chart.Point{N: r.nodes, Value: value})
			}
		}
		if len(r.rests) > 0 {
			memory := 0.0
			for kind, u := range r.rests[0].uses {
				if kind != nodesUse {
					memory += u.memory
				}
			}
			add(0, r.rests[0].requests)
			add(1, memory/(1<<20))
		}
		for _, o := range r.outcomes {
			if o.never != nil {
				continue
			}
			if _, known := times[o.what]; !known && len(times) < 4 {
				times[o.what] = len(curves)
				curves = append(curves, chart.Curve{Name: o.what + ": seconds until all is right"})
			}
			if i, drawn := times[o.what]; drawn {
				add(i, o.took.Seconds())
			}
		}
	}
	return chart.Draw(store+" with N nodes", "nodes", "", curves)
}
