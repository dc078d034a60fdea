package replica

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// quick is a disk that does not wait for the real one.
func quick() disk {
	d := realDisk
	d.sync = func(*os.File) error { return nil }
	d.syncDir = func(string) error { return nil }
	return d
}

func open(t testing.TB, path string) *folder {
	t.Helper()
	f, err := openFolder(path, slog.New(slog.DiscardHandler))
	must(t, err)
	f.disk = quick()
	t.Cleanup(func() { f.close() })
	return f
}

// reopen loads what is in a folder.
func reopen(t testing.TB, path string) (f *folder, s *State, fresh time.Time) {
	t.Helper()
	f, s = open(t, path), newClock().newReplica(false)
	fresh, err := f.load(s)
	must(t, err)
	return f, s, fresh
}

func copyFolder(t testing.TB, from, to string) {
	t.Helper()
	must(t, os.RemoveAll(to))
	must(t, os.CopyFS(to, os.DirFS(from)))
}

func filesOf(t testing.TB, path string) []string {
	t.Helper()
	entries, err := os.ReadDir(path)
	must(t, err)
	var names []string
	for _, e := range entries {
		if e.Name() != lockName {
			names = append(names, e.Name())
		}
	}
	return names
}

// life is a log, a state that follows it badly, and the folder that the state is kept in. An
// event happens each second: the log reached to event n at begin+n.
type life struct {
	t     *testing.T
	c     *choices
	m     *model
	fill  func(*Loader) // the scope
	only  bool          // revocations only
	mine  func(e revocation.Event) bool
	lasts map[string]revocation.Seq

	path  string
	f     *folder
	s     *State
	asked revocation.Seq // everything that the state is about, up to it, was delivered
	// kept are the revocations that the folder said to have.
	kept map[revocation.Target]int64
	// ahead are revocations that the state got without their events.
	ahead map[revocation.Target]int64
	// held are the revocations that the state had before it was looked at what a crash leaves: none of
	// them is missing from what is said to be fresh. Nil: a disk that fails cannot always tell.
	held map[revocation.Target]int64
	// folds are of each prefix of the log.
	folds []fold
	fails int // one operation in so many fails; 0: none
	crash int // before one in so many the process ends; 0: none
	tried int
}

// fold is what a prefix of the log says, to those whom it concerns.
type fold struct {
	entities map[string]string
	revoked  map[revocation.Target]int64
}

func newLife(t *testing.T, seed byte) *life {
	data := make([]byte, size(1200, 2000))
	rand.NewChaCha8([32]byte{seed}).Read(data)
	l := &life{
		t: t, c: &choices{data}, m: newModel(), path: filepath.Join(t.TempDir(), "folder"), lasts: make(map[string]revocation.Seq),
		kept: make(map[revocation.Target]int64), ahead: make(map[revocation.Target]int64),
		folds: []fold{{map[string]string{}, map[revocation.Target]int64{}}},
	}
	all := func(revocation.Event) bool { return true }
	switch seed % 3 {
	case 0:
		l.fill, l.mine = func(*Loader) {}, all
	case 1:
		l.fill = func(l *Loader) { l.Tenants([]string{acme.Domain}) }
		l.mine = func(e revocation.Event) bool { return e.Tenant == acme }
	case 2:
		l.fill, l.mine, l.only = func(l *Loader) { l.RevocationsOnly() }, all, true
	}
	return l
}

func (l *life) now() int64 { return begin + int64(len(l.m.log)) }

// happen appends an event to the log.
func (l *life) happen() {
	tenant := acme
	if l.c.n(3) == 0 {
		tenant = revocation.SuperTenant
	}
	var e revocation.Event
	if l.c.n(3) > 0 {
		target := l.c.target()
		if target.Kind == revocation.KindTenant {
			target.ID = tenant.Domain
		} else {
			target.Iss = "https://" + tenant.Domain
		}
		e = revoke(Record{Target: target, Tenant: tenant, Exp: l.now() + 1000, NotAfter: l.now() + 1000})
	} else {
		entity := l.c.entity()
		entity.Base().Tenant, entity.Base().Timestamp = tenant, l.now()
		entity.Base().UUID = strings.Replace(entity.Base().UUID, "8000", fmt.Sprintf("8%03d", len(tenant.Domain)), 1)
		var err error
		e, err = catalog.NewEvent(catalog.Change{Verb: []catalog.Verb{catalog.Updated, catalog.Deleted}[l.c.n(5)/4], Entity: entity})
		must(l.t, err)
	}
	e.Time = time.Unix(l.now()+1, 0)
	e.Previous = l.lasts[tenant.Domain]
	e = l.m.append(e)
	l.lasts[tenant.Domain] = e.Seq

	last := l.folds[len(l.folds)-1]
	if l.mine(e) {
		last = fold{maps.Clone(last.entities), maps.Clone(last.revoked)}
		if rev, err := e.Revocation(); err == nil {
			last.revoked[rev.Target] = rev.Exp
		} else if c, err := catalog.ParseChange(e); err == nil && !l.only {
			last.entities[c.Entity.Base().UUID] = jsonOf(c.Entity)
			if c.Verb == catalog.Deleted {
				delete(last.entities, c.Entity.Base().UUID)
			}
		}
	}
	l.folds = append(l.folds, last)
}

