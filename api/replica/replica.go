package replica

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// Config is what [New] makes a replica of. Source alone is enough.
type Config struct {
	// Source is where snapshots, and events that no feed delivered, come from.
	Source Source
	// Feeds tell what happens, side by side. None: Source, if it is a [Feed] too.
	Feeds []Feed
	// Folder is where the state is kept for a start without Source, in files of its own.
	// It is made if it is not there. No two replicas may share one. Empty: nowhere.
	Folder string

	// Staleness is what is done with what is not revoked as far as is known, past an age.
	// The zero value is {300 s, Deny}.
	Staleness Staleness
	// Routes have another Staleness than that, by the longest Path that a request's path
	// begins with, whole segments each.
	Routes []Route
	// Empty says what is done while nothing at all is known: after a first start without
	// Source. Deny (the default) or Serve.
	Empty OnStale

	// Claims says whether Authorize believes what self-contained tokens carry. Default ClaimsFirst.
	Claims ClaimsMode
	// Environments are the gateway environments (labels) of this gateway: APIs that are deployed
	// to none of them are not there. Empty: all are.
	Environments []string

	// Tenant is the domain of the only tenant that this gateway serves: APIs and issuers of others are
	// not there. Empty: the one that the state is about, if it is about one alone, as Source tells.
	//
	// Else several tenants are served, each at paths of its own (WSO2's convention), because each
	// chooses the contexts of its APIs itself: an API of carbon.super is there only if its
	// context is not /t and does not begin with /t/, one of another tenant only if its
	// context is /t/<domain> or begins with /t/<domain>/, percent-encoding decoded.
	// Otherwise a tenant could open or close the paths of another one, or let its own
	// applications in there.
	Tenant string

	// ID is what the service knows this replica by: 1 to 128 of A-Z a-z 0-9 . _ - that begin with a letter
	// or a digit. No two replicas may have the same, and it belongs to the account that first
	// reported with it. Default: one made of the host's name and chance, which Folder keeps; without
	// Folder it is new with each start, and the service knows a gateway for each.
	ID string
	// Labels are for people, and for those who select gateways: at most 16, with names of 1 to 63 of
	// A-Z a-z 0-9 . _ / - and values of at most 255 bytes of printable UTF-8.
	Labels map[string]string
	// Version is of the software, for people: at most 128 bytes of printable UTF-8.
	Version string
	// Reporter tells the service how this replica does, every few seconds and when the service asks,
	// so that it knows who has applied what, see [Report]. Default: Source or else the first of Feeds that
	// is one. NoReports: nobody is told.
	Reporter  Reporter
	NoReports bool

	// Logger is told when feeds break and heal, snapshots are loaded, and the folder cannot
	// be used. Default: nobody.
	Logger *slog.Logger
}

// Staleness says what is done past an age.
type Staleness struct {
	// Max is the age of what is known past which Then is done. 1 s to 24 h. Default 300 s. Less than
	// 10 s is passed now and then while all is well: heartbeats are seconds apart.
	Max time.Duration
	// Then is done with what is not revoked as far as is known. What is revoked is
	// refused at any age.
	Then OnStale
}

// The bounds of Staleness.Max.
const (
	minStaleness     = time.Second
	maxStaleness     = 24 * time.Hour
	defaultStaleness = 300 * time.Second
)

func (s Staleness) withDefault() Staleness {
	if s.Max == 0 {
		s.Max = defaultStaleness
	}
	return s
}

// Route is a part of the paths that has a staleness of its own.
type Route struct {
	// Path is what paths begin with, for example "/payments", which is no part of "/payments-old". It
	// is in the form of [CleanPath], and stands for all ways to encode it.
	Path string
	Staleness
}

// OnStale says what becomes of a request when too little is known. Its text is "deny",
// "serve" or "introspect".
type OnStale uint8

const (
	Deny       OnStale = iota // refuse it
	Serve                     // let it through
	Introspect                // ask the issuer (RFC 7662)
)

var onStale = [...]string{Deny: "deny", Serve: "serve", Introspect: "introspect"}

