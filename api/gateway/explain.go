package gateway

import (
	"context"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/token"
)

// verifier tells genuine tokens from others. [token.Verifier] is one.
type verifier interface {
	Verify(ctx context.Context, compact string) (*token.Token, error)
	Issuer(iss string) (token.Issuer, bool)
}

// ExplainToken says what the checks of a token itself find: its form, issuer, signature, type, times and
// audience, in the order in which a gateway makes them. T is nil if one failed. With acceptance.Audiences
// empty the audience is not looked at. It returns [token.ErrKeysUnavailable] as a failed check, not as an error.
func ExplainToken(ctx context.Context, v verifier, compact string, acceptance token.Acceptance, now time.Time) (t *token.Token, checks []replica.Check) {
	panic("skeleton")
}

// Explain is [Gateway.Decide] with its reasons: for operators, not for those who call APIs.
func (g *Gateway) Explain(ctx context.Context, r Request) replica.Explanation { panic("skeleton") }
