// Package rest hides how every endpoint outside OAuth speaks HTTP: problem documents
// (RFC 9457), who may call, strict JSON, ETags and preconditions, pages, content
// codings, and requests that are repeated.
//
// # Decisions
//
// A body is refused for what encoding/json overlooks: unknown and repeated members,
// names in another case, text that is not Unicode. Whoever misspells "keep_tokens" must
// not learn of it from the tokens that are gone.
//
// A cursor belongs to one list with all its filters. Followed in another, it would skip
// rows in silence.
//
// An answer to a request with an Idempotency-Key is stored before it is sent, so whoever
// has seen it sees it again. It may have a secret, so it is sealed.
package rest

import (
	"net/http"
)

// Handler answers a request, or returns an error for [Write] before it has written.
type Handler func(w http.ResponseWriter, r *http.Request) error

// ServeHTTP implements [http.Handler].
func (h Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := h(w, r); err != nil {
		Write(w, r, err)
	}
}

// Exchange is what the outermost handler's ResponseWriter knows about the request. It is
// found through any number of Unwrap methods.
type Exchange interface {
	RequestID() string
	Traceparent() string
	RemoteAddr() string
}

// ExchangeOf finds it; it returns one with empty values where there is none.
func ExchangeOf(w http.ResponseWriter) Exchange {
	if x, ok := find[Exchange](w); ok {
		return x
	}
	return noExchange{}
}

type noExchange struct{}

func (noExchange) RequestID() string   { return "" }
func (noExchange) Traceparent() string { return "" }
func (noExchange) RemoteAddr() string  { return "" }

// find returns w, or what it wraps, as a T.
func find[T any](w http.ResponseWriter) (found T, ok bool) {
	for {
		if found, ok = w.(T); ok {
			return found, true
		}
		wrapper, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return found, false
		}
		w = wrapper.Unwrap()
	}
}