func jsonOf(e catalog.Entity) string {
	b, err := json.Marshal(e)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// snapshot is what the source has.
func (l *life) snapshot(seq revocation.Seq) func(*Loader) {
	m := newModel()
	for _, e := range l.m.log[:seq] {
		if !l.mine(e) {
			continue
		}
		if rev, err := e.Revocation(); err == nil {
			m.revoked[rev.Target] = Record{Target: rev.Target, Tenant: rev.Tenant, Exp: rev.Exp, NotAfter: rev.NotAfter}
		} else if c, err := catalog.ParseChange(e); err == nil && !l.only {
			if m.entities[c.Entity.Base().UUID] = c.Entity; c.Verb == catalog.Deleted {
				delete(m.entities, c.Entity.Base().UUID)
			}
		}
	}
	return m.fill
}

// start is what a process does that begins.
func (l *life) start() {
	l.f = open(l.t, l.path)
	l.s = newClock().newReplica(false)
	_, err := l.f.load(l.s)
	must(l.t, err)
	l.asked = l.s.At().Seq
	l.f.disk = l.disk()
	clear(l.ahead)
}

// disk is one that fails and, before some of what is done, shows what would be left if the
// process ended.
func (l *life) disk() disk {
	d := quick()
	before := func(what string) error {
		l.tried++
		if l.crash > 0 && l.tried%l.crash == 0 {
			l.check("before " + what)
		}
		if l.fails > 0 && l.c.n(l.fails) == 0 {
			return syscall.ENOSPC
		}
		return nil
	}
	return disk{
		create: func(name string) (*os.File, error) {
			if err := before("create " + filepath.Base(name)); err != nil {
				return nil, err
			}
			return d.create(name)
		},
		write: func(f *os.File, b []byte, at int64) error {
			if err := before("write " + filepath.Base(f.Name())); err != nil {
				if len(b) > 0 {
					_ = d.write(f, b[:l.c.n(len(b))], at)
				}
				return err
			}
			return d.write(f, b, at)
		},
		sync:    func(f *os.File) error { return before("sync " + filepath.Base(f.Name())) },
		syncDir: func(string) error { return before("sync the folder") },
		rename: func(from, to string) error {
			if err := before("rename " + filepath.Base(from)); err != nil {
				return err
			}
			return d.rename(from, to)
		},
		remove: func(name string) error {
			if err := before("remove " + filepath.Base(name)); err != nil {
				return err
			}
			return d.remove(name)
		},
	}
}

// deliver has the state apply the next events that concern it.
func (l *life) deliver(n int) {
	for ; n > 0 && int(l.asked) < len(l.m.log); n-- {
		e := l.m.log[l.asked]
		if !l.mine(e) || e.Epoch != l.s.At().Epoch {
			l.asked++
			continue
		}
		err := l.f.event(e)
		if rev, no := e.Revocation(); no == nil && err == nil {
			l.kept[rev.Target] = rev.Exp
		}
		if l.c.n(8) == 0 {
			l.save() // of another goroutine, while the event is on its way
		}
		must(l.t, l.s.Apply(e))
		l.asked++
		if l.held != nil {
			maps.Copy(l.held, l.folds[l.asked].revoked)
		}
	}
}

// step does anything.
func (l *life) step() {
	switch l.c.n(16) {
	case 0, 1, 2, 3:
		for range 1 + l.c.n(3) {
			l.happen()
		}
	case 4, 5, 6, 7:
		l.deliver(1 + l.c.n(4))
	case 8:
		rec := Record{Target: ofJTI(fmt.Sprint("ahead-", len(l.kept))), Exp: l.now() + 1000}
		err := l.f.revoked(rec, revocation.Position{Epoch: epoch, Seq: l.m.head().Seq + 1}, false)
		if err == nil {
			l.kept[rec.Target] = rec.Exp
		}
		l.s.Revoke(rec, revocation.Position{Epoch: epoch, Seq: l.m.head().Seq + 1})
		l.ahead[rec.Target] = rec.Exp
	case 9, 10, 11:
		l.heartbeat()
	case 12, 13:
		if l.f.due() || l.c.n(4) == 0 {
			l.save()
		}
	case 14:
		if l.c.n(3) > 0 {
			return
		}
		// It was away for long, and loads a snapshot.
		l.asked = max(l.asked, revocation.Seq(l.c.n(len(l.m.log)+1)))
		loads := l.s.loadCount()
		load(l.t, l.s, revocation.Position{Epoch: epoch, Seq: l.asked}, l.fill, l.snapshot(l.asked))
		l.asked = max(l.asked, l.s.At().Seq)
		if l.held != nil {
			maps.Copy(l.held, l.folds[l.asked].revoked)
			l.check("after a snapshot was loaded")
		}
		if l.s.loadCount() > loads && l.asked > 0 && !l.f.due() {
			l.t.Fatal("the state was loaded from elsewhere, and no snapshot is due")
		}
	case 15:
		if l.c.n(3) == 0 {
			if err := l.f.close(); l.fails == 0 {
				must(l.t, err)
			}
			l.start()
		}
	}
}

// heartbeat says that the state has everything, if it has.
func (l *life) heartbeat() {
	head := l.m.head()
	if l.s.At().Epoch == "" || l.asked != head.Seq || l.s.Through(head) != nil {
		return
	}
	_ = l.f.fresh(time.Unix(l.now(), 0))
}

func (l *life) save() {
	fresh := time.Time{}
	if l.asked == l.m.head().Seq {
		fresh = time.Unix(l.now(), 0)
	}
	at := l.asked
	if err := l.f.save(l.s, fresh); err != nil {
		return
	}
	if l.fails == 0 && l.f.due() {
		l.t.Fatal("a snapshot is due after one was saved")
	}
	maps.Copy(l.kept, l.folds[at].revoked)
	maps.Copy(l.kept, l.ahead)
}

// check looks at what a process finds that starts now, if what was written last may be cut off.
func (l *life) check(when string) {
	l.t.Helper()
	path := l.path + "-copy"
	copyFolder(l.t, l.path, path)
	f, s, fresh := reopen(l.t, path)
	defer f.close()
	where := fmt.Sprintf("%s, with %v", when, filesOf(l.t, path))
	if got := f.damaged(); got != "" && l.fails == 0 {
		l.t.Fatalf("%s: %s", where, got)
	}
	for target, exp := range l.kept {
		if !holds(s, target, exp) {
			l.t.Fatalf("%s: %+v is not revoked any more", where, target)
		}
	}
	for target, exp := range l.held {
		if !fresh.IsZero() && !holds(s, target, exp) {
			l.t.Fatalf("%s: fresh at %d, it lacks %+v, which was revoked", where, fresh.Unix()-begin, target)
		}
	}
	at := s.At()
	if at.Epoch == "" {
		if !fresh.IsZero() || f.due() {
			l.t.Fatalf("%s: nothing is fresh", where)
		}
		return
	}
	least := at.Seq
	if !fresh.IsZero() {
		least = max(least, revocation.Seq(fresh.Unix()-begin))
	}
	if whole := l.folds[len(l.folds)-1]; least > l.m.head().Seq || len(whole.revoked)+len(l.ahead)+len(l.kept) == 0 && s.entries() > 0 {
		l.t.Fatalf("%s: it claims %s, fresh at %s, and the log is at %s", where, at, fresh, l.m.head())
	}
	for target, exp := range l.folds[least].revoked {
		if !holds(s, target, exp) {
			l.t.Fatalf("%s: at %s, fresh at %d, it lacks %+v", where, at, least, target)
		}
	}
	got := make(map[string]string)
	s.View(func(v *View) {
		for _, e := range v.entities() {
			got[e.Base().UUID] = jsonOf(e)
		}
	})
	last := least // the catalog of one that knows its position by its events is of that
	if s.content.part != nil {
		last = l.m.head().Seq
	}
	if !slices.ContainsFunc(l.folds[least:last+1], func(f fold) bool { return maps.Equal(f.entities, got) }) {
		l.t.Fatalf("%s: the catalog at %s, fresh at %d (-log +state):\n%s", where, at, least, cmp.Diff(l.folds[least].entities, got))
	}
}

func holds(s *State, target revocation.Target, exp int64) bool {
	tok := Token{Iss: target.Iss}
	switch target.Kind {
	case revocation.KindToken:
		if tok.JTI = target.ID; target.Digest {
			tok.JTI, tok.Digest = "", target.ID
		}
	case revocation.KindClient:
		tok.ClientID = target.ID
	case revocation.KindSubject:
		tok.Sub = target.ID
	case revocation.KindSession:
		tok.SID = target.ID
	case revocation.KindKey:
		tok.KID = target.ID
	case revocation.KindTenant:
		tok.Tenant = target.ID
	}
	_, ok := s.Check(tok, exp+leeway)
	return ok
}

// Wherever a process ends, the next one has what it said to have, and claims no more.
func TestFolderAfterACrash(t *testing.T) {
	t.Parallel()
	for seed := range byte(size(6, 12)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { // so that nothing is synced meanwhile
				l := newLife(t, seed)
				l.crash, l.held = 4, make(map[revocation.Target]int64)
				l.start()
				for l.c.more() {
					l.step()
				}
				l.check("at the end")
			})
		})
	}
}

