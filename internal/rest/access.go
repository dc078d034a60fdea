package rest

import (
	"context"
	"errors"
	"net/http"
	"slices"

	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// Accounts finds out which account sent a request. [authn.Authenticator] is one.
type Accounts interface {
	Account(r *http.Request) (authn.Account, error)
}

// Roles of accounts.
const (
	Admin       = "admin"        // everything, in every tenant
	TenantAdmin = "tenant_admin" // everything in its tenant but the tenant itself and whose tokens are believed
	Gateway     = "gateway"      // reads snapshots and events
	Notifier    = "notifier"     // may only notify
	Auditor     = "auditor"      // reads everything that is not secret
)

// challenge is RFC 7617's.
const challenge = `Basic realm="rescind", charset="UTF-8"`

type accountKey struct{}

// Require returns middleware that lets only accounts with one of roles through: others
// are 401 with a challenge, or 403. fail writes the refusal; nil is [Write].
func Require(accounts Accounts, fail func(http.ResponseWriter, *http.Request, error), roles ...string) func(http.Handler) http.Handler {
	if fail == nil {
		fail = Write
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			account, err := accounts.Account(r)
			if err != nil {
				if e, ok := errors.AsType[*authn.OAuthError](err); ok && e.Status == http.StatusUnauthorized {
					w.Header().Set("WWW-Authenticate", challenge)
				}
				fail(w, r, err)
				return
			}
			if rec, ok := find[authn.Recorder](w); ok {
				rec.RecordClient(account.Username)
			}
			if !slices.Contains(roles, account.Role) {
				fail(w, r, Status(http.StatusForbidden, "The account's role does not permit this."))
				return
			}
			next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), accountKey{}, account)))
		})
	}
}

// AccountOf is the account that [Require] let through. It panics where there is none.
func AccountOf(ctx context.Context) authn.Account { return ctx.Value(accountKey{}).(authn.Account) }

// ActorOf is who sent r, for the audit. It is filled from what the server knows about
// the request: see [Exchange].
func ActorOf(w http.ResponseWriter, r *http.Request) ledger.Actor {
	x := ExchangeOf(w)
	return ledger.Actor{
		Name:      "account:" + AccountOf(r.Context()).Username,
		RequestID: x.RequestID(),
		Remote:    x.RemoteAddr(),
	}
}
