package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
)

// own is the module that the document is about.
const own = "github.com/flanneld/flanneld"

// sbom writes a CycloneDX 1.6 document. It has no time and no random number in
// it: one source, one document.
func sbom(w io.Writer, parts []part, version string) error {
	type object = map[string]any
	component := func(kind string, p part) object {
		ref := "pkg:golang/" + p.path + "@" + p.version
		var licences []object
		for _, l := range p.all() {
			licences = append(licences, object{"license": object{"id": l}})
		}
		c := object{"type": kind, "bom-ref": ref, "purl": ref, "name": p.path, "version": p.version, "licenses": licences}
		if p.sum != "" {
			c["properties"] = []object{{"name": "go.sum", "value": p.sum}}
		}
		return c
	}
	var about object
	var components, refs = []object{}, []any{}
	for _, p := range parts {
		if p.path == own {
			p.version = version
			about = component("application", p)
			continue
		}
		c := component("library", p)
		components, refs = append(components, c), append(refs, c["bom-ref"])
	}
	if about == nil {
		return fmt.Errorf("none of the parts is %s", own)
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(object{
		"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
		"metadata":     object{"component": about},
		"components":   components,
		"dependencies": []object{{"ref": about["bom-ref"], "dependsOn": refs}},
	})
}

// all returns the licences of a part.
func (p part) all() []string {
	var out []string
	for _, t := range p.licences {
		for _, l := range t.licences {
			if !slices.Contains(out, l) {
				out = append(out, l)
			}
		}
	}
	return out
}

// notices writes all texts, equal ones once.
func notices(w io.Writer, parts []part) error {
	var order []string
	of := map[string][]string{} // a text's parts
	for _, p := range parts {
		if p.path == own {
			continue // its licence is a file of its own
		}
		for _, t := range slices.Concat(p.licences, p.notices) {
			content := strings.TrimSpace(strings.ReplaceAll(t.content, "\r\n", "\n"))
			if of[content] == nil {
				order = append(order, content)
			}
			of[content] = append(of[content], p.path+" "+p.version+" "+t.name)
		}
	}
	for _, content := range order {
		if _, err := fmt.Fprintf(w, "%s\n%s\n\n%s\n\n", strings.Repeat("=", 80), strings.Join(of[content], "\n"),
			content); err != nil {
			return err
		}
	}
	return nil
}
