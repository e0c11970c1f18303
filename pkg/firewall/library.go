package firewall

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/plain"
)

// A library is coreos/go-iptables for one program. It removes rules and chains, which the start of a node seldom needs:
// to open the library starts the program. The library starts programs by itself, so that all calls are here, through
// command.Call.
type library struct {
	programs *command.Runner
	path     string
	ipt      *goiptables.IPTables
}

// openLibrary has the library find out what a program can do, by its version.
func openLibrary(ctx context.Context, programs *command.Runner, path string) (*library, error) {
	l := &library{programs: programs, path: path}
	var err error
	l.ipt, err = call(ctx, l, "--version", func() (*goiptables.IPTables, error) {
		return goiptables.New(goiptables.Path(path), goiptables.Timeout(lockSeconds))
	})
	return l, err
}

// call calls the library, which runs the program with these arguments, or the like.
func call[T any](ctx context.Context, l *library, args string, f func() (T, error)) (T, error) {
	name := l.path + " " + args
	result, err := command.Call(ctx, l.programs, name, f)
	if failed := (*goiptables.Error)(nil); errors.As(err, &failed) {
		err = errors.New(plain.Line(failed.Error())) // with the command, and what it has printed
	} else if err != nil {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return result, err
}

// deleteRule deletes a rule, as iptables-save prints it, of the chain of c that jumps to ours. The rule may be gone.
func (l *library) deleteRule(ctx context.Context, c chain, rule string) error {
	args := strings.TrimPrefix(rule, "-A "+c.base+" ")
	_, err := call(ctx, l, fmt.Sprintf("-t %s -D %s %s", c.table, c.base, args), func() (struct{}, error) {
		return struct{}{}, l.ipt.DeleteIfExists(c.table, c.base, words(args)...)
	})
	return err
}

// deleteChain empties our chain and, unless it is used, deletes it.
func (l *library) deleteChain(ctx context.Context, c chain, used bool) error {
	remove := l.ipt.ClearAndDeleteChain
	if used {
		remove = l.ipt.ClearChain
	}
	_, err := call(ctx, l, fmt.Sprintf("-t %s -X %s", c.table, c.name), func() (struct{}, error) {
		return struct{}{}, remove(c.table, c.name)
	})
	return err
}

var (
	wordForm = regexp.MustCompile(`"(?:\\.|[^"\\])*"|\S+`)
	escapes  = regexp.MustCompile(`\\(.)`)
)

// words returns the words of a rule as iptables-save prints it.
func words(rule string) (all []string) {
	for _, word := range wordForm.FindAllString(rule, -1) {
		if quoted, ok := strings.CutPrefix(word, `"`); ok {
			word = escapes.ReplaceAllString(strings.TrimSuffix(quoted, `"`), "$1")
		}
		all = append(all, word)
	}
	return all
}
