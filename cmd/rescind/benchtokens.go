package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/sts"
)

var benchCaller = store.Caller{Actor: ledger.Actor{Name: "system"}}

// config is that of a command beside the service.
func (b *bench) config() (app.Config, error) {
	return app.ParseConfig(app.Input{Use: app.ForApply, Environ: b.serviceEnviron()})
}

// clients registers n clients in a tenant, each of an application of its own, and returns
// what they send as Authorization. They are deleted with release.
func (b *bench) clients(ctx context.Context, tenant revocation.Tenant, n int, registration func(i int) authn.Registration) (auth []string, release func(), err error) {
	cfg, err := b.config()
	if err != nil {
		return nil, nil, err
	}
	tools, err := app.OpenCatalog(ctx, cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, nil, err
	}
	run := rand.Text()
	var applications []catalog.Entity
	forget := func() {
		defer tools.Close()
		for some := range slices.Chunk(applications, 200) { // each takes its key with it
			changes := make([]store.Change, len(some))
			for i, a := range some {
				changes[i] = store.Change{Op: store.Delete, Entity: a, KeepTokens: true}
			}
			if _, _, err := tools.Catalog.Apply(context.WithoutCancel(ctx), benchCaller, changes); err != nil {
				fmt.Fprintf(b.progress, "the applications of the owner bench could not be deleted: %v\n", err)
				return
			}
		}
	}
	defer func() {
		if err != nil {
			forget()
		}
	}()
	var keyManager string
	err = b.pool.QueryRow(ctx, `SELECT name FROM rescind.key_managers WHERE tenant_id = $1 AND resident`, tenant.ID).Scan(&keyManager)
	if err != nil {
		return nil, nil, fmt.Errorf("find the key manager of %s: %w", tenant.Domain, err)
	}
	fmt.Fprintf(b.progress, "registering %s ...", count(n, "client"))
	start := time.Now()
	create := func(entity func(i int) catalog.Entity, made *[]catalog.Entity) error {
		for len(*made) < n {
			changes := make([]store.Change, min(n-len(*made), ledger.MaxChanges))
			for i := range changes {
				changes[i] = store.Change{Op: store.Create, Entity: entity(len(*made) + i)}
			}
			some, _, err := tools.Catalog.Apply(ctx, benchCaller, changes)
			if err != nil {
				return err
			}
			*made = append(*made, some...)
		}
		return nil
	}
	err = create(func(i int) catalog.Entity {
		return &catalog.Application{Meta: catalog.Meta{Tenant: tenant}, Name: fmt.Sprintf("%s %d", run, i), Owner: "bench", TokenType: "JWT"}
	}, &applications)
	if err != nil {
		return nil, nil, err
	}
	var keys []catalog.Entity
	err = create(func(i int) catalog.Entity {
		return &catalog.KeyMapping{
			Application: catalog.Ref{UUID: applications[i].Base().UUID}, KeyManager: keyManager, KeyType: catalog.Production,
			ConsumerKey: fmt.Sprintf("bench-%s-%d", run, i),
		}
	}, &keys)
	if err != nil {
		return nil, nil, err
	}
	// One after the other, as CreateKey makes them, ten thousand take minutes.
	auth = make([]string, n)
	const together = 100
	_, err = b.inParallel(16, (n+together-1)/together, func(int) (func(int) error, error) {
		return func(part int) error {
			return pgx.BeginFunc(ctx, b.pool, func(tx pgx.Tx) error {
				for i := part * together; i < min(n, (part+1)*together); i++ {
					cred, err := tools.Accounts.StoreClient(ctx, tx, keys[i].Base().ID, registration(i))
					if err != nil {
						return err
					}
					auth[i] = basic(cred.ID, cred.Secret)
				}
				return nil
			})
		}, nil
	})
	if err != nil {
		return nil, nil, err
	}
	fmt.Fprintf(b.progress, " at %.0f/s\n", float64(n)/time.Since(start).Seconds())
	return auth, forget, nil
}

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// minting loads the token endpoints of two issuers, which sign with one algorithm each.
func (b *bench) minting(ctx context.Context) error {
	const path = "/oauth2/token"
	algorithm, err := b.mint(ctx, path, basic(b.dev.ClientID, b.dev.ClientSecret))
	if err != nil {
		return err
	}
	other := "ES256"
	if algorithm == other {
		other = "RS256"
	}
	issuer, auth, release, err := b.issuerWith(ctx, other)
	if err != nil {
		return fmt.Errorf("make an issuer with %s: %w", other, err)
	}
	defer release()
	_, err = b.mint(ctx, issuer+path, auth)
	return err
}