// The same on a disk that fails now and then, and which is then as good as before.
func TestFolderOnABadDisk(t *testing.T) {
	t.Parallel()
	for seed := range byte(size(6, 12)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				l := newLife(t, seed)
				l.crash, l.fails = 7, 8
				l.start()
				for l.c.more() {
					l.step()
				}
				l.fails = 0
				for i := 0; l.s.At().Epoch == "" || l.f.due(); i++ {
					if l.s.At().Epoch == "" {
						load(t, l.s, l.m.head(), l.fill, l.snapshot(l.m.head().Seq))
						l.asked = l.m.head().Seq
					}
					if l.save(); i > 1 {
						t.Fatal("it does not heal")
					}
				}
				l.deliver(len(l.m.log))
				l.heartbeat()
				must(t, l.f.close())
				_, s, fresh := reopen(t, l.path)
				if fresh != time.Unix(l.now(), 0) || s.At() != l.m.head() {
					t.Errorf("at %s, fresh at %s, want %s and %d", s.At(), fresh, l.m.head(), l.now())
				}
			})
		})
	}
}

// filled is a folder with two snapshots and n events after each, of a log of 2n+1 revocations of
// tokens uuidOf(0) and on.
func filled(t *testing.T, n int) (path string, m *model) {
	path, m = filepath.Join(t.TempDir(), "folder"), newModel()
	f, s, _ := reopen(t, path)
	for i := range 2*n + 1 {
		m.revoke(Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: begin + 1000})
	}
	add := func(log []revocation.Event) {
		for _, e := range log {
			must(t, f.event(e))
			must(t, s.Apply(e))
			must(t, f.fresh(time.Unix(begin+int64(e.Seq), 0)))
		}
	}
	load(t, s, revocation.Position{Epoch: epoch})
	must(t, s.Apply(m.log[0]))
	must(t, f.save(s, time.Unix(begin+1, 0)))
	add(m.log[1 : n+1])
	must(t, f.save(s, time.Unix(begin+int64(n)+1, 0)))
	add(m.log[n+1:])
	must(t, f.close())
	return path, m
}

