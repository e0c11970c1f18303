package subnet

// A Holding is a lease, or a reservation, as the store has it for an operator.
type Holding struct {
	Lease
	Node     string // the name of the node; "": not known
	Reserved bool   // for the node with these public addresses
	Note     string // what an operator should know about it; "": nothing
}
