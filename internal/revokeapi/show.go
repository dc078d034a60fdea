package revokeapi

import (
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/revoke"
)

// target is what is revoked, its identifier under the name that an order has for it, but for
// the digest, which stands for a token.
type target struct {
	Kind     revocation.Kind   `json:"kind"`
	Iss      string            `json:"iss,omitempty"`
	JTI      string            `json:"jti,omitempty"`
	Digest   string            `json:"digest,omitempty"`
	ClientID string            `json:"client_id,omitempty"`
	Sub      string            `json:"sub,omitempty"`
	SID      string            `json:"sid,omitempty"`
	KID      string            `json:"kid,omitempty"`
	Tenant   revocation.Tenant `json:"tenant"` // the identifier of kind tenant too
}

func showTarget(t revocation.Target, tenant revocation.Tenant) target {
	shown := target{Kind: t.Kind, Iss: t.Iss, Tenant: tenant}
	switch {
	case t.Digest:
		shown.Digest = t.ID
	case t.Kind == revocation.KindToken:
		shown.JTI = t.ID
	case t.Kind == revocation.KindClient:
		shown.ClientID = t.ID
	case t.Kind == revocation.KindSubject:
		shown.Sub = t.ID
	case t.Kind == revocation.KindSession:
		shown.SID = t.ID
	case t.Kind == revocation.KindKey:
		shown.KID = t.ID
	}
	return shown
}

// outcome is a [revoke.Outcome].
type outcome struct {
	ID string `json:"id,omitempty"`
	target
	Exp      int64          `json:"exp"`
	NotAfter int64          `json:"not_after,omitempty"`
	Seq      revocation.Seq `json:"seq,omitempty"`
	Added    bool           `json:"added"`
	Expired  bool           `json:"expired"`
}

func showOutcome(o revoke.Outcome) outcome {
	return outcome{o.ID, showTarget(o.Target, o.Tenant), o.Exp, o.NotAfter, o.Seq, o.Added, o.Expired}
}

// effect is a [revoke.Effect].
type effect struct {
	target
	Exp              int64         `json:"exp"`
	NotAfter         int64         `json:"not_after,omitempty"`
	Expired          bool          `json:"expired"`
	Revoked          bool          `json:"revoked"`
	ApplicationCount int           `json:"application_count"`
	Applications     []application `json:"applications"`
	ClientCount      int           `json:"client_count"`
	Clients          []string      `json:"clients"`
	LiveTokens       *liveTokens   `json:"live_tokens,omitempty"`
}

type application struct {
	ID   int32  `json:"id"`
	UUID string `json:"uuid"`
	Name string `json:"name"`
}

// liveTokens is there where tokens are remembered.
type liveTokens struct {
	Count      int64  `json:"count"`
	KnownSince string `json:"known_since"`
}

func showEffect(e revoke.Effect) effect {
	shown := effect{
		target: showTarget(e.Target, e.Tenant), Exp: e.Exp, NotAfter: e.NotAfter, Expired: e.Expired, Revoked: e.Revoked,
		ApplicationCount: e.ApplicationCount, Applications: make([]application, len(e.Applications)),
		ClientCount: e.ClientCount, Clients: append([]string{}, e.Clients...),
	}
	for i, app := range e.Applications {
		shown.Applications[i] = showApplication(app)
	}
	if !e.Living.Since.IsZero() {
		shown.LiveTokens = &liveTokens{e.Living.Tokens, showTime(e.Living.Since)}
	}
	return shown
}

func showApplication(app *catalog.Application) application {
	return application{app.ID, app.UUID, app.Name}
}

// listed is a [ledger.Listed].
type listed struct {
	ID string `json:"id"`
	target
	Exp      int64 `json:"exp"`
	NotAfter int64 `json:"not_after,omitempty"`
	// IssuedTo is whose token it was, where that is known.
	IssuedTo  string         `json:"issued_to,omitempty"`
	Reason    string         `json:"reason,omitempty"`
	RevokedAt string         `json:"revoked_at"`
	Seq       revocation.Seq `json:"seq,omitempty"`
}

func showListed(l ledger.Listed) listed {
	return listed{
		ID: l.ID, target: showTarget(l.Target, l.Tenant), Exp: l.Exp, NotAfter: l.NotAfter,
		IssuedTo: l.ClientID, Reason: l.Reason, RevokedAt: showTime(l.At), Seq: l.Seq,
	}
}

// showTime is RFC 3339 with milliseconds.
func showTime(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }
