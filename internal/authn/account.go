package authn

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/crypto/argon2"

	"github.com/rescindhq/rescind/api/revocation"
)

// Account is a person or a gateway that has proved who it is. Its slice is shared: it
// is not to be changed.
type Account struct {
	Username string
	Tenant   revocation.Tenant
	// Role is "admin", "tenant_admin", "gateway", "notifier" or "auditor".
	Role string
	// ExtraTenants are the domains that it sees besides its own; "*" is all.
	ExtraTenants []string
	// RevokedJWTObject lists revoked tokens as WSO2's gateways since 4.3 want them, an
	// object, rather than as those before do, an array.
	RevokedJWTObject bool
}

const (
	allTenants = "*"
	roleAdmin  = "admin"
)

// SeesAll reports whether the account sees every tenant, those to come too.
func (a Account) SeesAll() bool {
	return a.Role == roleAdmin || slices.Contains(a.ExtraTenants, allTenants)
}

// Sees reports whether the account sees the tenant of this domain.
func (a Account) Sees(domain string) bool {
	return domain == a.Tenant.Domain || slices.Contains(a.ExtraTenants, domain) || a.SeesAll()
}

type accountRow struct {
	account Account
	hash    string // in PHC string form; empty when there is no such account
}

// Account finds out which account sent r, by HTTP Basic as in RFC 7617. Its error
// is an [OAuthError] with status 401, 429 or 503, of which callers outside OAuth
// show status and RetryAfter in their own form; that of r's context; or another
// for a stored hash that cannot be read.
func (a *Authenticator) Account(r *http.Request) (Account, error) {
	account, err := a.identifyAccount(r)
	a.count(err)
	return account, err
}

var errAccount = &OAuthError{Status: http.StatusUnauthorized, Code: InvalidClient, Description: "The user name or the password is wrong."}

func (a *Authenticator) identifyAccount(r *http.Request) (Account, error) {
	ctx := r.Context()
	who := caller{account: true, from: bucket(a.Remote(r))}
	header := r.Header["Authorization"]
	var user, password string
	readable := false
	if len(header) == 1 {
		user, password, readable = splitBasic(header[0])
		readable = readable && len(user) <= maxIDBytes && isText(user)
	}
	if readable {
		who.id = user
	}
	if a.throttle.throttled(who) {
		return Account{}, errThrottled
	}
	switch {
	case len(header) == 0:
		return Account{}, errAccount // no guess, so not counted
	case !readable:
		return Account{}, a.refuseAccount(who)
	}
	row, _, err := a.accounts.get(ctx, user)
	if err != nil {
		return Account{}, lookupError(ctx, err)
	}
	ok, err := a.verify(ctx, user, password, row.hash, who)
	if err != nil {
		return Account{}, err
	}
	if !ok {
		if err := a.refuseAccount(who); err != errAccount {
			return Account{}, err
		}
		hash := row.hash
		if row, err = a.accounts.recheck(ctx, user); err != nil {
			return Account{}, lookupError(ctx, err)
		}
		if row.hash == hash {
			return Account{}, errAccount
		}
		if ok, err = a.verify(ctx, user, password, row.hash, who); err != nil {
			return Account{}, err
		}
		if !ok {
			return Account{}, errAccount
		}
	}
	a.throttle.succeeded(who)
	return row.account, nil
}

func (a *Authenticator) refuseAccount(who caller) *OAuthError {
	if a.throttle.failed(who) {
		return errThrottled
	}
	return errAccount
}

// verify waits its turn to hash, so others may have guessed meanwhile: the
// throttle is asked again.
func (a *Authenticator) verify(ctx context.Context, user, password, hash string, who caller) (bool, error) {
	seal := a.verified.seal(user, password, hash)
	if a.verified.has(seal) {
		return true, nil
	}
	wait, cancel := context.WithTimeout(ctx, a.cfg.LookupTimeout)
	defer cancel()
	select {
	case a.verified.slots <- struct{}{}:
		defer func() { <-a.verified.slots }()
	case <-wait.Done():
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		return false, Unavailable(time.Second, errors.New("too many passwords are being checked"))
	}
	if a.verified.has(seal) {
		return true, nil // a fleet of one account starts at once: one of it was first
	}
	if a.throttle.throttled(who) {
		return false, errThrottled
	}
	p, err := parsePHC(hash)
	if hash == "" {
		p, err = noPassword, nil // takes as long as a real one
	}
	if err != nil {
		return false, fmt.Errorf("check password of account %q: %w", user, err)
	}
	equal := subtle.ConstantTimeCompare(p.hash(password), p.sum) == 1
	if !equal || hash == "" {
		return false, nil
	}
	a.verified.add(seal)
	return true, nil
}

