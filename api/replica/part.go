package replica

import "github.com/rescindhq/rescind/api/revocation"

// Tenants says that what is loaded is about these tenants only, by their domains: then events
// of others are passed over, and gaps are noticed by an event's Previous.
func (l *Loader) Tenants(domains []string) { panic("skeleton") }

// RevocationsOnly says that the catalog is not loaded, and none of its events applies. The
// state's position is moved by Through alone.
func (l *Loader) RevocationsOnly() { panic("skeleton") }

// Revoke makes rec hold at once, ahead of the log's events: at is of its event, or of a later
// one of the same epoch. No snapshot from before takes it back.
func (r *State) Revoke(rec Record, at revocation.Position) { panic("skeleton") }

// Through says that everything up to p is part of the state, or does not concern it. Of a state
// that is about everything it is an assertion: [ErrGap] if events up to p are missing, [ErrEpoch]
// if p is of another epoch. Other states move to p.
func (r *State) Through(p revocation.Position) error { panic("skeleton") }

// Scope is what the state is about: tenants by their domains, nil for all of them; and whether
// it has revocations only.
func (r *State) Scope() (tenants []string, revocationsOnly bool) { panic("skeleton") }

// loaded is a revocation as a binary snapshot has it.
type loaded struct {
	key           key
	exp, notAfter int64
}

// entries adds many revocations of a class of an issuer ("" for tenants) at once. About is how many
// of it are expected in all, 0 if that is not known.
func (l *Loader) entries(iss string, c class, list []loaded, about int) { panic("skeleton") }
