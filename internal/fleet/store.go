package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/internal/authn"
)

const (
	// maxClaims is how many connections of the pool first and last reports take at a time: many gateways
	// that start at once must not keep revocations from theirs.
	maxClaims = 2
	// storeEvery is how old the database's report of a gateway gets, and some seconds more.
	storeEvery = 30 * time.Second
	storeBatch = 500
	syncEvery  = time.Minute
	// forgetAfter a gateway that is lost is no longer remembered.
	forgetAfter = 30 * 24 * time.Hour
	sweepEvery  = 24 * time.Hour
)

const syncSQL = `
	SELECT id, account, tenant, sees, first_seen, extract(epoch FROM statement_timestamp() - last_seen)::float8,
		canary_url, canary, CASE WHEN $2 THEN report END
	FROM rescind.gateways WHERE left_at IS NULL AND ($1::text[] IS NULL OR id = ANY ($1))`

// sync makes what is known what the database says of these gateways, nil: of all. Reports are read if
// asked for, or if they are newer than what is known.
func (f *Fleet) sync(ctx context.Context, ids []string, reports bool) error {
	type row struct {
		ID, Account, Tenant string
		Sees                []string
		FirstSeen           time.Time
		Age                 float64
		CanaryURL           string
		Canary, Report      []byte
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	began := time.Now()
	rows, err := f.pool.Query(ctx, syncSQL, ids, reports)
	if err != nil {
		return fmt.Errorf("read gateways: %w", err)
	}
	var newer []string
	there := make(map[string]bool)
	var r row
	_, err = pgx.ForEachRow(rows, []any{&r.ID, &r.Account, &r.Tenant, &r.Sees, &r.FirstSeen, &r.Age, &r.CanaryURL, &r.Canary, &r.Report}, func() error {
		there[r.ID] = true
		var report *replica.Report
		var canary *CanaryResult
		if r.Report != nil {
			if err := json.Unmarshal(r.Report, &report); err != nil {
				return fmt.Errorf("read the report of gateway %s: %w", r.ID, err)
			}
		}
		if r.Canary != nil {
			if err := json.Unmarshal(r.Canary, &canary); err != nil {
				return fmt.Errorf("read the canary of gateway %s: %w", r.ID, err)
			}
		}
		seen := began.Add(-time.Duration(r.Age * float64(time.Second)))
		f.mu.Lock()
		defer f.mu.Unlock()
		g := f.gateways[r.ID]
		if g != nil && g.account != r.Account { // forgotten, and another's now
			f.remove(g)
			g = nil
		}
		if g == nil || g.source != here && seen.After(g.reportedAt.Add(storedSlack)) {
			if report == nil {
				newer = append(newer, r.ID)
				return nil
			}
			if g == nil {
				g = newGateway(r.ID)
				g.account = r.Account
				f.add(g)
			}
			if g.source == elsewhere { // whether it is heard of there is to be read again
				for _, p := range f.talk.peers {
					p.version = -1
				}
			}
			g.source, g.report, g.reportedAt = stored, *report, seen
			g.tenant, g.sees = r.Tenant, r.Sees
		}
		g.firstSeen, g.canaryURL, g.canary = r.FirstSeen, r.CanaryURL, canary
		f.announce()
		return nil
	})
	if err != nil {
		return fmt.Errorf("read gateways: %w", err)
	}
	f.mu.Lock()
	gone := func(g *gateway) {
		// One that this process came to know of since may have been too late for the query.
		if g != nil && !there[g.id] && g.known.Before(began) {
			f.remove(g)
		}
	}
	if ids == nil {
		for _, g := range slices.Collect(maps.Values(f.gateways)) {
			gone(g)
		}
	}
	for _, id := range ids {
		gone(f.gateways[id])
	}
	f.mu.Unlock()
	if len(newer) > 0 {
		return f.sync(ctx, newer, true)
	}
	return nil
}

// claim lets the database decide whose id it is, and returns the gateway, which may be another account's.
func (f *Fleet) claim(ctx context.Context, by authn.Account, id string, r *replica.Report) (*gateway, error) {
	select {
	case f.claims <- struct{}{}:
		defer func() { <-f.claims }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	report, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("write report of gateway %s: %w", id, err)
	}
	sees := seesOf(by)
	g := newGateway(id)
	g.report.Instance = r.Instance
	var left bool
	var canary *CanaryResult
	err = pgx.BeginFunc(ctx, f.pool, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `
			INSERT INTO rescind.gateways AS g (id, account, tenant, sees, report) VALUES ($1, $2, $3, $4, $5)
			ON CONFLICT (id) DO UPDATE SET left_at = NULL, last_seen = clock_timestamp(), report = excluded.report
				WHERE g.left_at IS NOT NULL AND g.account = excluded.account`,
			id, by.Username, by.Tenant.Domain, sees, report)
		if err != nil {
			return err
		}
		return tx.QueryRow(ctx, `
			SELECT account, tenant, sees, first_seen, left_at IS NOT NULL, canary_url, canary FROM rescind.gateways WHERE id = $1`, id).
			Scan(&g.account, &g.tenant, &g.sees, &g.firstSeen, &left, &g.canaryURL, &canary)
	})
	switch {
	case errors.Is(err, pgx.ErrNoRows): // forgotten in between: whoever reports next has it
		return nil, fmt.Errorf("claim gateway %s: it was forgotten at this moment: %w", id, err)
	case err != nil:
		return nil, fmt.Errorf("claim gateway %s: %w", id, err)
	case left:
		return nil, ErrOwned
	}
	g.canary, g.written = canary, time.Now()
	return g, nil
}