const readAccountsSQL = `
SELECT a.username, a.role, a.password_hash, t.id, t.domain, a.extra_tenants, a.revoked_jwt_form
FROM rescind.accounts a
JOIN rescind.tenants t ON t.id = a.tenant_id
WHERE a.username = ANY ($1)`

func (a *Authenticator) readAccounts(ctx context.Context, usernames []string) (map[string]accountRow, error) {
	all := make(map[string]accountRow, len(usernames))
	found, err := a.pool.Query(ctx, readAccountsSQL, usernames)
	if err != nil {
		return nil, fmt.Errorf("read accounts: %w", err)
	}
	for found.Next() {
		var (
			row  accountRow
			acc  = &row.account
			form string
		)
		err := found.Scan(&acc.Username, &acc.Role, &row.hash, &acc.Tenant.ID, &acc.Tenant.Domain, &acc.ExtraTenants, &form)
		if err != nil {
			break // found.Err has it
		}
		acc.RevokedJWTObject = form == formObject
		all[acc.Username] = row
	}
	if err := found.Err(); err != nil {
		return nil, fmt.Errorf("read accounts: %w", err)
	}
	return all, nil
}

const (
	verifiedFor  = 5 * time.Minute
	verifiedSize = 1000
)

type sealed [sha256.Size]byte

// passwords remembers which were right a short time ago, so that a caller with
// many requests costs one hash. A password is remembered as a MAC under a key
// that this process alone has, together with the hash that it matched: a changed
// password is forgotten by that.
type passwords struct {
	key   [32]byte
	slots chan struct{}

	mu    sync.Mutex
	right *simplelru.LRU[sealed, time.Time] // until when
}

func newPasswords(maxHashes int) *passwords {
	right, err := simplelru.NewLRU[sealed, time.Time](verifiedSize, nil)
	if err != nil {
		panic(err) // the size is a constant
	}
	p := &passwords{slots: make(chan struct{}, maxHashes), right: right}
	rand.Read(p.key[:]) // never fails
	return p
}

func (p *passwords) seal(parts ...string) sealed {
	m := hmac.New(sha256.New, p.key[:])
	for _, s := range parts {
		_ = binary.Write(m, binary.BigEndian, uint64(len(s)))
		_, _ = io.WriteString(m, s)
	}
	return sealed(m.Sum(nil))
}

func (p *passwords) has(s sealed) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	until, ok := p.right.Get(s)
	return ok && time.Now().Before(until)
}

func (p *passwords) add(s sealed) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.right.Add(s, time.Now().Add(verifiedFor))
}

// phc is a password's hash by Argon2id.
type phc struct {
	memory, passes uint32 // memory in KiB
	threads        uint8
	salt, sum      []byte
}

// The parameters for new hashes: OWASP's first choice for Argon2id with little memory.
const (
	hashMemory  = 19 << 10
	hashPasses  = 2
	hashThreads = 1
)

// noPassword matches no password; to find that out takes as long as for any.
var noPassword = phc{hashMemory, hashPasses, hashThreads, make([]byte, 16), make([]byte, 32)}

func newPHC(password string) phc {
	p := phc{hashMemory, hashPasses, hashThreads, make([]byte, 16), make([]byte, 32)}
	rand.Read(p.salt)
	p.sum = p.hash(password)
	return p
}

func (p phc) hash(password string) []byte {
	return argon2.IDKey([]byte(password), p.salt, p.passes, p.memory, p.threads, uint32(len(p.sum)))
}

var phcBase64 = base64.RawStdEncoding.Strict()

func (p phc) String() string {
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, p.memory, p.passes, p.threads,
		phcBase64.EncodeToString(p.salt), phcBase64.EncodeToString(p.sum))
}

// parsePHC refuses parameters that would make one login a burden to the server.
func parsePHC(s string) (phc, error) {
	var (
		p       phc
		version int
	)
	fields := strings.Split(s, "$")
	if len(fields) != 6 || fields[0] != "" || fields[1] != "argon2id" {
		return p, errors.New("the stored hash is not of Argon2id in PHC string form")
	}
	_, err := fmt.Sscanf(fields[2]+" "+fields[3], "v=%d m=%d,t=%d,p=%d", &version, &p.memory, &p.passes, &p.threads)
	if err == nil {
		p.salt, err = phcBase64.DecodeString(fields[4])
	}
	if err == nil {
		p.sum, err = phcBase64.DecodeString(fields[5])
	}
	switch {
	case err != nil:
		return p, errors.New("the stored hash is not in PHC string form")
	case version != argon2.Version:
		return p, fmt.Errorf("the stored hash is of version %d of Argon2, must be %d", version, argon2.Version)
	case p.memory > 256<<10 || p.passes < 1 || p.passes > 16 || p.threads < 1 || p.threads > 16,
		len(p.salt) < 8 || len(p.sum) < 16 || len(p.sum) > 64:
		return p, errors.New("the stored hash has parameters outside the bounds")
	}
	return p, nil
}