// mint loads a token endpoint, beside a loop of nothing but signatures.
func (b *bench) mint(ctx context.Context, path, auth string) (algorithm string, err error) {
	c, err := b.dial()
	if err != nil {
		return "", err
	}
	c.auth = auth
	if algorithm, err = c.algorithm(path); err != nil {
		return "", err
	}
	sign, err := signing(algorithm)
	if err != nil {
		return "", err
	}
	cores := runtime.GOMAXPROCS(0)
	base, err := perSecond(ctx, cores, 5*time.Second, sign.call)
	if err != nil {
		return "", err
	}
	l, err := b.inParallel(b.connections, b.requests, func(int) (func(int) error, error) {
		c, err := b.dial()
		if err != nil {
			return nil, err
		}
		c.auth = auth
		return func(int) error { _, err := c.post(path, "grant_type=client_credentials"); return err }, nil
	})
	if err != nil {
		return "", err
	}
	b.row(fmt.Sprintf("(11) /oauth2/token, %s, %d connections", algorithm, b.connections),
		fmt.Sprintf("%.0f/s = %.2f x %s", l.rate, l.rate/base, sign.name),
		fmt.Sprintf("%s; in a loop on %d cores it makes %.0f/s", l, cores, base))
	return algorithm, nil
}

// algorithm is the alg of a token that an endpoint gives out.
func (c *conn) algorithm(path string) (string, error) {
	t, err := c.token(path)
	if err != nil {
		return "", err
	}
	first, _, _ := strings.Cut(t.compact, ".")
	header, err := base64.RawURLEncoding.DecodeString(first)
	if err != nil {
		return "", fmt.Errorf("read the header of a token: %w", err)
	}
	var h struct {
		Alg string `json:"alg"`
	}
	err = json.Unmarshal(header, &h)
	return h.Alg, err
}

type signature struct {
	name string
	call func() error
}

// signing is what a token with this algorithm cannot do without.
func signing(algorithm string) (signature, error) {
	digest := sha256.Sum256([]byte("as long as it likes to be"))
	switch algorithm {
	case "RS256":
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		return signature{"rsa.SignPKCS1v15", func() error {
			_, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
			return err
		}}, err
	case "ES256":
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		return signature{"ecdsa.SignASN1", func() error {
			_, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
			return err
		}}, err
	}
	return signature{}, fmt.Errorf("the service signs with %q, for which there is no baseline", algorithm)
}

// perSecond calls f from n goroutines for a time.
func perSecond(ctx context.Context, n int, d time.Duration, f func() error) (float64, error) {
	var calls atomic.Int64
	errs := make([]error, n)
	var wg sync.WaitGroup
	start := time.Now()
	for i := range n {
		wg.Go(func() {
			for time.Since(start) < d && errs[i] == nil && ctx.Err() == nil {
				errs[i] = f()
				calls.Add(1)
			}
		})
	}
	wg.Wait()
	rate := float64(calls.Load()) / time.Since(start).Seconds()
	return rate, errors.Join(append(errs, ctx.Err())...)
}

// issuerWith sees to it that a tenant's issuer signs with an algorithm, whatever the service's
// setting is. It returns the issuer's path on the service, and a client of it.
func (b *bench) issuerWith(ctx context.Context, algorithm string) (path, auth string, release func(), err error) {
	cfg, err := b.config()
	if err != nil {
		return "", "", nil, err
	}
	tenant, iss, err := b.tenant(ctx, cfg, "bench-"+strings.ToLower(algorithm)+".example")
	if err != nil {
		return "", "", nil, err
	}
	all, release, err := b.clients(ctx, tenant, 1, func(int) authn.Registration { return authn.Registration{} })
	if err != nil {
		return "", "", nil, err
	}
	path, auth = strings.TrimPrefix(iss, b.issuer), all[0]
	if err := b.signWith(ctx, cfg, iss, path, auth, algorithm); err != nil {
		release()
		return "", "", nil, err
	}
	return path, auth, release, nil
}

// tenant makes a tenant unless it is there. It stays: its issuer may have live revocations.
func (b *bench) tenant(ctx context.Context, cfg app.Config, domain string) (tenant revocation.Tenant, iss string, err error) {
	const sql = `
		SELECT t.id, t.domain, k.iss FROM rescind.tenants t
		JOIN rescind.key_managers k ON k.tenant_id = t.id AND k.resident
		WHERE t.domain = $1`
	find := func() error { return b.pool.QueryRow(ctx, sql, domain).Scan(&tenant.ID, &tenant.Domain, &iss) }
	if err := find(); !errors.Is(err, pgx.ErrNoRows) {
		return tenant, iss, err
	}
	tools, err := app.OpenCatalog(ctx, cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return tenant, "", err
	}
	defer tools.Close()
	made := &catalog.Tenant{Meta: catalog.Meta{Tenant: revocation.Tenant{Domain: domain}}}
	if _, _, err := tools.Catalog.Apply(ctx, benchCaller, []store.Change{{Op: store.Create, Entity: made}}); err != nil {
		return tenant, "", err
	}
	return tenant, iss, find()
}

