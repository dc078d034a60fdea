package replica

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// folder keeps a state across restarts: the last snapshots, and journals of what followed. Its
// methods are called by one goroutine at a time, but for save.
//
// Its files are id, snapshot-<n> and journal-<n>. A save begins journal n, and then writes snapshot n:
// so what is not in snapshot n is in journal n or a later one, but for what was on its way to
// the state when journal n began, which is in the one before. A snapshot appears under its
// name when all of it is on disk. The snapshot before the last one stays, with all journals since
// the one before it: if the last one is damaged nothing is lost.
//
// A hole in what is here is known: by events that do not follow each other, by damage in a
// journal, since each journal tells how much of the one before must be there, and since one that
// lacks what the state has says so: what could not be written, or was loaded from elsewhere. Past
// one the state is loaded as it was before, with the revocations from after it besides, and is
// not said to be fresh as of any time: a revocation that was known may be what is missing.
type folder struct {
	path  string
	log   *slog.Logger
	disk  disk
	lock  *os.File
	state *State // since load

	saving sync.Mutex // held by a save; before mu
	aside  []int      // journals that are damaged, until a snapshot stands for them; of the one who saves

	mu       sync.Mutex
	closed   bool
	number   int      // the last that was given to a journal
	journal  *os.File // of this number; nil: the next record begins another
	end      int64    // where its next record goes
	unsaved  bool     // it was begun for a snapshot that is not there yet
	chain    link     // where what is here ends, if journal is nil
	base     int      // the last snapshot; 0: none
	size     int64    // of it, in bytes
	length   int64    // of the journals since then, in bytes
	loads    uint64   // [View.Loads] of the state that is here
	whole    bool     // what is here makes the state
	failures int      // how often the state came to have what is not here
	lacks    bool     // that was since the journal was begun
	told     bool     // so the journal's head says it
	pending  bool     // what failed last may not be in the state yet
	damage   []string // see damaged
	record   []byte
	sync     *time.Timer // nil: everything is synced
}

const (
	lockName       = "lock"
	idName         = "id" // of whom it belongs to
	snapshotPrefix = "snapshot-"
	journalPrefix  = "journal-"
	partSuffix     = ".part"    // of a snapshot that is being written
	damagedSuffix  = ".damaged" // of what was set aside

	// syncAfter is how long a record may be in the system's cache only.
	syncAfter = time.Second
	// Another snapshot is due when the journals are as long as the last one, within these bounds:
	// so little more is written than twice what comes, and a start reads a journal in some tenths
	// of a second.
	minJournal = 4 << 20
	maxJournal = 32 << 20
	// maxDamaged is how many files that were set aside are kept.
	maxDamaged = 3
)

// disk is what a folder does to files, so that tests can make it fail.
type disk struct {
	create  func(name string) (*os.File, error) // it must not be there
	write   func(f *os.File, b []byte, at int64) error
	sync    func(f *os.File) error
	rename  func(from, to string) error
	remove  func(name string) error
	syncDir func(path string) error
}

var realDisk = disk{
	create: func(name string) (*os.File, error) {
		return os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	},
	write: func(f *os.File, b []byte, at int64) error {
		_, err := f.WriteAt(b, at)
		return err
	},
	sync:    (*os.File).Sync,
	rename:  os.Rename,
	remove:  os.Remove,
	syncDir: syncDir,
}

// openFolder makes the folder if it is not there, and takes it for this process alone.
func openFolder(path string, log *slog.Logger) (*folder, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("open folder: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(path, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open folder: %w", err)
	}
	if err := lockFile(lock); err != nil {
		lock.Close()
		return nil, fmt.Errorf("open folder %s: another process or replica uses it, and each needs its own: %w", path, err)
	}
	f := &folder{path: path, log: log, disk: realDisk, lock: lock}
	for _, name := range f.names(partSuffix) {
		f.drop(name)
	}
	return f, nil
}

