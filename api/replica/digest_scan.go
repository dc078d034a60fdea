package replica

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// observer is told of what changes in the content of a state. What it has is changed with State.mu held.
type observer struct {
	scan    *scan    // nil: none runs
	history *history // nil: none is kept

	hashed  *set // of which hash is; most changes are of the same
	hashing hashedSet
}

// revoked is told before the entry of k, none if there is none, becomes rec.
func (o *observer) revoked(c *content, set *set, k key, e entry, rec Record) {
	read := o.scan != nil && o.scan.hasRead(set, k) && c.counts(set, k)
	if !read && o.history == nil {
		return
	}
	if o.hashed != set {
		o.hashed, o.hashing = set, hashSet(set.class, c.marks.issuerOf(set))
	}
	var before counted
	if e.ok() {
		before = counted{hash: o.hashing.entry(k, e.exp(), e.notAfter(set)), end: e.exp()}
		if c.archive != nil {
			before.domain = c.archive.domainOf(e.record(set))
		}
	}
	if !set.timed {
		rec.NotAfter = 0
	}
	o.note(read, before, counted{o.hashing.entry(k, rec.Exp, rec.NotAfter), rec.Exp, rec.Tenant.Domain})
}

// changed is told after e took the place of was, which may be nil, or is deleted.
func (o *observer) changed(was, e catalog.Entity, deleted bool) {
	var none counted
	if was != nil {
		o.note(o.scan != nil && o.scan.hasReadEntity(was), countedOf(was), none)
	}
	if !deleted {
		o.note(o.scan != nil && o.scan.hasReadEntity(e), none, countedOf(e))
	}
}

// note is of a change; read: the scan is past it.
func (o *observer) note(read bool, before, after counted) {
	if read && before.end != 0 {
		o.scan.sum(before.domain).sub(before.hash, before.end, o.scan.cutoff)
	}
	if read && after.end != 0 {
		o.scan.sum(after.domain).add(after.hash, after.end, o.scan.cutoff)
	}
	if o.history != nil {
		o.history.note(before, after)
	}
}

// applied is told that what was noted is that of the event at seq.
func (o *observer) applied(seq, ahead revocation.Seq) {
	if o.history != nil {
		o.history.append(seq, ahead)
	}
}

// replaced is told that another content takes the place of the one that was observed.
func (o *observer) replaced() {
	o.hashed = nil
	if o.history != nil {
		o.history.forget()
	}
	if o.scan != nil {
		o.scan.restart()
	}
}

// domainOf is the tenant of record n.
func (a *archive) domainOf(n uint32) string {
	return a.tenants.values[a.chunks[n/chunkSize].records[n%chunkSize].tenant].Domain
}

// lead notes that something is held ahead of the log, up to p. It needs s.mu.
func (s *State) lead(p revocation.Position) {
	s.breakOff()
	switch p.Epoch {
	case s.At().Epoch:
		s.ahead = max(s.ahead, p.Seq)
	case s.foreign.Epoch:
		s.foreign.Seq = max(s.foreign.Seq, p.Seq)
	default:
		s.foreign = p
	}
}

// breakOff notes that the state changes otherwise than by the log's next event. It needs s.mu.
func (s *State) breakOff() {
	if o := s.content.observer; o != nil && o.history != nil {
		o.history.forget()
		s.breaks++
	}
}

// enter notes that the state comes to be of an epoch. It needs s.mu.
func (s *State) enter(e revocation.Epoch) {
	was := s.At().Epoch
	if was == e {
		return
	}
	held := revocation.Position{Epoch: was, Seq: s.ahead}
	s.ahead = 0
	if s.foreign.Epoch == e {
		s.ahead = s.foreign.Seq
	}
	s.foreign = held
}

// exact reports whether the state is that of its position: nothing is held ahead of it. What is of
// another epoch is held beside it, not ahead: it may never come. It needs s.mu.
func (s *State) exact() bool {
	at, part := s.At(), s.content.part
	return at.Epoch != "" && s.ahead <= at.Seq && (part == nil || len(part.last) == 0)
}

