// Package chart draws what benchmarks measure over the number of nodes.
package chart

import (
	"bytes"
	"fmt"
	"math"
	"slices"
)

// A Curve is a value over N.
type Curve struct {
	Name   string
	Points []Point
}

// A Point is the value for one N. Both are more than zero.
type Point struct {
	N     int
	Value float64
}

// Draw draws curves with both axes logarithmic, as SVG. The texts name what the x axis counts, and follow each value.
func Draw(title, counted, unit string, curves []Curve) []byte {
	const width, left, right, line = 760.0, 70.0, 30.0, 18.0
	const plot, bottom = 370.0, 50.0
	top := 50 + line*float64(len(curves)) // the names of the curves are above the plot
	height := top + plot + bottom
	colours := []string{"#0b62a4", "#7fb2dd", "#c2571a", "#efb08c", "#3a7d34", "#8a4f9e", "#777777"}
	// The decades that hold all points.
	low, high := [2]float64{math.Inf(1), math.Inf(1)}, [2]float64{math.Inf(-1), math.Inf(-1)}
	at := func(p Point) [2]float64 { return [2]float64{math.Log10(float64(p.N)), math.Log10(p.Value)} }
	for _, c := range curves {
		for _, p := range c.Points {
			for i, v := range at(p) {
				low[i], high[i] = min(low[i], math.Floor(v)), max(high[i], math.Ceil(v))
			}
		}
	}
	place := func(v [2]float64) (x, y float64) {
		share := func(i int) float64 { return (v[i] - low[i]) / max(high[i]-low[i], 1) }
		return left + share(0)*(width-left-right), top + plot - share(1)*plot
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" font-family="sans-serif" font-size="13">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/><text x="%g" y="24" font-size="16">%s</text>`+"\n",
		left, title)
	lines := [2][]float64{sizes(curves), nil}
	for i := range lines {
		for decade := low[i]; decade <= high[i]; decade++ {
			lines[i] = append(lines[i], math.Pow(10, decade))
		}
		slices.Sort(lines[i])
		lines[i] = slices.Compact(lines[i])
	}
	for i, name := range []string{"%g", "%g" + unit} {
		for _, value := range lines[i] {
			from, to := low, high
			from[i], to[i] = math.Log10(value), math.Log10(value)
			x1, y1 := place(from)
			x2, y2 := place(to)
			fmt.Fprintf(&b, `<path d="M%.1f %.1fL%.1f %.1f" stroke="#ddd"/>`, x1, y1, x2, y2)
			x, y, anchor := x1-8, y1+4, "end"
			if i == 0 {
				x, y, anchor = x1, y1+18, "middle"
			}
			fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", x, y, anchor,
				fmt.Sprintf(name, value))
		}
	}
	fmt.Fprintf(&b, `<text x="%g" y="%g" text-anchor="middle">%s</text>`+"\n", (width+left-right)/2, height-10, counted)
	for i, c := range curves {
		colour := colours[i%len(colours)]
		fmt.Fprintf(&b, `<path fill="none" stroke-width="2" stroke="%s" d="`, colour)
		for j, p := range c.Points {
			x, y := place(at(p))
			fmt.Fprintf(&b, "%c%.1f %.1f", "ML"[min(j, 1)], x, y)
		}
		b.WriteString(`"/>`)
		for _, p := range c.Points {
			x, y := place(at(p))
			fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"><title>%s: %d %s, %.3f%s</title></circle>`, x, y,
				colour, c.Name, p.N, counted, p.Value, unit)
		}
		y := 44 + line*float64(i)
		fmt.Fprintf(&b, `<path d="M%g %gh24" stroke="%s" stroke-width="2"/><text x="%g" y="%g">%s</text>`+"\n", left, y,
			colour, left+32, y+4, c.Name)
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// sizes returns for which N there are points.
func sizes(curves []Curve) (all []float64) {
	for _, c := range curves {
		for _, p := range c.Points {
			all = append(all, float64(p.N))
		}
	}
	return all
}
