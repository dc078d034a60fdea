package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/klauspost/compress/zstd"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

const (
	channel = "rescind_fleet"

	beatEvery = 3 * time.Second
	// deadAfter without a heartbeat a process is no longer asked.
	deadAfter    = 15 * time.Second
	answerWithin = time.Second
	// repeatEvery makes up for a notification that was lost, also because its hearer was not connected.
	repeatEvery = 500 * time.Millisecond
	// pollEvery is how often rows are looked at while an answer is due, whatever is notified.
	pollEvery = 100 * time.Millisecond
	// watchFor is how long a question that is not repeated is answered anew when something changes.
	watchFor = 2 * time.Second
	// tellAgain is how often it is answered when nothing but ages has changed.
	tellAgain = time.Second
	// forgiveFor a process that did not answer in time is not waited for.
	forgiveFor = 10 * time.Second
	// A process tells at most every tellGap, and takes about a sixth of a core for it, but at least every
	// second.
	tellGap     = 100 * time.Millisecond
	tellShare   = 5
	keepTelling = 15 * time.Minute

	writeTimeout = 5 * time.Second

	// maxRow is how large a process's row may be before it is compressed: the most gateways with the longest
	// reports. What is larger would be too much for those who read it.
	maxRow = 256 << 20
	// maxChanged ids that have changed are read one by one, past it all are.
	maxChanged = 1000
)

var never = time.Time{}

// message is the payload of a notification.
type message struct {
	From string `json:"from"`
	// Ask is the number of a question: what the hearer knows of its gateways. The rest is what they are
	// to be asked for.
	Ask     int64                  `json:"ask,omitempty"`
	Confirm revocation.Position    `json:"confirm,omitzero"`
	Digest  *replica.DigestRequest `json:"digest,omitempty"`
	Load    string                 `json:"load,omitempty"` // the name of the request
	IDs     []string               `json:"ids,omitempty"`  // which are to load
	// Rows of these ids have changed in the database.
	Rows []string `json:"rows,omitempty"`
	// Told: the sender's row has changed.
	Told bool `json:"told,omitempty"`
}

// idsInMessage keep a message below the 8,000 bytes that a notification may have.
const idsInMessage = 40

func (f *Fleet) payload(m message) string {
	m.From = f.self
	b, err := json.Marshal(m)
	if err != nil {
		panic(err) // of strings and numbers
	}
	return string(b)
}

// talk is what this process and the others ask each other. It belongs to the Fleet's mutex, but for
// refreshing, and refreshed, which belongs to whoever has put a value into it.
type talk struct {
	questions map[*question]struct{} // own
	lastAsked int64
	peers     map[string]*peer
	read      chan struct{} // closed after the rows were read
	readAt    time.Time     // when the last read began

	heard   int64 // the last question of others
	told    int64 // the last one that the row answers
	until   time.Time
	urgent  bool // something has changed that is waited for
	some    bool // something has
	wishes  map[wishKey]wish
	version int64

	refreshing chan struct{}
	refreshed  time.Time
}

func newTalk() talk {
	return talk{
		questions: make(map[*question]struct{}), peers: make(map[string]*peer), wishes: make(map[wishKey]wish),
		read: make(chan struct{}), refreshing: make(chan struct{}, 1),
	}
}

// question is one of this process.
type question struct {
	message
	posed time.Time // zero: not yet
	sent  time.Time
	until time.Time // [never]: until it is closed
}

// peer is another process that lives.
type peer struct {
	asked   int64 // the last question that it has answered, of anyone
	version int64
	seen    time.Time
	since   time.Time
	missed  time.Time // when it did not answer in time, zero: it has answered since
	broken  bool      // its row could not be read
}

// wish is a position that a barrier waits for.
type (
	wishKey struct {
		from string
		ask  int64
	}
	wish struct {
		revocation.Position
		until time.Time
	}
)

