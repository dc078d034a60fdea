// Package canary finds out how long a revocation takes to reach each gateway, by what the gateway does: a
// token is issued, accepted, revoked, and tried until it is refused.
package canary

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
)

// Token is one that was issued for the canary API alone. Compact is a secret.
type Token struct {
	Compact string
	Expires time.Time
}

// Issuer issues and revokes tokens of the canary application.
type Issuer interface {
	// Issue returns a token that lives for a few minutes.
	Issue(ctx context.Context) (Token, error)
	// Revoke returns when the revocation is committed.
	Revoke(ctx context.Context, t Token) (revocation.Position, error)
}

// Fleet is [fleet.Fleet].
type Fleet interface {
	Refresh(ctx context.Context) error
	Gateways() []fleet.Gateway
	RecordCanary(ctx context.Context, id string, r fleet.CanaryResult) error
}

// Lead waits until this process may run the canary, and returns a context that ends when it may no longer.
type Lead func(ctx context.Context) (leading context.Context, end func(), err error)

// Config tunes the canary.
type Config struct {
	// Every is the time from one round to the next. 10 s to 24 h.
	Every time.Duration
	// Limit is how long a gateway may take to refuse before that is alarming. 100 ms to 1 min.
	Limit time.Duration
	// Client sends the requests. It follows no redirect. Default: one with timeouts.
	Client *http.Client
}

// Canary runs rounds. Make one with [New].
type Canary struct{}

// New returns a canary.
func New(cfg Config, issuer Issuer, f Fleet, lead Lead, reg prometheus.Registerer, log *slog.Logger) (*Canary, error) {
	panic("skeleton")
}

// Run runs rounds until ctx ends.
func (c *Canary) Run(ctx context.Context) error { panic("skeleton") }

// CheckURL reports what is wrong with where a canary is called: https, or http on loopback, no user, no
// fragment.
func CheckURL(url string) error { panic("skeleton") }

// Alarms are the gateways whose last result is alarming, sorted, as the fleet knows them.
func Alarms(gateways []fleet.Gateway) []string { panic("skeleton") }
