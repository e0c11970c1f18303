package firewall

import (
	"context"
	"errors"
	"fmt"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/family"
)

// A tool reads and writes one family's rules where one program keeps them: the
// tables of either variant of iptables, or a table of nftables.
type tool interface {
	// list returns what the program prints of the tables that may hold our rules, "" when there are no such tables.
	list(context.Context) (string, error)

	// find returns all rules in a listing that are ours, nothing when there are none.
	find(ctx context.Context, listing string) found

	// write replaces our rules, atomically in each table, where the listing differs from the desired rules. It returns
	// how many rules find must find now, and whether the program was run, so that the listing is out of date.
	write(ctx context.Context, listing string, want Ruleset) (rules int, wrote bool, err error)

	// plan returns the command that write would run, "" when all rules are
	// right already.
	plan(context.Context, Ruleset) (command string, err error)

	// inNFTables returns whether the rules are in the kernel's nftables: every
	// change raises the nftables generation.
	inNFTables() bool

	String() string // the program: "iptables-legacy", "nft"
}

// found is what there is of our rules.
type found struct {
	text  string // as the program prints them; rules that are not ours do not change it
	rules int

	// misplaced: a rule of another program ends everything before a chain of ours is reached, and write moves our rule
	// before that.
	misplaced bool
}

// A Driver keeps the node's rules in one mode, iptables or nftables. It is for
// one goroutine at a time.
type Driver struct {
	mode     string
	families family.Pair[*familyRules]
}

// familyRules are the rules of one address family.
type familyRules struct {
	protocol
	find    func(context.Context) // sets tool, missing and others
	tool    tool                  // keeps the rules; nil when its programs are missing
	missing error                 // what to do about missing programs
	others  []tool
	left    map[tool]string // why rules that are not desired may be left, as it was logged

	// The result of the last Apply, valid when applied is true.
	applied    bool
	rules      Ruleset
	now        found  // what tool finds since then
	generation uint32 // at which tool was last seen to find now; 0: unknown
}

// New returns the driver of nftables, or of iptables in the variant that the
// node's iptables is. It fails when the mode's programs are missing or too old;
// the error names the package to install. A node may lack ip6tables as long as
// no IPv6 rules are desired. Nothing is written before Apply.
//
// Each network on this host has rules of its own: network is its name.
func New(ctx context.Context, network string, nftables bool) (*Driver, error) {
	return newDriver(ctx, &command.Runner{}, network, nftables)
}

func newDriver(ctx context.Context, programs *command.Runner, network string, nftables bool) (*Driver, error) {
	d := &Driver{mode: "iptables"}
	if nftables {
		d.mode = "nftables"
	}
	for f, p := range protocols.Each() {
		s := &familyRules{protocol: p, left: map[tool]string{}}
		s.find = func(ctx context.Context) { s.findTools(ctx, programs, network, nftables) }
		s.find(ctx)
		*d.families.At(f) = s
	}
	if err := d.families.IPv4.missing; err != nil {
		return nil, err
	}
	return d, nil
}

// findTools finds what keeps the rules of a mode, and what may hold rules of another mode.
func (s *familyRules) findTools(ctx context.Context, programs *command.Runner, network string, nftables bool) {
	ipt, iptErr := findIPTables(ctx, programs, network, s.protocol)
	nft, nftErr := findNFT(programs, network, s.protocol)
	if nftables && nftErr == nil && s.family == family.IPv4 { // IPv6 when rules are written: most nodes have none
		nftErr = nft.open(ctx)
	}
	s.tool, s.missing, s.others = nil, nil, nil
	switch {
	case nftables && nftErr == nil:
		nft.desired = true
		s.tool, s.others = nft, ipt
		return
	case nftables:
		s.missing = nftErr
	case iptErr == nil:
		s.tool, s.others = ipt[0], ipt[1:]
	default:
		s.missing = iptErr
	}
	if nftErr == nil {
		s.others = append(s.others, nft)
	}
}

// String names the mode: "iptables" or "nftables".
func (d *Driver) String() string { return d.mode }

// Outdated returns whether New would choose the other variant of iptables by now, since kubelet has made its chain
// there. Ask before the first Apply.
func (d *Driver) Outdated(ctx context.Context) bool {
	for _, s := range d.families.Each() {
		used, isIPTables := s.tool.(*iptables)
		for _, o := range s.others {
			if other, ok := o.(*iptables); ok && isIPTables && used.yieldsTo(ctx, other) {
				return true
			}
		}
	}
	return false
}

// Disturbs returns whether what Apply writes may disturb another program. ebtables-restore 1.8.9 fails to flush its
// tables when anything in nftables changes meanwhile. firewalld, with its iptables backend, flushes iptables, ip6tables
// and ebtables in turn, so that rules of iptables which are restored at once come in between, and drops all packets
// after such a failure.
func (d *Driver) Disturbs() bool { return d.families.IPv4.tool.inNFTables() && hasEBTables() }