// want compares what a folder has with the first events of a log.
func want(t *testing.T, path string, seq, revoked int, damaged string) {
	t.Helper()
	f, s, fresh := reopen(t, path)
	defer f.close()
	if s.At().Seq != revocation.Seq(seq) || seq > 0 && fresh != time.Unix(begin+int64(seq), 0) {
		t.Errorf("%v: at %s, fresh at %d, want %d", filesOf(t, path), s.At(), fresh.Unix()-begin, seq)
	}
	for i := range revoked {
		if !holds(s, ofJTI(uuidOf(i)), begin+1000) {
			t.Errorf("%v: token %d of %d is not revoked", filesOf(t, path), i, revoked)
		}
	}
	if got := f.damaged(); (got == "") != (damaged == "") || !strings.Contains(got, damaged) {
		t.Errorf("it is said to be damaged: %q, want %q", got, damaged)
	}
}

func TestFolderDamage(t *testing.T) {
	t.Parallel()
	const n, last = 4, 9
	path, m := filled(t, n)
	if diff := cmp.Diff([]string{"journal-1", "journal-2", "snapshot-1", "snapshot-2"}, filesOf(t, path)); diff != "" {
		t.Fatalf("files (-want +got):\n%s", diff)
	}
	want(t, path, last, last, "")
	change := func(name string, edit func(b []byte) []byte) string {
		t.Helper()
		other := filepath.Join(t.TempDir(), "folder")
		copyFolder(t, path, other)
		b, err := os.ReadFile(filepath.Join(other, name))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(other, name), edit(b), 0o600))
		return other
	}
	flip := func(i int) func([]byte) []byte {
		return func(b []byte) []byte { b[i] ^= 1; return b }
	}
	t.Run("a snapshot", func(t *testing.T) {
		for _, edit := range []func([]byte) []byte{flip(0), flip(60), flip(100), func(b []byte) []byte { return b[:50] }, func([]byte) []byte { return nil }} {
			other := change("snapshot-2", edit)
			want(t, other, last, last, "snapshot-2") // the one before, and both journals
			if names := filesOf(t, other); !slices.Contains(names, "snapshot-2.damaged") || slices.Contains(names, "snapshot-2") {
				t.Errorf("it is not set aside: %v", names)
			}
			want(t, other, last, last, "")
		}
	})
	t.Run("both snapshots", func(t *testing.T) {
		other := change("snapshot-2", flip(70))
		must(t, os.Truncate(filepath.Join(other, "snapshot-1"), 20))
		f, s, fresh := reopen(t, other)
		if s.At() != (revocation.Position{}) || !fresh.IsZero() || f.due() {
			t.Errorf("at %s, fresh at %s", s.At(), fresh)
		}
		for i := 1; i < last; i++ {
			if !holds(s, ofJTI(uuidOf(i)), begin+1000) {
				t.Errorf("token %d is not revoked", i)
			}
		}
	})
	t.Run("the last journal", func(t *testing.T) {
		b, err := os.ReadFile(filepath.Join(path, "journal-2"))
		must(t, err)
		ends := []int{} // of events
		for i := journalHead; i < len(b); {
			size := int(b[i+4]) | int(b[i+5])<<8
			if b[i+recordHead] == recordEvent {
				ends = append(ends, i+recordHead+size)
			}
			i += recordHead + size
		}
		read := func(b []byte) (r replay, missing int, damage error) {
			r = replay{state: newClock().newReplica(false), base: 2, fresh: time.Unix(begin+1+n, 0)}
			load(t, r.state, revocation.Position{Epoch: epoch, Seq: 1 + n})
			damage = r.journal(2, bytes.NewReader(b))
			for i := 1 + n; i < last; i++ {
				if !holds(r.state, ofJTI(uuidOf(i)), begin+1000) {
					missing++
				}
			}
			if at := int(r.state.At().Seq); int(r.fresh.Unix()-begin) > at || at < 1+n {
				t.Errorf("at %d, fresh at %d", at, r.fresh.Unix()-begin)
			}
			return r, missing, damage
		}
		for cut := range b {
			r, missing, damage := read(b[:cut])
			whole, _ := slices.BinarySearch(ends, cut+1)
			if damage != nil || r.lost || missing != n-whole || int(r.state.At().Seq) != 1+n+whole || int(r.fresh.Unix()-begin) < n+whole {
				t.Errorf("cut at %d: at %s, fresh at %d, damage %v, %d are missing", cut, r.state.At(), r.fresh.Unix()-begin, damage, missing)
			}
		}
		for i := journalHead; i < len(b); i++ {
			r, missing, damage := read(flip(i)(bytes.Clone(b)))
			tail := i >= ends[len(ends)-1] // there it looks like what a crash leaves
			if missing > 1 || !tail && (damage == nil || !r.lost) {
				t.Errorf("bit at %d: %d are missing, damage %v, lost %t", i, missing, damage, r.lost)
			}
		}
		other := change("journal-2", flip(journalHead+40))
		f, s, fresh := reopen(t, other)
		if s.At().Seq != 1+n || !fresh.IsZero() || !f.due() || !strings.Contains(f.damaged(), "journal-2") {
			t.Errorf("at %s, fresh at %d, damage %q, due %t", s.At(), fresh.Unix()-begin, f.damaged(), f.due())
		}
	})
	t.Run("a journal is missing", func(t *testing.T) {
		other := change("snapshot-2", flip(100))
		must(t, os.Remove(filepath.Join(other, "journal-1")))
		f, s, fresh := reopen(t, other)
		if s.At().Seq != 1 || !fresh.IsZero() || !f.due() {
			t.Errorf("at %s, fresh at %d", s.At(), fresh.Unix()-begin)
		}
		if !holds(s, ofJTI(uuidOf(last-1)), begin+1000) {
			t.Error("what follows the gap is not revoked")
		}
	})
	t.Run("a damaged journal heals", func(t *testing.T) {
		other := change("journal-2", flip(journalHead+40))
		f, s, _ := reopen(t, other)
		for _, e := range m.log[s.At().Seq:] { // from the source
			must(t, f.event(e))
			must(t, s.Apply(e))
		}
		must(t, f.fresh(time.Unix(begin+last, 0))) // not before the snapshot
		must(t, f.close())
		f, s, fresh := reopen(t, other)
		if fresh.Unix()-begin > 1+n || s.At().Seq != last {
			t.Errorf("at %s, fresh at %d, although something is missing", s.At(), fresh.Unix()-begin)
		}
		must(t, f.save(s, time.Unix(begin+last, 0)))
		if names := filesOf(t, other); !slices.Contains(names, "journal-2.damaged") || slices.Contains(names, "journal-2") {
			t.Errorf("it is not set aside: %v", names)
		}
		must(t, f.close())
		want(t, other, last, last, "")
	})
	t.Run("few are kept", func(t *testing.T) {
		other := change("snapshot-2", flip(70))
		must(t, os.WriteFile(filepath.Join(other, "README"), []byte("mine"), 0o600))
		for i := range 10 {
			must(t, os.WriteFile(filepath.Join(other, fmt.Sprintf("snapshot-%d", 20+i)), []byte("nonsense"), 0o600))
		}
		want(t, other, last, last, "snapshot-29")
		names := slices.DeleteFunc(filesOf(t, other), func(name string) bool { return !strings.HasSuffix(name, damagedSuffix) })
		if diff := cmp.Diff([]string{"snapshot-27.damaged", "snapshot-28.damaged", "snapshot-29.damaged"}, names); diff != "" {
			t.Errorf("damaged files (-want +got):\n%s", diff)
		}
		if !slices.Contains(filesOf(t, other), "README") {
			t.Error("somebody else's file is gone")
		}
	})
	t.Run("a later version", func(t *testing.T) {
		f, s, fresh := reopen(t, change("journal-2", func(b []byte) []byte { b[len(journalMagic)]++; return b }))
		if s.At().Seq != 1+n || !fresh.IsZero() || !strings.Contains(f.damaged(), "version 2") {
			t.Errorf("at %s, fresh at %s, damage %q", s.At(), fresh, f.damaged())
		}
		want(t, change("snapshot-2", func(b []byte) []byte { b[len(snapshotMagic)]++; return b }), last, last, "version 2")
	})
}

