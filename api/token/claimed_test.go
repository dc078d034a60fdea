package token

import (
	"encoding/base64"
	"errors"
	"strings"
	"testing"
)

// What a token and the same claims without one say of themselves is the same, and is no more than what Verify would
// find malformed or of wrong types.
func TestClaimed(t *testing.T) {
	t.Parallel()
	part := base64.RawURLEncoding.EncodeToString
	for _, tt := range []struct {
		claims string
		err    error
		iss    string
	}{
		{`{"iss":"https://km.example.com","sub":"alice","jti":"1","exp":7,"iat":3,"aud":["a"],"azp":"c"}`, nil, "https://km.example.com"},
		{`{}`, nil, ""},
		{`{"iss":"a","sub":7}`, ErrClaims, "a"},
		{`{"iss":"a","exp":"soon"}`, ErrClaims, "a"},
		{`{"iss":7}`, ErrMalformed, ""},
		{`{"iss":"a","iss":"b"}`, ErrMalformed, ""},
		{`[]`, ErrMalformed, ""},
		{``, ErrMalformed, ""},
		{`{"iss":"` + strings.Repeat("a", maxTokenBytes) + `"}`, ErrMalformed, ""},
	} {
		compact := part([]byte(`{"alg":"ES256","typ":"at+jwt"}`)) + "." + part([]byte(tt.claims)) + "." + part([]byte("signature"))
		a, errA := Claimed(compact)
		b, errB := OfClaims([]byte(tt.claims))
		if tt.err == nil && (errA != nil || errB != nil) || !errors.Is(errA, tt.err) || !errors.Is(errB, tt.err) {
			t.Errorf("%.40s: %v and %v, want %v", tt.claims, errA, errB, tt.err)
			continue
		}
		if errors.Is(tt.err, ErrMalformed) {
			if a != nil || b != nil {
				t.Errorf("%.40s: there is a token all the same", tt.claims)
			}
			continue
		}
		if a.Issuer != tt.iss || b.Issuer != tt.iss || a.Subject != b.Subject || a.ID != b.ID || a.ClientID != b.ClientID || a.Expiry != b.Expiry ||
			a.IssuedAt != b.IssuedAt || len(a.Audience) != len(b.Audience) || a.Type != b.Type || b.Alg != "" || b.Signature != "" {
			t.Errorf("%s: %+v and %+v", tt.claims, a, b)
		}
	}
}