// unconfirmed is the first position that is waited for and not reached at this one.
func (t *talk) unconfirmed(at revocation.Position, now time.Time) (p revocation.Position, ok bool) {
	consider := func(q revocation.Position) {
		if q.Epoch != "" && !applied(at, q) && (!ok || q.Seq < p.Seq) {
			p, ok = q, true
		}
	}
	for q := range t.questions {
		consider(q.Confirm)
	}
	for _, w := range t.wishes {
		if now.Before(w.until) {
			consider(w.Position)
		}
	}
	return p, ok
}

// answered reports whether all who live have answered q, and whether that is without some who are not waited
// for, because they did not answer lately.
func (t *talk) answered(q *question, now time.Time) (ok, without bool) {
	if q.posed.IsZero() || t.readAt.Before(q.posed) {
		return false, false
	}
	for _, p := range t.peers {
		switch {
		case p.asked >= q.Ask:
		case now.Sub(p.missed) < forgiveFor:
			without = true
		default:
			return false, false
		}
	}
	return true, without
}

// missed is called when those who have not answered q are waited for no longer.
func (t *talk) missed(q *question, now time.Time) {
	for _, p := range t.peers {
		if p.asked < q.Ask && now.Sub(p.missed) >= forgiveFor {
			p.missed = now
		}
	}
}

// open begins to ask the gateways of this process, and is followed by [Fleet.pose] for the others, until
// done is called, or until has come. It needs f.mu.
func (f *Fleet) open(m message, until time.Time) (q *question, done func()) {
	q = &question{message: m, until: until}
	f.talk.questions[q] = struct{}{}
	f.ask(m)
	return q, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.talk.questions, q)
	}
}

// ask asks the gateways that report here. It needs f.mu.
func (f *Fleet) ask(m message) {
	now := time.Now()
	if m.Confirm.Epoch != "" {
		for _, g := range f.gateways {
			if g.held != nil && !applied(g.report.Position, m.Confirm) {
				g.wake()
			}
		}
	}
	if m.Digest != nil && *m.Digest != f.wanted.DigestRequest && !(now.Before(f.wanted.until) && f.wanted.covers(*m.Digest)) {
		f.wanted = digestWish{DigestRequest: *m.Digest, until: now.Add(digestFor)}
		for _, g := range f.gateways {
			if g.source == here {
				g.wanted = *m.Digest
				g.wish(f.wanted, now)
			}
		}
	}
	for _, id := range m.IDs {
		if g := f.gateways[id]; g != nil && g.source == here && g.loads.name != m.Load {
			g.load(m.Load, now)
		}
	}
}

// unsynced makes the transaction not wait for the disk: what a crash takes is asked and told again.
const unsynced = `set_config('synchronous_commit', 'off', true)`

const poseSQL = `
	SELECT n, pg_notify('` + channel + `', jsonb_set($1::jsonb, '{ask}', to_jsonb(n))::text), ` + unsynced + `
	FROM nextval('rescind.fleet_questions') AS n`

// pose asks the other processes.
func (f *Fleet) pose(ctx context.Context, q *question) error {
	var n int64
	if err := f.pool.QueryRow(ctx, poseSQL, f.payload(q.message)).Scan(&n, nil, nil); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	q.Ask, q.posed = n, time.Now()
	q.sent = q.posed
	f.talk.lastAsked = max(f.talk.lastAsked, n)
	kick(f.kicks.converse)
	return nil
}

// AskDigests asks all gateways for digests with this cutoff at positions not before after. They are in
// Gateway.Report.Digest when they come; see [Fleet.Changed], which goes by them for a quarter of a minute.
// A later call takes the place of an earlier one, and of several processes that of the latest cutoff.
func (f *Fleet) AskDigests(ctx context.Context, r replica.DigestRequest) error {
	f.mu.Lock()
	delete(f.talk.questions, f.digests)
	f.mu.Unlock()
	q, err := f.askFor(ctx, message{Digest: &r})
	if err != nil {
		return fmt.Errorf("ask for digests: %w", err)
	}
	f.mu.Lock()
	f.digests = q
	f.mu.Unlock()
	return nil
}

