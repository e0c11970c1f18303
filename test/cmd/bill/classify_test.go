package main

import (
	"slices"
	"strings"
	"testing"
)

func TestClassify(t *testing.T) {
	const bsd = "Redistribution and use in source and binary forms, with or without\nmodification, are permitted provided that\n"
	for text, want := range map[string]string{
		"   Apache License\n  Version 2.0, January 2004\n":                                                    "Apache-2.0",
		"The MIT License\n\nPermission is hereby granted, free of charge, to any person\nobtaining a copy of": "MIT",
		bsd + "1. 2.": "BSD-2-Clause",
		bsd + "3. Neither the name of X may be used to endorse or promote products":            "BSD-3-Clause",
		bsd + "3. All advertising materials mentioning features or use of this":                "BSD-4-Clause",
		"Permission is hereby granted, free of charge, to any person obtaining a copy\n" + bsd: "MIT BSD-2-Clause",
		"Mozilla Public License Version 2.0 ... the GNU General Public License, Version 2.0":   "MPL-2.0",
		"GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007":                                  "GPL",
		"All rights reserved.": "",
	} {
		if got := classify(text); !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%q is %q, want %q", text, got, want)
		}
	}
}

func TestCheck(t *testing.T) {
	for want, p := range map[string]part{
		"":                             {path: "a", licences: []text{{"LICENSE", "", []string{"MIT", "ISC"}}}},
		"a has no file":                {path: "a"},
		"a: LICENSE is no licence":     {path: "a", licences: []text{{"LICENSE", "", nil}}},
		"a: LICENSE is of licence GPL": {path: "a", licences: []text{{"LICENSE", "", []string{"MIT", "GPL"}}}},
	} {
		got := ""
		if err := check([]part{p}); err != nil {
			got = err.Error()
		}
		if got == "" != (want == "") || !strings.HasPrefix(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
