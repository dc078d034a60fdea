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
	// syncWithin is how long gateways may take to be read, but at the start.
	syncWithin = 10 * time.Second
	// What is lost, has left or has a canary is no longer remembered after so long. One that left keeps its
	// id from other accounts, for it stops to start again.
	forgetLost   = 24 * time.Hour
	forgetLeft   = 7 * 24 * time.Hour
	forgetCanary = 30 * 24 * time.Hour
	sweepEvery   = time.Hour
	// evictAfter a lost gateway may give its place to another one: by then the database knows if it reports to
	// another process.
	evictAfter = 2 * time.Minute
)

const syncSQL = `
	SELECT id, account, tenant, sees, first_seen, extract(epoch FROM statement_timestamp() - last_seen)::float8,
		canary_url, canary, CASE WHEN $2 OR left_at IS NOT NULL THEN report END, left_at IS NOT NULL
	FROM rescind.gateways WHERE CASE WHEN $1::text[] IS NULL THEN left_at IS NULL ELSE id = ANY ($1) END`

// sync makes what is known what the database says of these gateways, nil: of all. Reports are read if
// asked for, or if they are newer than what is known. What cannot be read is passed over.
func (f *Fleet) sync(ctx context.Context, ids []string, reports bool) error {
	type row struct {
		ID, Account, Tenant string
		Sees                []string
		FirstSeen           time.Time
		Age                 float64
		CanaryURL           string
		Canary, Report      []byte
		Left                bool
	}
	limit := syncWithin
	if ids == nil && reports {
		limit = time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := f.pool.Acquire(ctx) // ages count from now on
	if err != nil {
		return fmt.Errorf("read gateways: %w", err)
	}
	defer conn.Release()
	began := time.Now()
	rows, err := conn.Query(ctx, syncSQL, ids, reports)
	if err != nil {
		return fmt.Errorf("read gateways: %w", err)
	}
	var look []string // these are read by themselves
	there := make(map[string]bool)
	var r row
	_, err = pgx.ForEachRow(rows, []any{&r.ID, &r.Account, &r.Tenant, &r.Sees, &r.FirstSeen, &r.Age, &r.CanaryURL, &r.Canary, &r.Report, &r.Left}, func() error {
		there[r.ID] = true
		var report *replica.Report
		var canary *CanaryResult
		if r.Report != nil {
			if err := json.Unmarshal(r.Report, &report); err != nil || report == nil {
				f.log.Warn("cannot read the stored report of a gateway, its next one takes its place", "gateway", r.ID, "error", err)
				report = new(replica.Report)
			}
		}
		if r.Left {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.left(r.ID, report)
			return nil
		}
		if r.Canary != nil {
			if err := json.Unmarshal(r.Canary, &canary); err != nil {
				f.log.Warn("cannot read the stored canary of a gateway, its next round takes its place", "gateway", r.ID, "error", err)
				canary = nil
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
				look = append(look, r.ID)
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
			report.Tenants = f.lists.shared(report.Tenants, g.report.Tenants)
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
	conn.Release()
	f.mu.Lock()
	if ids == nil {
		for id := range f.gateways {
			if !there[id] { // it has left, or is not known any more
				look = append(look, id)
			}
		}
	}
	for _, id := range ids {
		// One that this process came to know of since may have been too late for the query.
		if g := f.gateways[id]; g != nil && !there[id] && g.known.Before(began) {
			f.remove(g)
		}
	}
	f.mu.Unlock()
	if len(look) > 0 {
		return f.sync(ctx, look, true)
	}
	return nil
}

// turn lets one at a time through.
type turn struct {
	c     chan struct{}
	users int
}

// inTurn runs fn with a limit of time of its own: for one gateway of an account at a time, and for few of all,
// so that neither one account keeps the others waiting, nor all of them what the pool is there for.
func (f *Fleet) inTurn(ctx context.Context, account string, fn func(ctx context.Context) error) error {
	f.mu.Lock()
	t := f.claiming[account]
	if t == nil {
		t = &turn{c: make(chan struct{}, 1)}
		f.claiming[account] = t
	}
	t.users++
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(f.claiming, account)
		}
	}()
	for _, c := range []chan struct{}{t.c, f.claims} {
		select {
		case c <- struct{}{}:
			defer func() { <-c }()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	return fn(ctx)
}

// claim lets the database decide whose id it is, and returns the gateway, which may be another account's.
// A victim gives its place up; if it does not, because it is not lost after all, the error is [ErrTooMany].
func (f *Fleet) claim(ctx context.Context, by authn.Account, id, victim string, r *replica.Report) (*gateway, error) {
	report, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("write report of gateway %s: %w", id, err)
	}
	sees := seesOf(by)
	g := newGateway(id)
	g.report.Instance = r.Instance
	var left bool
	var canary *CanaryResult
	one := func(ctx context.Context, tx pgx.Tx) error {
		if victim != "" {
			tag, err := tx.Exec(ctx, `
				DELETE FROM rescind.gateways
				WHERE id = $1 AND canary_url = '' AND last_seen < clock_timestamp() - make_interval(secs => $2)`, victim, evictAfter.Seconds())
			if err != nil {
				return err
			}
			if tag.RowsAffected() == 0 {
				return ErrTooMany
			}
			if _, err := tx.Exec(ctx, `SELECT pg_notify('`+channel+`', $1)`, f.payload(message{Rows: []string{victim}})); err != nil {
				return err
			}
		}
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
	}
	err = f.inTurn(ctx, by.Username, func(ctx context.Context) error {
		return pgx.BeginFunc(ctx, f.pool, func(tx pgx.Tx) error { return one(ctx, tx) })
	})
	if victim != "" {
		f.mu.Lock()
		if v := f.gateways[victim]; err == nil && v != nil {
			f.remove(v)
		}
		f.rowsChanged([]string{victim})
		f.mu.Unlock()
	}
	switch {
	case errors.Is(err, ErrTooMany):
		return nil, ErrTooMany
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

// storeLeft notes that a gateway leaves, and reports false if it is not there, or another process reports with
// its id that started later. The row is kept, so that the id is still the account's.
func (f *Fleet) storeLeft(ctx context.Context, account, id string, r *replica.Report) (left bool, err error) {
	report, err := json.Marshal(r)
	if err != nil {
		return false, fmt.Errorf("write report of gateway %s: %w", id, err)
	}
	err = f.inTurn(ctx, account, func(ctx context.Context) error {
		return pgx.BeginFunc(ctx, f.pool, func(tx pgx.Tx) error {
			tag, err := tx.Exec(ctx, `
				UPDATE rescind.gateways SET left_at = clock_timestamp(), last_seen = clock_timestamp(), report = $3
				WHERE id = $1 AND account = $2 AND left_at IS NULL
					AND (report->'instance' IS NOT DISTINCT FROM $3::jsonb->'instance' OR coalesce(report->'started' < $3::jsonb->'started', true))`,
				id, account, report)
			if err != nil || tag.RowsAffected() == 0 {
				return err
			}
			left = true
			// No more are remembered of an account than it may have, or one that gives each start a new id could
			// fill the database.
			_, err = tx.Exec(ctx, `
				DELETE FROM rescind.gateways WHERE id IN (
					SELECT id FROM rescind.gateways WHERE account = $1 AND left_at IS NOT NULL AND canary_url = '' ORDER BY left_at DESC OFFSET $2)`,
				account, f.perAccount())
			if err != nil {
				return err
			}
			_, err = tx.Exec(ctx, `SELECT pg_notify('`+channel+`', $1)`, f.payload(message{Rows: []string{id}}))
			return err
		})
	})
	if err != nil {
		return false, fmt.Errorf("note that gateway %s leaves: %w", id, err)
	}
	return left, nil
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

const recordSQL = `
	WITH known AS (
		SELECT g.id, n.canary FROM unnest($1::text[], $2::jsonb[]) AS n (id, canary) JOIN rescind.gateways AS g ON g.id = n.id
		WHERE g.left_at IS NULL AND g.canary_url <> '' ORDER BY n.id FOR UPDATE OF g)
	UPDATE rescind.gateways AS g SET canary = known.canary FROM known WHERE g.id = known.id RETURNING g.id`

// RecordCanaries keeps the last results of gateways, by ID. Those that are not there, or have no canary, are
// passed over.
func (f *Fleet) RecordCanaries(ctx context.Context, results map[string]CanaryResult) error {
	for ids := range slices.Chunk(slices.Sorted(maps.Keys(results)), storeBatch) {
		var canaries []json.RawMessage
		for _, id := range ids {
			b, err := json.Marshal(results[id])
			if err != nil {
				return fmt.Errorf("write canary of gateway %s: %w", id, err)
			}
			canaries = append(canaries, b)
		}
		var kept []string
		err := pgx.BeginFunc(ctx, f.pool, func(tx pgx.Tx) error {
			rows, err := tx.Query(ctx, recordSQL, ids, canaries)
			if err != nil {
				return err
			}
			if kept, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
				return err
			}
			var told []string
			for some := range slices.Chunk(kept, idsInMessage) {
				told = append(told, f.payload(message{Rows: some}))
			}
			_, err = tx.Exec(ctx, `SELECT pg_notify('`+channel+`', n.payload) FROM unnest($1::text[]) AS n (payload)`, told)
			return err
		})
		if err != nil {
			return fmt.Errorf("record canaries: %w", err)
		}
		f.mu.Lock()
		for _, id := range kept {
			if g := f.gateways[id]; g != nil {
				r := results[id]
				g.canary = &r
			}
		}
		f.announce()
		f.mu.Unlock()
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

// sweep forgets those that were lost, or left, long ago.
func (f *Fleet) sweep(ctx context.Context) error {
	_, err := f.pool.Exec(ctx, `
		DELETE FROM rescind.gateways
		WHERE coalesce(left_at, last_seen) < clock_timestamp() - make_interval(secs =>
			CASE WHEN canary_url <> '' THEN $3::float8 WHEN left_at IS NOT NULL THEN $2 ELSE $1::float8 END)`,
		forgetLost.Seconds(), forgetLeft.Seconds(), forgetCanary.Seconds())
	if err != nil {
		return fmt.Errorf("forget gateways that were lost, or left, long ago: %w", err)
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
		WHERE g.account = excluded.account AND (g.last_seen < excluded.last_seen
			OR g.left_at IS NOT NULL AND g.report->'instance' <> excluded.report->'instance' AND g.report->'started' <= excluded.report->'started')`

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
			sees, reports = append(sees, s), append(reports, report)
		}
		wctx, cancel := context.WithTimeout(ctx, writeTimeout)
		err := pgx.BeginFunc(wctx, f.pool, func(tx pgx.Tx) error {
			// What a crash takes comes again.
			if _, err := tx.Exec(wctx, `SET LOCAL synchronous_commit = off`); err != nil {
				return err
			}
			var ages []float64 // now that there is nothing more to wait for
			for _, d := range batch {
				ages = append(ages, time.Since(d.at).Seconds())
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