// partOf is a log of acme alone, and a state of acme's part of it.
func partOf(t *testing.T, n int) (*model, *State) {
	m, s := newModel(), newClock().newReplica(false)
	for i := range n {
		e := m.revoke(Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: begin + 1000})
		m.log[i].Previous = e.Seq - 1
	}
	load(t, s, revocation.Position{Epoch: epoch}, func(l *Loader) { l.Tenants([]string{acme.Domain}) })
	return m, s
}

// A journal's word is not taken for what it lacks.
func TestReplayClaims(t *testing.T) {
	t.Parallel()
	m, _ := partOf(t, 5)
	at := func(seq int) revocation.Position { return revocation.Position{Epoch: epoch, Seq: revocation.Seq(seq)} }
	event := func(seq int) func(b []byte) []byte {
		return func(b []byte) []byte { return appendEvent(b, m.log[seq-1]) }
	}
	fresh := func(p revocation.Position) func(b []byte) []byte {
		return func(b []byte) []byte { return appendFresh(b, time.Unix(begin+int64(p.Seq), 0), p) }
	}
	unknown := func(b []byte) []byte { return appendPosition(append(b, 99), at(3)) }
	type records []func([]byte) []byte
	for _, tt := range []struct {
		name    string
		follows link
		records records
		fresh   int // of a whole state, and of a part; 0: nothing
		ofPart  int
	}{
		{"all", link{number: 1}, records{event(1), fresh(at(1)), event(2), fresh(at(2))}, 2, 2},
		{"a part of the log", link{number: 1}, records{event(1), event(2), fresh(at(4))}, 0, 4},
		{"an event is missing", link{number: 1}, records{event(1), fresh(at(1)), event(3), fresh(at(3))}, 1, 1},
		{"a journal is missing", link{number: 7}, records{event(1), fresh(at(1))}, 0, 0},
		{"the end of a journal is missing", link{number: 1, end: 1}, records{event(1), fresh(at(1))}, 0, 0},
		{"it begins with something missing", unlinked, records{event(1), fresh(at(1))}, 0, 0},
		{"another epoch", link{number: 1}, records{event(1), fresh(revocation.Position{Epoch: newEpoch, Seq: 1})}, 0, 0},
		{"a record of a later version", link{number: 1}, records{event(1), fresh(at(1)), unknown, fresh(at(1))}, 1, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := appendJournalHead(nil, tt.follows)
			for _, what := range tt.records {
				var err error
				b, err = appendRecord(b, what)
				must(t, err)
			}
			whole := newClock().newReplica(false)
			load(t, whole, at(0))
			_, part := partOf(t, 0)
			for s, want := range map[*State]int{whole: tt.fresh, part: tt.ofPart} {
				r := replay{state: s, base: 1, chain: link{number: 1}}
				must(t, r.journal(2, bytes.NewReader(b)))
				got := 0
				if !r.fresh.IsZero() {
					got = int(r.fresh.Unix() - begin)
				}
				if got != want || int(s.At().Seq) < got || !holds(s, ofJTI(uuidOf(0)), begin+1000) {
					t.Errorf("part %t: at %s, fresh at %d, want %d", s == part, s.At(), got, want)
				}
			}
		})
	}
}

