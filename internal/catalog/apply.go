package catalog

import (
	"context"
	"errors"
	"fmt"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
)

const maxEvents = ledger.MaxChanges

// tooMany is for a batch that does not fit into one transaction.
var tooMany = &Conflict{Slug: "limit", Detail: fmt.Sprintf(
	"the changes make more than %d events and revocations, which is the most in one transaction: make fewer at once", maxEvents)}

// Failed is the change that cannot be made. Nothing was changed.
type Failed struct {
	Index int
	Err   error
}

// Error is that of Err.
func (f *Failed) Error() string { return f.Err.Error() }

// Unwrap returns Err.
func (f *Failed) Unwrap() error { return f.Err }

// Apply makes changes in one transaction, in their order: all or none. It returns the entities
// as they are after it (a deleted one as it was last) and the log's position that has them.
//
// A batch makes at most 500 events and revocations: one event for each change, one more for
// each time that an API is deployed or undeployed with it, four more for a new tenant, one for
// everything that goes with something deleted, and a revocation for each consumer key whose tokens
// end. Deleting one application, as the only change, may take several transactions, the first of which
// blocks it; a deletion that stopped is finished by asking for it again.
//
// Errors: [Failed] with the index of the change that cannot be made, around [catalog.Invalid],
// [Conflict], [ErrNotFound] or [ErrStale]; a [Conflict] with slug "limit"; those of [ledger.Ledger.Change].
func (s *Store) Apply(ctx context.Context, by Caller, changes []Change) ([]catalog.Entity, revocation.Position, error) {
	if len(changes) > maxEvents {
		return nil, revocation.Position{}, tooMany
	}
	asked := make([]*step, len(changes))
	for i, c := range changes {
		st, err := prepare(by, i, c)
		if err != nil {
			return nil, revocation.Position{}, err
		}
		asked[i] = st
	}
	if len(asked) == 1 && asked[0].op == Delete && asked[0].noun == catalog.NounApplication {
		return s.deleteApplication(ctx, by, asked[0])
	}
	var b *batch
	var done []*step
	at, err := s.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) error {
		b = s.newBatch(by, tx)
		done = b.steps(asked)
		return b.apply(ctx, done)
	})
	s.forget(b)
	if err != nil {
		return nil, revocation.Position{}, err
	}
	entities := make([]catalog.Entity, len(done))
	for i, st := range done {
		entities[i] = st.result()
	}
	return entities, at, nil
}

// forget is called whatever became of b's transaction: it may have been committed.
func (s *Store) forget(b *batch) {
	if b == nil {
		return
	}
	for _, c := range b.forget {
		s.clients.Forget(c.iss, c.key)
	}
}

// step is a change on its way.
type step struct {
	index       int
	op          Op
	noun        catalog.Noun
	uuid        string // of Update and Delete
	ifTimestamp int64
	keepTokens  bool
	reason      string // for the audit, where nobody asked for this change itself

	// cur is the entity as it was, nil on Create. want is how it should be, nil on Delete.
	cur, want catalog.Entity
	madeID    bool
	row       []byte
}

func (st *step) fail(err error) error { return &Failed{st.index, err} }

// result is the entity as it is now.
func (st *step) result() catalog.Entity {
	if st.op == Delete {
		return st.cur
	}
	return st.want
}

// prepare checks what can be checked without looking.
func prepare(by Caller, index int, c Change) (*step, error) {
	st := &step{index: index, op: c.Op, ifTimestamp: c.IfTimestamp, keepTokens: c.KeepTokens}
	if c.Entity == nil {
		return nil, st.fail(catalog.Invalid{{Pointer: "#", Detail: "there is no entity"}})
	}
	m := c.Entity.Base()
	st.noun, st.uuid = c.Entity.Noun(), m.UUID
	if st.noun == catalog.NounTenant && by.Tenant != "" {
		return nil, st.fail(catalog.Invalid{{Pointer: "#/tenant", Detail: "tenants are created, changed and deleted by those who see all of them"}})
	}
	if st.noun == catalog.NounKeyManager && by.Tenant != "" && c.Op != Update {
		return nil, st.fail(catalog.Invalid{{Pointer: "#/iss", Detail: "whose tokens are believed is decided by those who see all tenants: " +
			"they create and delete key managers"}})
	}
	switch c.Op {
	case Create:
	case Update, Delete:
		if !isUUID(m.UUID) {
			return nil, st.fail(notFound(st.noun, "of this UUID"))
		}
	default:
		return nil, st.fail(catalog.Invalid{{Pointer: "#", Detail: "the op must be create, update or delete"}})
	}
	if c.Op == Delete {
		return st, nil
	}
	st.want = copyOf(c.Entity)
	kindOf(st.noun).complete(st.want)
	if err := validate(st); err != nil {
		return nil, err
	}
	return st, nil
}

func validate(st *step) error {
	var wrong catalog.Invalid
	err := st.want.Validate()
	if found, ok := errors.AsType[catalog.Invalid](err); ok {
		wrong = found
	} else if err != nil {
		return st.fail(err)
	}
	add := func(pointer, detail string) {
		wrong = append(wrong, catalog.FieldError{Pointer: pointer, Detail: detail})
	}
	m := st.want.Base()
	if m.UUID != "" && !isUUID(m.UUID) {
		add("#/uuid", "must be a UUID in lower case, for example 0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3")
	}
	if m.ID < 0 && st.noun != catalog.NounTenant {
		add("#/id", "must be 1 to 2147483647")
	}
	ref := func(pointer string, r catalog.Ref) {
		switch {
		case r.UUID != "" && !isUUID(r.UUID):
			add(pointer+"/uuid", "must be a UUID in lower case")
		case r.UUID == "" && r.ID == 0 && st.op == Create:
			add(pointer, "must have an id or a uuid")
		}
	}
	switch e := st.want.(type) {
	case *catalog.Tenant:
		if st.op == Create && !catalog.ValidDomain(m.Tenant.Domain) {
			add("#/tenant/domain", "must be 1 to 200 of a-z 0-9 . -")
		}
		if m.ID != 0 && m.Tenant.ID != 0 && m.ID != m.Tenant.ID {
			add("#/tenant/id", "must be the id")
		}
	case *catalog.KeyManager:
		if e.Resident && st.op == Create {
			add("#/resident", "must be false: an issuer of our own comes with its tenant")
		}
	case *catalog.KeyMapping:
		ref("#/application", e.Application)
	case *catalog.Subscription:
		ref("#/application", e.Application)
		ref("#/api", e.API)
	}
	if len(wrong) > 0 {
		return st.fail(wrong)
	}
	return nil
}

func notFound(n catalog.Noun, which string) error {
	return fmt.Errorf("%s %s: %w", n, which, ErrNotFound)
}
