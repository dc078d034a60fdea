// Package catalog changes and reads what gateways validate subscriptions with. It
// hides the tables, what refers to what, which revocations a change entails, and how
// each change is told. It owns the tables tenants, key_managers, policies, scopes,
// apis, applications, key_mappings and subscriptions; an issuer of our own that goes takes
// its signing keys with it.
//
// # Invariants
//
// An entity, what it refers to, its event, its audit record and the revocations that
// its change entails commit in one transaction.
//
// # Decisions
//
// Changes within one tenant are made one after the other: each locks the tenant's row
// first, those of several tenants in ascending order. Nearly every rule is about two
// entities of one tenant (a policy is not deleted while an application is created with
// it), and with one lock none of them has a race. The log's head lines writers up anyway,
// and a transaction of 500 changes holds the lock for well under 0.1 s. Revocations do not
// wait for it, unless they are of a client that the change itself revokes. Keys of the
// database are a second net, for rows of older versions of the service.
//
// What is unique over all tenants (an issuer, an id or a UUID that is given) may still make
// two changes wait for each other, and so may an announcement: the database ends one of
// them, and the log runs it again.
//
// Consecutive changes of one noun and op are made together, in a fixed number of
// statements, so the cost of a batch is in its rows and not in its round trips. Later ones
// see the earlier ones because the database does.
//
// A row is made from its event's data, so that they cannot differ.
package catalog

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// The errors that callers act on. Each comes wrapped in a [Conflict] or with text that
// may be shown to the caller.
var (
	// ErrNotFound: there is no such entity, or it is another tenant's.
	ErrNotFound = errors.New("not found")
	// ErrStale: the entity has changed since the version that the change is for.
	ErrStale = errors.New("it has changed meanwhile")
)

// Conflict says why a change cannot be made as things are. Its text may be shown to
// the caller. Slug is "exists" (a name, id or UUID is taken), "in-use" (something
// refers to it), "immutable" (a member that never changes would) or "limit".
type Conflict struct {
	Slug   string
	Detail string
	// Pointer is the member that is in conflict, "" if none.
	Pointer string
}

// Error is the detail.
func (c *Conflict) Error() string { return c.Detail }

// Caller is who changes or reads something, and within which tenants.
type Caller struct {
	Actor       ledger.Actor
	Traceparent string
	// Tenant is the domain of the only tenant that it sees; "" sees all.
	Tenant string
	// AlsoReads are domains of other tenants that Get and List show it.
	AlsoReads []string
}

// Op is what to do with an entity.
type Op string

// The ops.
const (
	Create Op = "create"
	Update Op = "update"
	Delete Op = "delete"
)

// Change asks for one change.
type Change struct {
	Op Op
	// Entity is the whole state wanted. Its UUID names it, but on Create, where ID and
	// UUID are made unless given. Its tenant may be named by either member; by default it
	// is the caller's, that of the application where there is one, or carbon.super. Of a Delete
	// only Meta.UUID and the noun count. Refs may have either member. What only the service
	// sets (Generated, ApplicationBlocked, and on Update Resident and Blocked) is ignored.
	Entity catalog.Entity
	// IfTimestamp is the timestamp that an Update or Delete demands of the entity; 0 is any.
	IfTimestamp int64
	// KeepTokens: a change that ends what a consumer key may do does not revoke its
	// tokens. It is about deleted applications, key mappings and subscriptions, and
	// subscriptions that are no longer let through. An application whose tokens are
	// self-contained refuses it, since they know nothing of the change; so does the update
	// after which they no longer are, which ends the tokens of before.
	KeepTokens bool
}

// Config is for [New].
type Config struct {
	// Issuer is the iss of the super tenant's own key manager, at most 255 bytes and without a
	// slash at the end; that of another tenant is Issuer/t/<domain>. Empty: tenants get none,
	// which is for tests.
	Issuer string
	// MaxTokenLifetime is the longest from iat to exp of tokens of our own issuers, in whole
	// seconds.
	MaxTokenLifetime time.Duration
}

// Store is the catalog. Its methods may be called from any goroutine.
type Store struct {
	cfg     Config
	pool    *pgxpool.Pool
	ledger  Ledger
	clients Clients
	log     *slog.Logger

	warned sync.Map // domains of tenants that cannot have an issuer
}

// Ledger is where changes are told. [ledger.Ledger] is one.
type Ledger interface {
	Change(ctx context.Context, f func(ctx context.Context, tx *ledger.Tx) error) (revocation.Position, error)
}

// Clients keeps what the holder of a generated consumer key proves itself with.
// [authn.Authenticator] is one.
type Clients interface {
	// StoreClient makes the client of a key mapping in tx.
	StoreClient(ctx context.Context, tx pgx.Tx, keyMappingID int32, r authn.Registration) (authn.Credentials, error)
	// RotateClient gives it another secret, or other keys, in tx.
	RotateClient(ctx context.Context, tx pgx.Tx, clientID string, r authn.Rotation) (secret string, err error)
	// Forget is called after a client was made, changed or removed.
	Forget(iss, consumerKey string)
}

// New returns a catalog on pool, which logs in as a member of rescind_service.
func New(cfg Config, pool *pgxpool.Pool, l Ledger, clients Clients, log *slog.Logger) *Store {
	return &Store{cfg: cfg, pool: pool, ledger: l, clients: clients, log: log.With("component", "catalog")}
}