// What was missing before a snapshot is missing again if that snapshot is damaged.
func TestFolderFallsBackOverAHole(t *testing.T) {
	t.Parallel()
	m, s := partOf(t, 4)
	path := filepath.Join(t.TempDir(), "folder")
	f := open(t, path)
	_, err := f.load(s)
	must(t, err)
	must(t, f.save(s, time.Unix(begin, 0)))
	for i, e := range m.log {
		f.disk = quick()
		if i == 2 {
			f.disk.write = func(*os.File, []byte, int64) error { return syscall.ENOSPC }
		}
		if err := f.event(e); (err != nil) != (i == 2) {
			t.Fatalf("event %d: %v", i+1, err)
		}
		must(t, s.Apply(e))
		must(t, s.Through(e.Position))
		if i == 2 {
			f.disk = quick()
			if !f.due() {
				t.Error("no snapshot is due after a failure")
			}
			must(t, f.save(s, time.Unix(begin+3, 0)))
		}
		must(t, f.fresh(time.Unix(begin+int64(e.Seq), 0)))
	}
	must(t, f.close())
	copyFolder(t, path, path+"2")
	must(t, os.Truncate(filepath.Join(path+"2", "snapshot-2"), 30))
	for path, want := range map[string]time.Time{path: time.Unix(begin+4, 0), path + "2": {}} {
		_, s, fresh := reopen(t, path)
		if fresh != want || fresh.IsZero() && s.At().Seq > 2 || !holds(s, ofJTI(uuidOf(3)), begin+1000) {
			t.Errorf("%v: at %s, fresh at %s, want %s", filesOf(t, path), s.At(), fresh, want)
		}
	}
}

// A process may end when the state was loaded from elsewhere and that is not here yet: what is here
// is not fresh then.
func TestFolderIsToldOfLoads(t *testing.T) {
	t.Parallel()
	for name, when := range map[string]string{
		"nothing is saved": "", "a snapshot is about to be made": "sync", "a snapshot is being written": "write",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path, m := filled(t, 4)
			f, s, _ := reopen(t, path)
			must(t, f.fresh(time.Unix(begin+9, 0)))
			m.revoke(Record{Target: ofJTI("late"), Tenant: acme, Exp: begin + 1000})
			arrive := sync.OnceFunc(func() {
				load(t, s, m.head(), m.fill)
				copyFolder(t, path, path+"-during")
			})
			f.disk.sync = func(file *os.File) error {
				if when == "sync" && strings.Contains(file.Name(), journalPrefix) {
					arrive()
				}
				return nil
			}
			f.disk.write = func(file *os.File, b []byte, at int64) error {
				if when == "write" && strings.Contains(file.Name(), snapshotPrefix) {
					arrive()
				}
				return realDisk.write(file, b, at)
			}
			if when != "" {
				must(t, f.save(s, time.Unix(begin+9, 0)))
			}
			arrive()
			copyFolder(t, path, path+"-before")
			for _, at := range []string{path + "-during", path + "-before"} {
				if _, s, fresh := reopen(t, at); !fresh.IsZero() && !holds(s, ofJTI("late"), begin+1000) {
					t.Errorf("%v: fresh at %d without what was loaded", filesOf(t, at), fresh.Unix()-begin)
				}
			}
			must(t, f.fresh(time.Unix(begin+10, 0)))
			if !f.due() {
				t.Error("no snapshot is due")
			}
			must(t, f.save(s, time.Unix(begin+10, 0)))
			must(t, f.close())
			want(t, path, 10, 9, "")
		})
	}
}

// What cannot be written when the disk is full is missing, and what is here says so as soon as
// anything can be written: at once where there is room already.
func TestFolderTellsWhatItLacks(t *testing.T) {
	t.Parallel()
	late := Record{Target: ofJTI("late"), Tenant: acme, Exp: begin + 1000}
	for name, add := range map[string]func(f *folder, m *model) error{
		"event": func(f *folder, m *model) error { return f.event(m.revoke(late)) },
		"revoked": func(f *folder, m *model) error {
			return f.revoked(late, revocation.Position{Epoch: newEpoch, Seq: 1}, false)
		},
	} {
		for full, room := range map[string]bool{"no room": true, "nothing can be written": false} {
			for journal, begun := range map[string]bool{"a journal": true, "no journal yet": false} {
				t.Run(strings.Join([]string{name, full, journal}, ", "), func(t *testing.T) {
					t.Parallel()
					path, m := filled(t, 4)
					f, s, _ := reopen(t, path)
					if begun {
						must(t, f.fresh(time.Unix(begin+9, 0)))
					}
					f.disk.write = func(file *os.File, b []byte, at int64) error {
						if info, err := file.Stat(); err == nil && room && at+int64(len(b)) <= info.Size() {
							return realDisk.write(file, b, at)
						}
						return syscall.ENOSPC
					}
					fresh := func() time.Time {
						copyFolder(t, path, path+"-copy")
						f, _, fresh := reopen(t, path+"-copy")
						must(t, f.close())
						return fresh
					}
					if err := add(f, m); !errors.Is(err, syscall.ENOSPC) {
						t.Fatalf("%v", err)
					}
					if room && begun && !fresh().IsZero() {
						t.Error("it is said to be fresh after a crash")
					}
					f.disk = quick()
					if must(t, f.fresh(time.Unix(begin+20, 0))); !fresh().IsZero() {
						t.Error("it is said to be fresh when there is room again")
					}
					// The event may be on its way still: a snapshot does not stand for it.
					must(t, add(f, m))
					if !fresh().IsZero() {
						t.Error("what failed before is forgotten")
					}
					s.Revoke(late, revocation.Position{Epoch: newEpoch, Seq: 1})
					must(t, f.save(s, time.Unix(begin+21, 0)))
					if fresh() != time.Unix(begin+21, 0) || f.due() {
						t.Errorf("it is not healed: fresh at %s, due %t", fresh(), f.due())
					}
				})
			}
		}
	}
}