// signWith gives an issuer a key, and waits until the service signs with it. A key that
// replaces a compromised one is used at once; nobody has tokens of the others.
func (b *bench) signWith(ctx context.Context, cfg app.Config, iss, path, auth, algorithm string) error {
	c, err := b.dial()
	if err != nil {
		return err
	}
	c.auth = auth
	rotated := false
	deadline := time.Now().Add(time.Minute)
	for {
		now, err := c.algorithm(path + "/oauth2/token")
		switch {
		case err == nil && now == algorithm:
			return nil
		case time.Now().After(deadline):
			return cmp.Or(err, fmt.Errorf("%s still signs with %s", iss, now))
		case err == nil && !rotated:
			keys, err := app.OpenKeys(ctx, cfg, slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			_, err = keys.Rotate(ctx, sts.Rotation{Iss: iss, Algorithm: algorithm, Compromised: sts.AllKeys, Reason: "bench"})
			keys.Close()
			if err != nil {
				return err
			}
			rotated = true
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// introspect loads the introspection endpoint with the questions of one resource server,
// beside requests of the same size to an address where there is nothing: what HTTP alone
// takes in this service.
func (b *bench) introspect(ctx context.Context) error {
	const audience, most = "https://api.bench.example", 10_000
	auth, release, err := b.clients(ctx, revocation.SuperTenant, 2, func(i int) authn.Registration {
		if i == 0 {
			return authn.Registration{Audience: []string{audience}}
		}
		return authn.Registration{ResourceAudiences: []string{audience}}
	})
	if err != nil {
		return err
	}
	defer release()
	tokens, err := b.tokensOf(min(b.requests, most), func(int) string { return auth[0] })
	if err != nil {
		return err
	}
	ask := func(path string, right func(status string, body []byte) bool) (load, error) {
		return b.inParallel(b.connections, b.requests, func(int) (func(int) error, error) {
			c, err := b.dial()
			if err != nil {
				return nil, err
			}
			c.auth = auth[1]
			return func(i int) error {
				status, body, err := c.send(path, "token="+tokens[i%len(tokens)].compact)
				if err == nil && !right(status, body) {
					err = fmt.Errorf("POST %s: %s: %s", path, status, body)
				}
				return err
			}, nil
		})
	}
	base, err := ask("/nothing/is/here", func(status string, _ []byte) bool { return strings.HasPrefix(status, "404") })
	if err != nil {
		return err
	}
	l, err := ask("/oauth2/introspect", func(status string, body []byte) bool {
		return strings.HasPrefix(status, "200") && bytes.Contains(body, []byte(`"active":true`))
	})
	if err != nil {
		return err
	}
	b.row(fmt.Sprintf("(12) /oauth2/introspect, %d tokens, %d connections", len(tokens), b.connections),
		fmt.Sprintf("%.0f/s = %.2f x a 404", l.rate, l.rate/base.rate), fmt.Sprintf("%s; 404s for the same requests: %.0f/s", l, base.rate))
	return nil
}

// revokeByMany loads /revoke as one client, and as many that take turns. Each goes twice, the
// one first and last: the machine's speed varies.
func (b *bench) revokeByMany(ctx context.Context) error {
	if b.distinct == 0 {
		return nil
	}
	n := b.requests / 2
	auth, release, err := b.clients(ctx, revocation.SuperTenant, min(b.distinct, n), func(int) authn.Registration { return authn.Registration{} })
	if err != nil {
		return err
	}
	defer release()
	one := func(int) string { return auth[0] }
	many := func(i int) string { return auth[i%len(auth)] }
	start, err := b.stopSinks(ctx)
	if err != nil {
		return fmt.Errorf("stop the sinks: %w", err)
	}
	var took [2]time.Duration
	var latencies [2][]time.Duration
	for _, who := range []int{0, 1, 1, 0} {
		l, err := b.loadRevokeOf(n, []func(int) string{one, many}[who])
		if err != nil {
			start()
			return err
		}
		took[who] += time.Duration(float64(n) / l.rate * float64(time.Second))
		latencies[who] = append(latencies[who], l.latencies...)
	}
	start()
	if _, err := b.caughtUp(ctx); err != nil {
		return err
	}
	var loads [2]load
	for i := range loads {
		slices.Sort(latencies[i])
		loads[i] = load{rate: float64(2*n) / took[i].Seconds(), latencies: latencies[i]}
	}
	b.row(fmt.Sprintf("(13) /revoke, %d clients, %d connections, sinks stopped", len(auth), b.connections),
		fmt.Sprintf("%.0f/s = %.2f x one client", loads[1].rate, loads[1].rate/loads[0].rate), fmt.Sprintf("%s; one client: %.0f/s, %s", loads[1], loads[0].rate, loads[0]))
	return nil
}