// scan reads a state for its digest, while the state changes: what changes where it has been corrects
// its sums, and what changes where it comes to is not counted before.
//
// Where that is goes by what no rebuilding changes: in the catalog by the order of entities, and in a set
// by the hash of the entry. A table has the entries of a range of hashes; it is replaced by one of the same
// range, by two of its halves, or by none when a set becomes empty, which begins anew with one of all
// hashes.
//
// It is changed by the one who reads with State.mu held for reading, by those who change the state with
// State.mu held.
type scan struct {
	cutoff   int64
	after    revocation.Position
	byTenant bool
	woken    chan struct{} // has one after it was restarted, and when it is over

	scanned

	over   bool
	at     revocation.Position // when it was over
	breaks uint64              // State.breaks, then
	err    error
}

// scanned is what was read.
type scanned struct {
	sums map[string]*tally // by domain, of all tenants by "" if not byTenant
	last struct {          // of sums
		domain string
		*tally
	}

	set   uint32   // sets before it were read
	from  uint64   // hashes before it were read, of set
	shelf int      // shelves before it were read, by their index in catalog.Nouns
	found struct { // entities up to it were read, of shelf
		any  bool
		id   int32
		uuid string
	}
	complete bool // all was read
}

// scanStep is about how much is read with State.mu held: so many sets or entities, or entries, of which
// there may be a table more.
const scanStep = 1000

func newScan(cutoff int64, after revocation.Position, byTenant bool) *scan {
	return &scan{
		cutoff: cutoff, after: after, byTenant: byTenant,
		woken: make(chan struct{}, 1), scanned: scanned{sums: make(map[string]*tally)},
	}
}

