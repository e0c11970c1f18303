// Command bill lists what our binaries are made of, from the go tool and the
// module cache alone:
//
//	bill check             fails on a module whose licence is not known or not allowed
//	bill sbom VERSION      a CycloneDX document
//	bill notices           all licences and notices, as their authors ask for
//
// It runs in the directory of the module that the binaries are made from.
package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// architectures are those that binaries are released for.
var architectures = []string{"amd64", "arm", "arm64", "ppc64le", "riscv64", "s390x"}

// allowed are the licences under which others' work may go into ours.
var allowed = []string{"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MPL-2.0"}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "bill: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("say what to do: check, sbom VERSION, or notices")
	}
	parts, err := list()
	if err != nil {
		return err
	}
	switch what := strings.Join(args, " "); {
	case what == "check":
		return check(parts)
	case args[0] == "sbom" && len(args) == 2:
		return sbom(os.Stdout, parts, args[1])
	case what == "notices":
		return notices(os.Stdout, parts)
	default:
		return fmt.Errorf("%q is nothing it can do: check, sbom VERSION, or notices", what)
	}
}

// check returns an error that names every part which cannot stay.
func check(parts []part) error {
	var errs []error
	for _, p := range parts {
		for _, t := range p.licences {
			for _, l := range t.licences {
				if !slices.Contains(allowed, l) {
					errs = append(errs, fmt.Errorf("%s: %s is of licence %s: allowed are %s", p.path, t.name, l,
						strings.Join(allowed, ", ")))
				}
			}
			if len(t.licences) == 0 {
				errs = append(errs, fmt.Errorf("%s: %s is no licence that is known here: read it", p.path, t.name))
			}
		}
		if len(p.licences) == 0 {
			errs = append(errs, fmt.Errorf("%s has no file with a licence", p.path))
		}
	}
	return errors.Join(errs...)
}