// AskLoad asks gateways to load a snapshot. Those that are not there are passed over.
func (f *Fleet) AskLoad(ctx context.Context, ids []string) error {
	name := uuid.NewString()
	for chunk := range slices.Chunk(ids, idsInMessage) {
		if _, err := f.askFor(ctx, message{Load: name, IDs: chunk}); err != nil {
			return fmt.Errorf("ask gateways to load a snapshot: %w", err)
		}
	}
	return nil
}

const askFor = 15 * time.Second

func (f *Fleet) askFor(ctx context.Context, m message) (*question, error) {
	f.mu.Lock()
	q, done := f.open(m, time.Now().Add(askFor))
	f.mu.Unlock()
	if err := f.pose(ctx, q); err != nil {
		done()
		return nil, err
	}
	return q, nil
}

// listen hears the other processes, on a connection of its own: LISTEN belongs to it.
func (f *Fleet) listen(ctx context.Context) {
	for ctx.Err() == nil {
		err := f.listenOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		f.log.Warn("lost the notifications of other processes, what they know comes late until they are back", "error", err)
		pause(ctx, time.Second)
	}
}

func (f *Fleet) listenOnce(ctx context.Context) error {
	conn, err := f.connect(ctx)
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(ctx) // it is of no use either way
	}()
	if _, err := conn.Exec(ctx, `LISTEN `+channel); err != nil {
		return err
	}
	f.mu.Lock()
	f.rowsChanged(nil) // what was said of rows before was not heard
	f.mu.Unlock()
	kick(f.kicks.converse)
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return err
		}
		var m message
		if err := json.Unmarshal([]byte(n.Payload), &m); err != nil {
			f.log.Warn("passes over a notification that it does not understand", "error", err)
			continue
		}
		if m.From != f.self {
			f.hear(m)
		}
	}
}

func (f *Fleet) connect(ctx context.Context) (*pgx.Conn, error) {
	cfg := f.pool.Config().ConnConfig.Copy()
	p := cfg.RuntimeParams
	p["application_name"] = "rescind fleet"
	// Both sides are to find out within about ten seconds that the other has gone without a word.
	p["tcp_keepalives_idle"], p["tcp_keepalives_interval"], p["tcp_keepalives_count"] = "5", "2", "3"
	dialer := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3,
	}}
	cfg.DialFunc = dialer.DialContext
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return pgx.ConnectConfig(ctx, cfg)
}

// hear takes what another process says.
func (f *Fleet) hear(m message) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(m.Rows) > 0 {
		f.rowsChanged(m.Rows)
	}
	if m.Told && len(f.talk.questions) > 0 {
		kick(f.kicks.converse)
	}
	if m.Ask == 0 || f.cfg.Observe {
		return
	}
	now := time.Now()
	t := &f.talk
	t.heard, t.until = max(t.heard, m.Ask), now.Add(watchFor)
	if m.Confirm.Epoch != "" {
		key := wishKey{m.From, m.Ask}
		_, again := t.wishes[key]
		t.wishes[key] = wish{m.Confirm, t.until}
		maps.DeleteFunc(t.wishes, func(_ wishKey, w wish) bool { return now.After(w.until) })
		if again {
			m.Confirm = revocation.Position{}
		}
	}
	f.ask(m)
	kick(f.kicks.tell)
}

// changedRows are gateways whose rows are to be read.
type changedRows struct {
	ids map[string]struct{}
	all bool
}

// rowsChanged has rows read, nil: all. It needs f.mu.
func (f *Fleet) rowsChanged(ids []string) {
	r := &f.rows
	if r.ids == nil {
		r.ids = make(map[string]struct{})
	}
	for _, id := range ids {
		r.ids[id] = struct{}{}
	}
	r.all = r.all || ids == nil || len(r.ids) > maxChanged
	kick(f.kicks.rows)
}

