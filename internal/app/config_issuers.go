package app

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// TrustedIssuer is an issuer, other than ourselves, whose tokens may be revoked here.
type TrustedIssuer struct {
	// Iss is compared with the claim byte for byte.
	Iss string
	// Name is the key manager's, unique in its tenant.
	Name string
	// Tenant is the domain of the one tenant that the issuer belongs to.
	Tenant string
	// Exactly one of JWKSURL and JWKSFile is set.
	JWKSURL, JWKSFile string
	// MaxTokenLifetime is the longest that any of its tokens lives, in whole seconds.
	MaxTokenLifetime time.Duration
	// Algorithms are those that its tokens may be signed with. Empty for the default.
	Algorithms []string
	// AllowTyp are values of the header typ that its access tokens have beside at+jwt.
	AllowTyp []string
	// AllowPrivateAddresses lets JWKSURL lead to loopback, link-local and private networks.
	AllowPrivateAddresses bool
}

const maxTokenLifetime = 10 * 365 * 24 * time.Hour

var (
	domainForm      = regexp.MustCompile(`^[a-z0-9.-]{1,200}$`)
	knownAlgorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"}
)

func issuersFileValue(p *[]TrustedIssuer) value {
	return value{rule: "the name of a file with a JSON array of issuers", set: func(name string) error {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		*p, err = parseTrustedIssuers(b, filepath.Dir(name))
		return err
	}}
}

// parseTrustedIssuers reports all mistakes. Relative files lie in dir. Member
// names are exact: encoding/json would take "ISS" for "iss", and forgive an
// unknown or a repeated one.
func parseTrustedIssuers(b []byte, dir string) ([]TrustedIssuer, error) {
	var items []json.RawMessage
	if err := json.Unmarshal(b, &items); err != nil {
		return nil, fmt.Errorf("not a JSON array: %w", err)
	}
	var (
		out      []TrustedIssuer
		mistakes []string
	)
	for i, item := range items {
		ti, wrong := parseTrustedIssuer(item)
		if ti.Iss != "" && slices.ContainsFunc(out, func(o TrustedIssuer) bool { return o.Iss == ti.Iss }) {
			wrong = append(wrong, "iss is another's too")
		}
		if ti.Name != "" && slices.ContainsFunc(out, func(o TrustedIssuer) bool { return o.Name == ti.Name && o.Tenant == ti.Tenant }) {
			wrong = append(wrong, "name is another's of that tenant too")
		}
		for _, w := range wrong {
			mistakes = append(mistakes, fmt.Sprintf("[%d]: %s", i, w))
		}
		if ti.JWKSFile != "" && !filepath.IsAbs(ti.JWKSFile) {
			ti.JWKSFile = filepath.Join(dir, ti.JWKSFile)
		}
		out = append(out, ti)
	}
	if len(mistakes) > 0 {
		return nil, errors.New(strings.Join(mistakes, "; "))
	}
	return out, nil
}

func parseTrustedIssuer(b []byte) (ti TrustedIssuer, wrong []string) {
	given, err := jsonMembers(b)
	if err != nil {
		return ti, []string{err.Error()}
	}
	member := func(name, rule string, into any, valid func() bool) {
		raw, ok := given[name]
		delete(given, name)
		if ok && (string(raw) == "null" || json.Unmarshal(raw, into) != nil) || !valid() {
			wrong = append(wrong, name+" must be "+rule)
		}
	}
	always := func() bool { return true }
	var lifetime int64
	ti.Tenant = revocation.SuperTenant.Domain
	member("iss", "text of 1 to 255 bytes", &ti.Iss, func() bool {
		return revocation.Target{Kind: revocation.KindToken, Iss: ti.Iss, ID: "any"}.Validate() == nil
	})
	member("name", "text of 1 to 255 bytes", &ti.Name, func() bool { return ti.Name != "" && len(ti.Name) <= 255 })
	member("tenant", "a domain of a-z 0-9 . -, at most 200", &ti.Tenant, func() bool { return domainForm.MatchString(ti.Tenant) })
	member("max_token_lifetime", "a whole number of seconds, 1 to 315360000", &lifetime, func() bool {
		return lifetime >= 1 && lifetime <= int64(maxTokenLifetime/time.Second)
	})
	ti.MaxTokenLifetime = time.Duration(lifetime) * time.Second
	member("algorithms", "a list of "+strings.Join(knownAlgorithms, ", "), &ti.Algorithms, func() bool {
		return !slices.ContainsFunc(ti.Algorithms, func(a string) bool { return !slices.Contains(knownAlgorithms, a) })
	})
	member("allow_typ", `a list of text such as "JWT"`, &ti.AllowTyp, func() bool { return !slices.Contains(ti.AllowTyp, "") })
	member("allow_private_addresses", "true or false", &ti.AllowPrivateAddresses, always)
	member("jwks_file", "the name of a file", &ti.JWKSFile, always)
	member("jwks_url", "an https URL (http only with allow_private_addresses)", &ti.JWKSURL, func() bool {
		return ti.JWKSURL == "" || isKeySetURL(ti.JWKSURL, ti.AllowPrivateAddresses)
	})
	if (ti.JWKSURL == "") == (ti.JWKSFile == "") {
		wrong = append(wrong, "one of jwks_url and jwks_file must be given, not both")
	}
	unknown := make([]string, 0, len(given))
	for name := range given {
		unknown = append(unknown, fmt.Sprintf("%q is not known", name))
	}
	slices.Sort(unknown)
	return ti, append(wrong, unknown...)
}

func isKeySetURL(s string, allowPrivate bool) bool {
	u, err := url.Parse(s)
	return err == nil && u.Hostname() != "" && u.User == nil && u.Fragment == "" &&
		(u.Scheme == "https" || u.Scheme == "http" && allowPrivate)
}

// jsonMembers splits a JSON object, and refuses one that names a member twice.
func jsonMembers(b []byte) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(strings.NewReader(string(b)))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("must be an object")
	}
	out := make(map[string]json.RawMessage)
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, err
		}
		name, _ := t.(string)
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return nil, err
		}
		if _, twice := out[name]; twice {
			return nil, fmt.Errorf("%q is given twice", name)
		}
		out[name] = raw
	}
	return out, nil
}
