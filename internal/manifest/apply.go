package manifest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
)

// Config says how a plan is made. All of it may be left out, but Keep where the plan
// has secrets.
type Config struct {
	// Actor is who the audit names.
	Actor ledger.Actor
	// Keep puts a secret where its owner finds it. It is called before the key is made,
	// because the secret cannot be read afterwards: one that fails ends the run.
	Keep func(Secret) error
	// Progress is called after each transaction, with how many steps of the plan are done.
	Progress func(done int)
	// Share is the most of the time that transactions may take, so that the service
	// has the rest. More is faster, and slows down revocations. Default 0.5, up to 1.
	Share float64
}

// Secret is the new secret of a key.
type Secret struct {
	Tenant      string `json:"tenant"`
	Owner       string `json:"owner"`
	Application string `json:"application"`
	KeyManager  string `json:"key_manager"`
	ConsumerKey string `json:"consumer_key"`
	Secret      string `json:"secret"`
}

// The limits of a transaction, and how long it may take before there is a pause.
const (
	maxWeight   = ledger.MaxChanges
	maxCascades = 100 // applications that are deleted, with what they have
	quick       = 10 * time.Millisecond
)

// StepError is the step that could not be made. Nothing of its transaction was.
type StepError struct {
	Step *Step
	Err  error
}

// Error says where the files ask for the step, what it was and what to do.
func (e *StepError) Error() string {
	what := e.Err.Error()
	switch {
	case errors.Is(e.Err, store.ErrStale):
		what = "somebody else changed it after the plan was made; plan again"
	case errors.Is(e.Err, store.ErrNotFound):
		what = "somebody else deleted it, or what it refers to, after the plan was made; plan again"
	}
	return Mistake{Place: e.Step.At, Text: fmt.Sprintf("%s %s: %s", e.Step.Op, e.Step, what)}.Error()
}

// Unwrap returns Err.
func (e *StepError) Unwrap() error { return e.Err }

// Apply makes the steps of a plan and returns how many it made: all, or those before
// the one that is the error. What it made stays made. Errors: [StepError] for what the
// catalog refuses, those of [store.Store.Apply] and Config.Keep.
func Apply(ctx context.Context, s *store.Store, plan *Plan, cfg Config) (done int, err error) {
	if plan.Secrets > 0 && cfg.Keep == nil {
		return 0, fmt.Errorf("%d keys get a new secret, and there is no place for secrets", plan.Secrets)
	}
	r := run{cfg: cfg, store: s, by: store.Caller{Actor: cfg.Actor}, versions: make(map[string]int64)}
	for i := range plan.Steps {
		if op := plan.Steps[i].Op; op == Block || op == Unblock {
			r.versions[plan.Steps[i].entity.Base().UUID] = plan.Steps[i].version
		}
	}
	if err := reserve(ctx, s, plan); err != nil {
		return 0, err
	}
	for done < len(plan.Steps) {
		if err := ctx.Err(); err != nil {
			return done, context.Cause(ctx)
		}
		steps := together(plan.Steps[done:])
		began := time.Now()
		if err := r.make(ctx, steps); err != nil {
			return done, err
		}
		done += len(steps)
		if cfg.Progress != nil {
			cfg.Progress(done)
		}
		if done < len(plan.Steps) {
			r.pause(ctx, time.Since(began))
		}
	}
	return done, nil
}

// reserve sees to it that what comes with new tenants takes no id that the plan gives to others.
func reserve(ctx context.Context, s *store.Store, plan *Plan) error {
	highest := make(map[catalog.Noun]int32)
	tenants := false
	for _, st := range plan.Steps {
		if st.Op != Create {
			continue
		}
		tenants = tenants || st.Noun == catalog.NounTenant
		if st.entity != nil && (st.Noun == catalog.NounKeyManager || st.Noun == catalog.NounPolicy) {
			highest[st.Noun] = max(highest[st.Noun], st.entity.Base().ID)
		}
	}
	if !tenants {
		return nil
	}
	for _, n := range catalog.Nouns {
		if highest[n] == 0 {
			continue
		}
		if err := s.Reserve(ctx, n, highest[n]); err != nil {
			return err
		}
	}
	return nil
}

// together are the first of steps that one transaction makes.
func together(steps []Step) []Step {
	weight, cascades := 0, 0
	for i := range steps {
		s := &steps[i]
		weight += s.weight
		if s.Op == Delete && s.Noun == catalog.NounApplication {
			cascades++
		}
		if s.alone() || weight > maxWeight || cascades > maxCascades {
			return steps[:max(i, 1)]
		}
	}
	return steps
}