// syncRows reads rows that have changed, those together that change meanwhile.
func (f *Fleet) syncRows(ctx context.Context) {
	for down := false; ctx.Err() == nil; {
		select {
		case <-f.kicks.rows:
		case <-ctx.Done():
			return
		}
		err := f.readChanged(ctx)
		if err != nil && ctx.Err() == nil {
			if !down {
				f.log.Warn("cannot read gateways that have changed, it is tried until it can", "error", err)
			}
			pause(ctx, time.Second)
		}
		down = err != nil
	}
}

// readChanged returns when all rows are read that have changed before the call. What it cannot read is left to be read.
func (f *Fleet) readChanged(ctx context.Context) (err error) {
	select {
	case f.changing <- struct{}{}: // whoever is at it may have what changed before
		defer func() { <-f.changing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	f.mu.Lock()
	r := f.rows
	f.rows = changedRows{}
	f.mu.Unlock()
	ids := slices.Collect(maps.Keys(r.ids))
	switch {
	case r.all:
		err = f.sync(ctx, nil, false)
	case len(ids) > 0:
		err = f.sync(ctx, ids, true)
	}
	if err != nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.rows.all = f.rows.all || r.all
		f.rowsChanged(append([]string{}, ids...))
	}
	return err
}

// tellSoon is called with each report that was taken. It needs f.mu.
func (f *Fleet) tellSoon(g *gateway, r *replica.Report) {
	t := &f.talk
	t.some = true
	if g.reportedAt.After(t.until) {
		return
	}
	waited := r.Digest != nil && r.Digest.Cutoff == f.wanted.Cutoff
	for _, w := range t.wishes {
		waited = waited || applied(r.Position, w.Position)
	}
	t.urgent = t.urgent || waited
	kick(f.kicks.tell)
}

// told is a gateway in a process's row. Ages are milliseconds at told_at.
type told struct {
	ID          string         `json:"id"`
	Account     string         `json:"account"`
	Tenant      string         `json:"tenant"`
	Sees        []string       `json:"sees,omitempty"`
	FirstSeen   time.Time      `json:"first_seen"`
	Age         int64          `json:"age"`
	Lease       int64          `json:"lease"`
	Report      replica.Report `json:"report"`         // without tenants
	List        int            `json:"list,omitempty"` // of its tenants, from 1; 0: it names none
	ConflictAge *int64         `json:"conflict_age,omitempty"`
	Comparison  *Comparison    `json:"comparison,omitempty"`
	ComparedAge int64          `json:"compared_age,omitempty"`
}

// row is what a process tells.
type row struct {
	Lists    [][]string `json:"lists,omitempty"` // of tenants, for most gateways have the same
	Gateways []told     `json:"gateways"`
}

var (
	encoder, _ = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true))
	decoder, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxRow))
)

const (
	beatSQL = `
		WITH beat AS (
			INSERT INTO rescind.fleet_processes (id, since, seen) VALUES ($1, statement_timestamp() - make_interval(secs => $2), statement_timestamp())
			ON CONFLICT (id) DO UPDATE SET seen = excluded.seen RETURNING id)
		SELECT ` + unsynced + ` FROM beat`
	tellSQL = `
		WITH told AS (
			INSERT INTO rescind.fleet_processes (id, since, seen, asked, version, told_at, gateways)
			VALUES ($1, statement_timestamp() - make_interval(secs => $2), statement_timestamp(), $3, $4,
				statement_timestamp() - make_interval(secs => $7), $5)
			ON CONFLICT (id) DO UPDATE SET seen = excluded.seen, asked = excluded.asked, version = excluded.version,
				told_at = excluded.told_at, gateways = excluded.gateways
			RETURNING id)
		SELECT pg_notify('` + channel + `', $6), ` + unsynced + ` FROM told`
)