// Apply makes the kernel hold exactly the desired rules, in place of all our
// rules: of an earlier network, of an earlier daemon, of the other mode. Rules
// that stay are in force all the while. When the rules are in place already,
// Apply writes nothing. After an error, which may concern one family alone,
// call Apply again.
func (d *Driver) Apply(ctx context.Context, want Desired) error {
	var errs []error
	for f, s := range d.families.Each() {
		if err := s.apply(ctx, want.Of(f)); err != nil {
			errs = append(errs, fmt.Errorf("%s rules: %w", s.family, err))
		}
	}
	return errors.Join(errs...)
}

// Check returns whether the rules of the last Apply are still in place,
// exactly: it returns false when a rule of ours is missing, changed or moved,
// or when a foreign rule is among ours. Rules of others around ours may come
// and go. Before Apply has succeeded, Check returns false. Check starts at most
// one process a family, and none when the rules are in nftables (iptables-nft
// keeps them there too) and nftables has not changed since the last Check.
func (d *Driver) Check(ctx context.Context) (bool, error) {
	for _, s := range d.families.Each() {
		if ok, err := s.check(ctx); !ok || err != nil {
			if err != nil {
				err = fmt.Errorf("%s rules: %w", s.family, err)
			}
			return false, err
		}
	}
	return true, nil
}

func (s *familyRules) apply(ctx context.Context, want Ruleset) error {
	was := s.applied && s.rules.Equal(want)
	s.applied = false
	if s.tool == nil && !want.IsZero() {
		s.find(ctx) // the programs may have been installed since
	}
	if s.tool == nil {
		if !want.IsZero() {
			return s.missing
		}
	} else if err := s.update(ctx, want, was); err != nil {
		// A family that is off may not work at all on this node (a kernel
		// without IPv6). That must not keep the other from working.
		if !want.IsZero() || ctx.Err() != nil {
			return err
		}
		s.logLeft(ctx, s.tool, err)
	}
	s.rules, s.applied = want, true
	s.removeOthers(ctx) // last: until here, the rules that it removes may have been in use
	return nil
}

// update has the tool write want; was is whether the last Apply did so.
func (s *familyRules) update(ctx context.Context, want Ruleset, was bool) error {
	generation := s.nftGeneration(ctx)
	listing, err := s.tool.list(ctx)
	if err != nil {
		return err
	}
	now := s.tool.find(ctx, listing)
	if was && now == s.now {
		return nil
	}
	rules, wrote, err := s.tool.write(ctx, listing, want)
	if err != nil {
		return err
	}
	// Programs print rules in ways that differ by version. Later checks compare
	// with what this program prints now, provided that all rules are there.
	if wrote {
		generation = s.nftGeneration(ctx)
		if listing, err = s.tool.list(ctx); err != nil {
			return err
		}
		now = s.tool.find(ctx, listing)
	}
	if now.rules != rules {
		return fmt.Errorf("%d rules were written, but %s now shows %d: another program on the node rewrites them, "+
			"or hides them from %s", rules, s.tool, now.rules, s.tool)
	}
	if now.misplaced { // another program has changed the rules since they were read: the next check is to see that
		now.misplaced, generation = false, 0
	}
	s.now, s.generation = now, generation
	return nil
}

// removeOthers removes the rules that another mode, or the other variant of
// iptables, has left. A failure is only logged, and the next Apply tries again:
// such rules accept and masquerade what ours do, or did.
func (s *familyRules) removeOthers(ctx context.Context) {
	var left []tool
	for _, o := range s.others {
		listing, err := o.list(ctx)
		if err == nil && o.find(ctx, listing).text != "" {
			_, _, err = o.write(ctx, listing, Ruleset{})
		}
		if err == nil {
			continue
		}
		left = append(left, o)
		if ctx.Err() == nil {
			s.logLeft(ctx, o, err)
		}
	}
	s.others = left
}

// logLeft logs why a tool cannot remove rules, unless that was logged before. While the rules of the other family fail,
// Apply is called again and again.
func (s *familyRules) logLeft(ctx context.Context, t tool, err error) {
	if s.left[t] == err.Error() {
		return
	}
	s.left[t] = err.Error()
	klog.FromContext(ctx).Error(err, "Cannot remove the rules of an earlier daemon, if there are any",
		"family", s.family, "tool", t.String())
}

func (s *familyRules) check(ctx context.Context) (bool, error) {
	if !s.applied {
		return false, nil
	}
	if s.rules.IsZero() {
		return true, nil
	}
	generation := s.nftGeneration(ctx) // before reading: the next check sees what changes during this one
	if generation != 0 && generation == s.generation {
		return true, nil
	}
	listing, err := s.tool.list(ctx)
	if err != nil || s.tool.find(ctx, listing) != s.now {
		return false, err
	}
	s.generation = generation
	return true, nil
}

// nftGeneration returns 0 when the generation says nothing about the tool's
// rules, or cannot be read. It costs one netlink message.
func (s *familyRules) nftGeneration(ctx context.Context) uint32 {
	if !s.tool.inNFTables() {
		return 0
	}
	g, err := generation()
	if err != nil {
		klog.FromContext(ctx).V(2).Info("Reading all rules at each check", "reason", err)
		return 0
	}
	return g
}