func seesOf(by authn.Account) []string {
	switch {
	case by.SeesAll():
		return seesAll
	case by.ExtraTenants == nil:
		return []string{}
	}
	return by.ExtraTenants
}

// storeLeft removes a gateway that leaves. What people have set for it is kept for the next time.
func (f *Fleet) storeLeft(ctx context.Context, g *gateway) error {
	select {
	case f.claims <- struct{}{}:
		defer func() { <-f.claims }()
	case <-ctx.Done():
		return ctx.Err()
	}
	_, err := f.pool.Exec(ctx, `
		WITH gone AS (DELETE FROM rescind.gateways WHERE id = $1 AND account = $2 AND canary_url = ''),
			kept AS (UPDATE rescind.gateways SET left_at = clock_timestamp(), last_seen = clock_timestamp()
				WHERE id = $1 AND account = $2 AND canary_url <> '')
		SELECT pg_notify('`+channel+`', $3)`, g.id, g.account, f.payload(message{Rows: []string{g.id}}))
	if err != nil {
		return fmt.Errorf("remove gateway %s that leaves: %w", g.id, err)
	}
	return nil
}

// Forget removes a gateway that is gone for good. One that reports again is there again, and belongs to
// whoever reports it. [ErrNotFound].
func (f *Fleet) Forget(ctx context.Context, id string) error {
	err := f.change(ctx, id, `DELETE FROM rescind.gateways WHERE id = $1 RETURNING id`)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("forget gateway %s: %w", id, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if g := f.gateways[id]; g != nil {
		f.remove(g)
		return nil
	}
	return err
}

// SetCanary sets where the canary of a gateway is called, empty for nowhere. [ErrNotFound].
func (f *Fleet) SetCanary(ctx context.Context, id, url string) error {
	err := f.change(ctx, id, `
		UPDATE rescind.gateways SET canary_url = $2, canary = CASE WHEN canary_url = $2 THEN canary END
		WHERE id = $1 AND left_at IS NULL RETURNING id`, url)
	if err != nil {
		return fmt.Errorf("set canary of gateway %s: %w", id, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if g := f.gateways[id]; g != nil && g.canaryURL != url {
		g.canaryURL, g.canary = url, nil
		f.announce()
	}
	return nil
}

// RecordCanary keeps the last result of a gateway. [ErrNotFound].
func (f *Fleet) RecordCanary(ctx context.Context, id string, r CanaryResult) error {
	b, err := json.Marshal(r)
	if err == nil {
		err = f.change(ctx, id, `UPDATE rescind.gateways SET canary = $2::jsonb WHERE id = $1 AND left_at IS NULL RETURNING id`, string(b))
	}
	if err != nil {
		return fmt.Errorf("record canary of gateway %s: %w", id, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if g := f.gateways[id]; g != nil {
		g.canary = &r
		f.announce()
	}
	return nil
}

// change runs a statement that returns the id, if there is one, and lets the other processes know.
func (f *Fleet) change(ctx context.Context, id, sql string, args ...any) error {
	return pgx.BeginFunc(ctx, f.pool, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, sql, append([]any{id}, args...)...)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return ErrNotFound
		}
		_, err = tx.Exec(ctx, `SELECT pg_notify('`+channel+`', $1)`, f.payload(message{Rows: []string{id}}))
		return err
	})
}

// keep writes reports down, in batches, and keeps what is known and what the database has together.
func (f *Fleet) keep(ctx context.Context) {
	synced, swept := time.Now(), time.Now().Add(time.Hour-sweepEvery)
	for down := false; pause(ctx, time.Second); {
		now := time.Now()
		err := f.store(ctx, now, storeEvery)
		if err == nil && now.Sub(synced) >= syncEvery {
			synced = now
			if err = f.sync(ctx, nil, false); err == nil {
				_, err = f.pool.Exec(ctx, `DELETE FROM rescind.fleet_processes WHERE seen < clock_timestamp() - make_interval(secs => $1)`, 4*deadAfter.Seconds())
			}
		}
		if err == nil && now.Sub(swept) >= sweepEvery {
			swept = now
			err = f.sweep(ctx)
		}
		if err != nil && !down && ctx.Err() == nil {
			f.log.Warn("cannot keep the gateways in the database, it is tried until it can", "error", err)
		}
		down = err != nil
	}
}

// sweep forgets those that have been lost for long.
func (f *Fleet) sweep(ctx context.Context) error {
	_, err := f.pool.Exec(ctx, `DELETE FROM rescind.gateways WHERE last_seen < clock_timestamp() - make_interval(secs => $1)`, forgetAfter.Seconds())
	if err != nil {
		return fmt.Errorf("forget gateways that were lost long ago: %w", err)
	}
	return f.sync(ctx, nil, false)
}

const storeSQL = `
	INSERT INTO rescind.gateways AS g (id, account, tenant, sees, last_seen, report)
	SELECT n.id, n.account, n.tenant, ARRAY(SELECT jsonb_array_elements_text(n.sees)), statement_timestamp() - make_interval(secs => n.age), n.report
	FROM unnest($1::text[], $2::text[], $3::text[], $4::jsonb[], $5::float8[], $6::jsonb[]) AS n (id, account, tenant, sees, age, report)
	ORDER BY n.id
	ON CONFLICT (id) DO UPDATE SET tenant = excluded.tenant, sees = excluded.sees, last_seen = excluded.last_seen,
			report = excluded.report, left_at = NULL
		WHERE g.account = excluded.account AND g.last_seen < excluded.last_seen`

// store writes down the last reports of those that report here and were not written for so long.
func (f *Fleet) store(ctx context.Context, now time.Time, after time.Duration) error {
	type last struct {
		g      *gateway
		sees   []string
		tenant string
		report replica.Report
		at     time.Time
	}
	f.mu.Lock()
	var due []last
	for _, g := range f.gateways {
		apart := min(after, time.Duration(g.slot%10)*time.Second) // those that came together
		if g.source == here && g.reportedAt.After(g.written) && now.Sub(g.written) >= after-apart {
			due = append(due, last{g, g.sees, g.tenant, g.report, g.reportedAt})
		}
	}
	f.mu.Unlock()
	for batch := range slices.Chunk(due, storeBatch) {
		var ids, accounts, tenants []string
		var sees, reports []json.RawMessage
		var ages []float64
		for _, d := range batch {
			report, err := json.Marshal(d.report)
			if err != nil {
				return fmt.Errorf("write report of gateway %s: %w", d.g.id, err)
			}
			s, err := json.Marshal(append([]string{}, d.sees...))
			if err != nil {
				return fmt.Errorf("write tenants of gateway %s: %w", d.g.id, err)
			}
			ids, accounts, tenants = append(ids, d.g.id), append(accounts, d.g.account), append(tenants, d.tenant)
			sees, reports, ages = append(sees, s), append(reports, report), append(ages, time.Since(d.at).Seconds())
		}
		wctx, cancel := context.WithTimeout(ctx, writeTimeout)
		err := pgx.BeginFunc(wctx, f.pool, func(tx pgx.Tx) error {
			// What a crash takes comes again.
			if _, err := tx.Exec(wctx, `SET LOCAL synchronous_commit = off`); err != nil {
				return err
			}
			_, err := tx.Exec(wctx, storeSQL, ids, accounts, tenants, sees, ages, reports)
			return err
		})
		cancel()
		if err != nil {
			return fmt.Errorf("write reports: %w", err)
		}
		f.mu.Lock()
		for _, d := range batch {
			d.g.written = now
		}
		f.mu.Unlock()
	}
	return nil
}

// end writes down what is known, and takes the process out of those that others wait for.
func (f *Fleet) end(ctx context.Context) {
	f.mu.Lock()
	f.ended = true
	for _, g := range f.gateways {
		g.wake()
	}
	f.mu.Unlock()
	if f.cfg.Observe {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	err := f.store(ctx, time.Now(), 0)
	_, rowErr := f.pool.Exec(ctx, `DELETE FROM rescind.fleet_processes WHERE id = $1`, f.self)
	if err := errors.Join(err, rowErr); err != nil {
		f.log.Warn("cannot write the gateways down at the end, what the database knows of them is older", "error", err)
	}
}
