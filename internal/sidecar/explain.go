package sidecar

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
)

// explainer says why requests are let through or refused. It is a [gateway.Gateway].
type explainer interface {
	Explain(ctx context.Context, r gateway.Request) replica.Explanation
	ExplainClaims(ctx context.Context, claims json.RawMessage, r gateway.Request) replica.Explanation
}

const (
	maxQuestionBytes = 64 << 10
	// maxExplaining are explained at a time, so that they take nothing from requests; past it the answer is 503.
	maxExplaining = 2
	// explainTime bounds what may be waited for: the keys of an issuer.
	explainTime = 10 * time.Second
)

// question is the body of POST /explain: a token, or the claims of one that is not at hand, or neither for a
// request without a token; and what it is presented for: path and method of a request, or an API as a
// whole, by its context and version or by a path without a method.
type question struct {
	Token  string          `json:"token"`
	Claims json.RawMessage `json:"claims"`
	Method string          `json:"method"`
	Path   string          `json:"path"`
	API    *struct {
		Context string `json:"context"`
		Version string `json:"version"`
	} `json:"api"`
}

// readQuestion needs a body of JSON. Its error repeats nothing of the question, which has a token.
func readQuestion(r io.Reader) (q question, err error) {
	body, err := io.ReadAll(r)
	if err != nil {
		return q, err
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if d.Decode(&q) != nil {
		return question{}, errors.New(`the body must be a JSON object with the members token or claims, and path and method, or api`)
	}
	if _, err := d.Token(); err != io.EOF {
		return question{}, errors.New("there is something after the JSON object: remove it")
	}
	q.Token = strings.TrimSpace(q.Token)
	if scheme, rest, ok := strings.Cut(q.Token, " "); ok && strings.EqualFold(scheme, "Bearer") {
		q.Token = strings.TrimSpace(rest) // as it was copied from a header field
	}
	if string(q.Claims) == "null" {
		q.Claims = nil
	}
	switch {
	case q.Token != "" && q.Claims != nil:
		return question{}, errors.New("token and claims are both there: leave one of them out")
	case q.API != nil && (q.Path != "" || q.Method != ""):
		return question{}, errors.New("api is there, and path or method too: api is for an API as a whole, so leave it or them out")
	case q.API != nil && (q.API.Context == "" || q.API.Version == ""):
		return question{}, errors.New("api must have context and version")
	case q.API == nil && q.Path == "":
		return question{}, errors.New("path is missing, must be that of the request, such as /pizza/1.0.0/menu; or api must be there")
	}
	return q, nil
}

// explained is the answer.
type explained struct {
	Verdict string `json:"verdict"` // accepted or refused
	Summary string `json:"summary"`
	// Code, HTTPStatus, Message and Reason are what the caller gets, and what logs and metrics say. They
	// are zero if the request is accepted.
	Code       int             `json:"code,omitempty"`
	HTTPStatus int             `json:"http_status,omitempty"`
	Message    string          `json:"message,omitempty"`
	Reason     string          `json:"reason,omitempty"`
	Checks     []replica.Check `json:"checks"`
	Next       string          `json:"next,omitempty"`
}

// explain answers q.
func (q question) explain(ctx context.Context, e explainer) explained {
	r := gateway.Request{Method: q.Method, Target: q.Path}
	if q.API != nil {
		r.Target = q.API.Context
	}
	if q.Token != "" {
		r.Authorization = []string{"Bearer " + q.Token}
	}
	var x replica.Explanation
	if q.Claims != nil {
		x = e.ExplainClaims(ctx, q.Claims, r)
	} else {
		x = e.Explain(ctx, r)
	}
	a := x.Authorization
	answer := explained{
		Verdict: "accepted", Summary: "The gateway lets the request through.",
		Code: int(a.Code), Message: a.Code.Message(), Reason: a.Reason, Checks: x.Checks, Next: x.Next,
	}
	if !a.Authorized {
		answer.Verdict, answer.HTTPStatus = "refused", x.HTTPStatus
		if i := slices.IndexFunc(x.Checks, func(c replica.Check) bool { return c.Result == replica.Failed }); i >= 0 {
			answer.Summary = "Refused by the check " + x.Checks[i].Name + ": " + x.Checks[i].Detail
		}
	}
	if q.API != nil && a.API != nil && (a.API.Context != q.API.Context || a.API.Version != q.API.Version) {
		answer.Summary += fmt.Sprintf(" But the API that is there is %s with version %s, not the one that was asked about.", a.API.Context, a.API.Version)
	}
	return answer
}

// text is the answer for people.
func (a explained) text() string {
	var b strings.Builder
	b.WriteString(strings.ToUpper(a.Verdict))
	if a.Code != 0 {
		fmt.Fprintf(&b, "  %d  %d %s  (%s)", a.HTTPStatus, a.Code, a.Message, a.Reason)
	}
	b.WriteString("\n\n" + a.Summary + "\n\n")
	for _, c := range a.Checks {
		mark := map[replica.CheckResult]string{replica.Passed: "ok", replica.Failed: "FAILED"}[c.Result]
		line := fmt.Sprintf("  %-6s  %-19s  %s", cmp.Or(mark, "-"), c.Name, c.Detail)
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	if a.Next != "" {
		b.WriteString("\nWhat to do: " + a.Next + "\n")
	}
	// Names come from issuers and publishers: none of them is to move a terminal's cursor.
	return strings.Map(func(r rune) rune {
		if r == '\n' || unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, b.String())
}

// explainHandler serves POST /explain: a [question] as application/json of up to 64 KiB, answered as JSON ([explained]), or
// as readable text where Accept asks for text/plain. It is for operators: it names applications and
// subscriptions. It never repeats a token, logs none, and asks no issuer.
func explainHandler(e explainer) http.Handler {
	slots := make(chan struct{}, maxExplaining)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if r.Method != http.MethodPost {
			w.Header().Set("Allow", http.MethodPost)
			http.Error(w, "send the question with POST: tokens do not belong in URLs", http.StatusMethodNotAllowed)
			return
		}
		// No page in a browser can send it across origins without being asked first.
		if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
			http.Error(w, "Content-Type must be application/json", http.StatusUnsupportedMediaType)
			return
		}
		q, err := readQuestion(http.MaxBytesReader(w, r.Body, maxQuestionBytes))
		if _, large := errors.AsType[*http.MaxBytesError](err); large {
			http.Error(w, fmt.Sprintf("the body is larger than %d bytes", maxQuestionBytes), http.StatusRequestEntityTooLarge)
			return
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			w.Header().Set("Retry-After", "1")
			http.Error(w, "others are being explained: try again", http.StatusServiceUnavailable)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), explainTime)
		defer cancel()
		answer := q.explain(ctx, e)
		if wantsText(r.Header.Values("Accept")) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			_, _ = io.WriteString(w, answer.text()) // whoever asked has gone away
			return
		}
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(answer) // as above
	})
}

// wantsText reports whether of the two forms text comes first in Accept.
func wantsText(accept []string) bool {
	for _, part := range strings.Split(strings.Join(accept, ","), ",") {
		switch kind, _, _ := mime.ParseMediaType(strings.TrimSpace(part)); kind {
		case "text/plain":
			return true
		case "application/json":
			return false
		}
	}
	return false
}