// alone: the catalog makes no other change with it.
func (s *Step) alone() bool { return s.Op == Block || s.Op == Unblock || s.client != nil || s.builtIn }

// run is one run of a plan.
type run struct {
	cfg   Config
	store *store.Store
	by    store.Caller
	// versions are the newest timestamps of applications that are yet to be blocked or
	// not, by UUID: an earlier step may have changed them.
	versions map[string]int64
}

// make makes steps in one transaction.
func (r *run) make(ctx context.Context, steps []Step) error {
	first := &steps[0]
	switch {
	case first.client != nil:
		return r.makeKey(ctx, first)
	case first.Op == Block || first.Op == Unblock:
		id := first.entity.Base().UUID
		if _, err := r.store.Block(ctx, r.by, id, r.versions[id], first.Op == Block, false); err != nil {
			return refused(first, err)
		}
		return nil
	case first.builtIn:
		if err := r.find(ctx, first); err != nil {
			return err
		}
	}
	changes := make([]store.Change, len(steps))
	for i := range steps {
		s := &steps[i]
		changes[i] = store.Change{Op: store.Op(s.Op), Entity: s.entity, IfTimestamp: s.version}
	}
	entities, _, err := r.store.Apply(ctx, r.by, changes)
	if failed, ok := errors.AsType[*store.Failed](err); ok {
		return &StepError{&steps[failed.Index], failed.Err}
	}
	if err != nil {
		return err
	}
	for _, e := range entities {
		if m := e.Base(); e.Noun() == catalog.NounApplication {
			if _, waits := r.versions[m.UUID]; waits {
				r.versions[m.UUID] = m.Timestamp
			}
		}
	}
	return nil
}

// refused tells what is about the step from what is about the database.
func refused(s *Step, err error) error {
	_, conflict := errors.AsType[*store.Conflict](err)
	_, invalid := errors.AsType[catalog.Invalid](err)
	_, target := errors.AsType[*revocation.InvalidError](err)
	if conflict || invalid || target || errors.Is(err, store.ErrStale) || errors.Is(err, store.ErrNotFound) {
		return &StepError{s, err}
	}
	return err
}

// find learns the identity of what came with its tenant.
func (r *run) find(ctx context.Context, s *Step) error {
	f := store.Filter{Tenant: s.Tenant}
	switch e := s.entity.(type) {
	case *catalog.Policy:
		f.Name, f.Kind = e.Name, e.Kind
	case *catalog.KeyManager:
		f.Name = e.Name
	}
	there, err := r.store.List(ctx, r.by, s.Noun, f, 0, 1)
	if err != nil {
		return err
	}
	if len(there) == 0 {
		return &StepError{s, store.ErrNotFound}
	}
	if made, ok := there[0].(*catalog.KeyManager); ok {
		f := keyManagerOf(s.entity.(*catalog.KeyManager)) // the rest of it only the service knew
		s.entity = f.ofResident(made)
	}
	*s.entity.Base() = *there[0].Base()
	s.version = there[0].Base().Timestamp
	return nil
}

func (r *run) makeKey(ctx context.Context, s *Step) error {
	mapping := s.entity.(*catalog.KeyMapping)
	client := *s.client
	if client.Secret == "" && hasSecret(client.AuthMethod) {
		client.Secret = rand.Text() + rand.Text() // 260 bits
		err := r.cfg.Keep(Secret{
			Tenant: s.Tenant, Owner: s.application.Owner, Application: s.application.Name,
			KeyManager: mapping.KeyManager, ConsumerKey: mapping.ConsumerKey, Secret: client.Secret,
		})
		if err != nil {
			return fmt.Errorf("keep the secret of key %q: %w", mapping.ConsumerKey, err)
		}
	}
	if _, _, err := r.store.CreateKey(ctx, r.by, store.NewKey{Mapping: *mapping, Client: &client}); err != nil {
		return refused(s, err)
	}
	return nil
}

// pause leaves the service its share of the time.
func (r *run) pause(ctx context.Context, took time.Duration) {
	share := r.cfg.Share
	if share == 0 {
		share = 0.5
	}
	if took < quick || share >= 1 {
		return
	}
	t := time.NewTimer(time.Duration(float64(took) * (1/share - 1)))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