func TestFolderIsOfOne(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "a", "folder")
	f := open(t, path)
	_, err := f.load(NewState(StateConfig{}))
	must(t, err)
	must(t, f.event(newModel().revoke(Record{Target: ofJTI("a"), Tenant: acme, Exp: begin})))
	if runtime.GOOS == "linux" {
		if _, err := openFolder(path, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("a second one opens it: %v", err)
		}
		must(t, filepath.Walk(path, func(name string, info os.FileInfo, err error) error {
			if want := map[bool]os.FileMode{true: 0o700, false: 0o600}[info.IsDir()]; info.Mode().Perm() != want {
				t.Errorf("%s has mode %s", name, info.Mode())
			}
			return err
		}))
	}
	must(t, f.close())
	must(t, f.close())
	open(t, path)
	for what, err := range map[string]error{
		"event": f.event(revocation.Event{}), "revoked": f.revoked(Record{}, revocation.Position{}, false), "save": f.save(NewState(StateConfig{}), time.Time{}),
	} {
		if !errors.Is(err, os.ErrClosed) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s of one that was given up: %v", what, err)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	if _, err := openFolder(file, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a file is opened as a folder")
	}
}

// While nothing can be written each call says so, and a snapshot is due until one is there.
func TestFolderIsFull(t *testing.T) {
	t.Parallel()
	path, m := filled(t, 4)
	f, s, _ := reopen(t, path)
	full := func(*os.File, []byte, int64) error { return syscall.ENOSPC }
	f.disk.write = full
	for i := range 5 {
		e := m.revoke(Record{Target: ofJTI(uuidOf(100 + i)), Tenant: acme, Exp: begin + 1000})
		if err := f.event(e); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("event: %v", err)
		}
		must(t, s.Apply(e))
		if err := f.fresh(time.Unix(begin+int64(e.Seq), 0)); err != nil {
			t.Errorf("fresh: %v", err)
		}
		if err := f.save(s, time.Time{}); !errors.Is(err, syscall.ENOSPC) || !f.due() {
			t.Errorf("save: %v, due %t", err, f.due())
		}
	}
	f.disk.write = realDisk.write
	e := m.revoke(Record{Target: ofJTI(uuidOf(200)), Tenant: acme, Exp: begin + 1000})
	must(t, f.event(e))
	must(t, s.Apply(e))
	if !f.due() {
		t.Error("what is missing is forgotten")
	}
	must(t, f.fresh(time.Unix(begin+15, 0))) // which cannot be said yet
	copyFolder(t, path, path+"2")
	_, before, fresh := reopen(t, path+"2")
	if before.At().Seq != 9 || !fresh.IsZero() || !holds(before, ofJTI(uuidOf(200)), begin+1000) {
		t.Errorf("without a snapshot it is at %s, fresh at %d", before.At(), fresh.Unix()-begin)
	}
	must(t, f.save(s, time.Unix(begin+15, 0)))
	if f.due() {
		t.Error("it is not healed")
	}
	must(t, f.close())
	want(t, path, 15, 9, "")
	if names := filesOf(t, path); len(names) > 6 {
		t.Errorf("there are many files: %v", names)
	}
}

// What fails while a snapshot is written, or just before, may be missing from it.
func TestFolderFailsWhileSaving(t *testing.T) {
	t.Parallel()
	for name, during := range map[string]bool{"during": true, "before": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path, m := filled(t, 4)
			f, s, _ := reopen(t, path)
			e := m.revoke(Record{Target: ofJTI("late"), Tenant: acme, Exp: begin + 1000})
			fail := func() {
				if err := f.event(e); err == nil {
					t.Error("nothing failed")
				}
			}
			f.disk.write = func(file *os.File, b []byte, at int64) error {
				inSnapshot := strings.Contains(file.Name(), snapshotPrefix)
				if inSnapshot && during {
					fail()
				}
				if bytes.HasPrefix(b, []byte(recordMark)) {
					return syscall.ENOSPC
				}
				return realDisk.write(file, b, at)
			}
			if !during {
				fail()
			}
			must(t, f.save(s, time.Unix(begin+9, 0)))
			copyFolder(t, path, path+"2")
			if _, _, fresh := reopen(t, path+"2"); !fresh.IsZero() {
				t.Errorf("fresh at %d, and what failed is missing", fresh.Unix()-begin)
			}
			must(t, s.Apply(e))
			if !f.due() {
				t.Error("no snapshot is due")
			}
			must(t, f.save(s, time.Unix(begin+10, 0)))
			if during == !f.due() {
				t.Errorf("due after another snapshot: %t", f.due())
			}
		})
	}
}

