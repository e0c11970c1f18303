package main

import (
	"bytes"
	"fmt"
	"math"
	"time"
)

// A curve is a time over N.
type curve struct {
	name   string
	points []point
}

type point struct {
	n    int
	took time.Duration
}

// draw draws curves with both axes logarithmic, as SVG.
func draw(title string, curves []curve) []byte {
	const width, height, left, right, top, bottom = 760.0, 480.0, 70.0, 30.0, 60.0, 50.0
	colours := []string{"#0b62a4", "#7fb2dd", "#c2571a", "#efb08c"}
	// The decades that hold all points.
	low, high := [2]float64{math.Inf(1), math.Inf(1)}, [2]float64{math.Inf(-1), math.Inf(-1)}
	at := func(p point) [2]float64 { return [2]float64{math.Log10(float64(p.n)), math.Log10(p.took.Seconds())} }
	for _, c := range curves {
		for _, p := range c.points {
			for i, v := range at(p) {
				low[i], high[i] = min(low[i], math.Floor(v)), max(high[i], math.Ceil(v))
			}
		}
	}
	place := func(v [2]float64) (x, y float64) {
		share := func(i int) float64 { return (v[i] - low[i]) / max(high[i]-low[i], 1) }
		return left + share(0)*(width-left-right), height - bottom - share(1)*(height-top-bottom)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" font-family="sans-serif" font-size="13">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/><text x="%g" y="24" font-size="16">%s</text>`+"\n",
		left, title)
	for i, name := range []string{"%g", "%g s"} {
		for decade := low[i]; decade <= high[i]; decade++ {
			from, to := low, high
			from[i], to[i] = decade, decade
			x1, y1 := place(from)
			x2, y2 := place(to)
			fmt.Fprintf(&b, `<path d="M%.1f %.1fL%.1f %.1f" stroke="#ddd"/>`, x1, y1, x2, y2)
			x, y, anchor := x1-8, y1+4, "end"
			if i == 0 {
				x, y, anchor = x1, y1+18, "middle"
			}
			fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", x, y, anchor,
				fmt.Sprintf(name, math.Pow(10, decade)))
		}
	}
	fmt.Fprintf(&b, `<text x="%g" y="%g" text-anchor="middle">peers</text>`+"\n", (width+left-right)/2, height-10)
	for i, c := range curves {
		colour := colours[i%len(colours)]
		fmt.Fprintf(&b, `<path fill="none" stroke-width="2" stroke="%s" d="`, colour)
		for j, p := range c.points {
			x, y := place(at(p))
			fmt.Fprintf(&b, "%c%.1f %.1f", "ML"[min(j, 1)], x, y)
		}
		b.WriteString(`"/>`)
		for _, p := range c.points {
			x, y := place(at(p))
			fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"><title>%s: %d peers, %.3f s</title></circle>`, x, y,
				colour, c.name, p.n, p.took.Seconds())
		}
		y := top + 18*float64(i+1)
		fmt.Fprintf(&b, `<path d="M%g %gh24" stroke="%s" stroke-width="2"/><text x="%g" y="%g">%s</text>`+"\n", left+14, y,
			colour, left+46, y+4, c.name)
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}
