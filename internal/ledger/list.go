package ledger

import (
	"context"
	"time"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
)

// ListFilter selects revocations. What is empty selects all.
type ListFilter struct {
	// Tenants are domains.
	Tenants []string
	Kind    revocation.Kind
	// Iss are issuers: the revocations of tenants, which name none, are then left out.
	Iss []string
	// ID is the identifier of [revocation.Target]. Without Kind and Iss it is looked for among
	// all kinds and issuers.
	ID string
}

// Listed is a revocation as it is stored.
type Listed struct {
	directory.Stored
	// Seq is the place in the log of the last event about it, 0 if retention has removed that.
	Seq revocation.Seq
}

// List returns up to limit revocations that are live, or were until lately, by ascending id,
// from the first after the id after; "" begins.
func (l *Ledger) List(ctx context.Context, f ListFilter, after string, limit int) ([]Listed, error) {
	panic("skeleton")
}

// Get returns the revocation with this id, a UUID, and false if there is none, or none any more.
func (l *Ledger) Get(ctx context.Context, id string) (Listed, bool, error) { panic("skeleton") }

// AuditFilter selects records of the audit. What is empty selects all.
type AuditFilter struct {
	// Tenants are domains.
	Tenants                     []string
	Actor, Action, Subject, Iss string
	EntityID, RequestID         string
	// From and To bound the time: From <= at < To.
	From, To time.Time
}

// AuditRecord is a record as it is stored.
type AuditRecord struct {
	ID int64
	At time.Time
	AuditEntry
}

// AuditPage returns up to limit records, the newest first, from the first before the record
// with the id before; 0 begins. Nothing but the time has an index: a filter that matches
// little reads much, and ctx should bound it.
func (l *Ledger) AuditPage(ctx context.Context, f AuditFilter, before int64, limit int) ([]AuditRecord, error) {
	panic("skeleton")
}

// Seen is the furthest head that this process knows to be committed: nothing that it has
// answered for is after it.
func (l *Ledger) Seen() revocation.Position { return l.lastSeen() }