// What was added is synced within a second, whatever comes later, and when the folder is closed.
func TestFolderSyncs(t *testing.T) {
	t.Parallel()
	path := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		f, s, m := open(t, path), newClock().newReplica(false), newModel()
		_, err := f.load(s)
		must(t, err)
		var syncs atomic.Int32
		var fails atomic.Pointer[error]
		f.disk.sync = func(*os.File) error {
			syncs.Add(1)
			if err := fails.Load(); err != nil {
				return *err
			}
			return nil
		}
		add := func() {
			must(t, f.event(m.revoke(Record{Target: ofJTI(fmt.Sprint(len(m.log))), Tenant: acme, Exp: begin})))
		}
		for range 10 {
			add()
		}
		for i := range 3 {
			time.Sleep(syncAfter)
			synctest.Wait()
			if got := syncs.Load(); got != 1 {
				t.Fatalf("after %d s: %d syncs", i+1, got)
			}
		}
		load(t, s, m.head(), m.fill)
		must(t, f.save(s, time.Time{}))
		if f.due() {
			t.Error("a snapshot is due after one was saved")
		}
		add()
		fails.Store(new(error(syscall.EIO)))
		time.Sleep(syncAfter)
		synctest.Wait()
		if !f.due() {
			t.Error("no snapshot is due although the journal could not be synced")
		}
		fails.Store(nil)
		add()
		before := syncs.Load()
		must(t, f.close())
		if syncs.Load() != before+1 {
			t.Error("it was closed without a sync")
		}
	})
}

// A journal does not grow for ever, nor does the number of files.
func TestFolderIsDue(t *testing.T) {
	t.Parallel()
	path, m := filepath.Join(t.TempDir(), "folder"), newModel()
	f, s, _ := reopen(t, path)
	load(t, s, m.head())
	e := m.revoke(Record{Target: ofJTI("a"), Tenant: acme, Exp: begin})
	e.Data = append(e.Data[:len(e.Data)-1], fmt.Sprintf(`,"reason":%q}`, strings.Repeat("x", 60_000))...)
	saves := 0
	for written := 0; written < 3*minJournal; written += len(e.Data) {
		if f.due() {
			must(t, f.save(s, time.Time{}))
			saves++
		}
		if f.due() {
			t.Fatal("a snapshot is due after one was saved")
		}
		must(t, f.event(e))
		e.Seq++
	}
	if names := filesOf(t, path); saves != 3 || len(names) > 5 {
		t.Errorf("%d snapshots were saved, and the files are %v", saves, names)
	}
	must(t, f.close())
	f, _, _ = reopen(t, path)
	if f.length < minJournal/2 {
		t.Errorf("the journals are said to have %d bytes", f.length)
	}
	big := e
	big.Data = bytes.Repeat([]byte("x"), maxRecord)
	if err := f.event(big); err == nil || f.event(e) != nil {
		t.Errorf("an event that is too large: %v", err)
	}
}

// A journal may have anything in it.
func FuzzJournal(f *testing.F) {
	m := newModel()
	record := func(what func([]byte) []byte) []byte {
		b, err := appendRecord(nil, what)
		if err != nil {
			panic(err)
		}
		return b
	}
	head := appendJournalHead(nil, link{number: 1})
	e := m.revoke(Record{Target: ofJTI("a"), Tenant: acme, Exp: begin})
	f.Add(slices.Concat(head, record(func(b []byte) []byte { return appendEvent(b, e) }), record(func(b []byte) []byte {
		return appendFresh(b, time.Unix(begin, 0), e.Position)
	})))
	f.Add(slices.Concat(head, []byte("garbage"), record(func(b []byte) []byte {
		return appendRevoked(b, Record{Target: ofJTI("b"), Exp: begin}, revocation.Position{Epoch: epoch, Seq: 5}, false)
	}), []byte(recordMark)))
	f.Add(head[:5])
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, fix := range []bool{false, true} {
			if fix { // as if the records were meant
				for i := 0; i+recordHead <= len(b); i++ {
					if string(b[i:i+len(recordMark)]) == recordMark {
						rest := b[i+recordHead:]
						size := min(int(b[i+len(recordMark)]), len(rest))
						b = slices.Concat(b[:i], record(func(b []byte) []byte { return append(b, rest[:size]...) }), rest[size:])
						i += recordHead + size - 1
					}
				}
			}
			s := newClock().newReplica(false)
			load(t, s, revocation.Position{Epoch: epoch})
			r := replay{state: s, base: 1}
			_ = r.journal(1, bytes.NewReader(b))
			if s.At().Epoch != epoch || r.chain.end > int64(len(b)) {
				t.Fatalf("at %s after %d of %d bytes", s.At(), r.chain.end, len(b))
			}
		}
	})
}

func BenchmarkFolderLoad(b *testing.B) {
	for _, n := range []int{100_000, million} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			path, m := b.TempDir(), newModel()
			f, s, _ := reopen(b, path)
			_, err := s.ReadSnapshot(bytes.NewReader(snapshotOf(n)))
			must(b, err)
			must(b, f.save(s, time.Unix(begin, 0)))
			for range 1000 { // a journal of the last minutes
				e := m.revoke(Record{Target: ofJTI(uuidOf(len(m.log))), Tenant: acme, Exp: begin})
				e.Seq += revocation.Seq(n)
				must(b, f.event(e))
				must(b, s.Apply(e))
			}
			must(b, f.close())
			for b.Loop() {
				f, s, _ := reopen(b, path)
				if s.At().Seq != revocation.Seq(n+1000) {
					b.Fatalf("at %s", s.At())
				}
				f.close()
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

func BenchmarkFolderEvent(b *testing.B) {
	f, _, _ := reopen(b, b.TempDir())
	e := newModel().revoke(Record{Target: ofJTI(uuidOf(1)), Tenant: acme, Exp: begin})
	b.ReportAllocs()
	for b.Loop() {
		must(b, f.event(e))
	}
}