// id is what the replica is known by that has this folder: it is kept here, and made if it is not there. One
// that cannot be kept is for this time.
func (f *folder) id() string {
	text, err := os.ReadFile(f.file(idName))
	if id := strings.TrimSuffix(string(text), "\n"); err == nil && ValidID(id) {
		return id
	}
	id := newID()
	if err == nil {
		f.log.Error("the file of this replica's id is damaged; it gets another one", "folder", f.path, "file", idName, "id", id)
	}
	if err == nil || errors.Is(err, os.ErrNotExist) {
		err = f.writeFile(idName, []byte(id+"\n"))
	}
	if err != nil {
		f.log.Warn("cannot keep this replica's id; it has another one after a restart, unless it is configured", "folder", f.path, "id", id, "error", err)
	}
	return id
}

// writeFile puts a file in the place of the one of this name, at once.
func (f *folder) writeFile(name string, text []byte) error {
	part := f.file(name) + partSuffix
	file, err := f.disk.create(part)
	if err != nil {
		return err
	}
	if err = f.disk.write(file, text, 0); err == nil {
		err = f.disk.sync(file)
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = f.disk.rename(part, f.file(name))
	}
	if err != nil {
		_ = f.disk.remove(part)
		return err
	}
	return f.disk.syncDir(f.path)
}

func (f *folder) file(name string) string { return filepath.Join(f.path, name) }

func snapshotName(n int) string { return snapshotPrefix + strconv.Itoa(n) }
func journalName(n int) string  { return journalPrefix + strconv.Itoa(n) }

// drop removes a file that nobody needs.
func (f *folder) drop(name string) {
	if err := f.disk.remove(f.file(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		f.log.Warn("cannot remove a file of the replica's folder; it only takes room", "folder", f.path, "file", name, "error", err)
	}
}

// names returns the names of the files that end in suffix. If they cannot be read there are none.
func (f *folder) names(suffix string) (names []string) {
	entries, _ := os.ReadDir(f.path)
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), suffix) {
			names = append(names, e.Name())
		}
	}
	return names
}

// list returns the numbers of the snapshots and journals there are, sorted.
func (f *folder) list() (snapshots, journals []int, err error) {
	entries, err := os.ReadDir(f.path)
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		for prefix, numbers := range map[string]*[]int{snapshotPrefix: &snapshots, journalPrefix: &journals} {
			digits, ok := strings.CutPrefix(e.Name(), prefix)
			if n, err := strconv.Atoi(digits); ok && err == nil && n > 0 && strconv.Itoa(n) == digits {
				*numbers = append(*numbers, n)
			}
		}
	}
	slices.Sort(snapshots)
	slices.Sort(journals)
	return snapshots, journals, nil
}

// load puts what the folder has into s, which is empty, and returns when that was known to be
// everything, zero if that was never known or something is missing. From then on the folder is told
// when s is loaded from elsewhere. What is damaged is set aside and logged, never returned
// as an error: what remains is loaded. It is called once, before anything is added.
func (f *folder) load(s *State) (fresh time.Time, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state = s
	snapshots, journals, err := f.list()
	if err != nil {
		return time.Time{}, fmt.Errorf("load from folder %s: %w", f.path, err)
	}
	r := replay{state: s}
	for _, n := range slices.Backward(snapshots) {
		f.number = max(f.number, n)
		if r.base > 0 {
			continue
		}
		if r.fresh, err = f.readSnapshot(n); err != nil {
			f.damagedFile(snapshotName(n), err)
			f.setAside(snapshotName(n))
			continue
		}
		r.base = n
	}
	r.chain = link{number: r.base}
	// All of them: an event may have been on its way to the state since before the snapshot's journal was
	// begun, and the one before that, if a save failed.
	for _, n := range journals {
		f.number = max(f.number, n)
		if err := f.readJournal(n, &r); err != nil {
			f.damagedFile(journalName(n), err)
			f.aside = append(f.aside, n)
			r.lost = true
		}
		if n >= r.base {
			f.length += r.chain.end
		}
	}
	f.base, f.chain, f.whole, f.loads = r.base, r.chain, r.base > 0 && !r.lost, s.loadCount()
	f.tidyDamaged()
	s.replacing = f.lost
	if r.lost {
		return time.Time{}, nil
	}
	return r.fresh, nil
}