// tell keeps this process's row.
func (f *Fleet) tell(ctx context.Context) {
	var beat, last time.Time
	down, known := false, false
	for ctx.Err() == nil {
		f.mu.Lock()
		now := time.Now()
		t := &f.talk
		due := t.heard > t.told || now.Before(t.until) && (t.urgent || t.some && now.Sub(last) >= tellAgain)
		next := beat.Add(beatEvery)
		if now.Before(t.until) && t.some && last.Add(tellAgain).Before(next) {
			next = last.Add(tellAgain)
		}
		since := now.Sub(f.since).Seconds()
		var heard, version int64
		var body row
		if due {
			t.urgent, t.some = false, false
			t.version++
			heard, version = t.heard, t.version
			body = f.body(now)
		}
		f.mu.Unlock()
		var err error
		var work time.Duration
		// Not ended with ctx: a row that was still on its way then would come after its removal.
		wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
		if due {
			var b []byte
			b, err = pack(body)
			work = time.Since(now)
			if err == nil {
				err = f.write(wctx, now, since, heard, version, b)
				last, beat = time.Now(), now
			}
		}
		if !now.Before(beat.Add(beatEvery)) { // also if there is too much to tell
			_, beatErr := f.pool.Exec(wctx, beatSQL, f.self, since)
			err = errors.Join(err, beatErr)
			beat = now
		}
		cancel()
		if err == nil && !known {
			known = true
			close(f.known)
		}
		switch {
		case ctx.Err() != nil:
		case err != nil && !down:
			f.log.Warn("cannot tell other processes of gateways, it is tried until it can", "error", err)
		case err == nil && due:
			f.mu.Lock()
			t.told = max(t.told, heard)
			f.mu.Unlock()
		}
		down = err != nil
		switch {
		case down:
			pause(ctx, time.Second)
		case due:
			pause(ctx, min(max(tellGap, tellShare*work), tellAgain))
		default:
			timer := time.NewTimer(max(time.Until(next), time.Millisecond))
			select {
			case <-f.kicks.tell:
			case <-timer.C:
			case <-ctx.Done():
			}
			timer.Stop()
		}
	}
}

// pack makes a body what a row has.
func pack(body row) ([]byte, error) {
	b, err := json.Marshal(body)
	if err != nil {
		panic(err) // reports came as JSON
	}
	if len(b) > maxRow {
		return nil, fmt.Errorf("%d gateways report to this process, of which there are %d MiB to tell, more than the %d MiB that others take: let fewer report to it",
			len(body.Gateways), len(b)>>20, maxRow>>20)
	}
	return encoder.EncodeAll(b, nil), nil
}

func unpack(b []byte) (body row, err error) {
	if b, err = decoder.DecodeAll(b, nil); err != nil {
		return row{}, err
	}
	if err := json.Unmarshal(b, &body); err != nil {
		return row{}, err
	}
	for i := range body.Gateways {
		g := &body.Gateways[i]
		switch {
		case g.List < 0 || g.List > len(body.Lists):
			return row{}, fmt.Errorf("gateway %s has the list %d of %d", g.ID, g.List, len(body.Lists))
		case g.List > 0:
			g.Report.Tenants = body.Lists[g.List-1]
		}
	}
	return body, nil
}

// write writes the row as of now, which may be a while ago.
func (f *Fleet) write(ctx context.Context, now time.Time, since float64, asked, version int64, b []byte) error {
	return f.pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
		age := time.Since(now).Seconds() // known once there is nothing more to wait for
		_, err := conn.Exec(ctx, tellSQL, f.self, since, asked, version, b, f.payload(message{Told: true}), age)
		return err
	})
}

