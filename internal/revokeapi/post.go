package revokeapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/revoke"
)

const (
	// maxBody bounds the body of orders, in bytes.
	maxBody = 16 << 20
	// maxLarge is how many requests with more than [rest.MaxBody] are read and worked on at a
	// time: each takes a hundred MiB at worst.
	maxLarge = 3
	// maxMedium is how many of the others with more than smallBody bytes are: their answers may
	// have several MiB.
	maxMedium = 8
	smallBody = 64 << 10
	// busyRetry is what others are asked to wait.
	busyRetry = 2 * time.Second
	// keysRetry is what callers are asked to wait when an issuer's key set is away.
	keysRetry = 5 * time.Second
	// timeout bounds the work on a request that was read, and the reading of a list.
	timeout = 20 * time.Second
	// bodyTime bounds the reading of a request that has a place, and sendTime what is left to do
	// after the work: keeping the answer, and sending it.
	bodyTime = 30 * time.Second
	sendTime = 20 * time.Second
)

var errTimeout = fmt.Errorf("the request took too long: %w", context.DeadlineExceeded)

// admit gives requests that are not small one of few places, until they are answered. One that
// repeats another is of the same size.
func (a *API) admit(next http.Handler) http.Handler {
	return rest.Handler(func(w http.ResponseWriter, r *http.Request) error {
		p, s := a.medium, &seat{leave: func() {}, waiting: a.waitingMedium}
		switch {
		case 0 <= r.ContentLength && r.ContentLength <= smallBody:
			s.waiting = a.waitingSmall
			defer func() { s.leave() }() // the one that it has by then
			next.ServeHTTP(w, s.with(r))
			return nil
		case r.ContentLength < 0, r.ContentLength > rest.MaxBody:
			p, s.waiting, r = a.large, a.waitingLarge, rest.LimitBody(r, maxBody)
		}
		leave, ok := p.enter(r)
		if !ok {
			w.Header().Set("Connection", "close") // the body is not read
			return &rest.Problem{
				Status: http.StatusServiceUnavailable, RetryAfter: busyRetry,
				Detail: "Another large request of the same tenant or account is being worked on, or many of others are. " +
					"Sending the same request again is safe.",
			}
		}
		s.leave = leave
		defer func() { s.leave() }()
		extend(w, bodyTime, bodyTime+timeout+sendTime)
		next.ServeHTTP(w, s.with(r))
		return nil
	})
}

// extend bounds from now on the time in which a request is read, and that in which it is
// answered: the server's are for short ones, and begin with the header.
func extend(w http.ResponseWriter, read, write time.Duration) {
	rc, now := http.NewResponseController(w), time.Now()
	_ = rc.SetReadDeadline(now.Add(read)) // a recorder in a test has none
	_ = rc.SetWriteDeadline(now.Add(write))
}

// order is what a caller says of tokens that it wants ended.
type order struct {
	Kind     revocation.Kind `json:"kind"`
	Iss      string          `json:"iss"`
	JTI      string          `json:"jti"`
	Token    string          `json:"token"`
	ClientID string          `json:"client_id"`
	Sub      string          `json:"sub"`
	SID      string          `json:"sid"`
	Tenant   string          `json:"tenant"`
	KID      string          `json:"kid"`
	Reason   string          `json:"reason"`
}

// orders is a body: one order, or many.
type orders struct {
	order
	Items  []order `json:"items"`
	DryRun bool    `json:"dry_run"`
}

// list are the orders of the body.
func (o *orders) list() (list []revoke.Order, err error) {
	if o.Items == nil {
		return []revoke.Order{revoke.Order(o.order)}, nil
	}
	if o.order != (order{}) {
		return nil, catalog.Invalid{{Pointer: "#/items", Detail: "is there beside the members of one order: leave out either"}}
	}
	if n := len(o.Items); n < 1 || n > ledger.MaxBulk {
		return nil, catalog.Invalid{{Pointer: "#/items", Detail: fmt.Sprintf("must have 1 to %d items", ledger.MaxBulk)}}
	}
	list = make([]revoke.Order, len(o.Items))
	for i, item := range o.Items {
		list[i] = revoke.Order(item)
	}
	return list, nil
}

func (a *API) post(w http.ResponseWriter, r *http.Request) error {
	within, err := waitOf(r)
	if err != nil {
		return err
	}
	var body orders
	if err := rest.Decode(w, r, &body); err != nil {
		return err
	}
	// Past the time for reading the server takes the caller for gone.
	extend(w, timeout+within+sendTime, timeout+within+sendTime)
	if body.DryRun {
		rest.DoNotKeep(w)
	}
	if body.DryRun && within > 0 {
		return badParameter(paramWait, "cannot be there with dry_run: nothing is done that gateways could apply")
	}
	list, err := body.list()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(r.Context(), timeout, errTimeout)
	defer cancel()
	by := revoke.Caller{Actor: rest.ActorOf(w, r), Traceparent: rest.ExchangeOf(w).Traceparent(), Tenant: tenantsOf(r).home}
	if body.DryRun {
		effects, err := a.deps.Revoker.Preview(ctx, by, list)
		if err != nil {
			return body.problem(err)
		}
		return answer(w, http.StatusOK, body.Items != nil, effects, showEffect)
	}
	outcomes, err := a.deps.Revoker.Revoke(ctx, by, list)
	if err != nil {
		return body.problem(err)
	}
	cancel() // what follows takes as long as the caller wishes
	many := body.Items != nil
	if !many && !outcomes[0].Expired {
		w.Header().Set("Location", path+"/"+outcomes[0].ID)
	}
	if within == 0 {
		return answer(w, http.StatusAccepted, many, outcomes, showOutcome)
	}
	r.Body = http.NoBody // nothing large is held while it waits but the outcomes
	return answerConverged(w, many, outcomes, a.converge(w, r, outcomes, within))
}

// problem is what a caller sees of err.
func (o *orders) problem(err error) error {
	if invalid, ok := errors.AsType[catalog.Invalid](err); ok {
		for i, e := range invalid {
			if o.Items == nil {
				invalid[i].Pointer = "#" + strings.TrimPrefix(e.Pointer, "#/0")
			} else {
				invalid[i].Pointer = "#/items" + strings.TrimPrefix(e.Pointer, "#")
			}
		}
		return invalid
	}
	if errors.Is(err, token.ErrKeysUnavailable) {
		return &rest.Problem{
			Status: http.StatusServiceUnavailable, RetryAfter: keysRetry, Cause: err,
			Detail: "The keys of a token's issuer cannot be had now, so nothing was done. Sending the same request again is safe.",
		}
	}
	return err
}

// answer is results as shown by show: the only one, or in items.
func answer[T, S any](w http.ResponseWriter, status int, many bool, results []T, show func(T) S) error {
	if !many {
		return rest.JSON(w, status, show(results[0]))
	}
	items := make([]S, len(results))
	for i, result := range results {
		items[i] = show(result)
	}
	return rest.JSON(w, status, struct {
		Items []S `json:"items"`
	}{items})
}