func (f *folder) readSnapshot(n int) (fresh time.Time, err error) {
	file, err := os.Open(f.file(snapshotName(n)))
	if err != nil {
		return fresh, err
	}
	defer file.Close()
	if _, fresh, err = f.state.readSnapshot(file); err != nil {
		return fresh, err
	}
	info, err := file.Stat()
	if err == nil {
		f.size = info.Size()
	}
	return fresh, err
}

// readJournal gives r what a journal has. Its error says what is wrong with it.
func (f *folder) readJournal(n int, r *replay) error {
	file, err := os.Open(f.file(journalName(n)))
	if err != nil {
		return err
	}
	defer file.Close()
	return r.journal(n, file)
}

// damagedFile notes that a file is.
func (f *folder) damagedFile(name string, err error) {
	f.log.Error("a file of the replica's folder is damaged; it is set aside, and the rest is used",
		"folder", f.path, "file", name, "error", err)
	f.damage = append(f.damage, fmt.Sprintf("%s of folder %s is damaged: %v", name, f.path, err))
}

// damaged is what was wrong with the files that load found, empty if nothing was. The state does
// not lack what a source has: what was missing is fetched.
func (f *folder) damaged() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.damage, "; ")
}

// setAside renames a file for people to look at.
func (f *folder) setAside(name string) {
	if err := f.disk.rename(f.file(name), f.file(name+damagedSuffix)); err != nil {
		f.log.Warn("cannot rename a damaged file of the replica's folder", "folder", f.path, "file", name, "error", err)
	}
}

// tidyDamaged keeps the newest of what was set aside.
func (f *folder) tidyDamaged() {
	names := f.names(damagedSuffix)
	number := func(name string) int {
		_, digits, _ := strings.Cut(strings.TrimSuffix(name, damagedSuffix), "-")
		n, _ := strconv.Atoi(digits)
		return n
	}
	slices.SortFunc(names, func(a, b string) int { return number(b) - number(a) })
	for _, name := range names[min(maxDamaged, len(names)):] {
		f.drop(name)
	}
}

// event adds an event, before it is applied, which it must be before the next call: then what was
// ever answered from it is on disk (in the system's cache at least; it is synced within a second).
// After an error it is not, and a snapshot is due.
func (f *folder) event(e revocation.Event) error {
	return f.add(func(b []byte) []byte { return appendEvent(b, e) })
}

// revoked adds what is revoked ahead of the events, or missed, see appendRevoked, before it is. All else is as
// with event.
func (f *folder) revoked(rec Record, at revocation.Position, missed bool) error {
	return f.add(func(b []byte) []byte { return appendRevoked(b, rec, at, missed) })
}

// fresh says that the state, where it is now, was known to have everything at that time. It adds
// nothing while a snapshot is due because something is missing: that will tell.
func (f *folder) fresh(at time.Time) error {
	p := f.state.At() // first: isWhole would not notice what is loaded between the two
	if !f.isWhole() {
		return nil
	}
	return f.add(func(b []byte) []byte { return appendFresh(b, at, p) })
}

// isWhole reports, to whoever adds, whether what is here makes the state.
func (f *folder) isWhole() bool {
	loads := f.state.loadCount()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pending = false
	f.tell()
	return f.whole && f.loads == loads
}

// lost is told before the state has what is not here, so that nobody takes what is here for fresh
// if the process ends before the next save does. It may be called at any time by who holds
// State.loading until the state has it: no save begins in between.
func (f *folder) lost() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.miss()
}

