package replica

import (
	"github.com/rescindhq/rescind/api/token"
)

// Check is one of the checks of a request, in an explanation.
type Check struct {
	// Name is what is looked at, one of the reasons of a refusal in words of one form: "signature",
	// "revoked", "subscription", see the list in api/explain.md.
	Name string `json:"name"`
	// Result is what came of it.
	Result CheckResult `json:"result"`
	// Detail is a sentence for people: what was looked at, and what was found. No token, no secret.
	Detail string `json:"detail"`
	// Facts are the same for programs. Never nil in JSON.
	Facts map[string]any `json:"facts,omitempty"`
}

// CheckResult is what came of a [Check].
type CheckResult string

const (
	Passed     CheckResult = "passed"
	Failed     CheckResult = "failed"
	NotReached CheckResult = "not_reached" // an earlier one failed
	NotLooked  CheckResult = "not_looked"  // cannot be looked at here, or the question does not say enough
)

// Explanation says why a request is let through or refused: what [Replica.Authorize] says, and the
// checks that it made, in order.
type Explanation struct {
	Authorization Authorization
	Checks        []Check
	// Next is what to do about a refusal, a sentence for people; empty if there is none.
	Next string
}

// Explainer is what an explanation goes by besides a state. The zero value is a gateway of all tenants.
type Explainer struct {
	Claims       ClaimsMode
	Tenant       string   // as in [Config]
	Environments []string // as in [Config]
	// AnyOperation: Request has no Method, and what is asked of an operation is not looked at.
	AnyOperation bool
}

// Explain says what a gateway whose state this is makes of a request with a verified token, at now (Unix
// seconds), however old the state is.
func (e Explainer) Explain(s *State, t *token.Token, req Request, now int64) Explanation {
	panic("skeleton")
}

// Explain is [Replica.Authorize] with its reasons.
func (r *Replica) Explain(t *token.Token, req Request) Explanation { panic("skeleton") }
