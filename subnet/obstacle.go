package subnet

import "net/netip"

// An Obstacle is a part of the network that belongs to this host: a prefix on one of its links, the address of the store
// or of a gateway, or a route of another program. A peer whose subnet conflicts with an Obstacle is left out, and this
// node does not lease such a subnet.
type Obstacle struct {
	Prefix netip.Prefix
	Name   string // in messages: "192.168.1.0/24 of eth1", "the gateway 10.5.0.1"

	// Route is set for a route that leads elsewhere: it conflicts only with a subnet that is the same as Prefix.
	Route bool

	// Via is where a Route leads, if a route of ours can stand beside it; otherwise, it is not valid. Where Via is the
	// address of a peer, the Route leads to that peer's own pods, and does not conflict with it.
	Via netip.Addr

	// Pods is set for what may belong to the pods of this node, such as the prefix of their bridge: it does not hinder
	// this node from having the subnet that it is in.
	Pods bool
}

// Conflicts tells whether a subnet conflicts with the obstacle.
func (o Obstacle) Conflicts(p netip.Prefix) bool {
	if o.Route {
		return o.Prefix == p
	}
	return o.Prefix.Overlaps(p)
}

// Around returns the configuration as it is for a host with these obstacles.
func (c *Config) Around(obstacles []Obstacle) *Config {
	around := *c
	around.Obstacles = obstacles
	return &around
}

// Hinders returns the first obstacle that hinders this node from having the subnets.
func (c *Config) Hinders(s Subnets) (o Obstacle, hindered bool) {
	for _, o := range c.Obstacles {
		for _, p := range s.Each() {
			if o.Conflicts(p) && !(o.Pods && p.Bits() <= o.Prefix.Bits()) {
				return o, true
			}
		}
	}
	return Obstacle{}, false
}

// Free returns the first subnets of one of the configuration's pools, limit at most, that overlap neither a prefix of
// taken nor an obstacle.
func (c *Config) Free(pool Pool, taken []netip.Prefix, limit int) []netip.Prefix {
	all := make([]netip.Prefix, 0, len(taken)+len(c.Obstacles))
	all = append(all, taken...)
	for _, o := range c.Obstacles {
		all = append(all, o.Prefix)
	}
	return pool.Free(all, limit)
}