// miss notes that something is missing here. It needs f.mu.
func (f *folder) miss() {
	f.whole, f.lacks = false, true
	f.failures++
	f.tell()
}

// tell has the journal say what it lacks, if it does not yet; if that fails, the next call tries it
// again. It needs f.mu.
func (f *folder) tell() {
	switch {
	case !f.lacks || f.told:
	case f.journal != nil:
		f.told = f.disk.write(f.journal, []byte{1}, int64(journalLacks)) == nil
	case f.base > 0: // else nothing here is said to be fresh
		_ = f.begin() // which says it
	}
}

// loadCount is [View.Loads].
func (s *State) loadCount() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.loads
}

// add adds a record.
func (f *folder) add(what func(b []byte) []byte) (err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pending = false
	defer func() {
		if err != nil {
			f.pending = true
			f.miss()
			err = fmt.Errorf("add to journal of folder %s: %w", f.path, err)
		}
	}()
	f.tell()
	if f.record, err = appendRecord(f.record[:0], what); err != nil {
		return err
	}
	if f.journal == nil {
		if err := f.begin(); err != nil {
			return err
		}
	}
	// What a write leaves that fails half-way, the next one overwrites.
	if err := f.disk.write(f.journal, f.record, f.end); err != nil {
		return err
	}
	f.end += int64(len(f.record))
	f.length += int64(len(f.record))
	if f.sync == nil {
		f.sync = time.AfterFunc(syncAfter, f.syncNow)
	}
	return nil
}

// begin begins a journal, after which f.journal is that. It needs f.mu.
func (f *folder) begin() error {
	if f.closed {
		return os.ErrClosed
	}
	follows := f.chain
	switch {
	case !f.whole:
		follows = unlinked
	case f.journal != nil:
		follows = link{number: f.number, end: f.end}
	}
	f.number++
	name := f.file(journalName(f.number))
	file, err := f.disk.create(name)
	if err != nil {
		return err
	}
	head := appendJournalHead(nil, follows)
	if err := f.disk.write(file, head, 0); err != nil {
		file.Close()
		_ = f.disk.remove(name) // else it is one without records
		return err
	}
	f.journal, f.end = file, int64(len(head))
	f.length += f.end
	f.unsaved, f.lacks, f.told = false, false, false
	return nil
}

// syncNow syncs the journal.
func (f *folder) syncNow() {
	f.mu.Lock()
	f.sync = nil
	file := f.journal
	f.mu.Unlock()
	if file != nil {
		f.syncFile(file)
	}
}

// syncFile syncs a journal. What a system does with the bytes that it cannot write nobody
// knows: a snapshot is due then.
func (f *folder) syncFile(file *os.File) {
	err := f.disk.sync(file)
	if err == nil || errors.Is(err, os.ErrClosed) { // by those who sync it first
		return
	}
	f.log.Error("cannot sync the journal of the replica's folder; what was added last is lost if the machine fails",
		"folder", f.path, "error", err)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.miss()
}

