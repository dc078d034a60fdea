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
	maxLarge = 2
	// busyRetry is what others are asked to wait.
	busyRetry = 2 * time.Second
	// keysRetry is what callers are asked to wait when an issuer's key set is away.
	keysRetry = 5 * time.Second
	// timeout bounds the work on a request that was read, and the reading of a list.
	timeout = 20 * time.Second
)

var errTimeout = fmt.Errorf("the request took too long: %w", context.DeadlineExceeded)

// admit gives requests that are or may be large one of few places.
func (a *API) admit(next http.Handler) http.Handler {
	return rest.Handler(func(w http.ResponseWriter, r *http.Request) error {
		if 0 <= r.ContentLength && r.ContentLength <= rest.MaxBody {
			next.ServeHTTP(w, r)
			return nil
		}
		select {
		case a.large <- struct{}{}:
			defer func() { <-a.large }()
			next.ServeHTTP(w, rest.LimitBody(r, maxBody))
			return nil
		default:
			w.Header().Set("Connection", "close") // the body is not read
			return &rest.Problem{
				Status: http.StatusServiceUnavailable, RetryAfter: busyRetry,
				Detail: "Other large requests are being worked on. Sending the same request again is safe.",
			}
		}
	})
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
	if r.URL.RawQuery != "" {
		return rest.InvalidParameter("There are no parameters here: dry_run is a member of the body.")
	}
	var body orders
	if err := rest.Decode(w, r, &body); err != nil {
		return err
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
	if body.Items == nil && !outcomes[0].Expired {
		w.Header().Set("Location", path+"/"+outcomes[0].ID)
	}
	return answer(w, http.StatusAccepted, body.Items != nil, outcomes, showOutcome)
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
