package main

import "strings"

// marks are words that a licence has and no other. Their case counts: the
// Mozilla licence names the GNU ones, but not as their titles do.
var marks = []struct{ licence, words string }{
	{"Apache-2.0", "Apache License Version 2.0, January 2004"},
	{"Apache-2.0", "Licensed under the Apache License, Version 2.0"},
	{"MIT", "Permission is hereby granted, free of charge, to any person obtaining a copy"},
	{"ISC", "Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted"},
	{"ISC", "Permission to use, copy, modify, and distribute this software for any purpose with or without fee is hereby granted"},
	{"MPL-2.0", "Mozilla Public License Version 2.0"},
	{"MPL-2.0", "Mozilla Public License, version 2.0"},
	{"GPL", "GNU GENERAL PUBLIC LICENSE"},
	{"LGPL", "GNU LESSER GENERAL PUBLIC LICENSE"},
	{"AGPL", "GNU AFFERO GENERAL PUBLIC LICENSE"},
	{"EPL", "Eclipse Public License"},
	{"CDDL", "COMMON DEVELOPMENT AND DISTRIBUTION LICENSE"},
	{"BUSL", "Business Source License"},
	{"SSPL", "Server Side Public License"},
	{"Commons-Clause", "Commons Clause"},
}

// classify returns the licences that a text holds, by their SPDX identifiers.
func classify(text string) []string {
	text = strings.Join(strings.Fields(text), " ")
	var out []string
	for _, m := range marks {
		if strings.Contains(text, m.words) && (len(out) == 0 || out[len(out)-1] != m.licence) {
			out = append(out, m.licence)
		}
	}
	if strings.Contains(text, "Redistribution and use in source and binary forms, with or without modification, are permitted") {
		switch {
		case strings.Contains(text, "All advertising materials mentioning features"):
			out = append(out, "BSD-4-Clause")
		case strings.Contains(text, "endorse or promote products"):
			out = append(out, "BSD-3-Clause")
		default:
			out = append(out, "BSD-2-Clause")
		}
	}
	return out
}
