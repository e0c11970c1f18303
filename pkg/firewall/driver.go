package firewall

import (
	"context"
	"errors"
	"fmt"

	"k8s.io/klog/v2"
)

// A store is a place in the kernel that can hold one family's rules: the
// tables of either variant of iptables, or a table of nftables.
type store interface {
	// read returns all that is ours in the store, as the store's program
	// prints it, and how many rules that is. Nothing of ours: "", 0. Equal
	// text means equal rules; whatever is not ours leaves it unchanged.
	read(context.Context) (text string, rules int, err error)

	// write replaces what is ours, atomically in each table, and returns how
	// many rules read must find now. What is right already it leaves alone.
	write(context.Context, Ruleset) (rules int, err error)

	// plan returns the command that write would run, "" where all is right
	// already.
	plan(context.Context, Ruleset) (command string, err error)

	// counted tells whether every change to the store raises the kernel's
	// nftables generation.
	counted() bool

	String() string // its program: "iptables-legacy", "nft"
}

// A Driver keeps the node's rules in one mode, iptables or nftables. It is for
// one goroutine at a time.
type Driver struct {
	mode  string
	sides []*side // IPv4, IPv6
}

// A side is the Driver's work in one address family.
type side struct {
	family
	kept    store // where the rules belong; nil when its programs are missing
	missing error // what to do about that
	others  []store

	// What the last Apply left behind; nothing here counts unless applied.
	applied    bool
	rules      Ruleset
	text       string // of rules, as kept prints them
	generation uint32 // at which kept was last seen to hold text; 0: unknown
}

// New returns the driver of nftables, or of iptables in whichever variant the
// node's iptables is. It fails when that mode's programs are missing, and says
// which package brings them, or when they do not work here. A node may lack ip6tables as long as it wants no
// IPv6 rules. Nothing is written before Apply.
func New(ctx context.Context, nftables bool) (*Driver, error) {
	d := &Driver{mode: "iptables"}
	if nftables {
		d.mode = "nftables"
	}
	for _, f := range []family{ipv4, ipv6} {
		ipt, iptErr := findIPTables(ctx, f)
		nft, nftErr := findNFT(f)
		if nftables && nftErr == nil {
			nftErr = nft.open()
		}
		s := &side{family: f}
		switch {
		case nftables && nftErr == nil:
			s.kept = nft
			s.others = ipt
		case nftables:
			s.missing = nftErr
		case iptErr == nil:
			s.kept = ipt[0]
			s.others = ipt[1:]
			if nftErr == nil {
				s.others = append(s.others, nft)
			}
		default:
			s.missing = iptErr
		}
		d.sides = append(d.sides, s)
	}
	if err := d.sides[0].missing; err != nil {
		return nil, err
	}
	return d, nil
}

// String names the mode: "iptables" or "nftables".
func (d *Driver) String() string { return d.mode }

// Apply makes the kernel hold exactly the desired rules, in place of whatever
// is ours: rules of an earlier network, of an earlier daemon, of the other
// mode. No packet meets a moment without the rules that stay. Applying again
// what is in place already writes nothing. After an error, which may concern
// one family alone, Apply again.
func (d *Driver) Apply(ctx context.Context, want Desired) error {
	var errs []error
	for i, rules := range []Ruleset{want.IPv4, want.IPv6} {
		s := d.sides[i]
		if err := s.apply(ctx, rules); err != nil {
			errs = append(errs, fmt.Errorf("%s rules: %w", s.name, err))
		}
	}
	return errors.Join(errs...)
}

// Check tells whether what Apply last set is still in place, exactly: a rule
// of ours that is missing, altered or moved, or a foreign one among ours, makes
// it false. The rules of others around ours may come and go. It is false, too,
// before Apply has succeeded. At most one process a family is started, and none
// when the rules are kept in nftables (iptables-nft keeps them there as well)
// and nobody has changed anything there since the last time.
func (d *Driver) Check(ctx context.Context) (bool, error) {
	for _, s := range d.sides {
		if ok, err := s.check(ctx); !ok || err != nil {
			if err != nil {
				err = fmt.Errorf("%s rules: %w", s.name, err)
			}
			return false, err
		}
	}
	return true, nil
}

func (s *side) apply(ctx context.Context, want Ruleset) error {
	was := s.applied && s.rules.Equal(want)
	s.applied = false
	if s.kept == nil {
		if !want.IsZero() {
			return s.missing
		}
	} else if err := s.keep(ctx, want, was); err != nil {
		// A family that is off may not work at all on this node (a kernel
		// without IPv6). That must not keep the other from working.
		if !want.IsZero() {
			return err
		}
		klog.Warningf("%s rules of an earlier daemon, if there are any, stay: %v", s.name, err)
	}
	s.rules, s.applied = want, true
	s.sweep(ctx) // last: until here, what it removes may have been doing the work
	return nil
}

// keep brings kept to hold want; was tells that it did after the last Apply.
func (s *side) keep(ctx context.Context, want Ruleset, was bool) error {
	text, _, err := s.kept.read(ctx)
	if err != nil {
		return err
	}
	if was && text == s.text {
		return nil
	}
	rules, err := s.kept.write(ctx, want)
	if err != nil {
		return err
	}
	// Programs print rules in ways that differ by version, so what to compare
	// with later is what this one prints now, provided that all is there.
	generation := s.nftGeneration()
	text, found, err := s.kept.read(ctx)
	if err != nil {
		return err
	}
	if found != rules {
		return fmt.Errorf("%d of ours were written, but %s now shows %d: something else on the node rewrites them, or hides them from %s",
			rules, s.kept, found, s.kept)
	}
	s.text, s.generation = text, generation
	return nil
}

// sweep removes what another mode, or the other variant of iptables, has left.
// What fails is tried again at the next Apply; it is worth a warning, not more:
// such rules grant and masquerade what ours do, or did.
func (s *side) sweep(ctx context.Context) {
	var left []store
	for _, o := range s.others {
		text, _, err := o.read(ctx)
		if err == nil && text != "" {
			_, err = o.write(ctx, Ruleset{})
		}
		if err != nil {
			klog.Warningf("%s rules of an earlier daemon, if there are any, stay in %s: %v", s.name, o, err)
			left = append(left, o)
		}
	}
	s.others = left
}

func (s *side) check(ctx context.Context) (bool, error) {
	if !s.applied {
		return false, nil
	}
	if s.rules.IsZero() {
		return true, nil
	}
	generation := s.nftGeneration() // before reading: what changes while we read, the next check sees
	if generation != 0 && generation == s.generation {
		return true, nil
	}
	text, _, err := s.kept.read(ctx)
	if err != nil || text != s.text {
		return false, err
	}
	s.generation = generation
	return true, nil
}

// nftGeneration returns 0 where the generation says nothing about kept, or
// cannot be had. Asking costs one netlink message.
func (s *side) nftGeneration() uint32 {
	if !s.kept.counted() {
		return 0
	}
	g, err := generation()
	if err != nil {
		klog.V(2).Infof("Reading all rules at each check: %v", err)
		return 0
	}
	return g
}