// body needs f.mu.
func (f *Fleet) body(now time.Time) (body row) {
	body.Gateways = make([]told, 0, f.reports)
	numbers := make(map[*string]int) // by the list's first element, for equal ones are shared
	for _, g := range f.gateways {
		if g.source != here || now.Sub(g.reportedAt) > keepTelling {
			continue
		}
		t := told{
			ID: g.id, Account: g.account, Tenant: g.tenant, Sees: g.sees, FirstSeen: g.firstSeen, Report: g.report,
			Age: now.Sub(g.reportedAt).Milliseconds(), Lease: g.lease.Milliseconds(),
		}
		if !g.conflict.IsZero() {
			age := now.Sub(g.conflict).Milliseconds()
			t.ConflictAge = &age
		}
		if g.comparison.Verdict != "" {
			c := g.comparison
			t.Comparison, t.ComparedAge = &c, now.Sub(c.Time).Milliseconds()
		}
		if list := g.report.Tenants; len(list) > 0 {
			t.Report.Tenants = nil
			if t.List = numbers[&list[0]]; t.List == 0 {
				body.Lists = append(body.Lists, list)
				t.List = len(body.Lists)
				numbers[&list[0]] = t.List
			}
		}
		body.Gateways = append(body.Gateways, t)
	}
	return body
}