// due reports whether there should be another snapshot: the journal is long, or lacks something,
// or the state was loaded from elsewhere.
func (f *folder) due() bool {
	if f.state.At() == (revocation.Position{}) {
		return false
	}
	if !f.isWhole() {
		return true
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.length >= min(max(f.size, minJournal), maxJournal)
}

// save writes a snapshot of s, and begins another journal. What is added meanwhile is in that. It
// may take long, and must be called once s was loaded from elsewhere. Fresh is as of when s was
// known to have everything, before the call; zero if that is not known.
func (f *folder) save(s *State, fresh time.Time) error {
	f.saving.Lock()
	defer f.saving.Unlock()
	err := f.trySave(s, fresh)
	if err != nil {
		return fmt.Errorf("save snapshot in folder %s: %w", f.path, err)
	}
	return nil
}

func (f *folder) trySave(s *State, fresh time.Time) error {
	t, err := f.turn(s)
	if err != nil {
		return err
	}
	if t.before != nil {
		f.syncFile(t.before)
		t.before.Close()
	}
	size, loads, err := f.writeSnapshot(t.number, s, fresh)
	if err != nil {
		return err
	}
	f.mu.Lock()
	kept := f.base
	if kept == 0 {
		kept = t.number
	}
	f.base, f.size, f.loads = t.number, size, loads
	f.length -= t.length
	f.unsaved = false
	// If something failed meanwhile, it may be missing from the snapshot too.
	f.whole = f.failures == t.failures
	f.mu.Unlock()
	f.tidy(kept) // events need not wait for it
	return nil
}

// turn is what a save begins with: a journal for what comes after it.
type turn struct {
	number   int
	before   *os.File // the journal before, to be closed; nil: there is none
	length   int64    // of the journals that the snapshot stands for
	failures int      // those that it stands for
}

// turn begins journal n for snapshot n, unless one was begun for a save that failed and lacks
// nothing. A snapshot of s that is begun afterwards has what the folder was told that it lacks.
func (f *folder) turn(s *State) (t turn, err error) {
	s.loading.Lock() // see lost
	defer s.loading.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return t, os.ErrClosed
	}
	if f.journal == nil || !f.unsaved || f.lacks {
		t.before = f.journal
		if err := f.begin(); err != nil {
			return t, err
		}
		f.unsaved = true
	}
	t.number, t.length, t.failures = f.number, f.length-f.end, f.failures
	if f.pending { // then the snapshot may lack it too
		f.miss()
	}
	return t, nil
}

// writeSnapshot writes snapshot n.
func (f *folder) writeSnapshot(n int, s *State, fresh time.Time) (size int64, loads uint64, err error) {
	name := f.file(snapshotName(n))
	part := name + partSuffix
	_ = f.disk.remove(part) // of a save that failed
	file, err := f.disk.create(part)
	if err != nil {
		return 0, 0, err
	}
	w := &fileWriter{f.disk, file, 0}
	_, loads, err = s.writeSnapshot(w, fresh)
	if err == nil {
		err = f.disk.sync(file)
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = f.disk.rename(part, name)
	}
	if err != nil {
		_ = f.disk.remove(part)
		return 0, 0, err
	}
	return w.at, loads, f.disk.syncDir(f.path)
}

// fileWriter writes to a new file.
type fileWriter struct {
	disk disk
	file *os.File
	at   int64
}

var _ io.Writer = (*fileWriter)(nil)

func (w *fileWriter) Write(b []byte) (int, error) {
	if err := w.disk.write(w.file, b, w.at); err != nil {
		return 0, err
	}
	w.at += int64(len(b))
	return len(b), nil
}

// tidy removes what nobody needs who loads snapshot kept or a later one. It needs f.saving.
func (f *folder) tidy(kept int) {
	snapshots, journals, err := f.list()
	if err != nil {
		return // the next time
	}
	for _, n := range f.aside {
		f.setAside(journalName(n))
	}
	for _, n := range snapshots {
		if n < kept {
			f.drop(snapshotName(n))
		}
	}
	first, _ := slices.BinarySearch(journals, kept)
	for _, n := range journals[:max(first-1, 0)] {
		if !slices.Contains(f.aside, n) {
			f.drop(journalName(n))
		}
	}
	f.aside = nil
	f.tidyDamaged()
}

// close gives the folder up, after a save that is under way.
func (f *folder) close() error {
	f.saving.Lock()
	defer f.saving.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	if f.sync != nil {
		f.sync.Stop()
		f.sync = nil
	}
	var errs []error
	if f.journal != nil {
		errs = append(errs, f.disk.sync(f.journal), f.journal.Close())
		f.journal = nil
	}
	errs = append(errs, f.lock.Close()) // which unlocks it
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close folder %s: %w", f.path, err)
	}
	return nil
}
