package catalog

import (
	"context"
	"crypto/rand"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// NewKey asks for a consumer key of an application.
type NewKey struct {
	// Mapping has Application, KeyType and KeyManager (default: the resident one), and
	// for a mapped key ConsumerKey. ID, UUID and a generated ConsumerKey may be given.
	Mapping catalog.KeyMapping
	// Client is what a generated key is registered with; nil maps a key of an external key
	// manager. Its ID is ignored, its Secret may be given.
	Client *authn.Registration
}

// CreateKey maps or generates a consumer key. The secret of a generated one is in the
// credentials, and can never be read again. Errors are those of Apply; pointers into the
// registration are those of [authn.Registration.Validate].
func (s *Store) CreateKey(ctx context.Context, by Caller, k NewKey) (*catalog.KeyMapping, authn.Credentials, error) {
	given := k.Mapping
	if ref := given.Application; ref.UUID != "" && !isUUID(ref.UUID) {
		return nil, authn.Credentials{}, catalog.Invalid{{Pointer: "#/application/uuid", Detail: "must be a UUID in lower case"}}
	}
	var client authn.Registration
	if k.Client != nil {
		client = *k.Client
		set(&given.ConsumerKey, rand.Text())
		if err := client.Validate(); err != nil {
			return nil, authn.Credentials{}, err
		}
	}
	var b *batch
	var made *step
	var cred authn.Credentials
	_, err := s.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) error {
		b = s.newBatch(by, tx)
		mapping := given
		made = &step{op: Create, noun: catalog.NounKeyMapping, want: &mapping}
		var err error
		cred, err = s.createKey(ctx, b, made, k.Client != nil, client)
		return err
	})
	s.forget(b)
	if failed, ok := errors.AsType[*Failed](err); ok {
		err = failed.Err // there is only one
	}
	if err != nil {
		return nil, authn.Credentials{}, err
	}
	return made.want.(*catalog.KeyMapping), cred, nil
}

func (s *Store) createKey(ctx context.Context, b *batch, st *step, generate bool, client authn.Registration) (cred authn.Credentials, err error) {
	m := st.want.(*catalog.KeyMapping)
	b.forget = append(b.forget, consumer{m.Iss, m.ConsumerKey})
	var w wanted
	w.add(st)
	if err := b.lock(ctx, w); err != nil {
		return cred, err
	}
	resident, err := b.findKeyManager(ctx, m)
	if err != nil {
		return cred, b.failed("look up the key manager", err)
	}
	keyMappings{}.complete(m)
	if err := validate(st); err != nil {
		return cred, err
	}
	if resident && !generate {
		return cred, catalog.Invalid{{Pointer: "#/key_manager", Detail: "must be an external one: keys of an issuer of our own are generated"}}
	}
	m.Generated = generate
	if err := b.create(ctx, keyMappings{}, []*step{st}); err != nil {
		return cred, err
	}
	b.forget = []consumer{{m.Iss, m.ConsumerKey}}
	if !generate {
		return authn.Credentials{ID: m.ConsumerKey}, nil
	}
	client.ID = m.ConsumerKey
	cred, err = s.clients.StoreClient(ctx, b.tx, m.ID, client)
	if errors.Is(err, authn.ErrExists) {
		err = taken("#/consumer_key", "another client, or an account, has this name already")
	}
	return cred, err
}

// keyManagerOfSQL finds the key manager of name $3, or the resident one, in an application's tenant.
const keyManagerOfSQL = `
SELECT coalesce(k.name, ''), coalesce(k.resident, false)
FROM rescind.applications a
LEFT JOIN rescind.key_managers k ON k.tenant_id = a.tenant_id AND (k.name = $3 OR $3 = '' AND k.resident)
WHERE a.uuid = nullif($1, '')::uuid OR $1 = '' AND a.id = $2`

// findKeyManager finds m's key manager, and whether it is resident. What cannot be found is left
// to be refused with the rest.
func (b *batch) findKeyManager(ctx context.Context, m *catalog.KeyMapping) (resident bool, err error) {
	var name string
	switch err := b.tx.QueryRow(ctx, keyManagerOfSQL, m.Application.UUID, m.Application.ID, m.KeyManager).Scan(&name, &resident); {
	case errors.Is(err, pgx.ErrNoRows):
		set(&m.KeyManager, residentName)
		return false, nil
	case err != nil:
		return false, err
	case name == "" && m.KeyManager == "":
		return false, catalog.Invalid{{Pointer: "#/key_manager", Detail: "the tenant has no key manager of its own: name one"}}
	}
	set(&m.KeyManager, name)
	return resident, nil
}

// RotateKey changes what the client of a generated key, by its mapping's UUID or id, proves
// itself with, and with revoke ends the key's tokens so far. A secret is in the credentials, and
// can never be read again. ifTimestamp is the timestamp that it demands of the mapping; 0 is
// any. Errors are those of Apply; pointers into r are those of [authn.Authenticator.RotateClient].
func (s *Store) RotateKey(ctx context.Context, by Caller, mapping string, ifTimestamp int64, r authn.Rotation, revoke bool) (*catalog.KeyMapping, authn.Credentials, error) {
	found, err := s.Get(ctx, by, catalog.NounKeyMapping, mapping)
	if err != nil {
		return nil, authn.Credentials{}, err
	}
	asked := step{op: Update, noun: catalog.NounKeyMapping, uuid: found.Base().UUID, ifTimestamp: ifTimestamp}
	m := found.(*catalog.KeyMapping)
	var cred authn.Credentials
	_, err = s.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) error {
		b, st := s.newBatch(by, tx), asked
		if err := b.lock(ctx, wanted{domains: []string{found.Base().Tenant.Domain}}); err != nil {
			return err
		}
		// The key may have gone to another application since it was looked up.
		if err := b.load(ctx, keyMappings{}, []*step{&st}, `FOR NO KEY UPDATE OF e`); err != nil {
			return b.failed("read", err)
		}
		m = st.cur.(*catalog.KeyMapping)
		if !m.Generated {
			return &Conflict{Slug: "immutable", Detail: "the key was mapped, not generated: its secret is with its key manager"}
		}
		cred.ID = m.ConsumerKey
		var err error
		cred.Secret, err = s.clients.RotateClient(ctx, tx, m.ConsumerKey, r)
		if errors.Is(err, authn.ErrNotFound) {
			return notFound(catalog.NounKeyMapping, mapping)
		}
		if err != nil {
			return err
		}
		tx.Audit(ledger.AuditEntry{
			Tenant: m.Tenant, Action: "rotate_key", EntityID: m.UUID, Iss: m.Iss, Subject: m.ConsumerKey, Actor: by.Actor,
		})
		if !revoke {
			return nil
		}
		reason := "secret rotated"
		if r.JWKS != "" {
			reason = "keys rotated"
		}
		keys, err := b.keysOf(ctx, []int32{m.Application.ID})
		if err != nil {
			return b.failed("read keys", err)
		}
		for _, k := range keys[m.Application.ID] {
			if k.consumer == (consumer{m.Iss, m.ConsumerKey}) {
				b.revoke(k, m.Tenant, reason)
			}
		}
		return nil
	})
	s.clients.Forget(m.Iss, m.ConsumerKey)
	if failed, ok := errors.AsType[*Failed](err); ok {
		err = failed.Err // there is only one
	}
	if err != nil {
		return nil, authn.Credentials{}, err
	}
	return m, cred, nil
}
