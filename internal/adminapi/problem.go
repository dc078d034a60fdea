package adminapi

import (
	"errors"
	"net/http"

	"github.com/rescindhq/rescind/api/catalog"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/rest"
)

// conflicts are the problem types of [store.Conflict], by its slug.
var conflicts = map[string]struct{ slug, title string }{
	"exists":    {"already-exists", "Something else has this name or id already."},
	"in-use":    {"in-use", "Something else refers to it."},
	"immutable": {"immutable", "This never changes."},
	"limit":     {"too-many", "There would be too many."},
}

// problem is what a caller sees of err. What it does not know is for [rest.Write].
func problem(err error) error {
	if err == nil {
		return nil
	}
	if c, ok := errors.AsType[*store.Conflict](err); ok {
		kind, known := conflicts[c.Slug]
		if !known {
			return err
		}
		p := &rest.Problem{Slug: kind.slug, Title: kind.title, Status: http.StatusConflict, Detail: c.Detail}
		if c.Pointer != "" {
			p.Errors = []catalog.FieldError{{Pointer: c.Pointer, Detail: c.Detail}}
		}
		return p
	}
	switch {
	case errors.Is(err, store.ErrNotFound):
		return rest.Status(http.StatusNotFound, "There is no such thing here, or it is another tenant's.")
	case errors.Is(err, store.ErrStale):
		return rest.Status(http.StatusPreconditionFailed, "It has changed since the version that If-Match names. Read it again, and decide whether the change still holds.")
	}
	return err
}