// String is the text, or OnStale(n) of what is none of the constants.
func (o OnStale) String() string {
	if int(o) < len(onStale) {
		return onStale[o]
	}
	return fmt.Sprintf("OnStale(%d)", uint8(o))
}

// MarshalText implements [encoding.TextMarshaler].
func (o OnStale) MarshalText() ([]byte, error) {
	if int(o) >= len(onStale) {
		return nil, fmt.Errorf("encode %s: must be one of %s", o, strings.Join(onStale[:], ", "))
	}
	return []byte(onStale[o]), nil
}

// UnmarshalText implements [encoding.TextUnmarshaler].
func (o *OnStale) UnmarshalText(text []byte) error {
	i := slices.Index(onStale[:], string(text))
	if i < 0 {
		return fmt.Errorf("%q must be one of %s", text, strings.Join(onStale[:], ", "))
	}
	*o = OnStale(i)
	return nil
}

// check returns a copy of cfg with its defaults, or everything that is wrong with it.
func (cfg Config) check() (Config, error) {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	staleness := func(name string, s *Staleness) {
		*s = s.withDefault()
		if s.Max < minStaleness || s.Max > maxStaleness {
			wrong("%s.Max is %s, must be %s to %s, or 0 for %s", name, s.Max, minStaleness, maxStaleness, defaultStaleness)
		}
		if s.Then > Introspect {
			wrong("%s.Then is %s, must be Deny, Serve or Introspect", name, s.Then)
		}
	}
	if cfg.Source == nil {
		wrong("Source is nil, must be where the state comes from, such as NewHTTP")
	}
	cfg.Feeds = slices.Clone(cfg.Feeds)
	if f, ok := cfg.Source.(Feed); ok && len(cfg.Feeds) == 0 {
		cfg.Feeds = []Feed{f}
	}
	for i, f := range cfg.Feeds {
		if f == nil {
			wrong("Feeds[%d] is nil: leave it out", i)
		}
	}
	staleness("Staleness", &cfg.Staleness)
	cfg.Routes = slices.Clone(cfg.Routes)
	for i := range cfg.Routes {
		route, name := &cfg.Routes[i], fmt.Sprintf("Routes[%d]", i)
		staleness(name, &route.Staleness)
		if clean, ok := CleanPath(route.Path); !ok || clean != route.Path {
			wrong("%s.Path is %q, must be the beginning of a path as CleanPath returns it, such as /payments", name, route.Path)
		} else {
			route.Path = unescaped(route.Path) // for StalenessOf
			if len(route.Path) > 1 {
				route.Path = strings.TrimSuffix(route.Path, "/")
			}
		}
		if slices.ContainsFunc(cfg.Routes[:i], func(other Route) bool { return other.Path == route.Path }) {
			wrong("%s.Path is %q, which another route has: leave one of them out", name, route.Path)
		}
	}
	slices.SortStableFunc(cfg.Routes, func(a, b Route) int { return len(b.Path) - len(a.Path) }) // the longest first
	if cfg.Empty != Deny && cfg.Empty != Serve {
		wrong("Empty is %s, must be Deny or Serve: while nothing is known, nor is whom to ask", cfg.Empty)
	}
	if cfg.Claims > ClaimsOnly {
		wrong("Claims is %d, must be ClaimsFirst, CatalogFirst or ClaimsOnly", cfg.Claims)
	}
	if cfg.Tenant != "" && !catalog.ValidDomain(cfg.Tenant) {
		wrong("Tenant is %q, must be the domain of a tenant, such as carbon.super", cfg.Tenant)
	}
	cfg.Environments = slices.Clone(cfg.Environments)
	for i, name := range cfg.Environments {
		if name == "" {
			wrong("Environments[%d] is empty, must be the name of one: leave it out", i)
		}
	}
	if cfg.ID != "" && !ValidID(cfg.ID) {
		wrong("ID is %.200q, must be 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or a digit", cfg.ID)
	}
	cfg.Labels = maps.Clone(cfg.Labels)
	if err := ValidLabels(cfg.Labels); err != nil {
		wrong("Labels: %w", err)
	}
	if !isLabelValue(cfg.Version) || len(cfg.Version) > maxVersion {
		wrong("Version is %.80q, must be at most %d bytes of printable UTF-8", cfg.Version, maxVersion)
	}
	switch {
	case cfg.NoReports && cfg.Reporter != nil:
		wrong("Reporter and NoReports are both set: leave one out")
	case !cfg.NoReports && cfg.Reporter == nil:
		cfg.Reporter, _ = cfg.Source.(Reporter)
		for _, f := range cfg.Feeds {
			if reporter, ok := f.(Reporter); ok && cfg.Reporter == nil {
				cfg.Reporter = reporter
			}
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return cfg, errors.Join(errs...)
}

// Replica is a [State] that is kept up to date. Make one with [New]. Its methods may be
// called from any goroutine.
//
// Whatever any feed tells of what is revoked holds at once, also if events are missing before it and
// the source cannot be asked for them; it is on disk before it holds. What is missing is fetched by
// one goroutine for all feeds: events if the source has them, else a snapshot.
//
// A feed is not believed to have told everything because it says so. A state of the whole log counts.
// One of some tenants cannot, so a connection's heartbeats move its position only from the
// first one on whose position it has come to with what the source has.
//
// A heartbeat that was long on its way does not make the state look fresh, and neither does a clock
// that was set, or a machine that slept: see [Replica.Age]. When it gets old with all feeds
// connected the source is asked, whose answer is about now.
type Replica struct {
	cfg   Config
	log   *slog.Logger
	id    string
	state *State
	start time.Time // what the clock that only runs counts from
	// instance is a UUID of this start.
	instance string
	age      age
	feeds    []*feed
	mender

	scope atomic.Pointer[scope] // of the state. It lags behind a Load
	loads []instant             // the last snapshots. Of serve's goroutine

	// keeping is held while what changes the state is kept and applied, one after the other.
	keeping sync.Mutex
	folder  *folder       // nil: there is none
	save    chan struct{} // a snapshot for the folder may be due

	used atomic.Bool // Run or Close was called

	mu        sync.Mutex
	from      string
	snapshots uint64
	deltas    uint64
	sourceErr string
	folderErr string
	logErr    string
	back      revocation.Position          // what the log does not reach, since when logErr is set
	foreign   map[revocation.Epoch]instant // when the source knew nothing of them
	expected  [expectations]expectation
	reports   ReportStatus
	reportErr error // of the last report
}

// New checks cfg and reads what cfg.Folder has, so that the replica that it returns can be
// asked at once if there is something. It connects to nothing. The folder is its own until Run has
// returned, or Close for a replica that is not run. Its error names all that is wrong with
// cfg; a folder that cannot be used at all is an error too, for else nobody would notice before
// the day when it is needed.
func New(cfg Config) (*Replica, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, fmt.Errorf("configure replica: %w", err)
	}
	r := &Replica{
		cfg: cfg, log: cfg.Logger.With("component", "replica"), state: NewState(StateConfig{}), start: time.Now(), instance: newInstance(),
		mender: newMender(), save: make(chan struct{}, 1), foreign: make(map[revocation.Epoch]instant),
	}
	for _, f := range cfg.Feeds {
		r.feeds = append(r.feeds, &feed{Feed: f, isSource: same(f, cfg.Source)})
	}
	if cfg.Folder != "" {
		if r.folder, err = openFolder(cfg.Folder, r.log); err != nil {
			return nil, fmt.Errorf("configure replica: %w", err)
		}
		fresh, err := r.folder.load(r.state)
		if err != nil {
			r.folderFails(err)
		}
		if r.state.At().Epoch != "" {
			r.from = "folder"
			r.age.restored(fresh, r.now())
			r.log.Info("the state was loaded from the folder", "position", r.state.At(), "age", r.Age())
		}
	}
	switch {
	case cfg.ID != "":
		r.id = cfg.ID
	case r.folder != nil:
		r.id = r.folder.id()
	default:
		r.id = newID()
	}
	r.rescope()
	return r, nil
}

// same reports whether a feed is the source.
func same(f Feed, s Source) bool {
	return reflect.ValueOf(f).Comparable() && reflect.ValueOf(s).Comparable() && any(f) == any(s)
}

// Close gives back the folder of a replica that is not to be run, after which it can be asked still.
// Once Run was called it does nothing: that gives the folder back itself.
func (r *Replica) Close() error {
	if r.used.Swap(true) || r.folder == nil {
		return nil
	}
	return r.folder.close()
}

// State is what is known. Only Run changes it: callers must do no more than read it, with View, Check,
// At, Scope and WriteSnapshot. What they did to it would be in no file, and could not be told from
// what the log has.
func (r *Replica) State() *State { return r.state }

// now is the present by both clocks.
func (r *Replica) now() instant { return r.instant(time.Now()) }

// instant needs a time that [time.Now] returned.
func (r *Replica) instant(now time.Time) instant {
	return instant{mono: int64(now.Sub(r.start)), wall: now.UnixNano()}
}

// Outcome is what [Replica.Check] says.
type Outcome uint8

const (
	// Refused: too little is known to accept the token.
	Refused Outcome = iota
	// Revoked: a revocation matches it.
	Revoked
	// Valid: none does, and enough is known to say so, or the operator wants it served.
	Valid
	// Ask: none does as far as is known, and its issuer is to be asked.
	Ask
)

// String is the constant's name in lower case.
func (o Outcome) String() string {
	names := [...]string{Refused: "refused", Revoked: "revoked", Valid: "valid", Ask: "ask"}
	if int(o) < len(names) {
		return names[o]
	}
	return fmt.Sprintf("Outcome(%d)", uint8(o))
}

// Decision is what is known of a token.
type Decision struct {
	Outcome Outcome
	// Kind is of the revocation, if Outcome is Revoked.
	Kind revocation.Kind
	// Age is how old what is known is: everything that was committed longer ago is in it.
	// [Never] while nothing is known, or nobody knows since when it is.
	Age time.Duration
}

// Never is the age of nothing.
const Never = time.Duration(1<<63 - 1)

// Check says whether t is revoked now, and past Config.Staleness what is to be done. It takes no
// lock, allocates nothing and asks nobody. That t is genuine and has not expired is for the
// caller to make sure of, see package token.
//
// Of tenants that the state is not about nothing is known: a token whose Tenant is set and none of
// [Status].Tenants is Refused, unless a revocation matches it, at any age and whatever Config.Staleness
// says. While nothing at all is known Config.Empty says what is done.
func (r *Replica) Check(t Token) Decision { return r.CheckWith(t, r.cfg.Staleness) }

// CheckWith is Check with another staleness, such as [Replica.StalenessOf] a path.
func (r *Replica) CheckWith(t Token, s Staleness) Decision {
	now := time.Now()
	d := Decision{Age: r.age.of(r.instant(now))} // before the state is read, which only gets fresher
	var revoked bool
	if d.Kind, revoked = r.state.Check(t, now.Unix()); revoked {
		d.Outcome = Revoked
		return d
	}
	if t.Tenant != "" && !r.scope.Load().about(t.Tenant) {
		return d
	}
	then := s.Then
	switch {
	case d.Age <= s.withDefault().Max:
		then = Serve
	case r.state.At().Epoch == "":
		then = r.cfg.Empty
	}
	switch then {
	case Serve:
		d.Outcome = Valid
	case Introspect:
		d.Outcome = Ask
	}
	return d
}

// StalenessOf is the staleness of requests for a path, which is as [CleanPath] returns it. As APIs are,
// routes are found by what the path stands for, however it is encoded.
func (r *Replica) StalenessOf(path string) Staleness {
	path = unescaped(path)
	for i := range r.cfg.Routes {
		route := &r.cfg.Routes[i]
		rest, ok := strings.CutPrefix(path, route.Path)
		if ok && (rest == "" || rest[0] == '/' || route.Path == "/") {
			return route.Staleness
		}
	}
	return r.cfg.Staleness
}

// Age is how old what is known is: everything that was committed longer ago is in it. It errs on the side of
// more. [Never] while nothing is known, or nobody knows since when it is.
func (r *Replica) Age() time.Duration { return r.age.of(r.now()) }

// Ready reports whether what a gateway needs is known: a state was loaded from the source or
// from the folder, or Config.Empty is Serve; and what was loaded is not so stale that everything
// would be refused.
func (r *Replica) Ready() bool {
	if r.state.At().Epoch == "" {
		return r.cfg.Empty == Serve
	}
	age := r.Age()
	serves := func(s Staleness) bool { return age <= s.Max || s.Then != Deny }
	return serves(r.cfg.Staleness) || slices.ContainsFunc(r.cfg.Routes, func(route Route) bool { return serves(route.Staleness) })
}

// Status is for operators. It has no secret.
func (r *Replica) Status() Status {
	s := Status{ID: r.id, Age: r.Age(), Ready: r.Ready(), Feeds: make([]FeedStatus, 0, len(r.feeds))}
	r.state.View(func(v *View) {
		s.Position = v.At()
		s.Revocations, s.Entities = v.count()
	})
	s.Tenants, s.RevocationsOnly = r.state.Scope()
	for _, f := range r.feeds {
		s.Feeds = append(s.Feeds, f.status())
	}
	if r.folder != nil {
		s.Damaged = r.folder.damaged()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cfg.Reporter != nil {
		reports := r.reports
		s.Report = &reports
	}
	s.From, s.Snapshots, s.Deltas = r.from, r.snapshots, r.deltas
	s.Error = strings.Join(slices.DeleteFunc([]string{r.logErr, r.sourceErr, r.folderErr}, func(e string) bool { return e == "" }), "; ")
	return s
}

// count is how many revocations and entities there are, ended revocations too until they are
// forgotten.
func (v *View) count() (revocations, entities int) {
	v.content.marks.each(func(_ string, s *set) { revocations += s.n })
	s := v.content.shelves
	return revocations, len(s.tenants.sorted) + len(s.keyManagers.sorted) + len(s.policies.sorted) + len(s.scopes.sorted) +
		len(s.apis.sorted) + len(s.applications.sorted) + len(s.keyMappings.sorted) + len(s.subscriptions.sorted)
}

// Status is how a replica does.
type Status struct {
	ID string `json:"id"` // see [Replica.ID]
	revocation.Position
	// Age is that of [Decision], in nanoseconds.
	Age   time.Duration `json:"age"`
	Ready bool          `json:"ready"`
	// From is where the state came from: "" (nothing yet), "folder" or "source".
	From string `json:"from"`
	// RevocationsOnly: Authorize cannot look at the catalog.
	RevocationsOnly bool `json:"revocations_only"`
	// Tenants are those that the state is about. None: all.
	Tenants []string `json:"tenants,omitempty"`
	// Revocations and Entities count what is held.
	Revocations int `json:"revocations"`
	Entities    int `json:"entities"`
	// Snapshots counts those that were loaded, Deltas the times that missed events were
	// fetched, since the start.
	Snapshots uint64       `json:"snapshots"`
	Deltas    uint64       `json:"deltas"`
	Feeds     []FeedStatus `json:"feeds"`
	// Report is how the service is told of this replica. Nil: it is not.
	Report *ReportStatus `json:"report,omitempty"`
	// Error is the last thing that went wrong with the source, the folder or the log, empty when
	// it is over.
	Error string `json:"error,omitempty"`
	// Damaged is what was wrong with files of the folder when it was read. They were set aside, and
	// what was missing is fetched from the source.
	Damaged string `json:"damaged,omitempty"`
}

// FeedStatus is how a feed does.
type FeedStatus struct {
	Name      string `json:"name"`
	Connected bool   `json:"connected"`
	// Heard is when something last came, in Unix milliseconds. 0: never.
	Heard int64 `json:"heard"`
	// Events counts what came since the start, heartbeats left out.
	Events uint64 `json:"events"`
	// Error is why it is not connected. The service is told, and shows it to who may see the gateway: it
	// must have no secret.
	Error string `json:"error,omitempty"`
}