// read has sc read the state, until it is over or ctx is.
func (s *State) read(ctx context.Context, sc *scan) error {
	select {
	case s.scanning <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.scanning }()

	s.observe(sc)
	defer s.observe(nil)
	for ctx.Err() == nil {
		more, over := s.readOn(sc)
		switch {
		case over:
			return sc.err
		case more:
			runtime.Gosched() // requests come first
			continue
		}
		select {
		case <-sc.woken:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

// observe has changes noted for sc, or for no scan.
func (s *State) observe(sc *scan) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.content
	if c.observer == nil {
		c.observer = new(observer)
	}
	c.observer.scan = sc
	if sc == nil && c.observer.history == nil {
		c.observer = nil
	}
}

// readOn takes a step of sc, and reports whether there is more to read now, and whether it is over.
func (s *State) readOn(sc *scan) (more, over bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	sc.step(s)
	sc.settle(s)
	return !sc.complete && s.At().Epoch != "", sc.over
}

// settle ends the scan that runs, if there is one, and this is the moment. It is to be called when the
// state has moved, with s.mu held.
func (s *State) settle() {
	if o := s.content.observer; o != nil && o.scan != nil {
		o.scan.settle(s)
	}
}

// settle ends the scan if this is the moment.
func (sc *scan) settle(s *State) {
	at := s.At()
	switch {
	case sc.over || at.Epoch == "":
		return
	case sc.after.Epoch != "" && sc.after.Epoch != at.Epoch:
		sc.err = fmt.Errorf("it is at %s, not past %s: %w", at, sc.after, ErrEpoch)
	case s.forgotten > sc.cutoff:
		sc.err = fmt.Errorf("revocations that end from %d on are to be counted, and those that ended before %d are forgotten",
			sc.cutoff, s.forgotten)
	case sc.byTenant && s.content.part != nil:
		sc.err = errors.New("it is about a part of the log")
	case !sc.complete || at.Seq < sc.after.Seq || !s.exact():
		return
	}
	sc.at, sc.breaks = at, s.breaks
	sc.over = true
	sc.wake()
}

func (sc *scan) wake() {
	select {
	case sc.woken <- struct{}{}:
	default:
	}
}

// restart has the scan begin anew.
func (sc *scan) restart() {
	if sc.over {
		return
	}
	sc.scanned = scanned{sums: make(map[string]*tally)}
	sc.wake()
}

// sum is what was read of a tenant.
func (sc *scan) sum(domain string) *tally {
	if !sc.byTenant {
		domain = ""
	}
	if sc.last.tally == nil || sc.last.domain != domain {
		t := sc.sums[domain]
		if t == nil {
			t = new(tally)
			sc.sums[domain] = t
		}
		sc.last.domain, sc.last.tally = domain, t
	}
	return sc.last.tally
}

// hasRead reports whether the scan is past the entry of k, if there is one.
func (sc *scan) hasRead(set *set, k key) bool {
	if sc.over {
		return false // its sums are taken
	}
	return sc.complete || set.number < sc.set || set.number == sc.set && set.hash(k) < sc.from
}

// hasReadEntity is hasRead for an entity.
func (sc *scan) hasReadEntity(e catalog.Entity) bool {
	if sc.over {
		return false
	}
	if sc.complete {
		return true
	}
	shelf := slices.Index(catalog.Nouns, e.Noun())
	return shelf < sc.shelf || shelf == sc.shelf && sc.found.any && sc.compare(e) <= 0
}

// compare compares e with the last entity that was read, by order.
func (sc *scan) compare(e catalog.Entity) int {
	base := e.Base()
	return cmp.Or(cmp.Compare(base.ID, sc.found.id), cmp.Compare(base.UUID, sc.found.uuid))
}

// step reads on, the catalog first: sets may be added until all is read.
func (sc *scan) step(s *State) {
	if sc.complete || sc.over || s.At().Epoch == "" {
		return
	}
	left := scanStep
	for left > 0 && sc.shelf < len(catalog.Nouns) {
		left -= sc.readShelf(s.content.shelves)
	}
	for left > 0 && sc.set < uint32(len(s.content.marks.sets)) {
		left -= sc.readTable(s.content)
	}
	sc.complete = left > 0
}

// readTable reads the next table, and returns about how much that was.
func (sc *scan) readTable(c *content) int {
	set := c.marks.sets[sc.set]
	dir := set.dir.Load()
	if dir == nil {
		sc.set, sc.from = sc.set+1, 0
		return 1
	}
	t := dir.tables[dir.index(sc.from)]
	hashed := hashSet(set.class, c.marks.issuerOf(set))
	// Only in a set that was empty in between has the table what comes before from.
	whole := t.first(sc.from) == sc.from
	var sum *tally
	if !sc.byTenant {
		sum = sc.sum("")
	}
	t.each(set.stride, func(e entry) {
		exp := e.exp()
		if exp < sc.cutoff || !whole && set.hash(e.key()) < sc.from || !c.counts(set, e.key()) {
			return
		}
		if sc.byTenant {
			sum = sc.sum(c.archive.domainOf(e.record(set)))
		}
		sum.add(hashed.entry(e.key(), exp, e.notAfter(set)), exp, sc.cutoff)
	})
	sc.from = t.next(sc.from)
	if sc.from == 0 {
		sc.set++
	}
	return 1 + t.n
}

// first is the first of the hashes that t is for, of which hash is one.
func (t *table) first(hash uint64) uint64 { return hash &^ (1<<(64-t.depth) - 1) }

// next is the first hash after those that t is for, 0 if there is none.
func (t *table) next(hash uint64) uint64 { return t.first(hash) + 1<<(64-t.depth) }

// readShelf reads up to scanStep entities, and returns about how many there were.
func (sc *scan) readShelf(s *shelves) int {
	switch noun := catalog.Nouns[sc.shelf]; noun {
	case catalog.NounTenant:
		return readShelf(sc, s.tenants.sorted)
	case catalog.NounKeyManager:
		return readShelf(sc, s.keyManagers.sorted)
	case catalog.NounPolicy:
		return readShelf(sc, s.policies.sorted)
	case catalog.NounScope:
		return readShelf(sc, s.scopes.sorted)
	case catalog.NounAPI:
		return readShelf(sc, s.apis.sorted)
	case catalog.NounApplication:
		return readShelf(sc, s.applications.sorted)
	case catalog.NounKeyMapping:
		return readShelf(sc, s.keyMappings.sorted)
	case catalog.NounSubscription:
		return readShelf(sc, s.subscriptions.sorted)
	default:
		panic("replica: a noun that no shelf is for: " + string(noun))
	}
}

func readShelf[E entity](sc *scan, list []E) int {
	if sc.found.any {
		i, _ := slices.BinarySearchFunc(list, sc, func(e E, sc *scan) int {
			return cmp.Or(sc.compare(e), -1) // past it
		})
		list = list[i:]
	}
	n := min(len(list), scanStep)
	for _, e := range list[:n] {
		sc.sum(e.Base().Tenant.Domain).add(hashEntity(e), always, sc.cutoff)
	}
	if n == len(list) {
		sc.shelf++
		sc.found.any = false
	} else {
		last := list[n-1].Base()
		sc.found.any, sc.found.id, sc.found.uuid = true, last.ID, last.UUID
	}
	return 1 + n
}
