package e2e

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// rightsInPage are the rows of Documentation/security.md with the rights in Kubernetes: resource, verbs, where.
var rightsInPage = regexp.MustCompile(
	"(?m)^\\| `([a-z/]+)` \\| ([`a-z, ]+) \\| (?:(the cluster)|namespace `([a-z-]+)`) \\|")

// TestServiceAccount: the service account may do what Documentation/security.md lists, and nothing else that not every
// service account may do. While flannel is being replaced, its pods may have the right that they need besides.
func TestServiceAccount(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	rows := rightsInPage.FindAllStringSubmatch(securityPage(t), -1)
	if len(rows) == 0 {
		t.Fatal("Documentation/security.md lists no rights")
	}
	_, k := newKube(ctx, t, "", nil)
	labtest.Do(t, k.Apply(ctx, `{"apiVersion": "v1", "kind": "ServiceAccount",
		"metadata": {"name": "other", "namespace": "kube-flannel"}}`))
	check := func(more ...string) {
		t.Helper()
		for _, namespace := range []string{"default", "kube-flannel", "kube-system"} {
			want := slices.Clone(more)
			for _, row := range rows {
				if row[3] == "" && row[4] != namespace {
					continue
				}
				for verb := range strings.SplitSeq(row[2], ", ") {
					want = append(want, strings.Trim(verb, "`")+" "+row[1])
				}
			}
			slices.Sort(want)
			// The API server takes some time to know of new roles.
			labtest.Do(t, lab.Poll(ctx, "the rights that Documentation/security.md lists", func() error {
				everybody, err := k.Rights(ctx, "other", namespace)
				if err != nil {
					return err
				}
				got, err := k.Rights(ctx, "flannel", namespace)
				got = slices.DeleteFunc(got, func(right string) bool { return slices.Contains(everybody, right) })
				if err == nil && !slices.Equal(got, want) {
					err = fmt.Errorf("in namespace %s the service account may\n%q\nwant\n%q", namespace, got, want)
				}
				return err
			}))
		}
	}
	check()

	page := string(labtest.Must(os.ReadFile("../../Documentation/upgrading.md"))(t))
	commands := regexp.MustCompile(`(?m)^kubectl (.* flannel-upgrade.*?)(  # .*)?$`).FindAllStringSubmatch(page, -1)
	if len(commands) != 3 {
		t.Fatalf("Documentation/upgrading.md has the commands %q", commands)
	}
	for i, command := range commands {
		labtest.Must(k.Kubectl(ctx, strings.Fields(command[1])...))(t)
		if i == 1 {
			check("get pods")
		}
	}
	check()
}