// converse repeats the questions of this process and reads the answers, while there are any.
func (f *Fleet) converse(ctx context.Context) {
	for down := false; ctx.Err() == nil; {
		f.mu.Lock()
		now := time.Now()
		var again []string
		asks, every := false, repeatEvery
		for q := range f.talk.questions {
			if !q.until.IsZero() && now.After(q.until) {
				delete(f.talk.questions, q)
				continue
			}
			if q.posed.IsZero() {
				continue
			}
			asks = true
			if ok, _ := f.talk.answered(q, now); !ok {
				every = pollEvery
			}
			if now.Sub(q.sent) >= repeatEvery {
				q.sent = now
				again = append(again, f.payload(q.message))
			}
		}
		f.mu.Unlock()
		if asks {
			err := f.readRows(ctx, again)
			if err != nil && !down && ctx.Err() == nil {
				f.log.Warn("cannot read what other processes know of gateways, it is tried until it can", "error", err)
			}
			down = err != nil
		}
		timer := time.NewTimer(every)
		wake := timer.C
		if !asks {
			wake = nil
		}
		select {
		case <-f.kicks.converse:
		case <-wake:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

const readSQL = `
	SELECT p.id::text, p.asked, p.version,
		extract(epoch FROM statement_timestamp() - p.seen)::float8, extract(epoch FROM statement_timestamp() - p.since)::float8,
		extract(epoch FROM statement_timestamp() - p.told_at)::float8,
		CASE WHEN p.version IS DISTINCT FROM k.version THEN p.gateways END
	FROM rescind.fleet_processes p LEFT JOIN unnest($2::uuid[], $3::bigint[]) AS k (id, version) ON k.id = p.id
	WHERE p.id <> $1 AND p.seen > statement_timestamp() - make_interval(secs => $4)`

// readRows sends again what was asked, and reads what the other processes have answered.
func (f *Fleet) readRows(ctx context.Context, again []string) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	conn, err := f.pool.Acquire(ctx) // ages count from now on
	if err != nil {
		return err
	}
	defer conn.Release()
	if len(again) > 0 {
		if _, err := conn.Exec(ctx, `SELECT pg_notify('`+channel+`', p), `+unsynced+` FROM unnest($1::text[]) AS p`, again); err != nil {
			return err
		}
	}
	f.mu.Lock()
	began := time.Now()
	var ids []string
	var versions []int64
	for id, p := range f.talk.peers {
		ids, versions = append(ids, id), append(versions, p.version)
	}
	f.mu.Unlock()
	type process struct {
		ID                   string
		Asked, Version       int64
		Seen, Since, ToldAge float64
		Gateways             []byte
	}
	rows, err := conn.Query(ctx, readSQL, f.self, ids, versions, deadAfter.Seconds())
	if err != nil {
		return err
	}
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[process])
	if err != nil {
		return err
	}
	conn.Release()
	bodies, broken := make([]row, len(all)), make([]error, len(all))
	for i, r := range all {
		if r.Gateways != nil {
			bodies[i], broken[i] = unpack(r.Gateways)
		}
	}
	ago := func(seconds float64) time.Time { return began.Add(-time.Duration(seconds * float64(time.Second))) }
	f.mu.Lock()
	defer f.mu.Unlock()
	peers := make(map[string]*peer, len(all))
	for i, r := range all {
		p := &peer{asked: r.Asked, version: r.Version, seen: ago(r.Seen), since: ago(r.Since)}
		old := f.talk.peers[r.ID]
		if broken[i] != nil { // as if it had not answered
			p.asked, p.version, p.broken = 0, -1, true
			if old != nil {
				p.asked = old.asked
			}
			if old == nil || !old.broken {
				f.log.Warn("passes over what another process says of its gateways, which it does not understand", "process", r.ID, "error", broken[i])
			}
		}
		if old != nil && p.asked <= old.asked {
			p.missed = old.missed
		}
		peers[r.ID] = p
	}
	f.talk.peers, f.talk.readAt = peers, began
	for i, r := range all {
		for j := range bodies[i].Gateways {
			f.merge(&bodies[i].Gateways[j], r.ID, ago(r.ToldAge))
		}
		if r.Gateways == nil || broken[i] != nil {
			continue
		}
		if ids := f.untold(r.ID, &bodies[i]); len(ids) > 0 {
			f.rowsChanged(ids)
		}
	}
	close(f.talk.read)
	f.talk.read = make(chan struct{})
	for w := range f.barriers {
		kick(w.wake)
	}
	return nil
}

// untold are the gateways that a process has told of, and tells of no longer: they have left meanwhile, or report
// elsewhere, and the database knows. It needs f.mu.
func (f *Fleet) untold(from string, told *row) (ids []string) {
	there := make(map[string]bool, len(told.Gateways))
	for i := range told.Gateways {
		there[told.Gateways[i].ID] = true
	}
	for id, g := range f.gateways {
		if g.source == elsewhere && g.from == from && !there[id] {
			ids = append(ids, id)
		}
	}
	return ids
}

// storedSlack makes up for what is lost when times go through another clock: what a process says comes
// before what it has written down.
const storedSlack = 5 * time.Second

// merge takes what another process says of a gateway, if it knows newer of it. It needs f.mu.
func (f *Fleet) merge(t *told, from string, at time.Time) {
	ms := func(age int64) time.Time { return at.Add(-time.Duration(age) * time.Millisecond) }
	reportedAt := ms(t.Age)
	g := f.gateways[t.ID]
	switch {
	case g == nil:
		g = newGateway(t.ID)
		g.account, g.firstSeen = t.Account, t.FirstSeen
		f.add(g)
		f.rowsChanged([]string{t.ID}) // what was told may be from before it was forgotten
	case g.account != t.Account: // it has been forgotten, and is another's: the rows will tell
		return
	}
	if t.ConflictAge != nil && ms(*t.ConflictAge).After(g.conflict) {
		g.conflict = ms(*t.ConflictAge)
	}
	if t.Comparison != nil && ms(t.ComparedAge).After(g.comparison.Time) {
		g.comparison = *t.Comparison
		g.comparison.Time = ms(t.ComparedAge)
		f.announce()
	}
	newer := reportedAt.After(g.reportedAt) || g.source == stored && reportedAt.After(g.reportedAt.Add(-storedSlack))
	// What one process says comes in order, while times by way of the database's clock waver.
	newer = newer || g.source == elsewhere && g.from == from
	if now := time.Now(); g.source != stored && g.from != from && g.report.Instance != t.Report.Instance {
		lease := max(g.lease, f.cfg.Lease)
		if now.Sub(g.reportedAt) < lease && now.Sub(reportedAt) < lease { // both live: two processes have one id
			newer = later(&t.Report, &g.report)
			g.conflict = now
		}
	}
	if !newer {
		return
	}
	g.source, g.from, g.tenant, g.sees = elsewhere, from, t.Tenant, t.Sees
	g.lease = time.Duration(t.Lease) * time.Millisecond
	f.heard(g, &t.Report, reportedAt)
}
