package fleetapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"net/http"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/rest"
)

const (
	// maxReport bounds the body of a report, in bytes.
	maxReport = 64 << 10
	// maxHold is how long the answer to a report is held at most, whatever the fleet says.
	maxHold = 90 * time.Second
	// spread is the time over which gateways come again that were all sent away at once.
	spread = time.Second
)

// report answers POST /v1/gateways/{id}/status.
func (a *API) report(w http.ResponseWriter, r *http.Request) error {
	if r.URL.RawQuery != "" {
		return rest.InvalidParameter("There are no parameters here.")
	}
	report, err := readReport(w, r)
	if err != nil {
		return err
	}
	extend(w, maxHold+sendTime)
	ctx, cancel := a.open(r.Context(), maxHold)
	defer cancel()
	if a.closing.Err() != nil { // the report is taken all the same
		ctx = r.Context()
	}
	account := rest.AccountOf(r.Context())
	told, err := a.deps.Fleet.Report(ctx, account, chi.URLParam(r, "id"), report, a.closing.Err() == nil)
	switch {
	case ctx.Err() != nil && errors.Is(err, ctx.Err()) && r.Context().Err() == nil: // it was held for long enough, or the service stops
		told, err = replica.Instructions{NextMS: rand.Int64N(spread.Milliseconds())}, nil
	case errors.Is(err, fleet.ErrID):
		return rest.InvalidRequest("The id in the path cannot be used: " + fleet.ErrID.Error() + ".")
	case errors.Is(err, fleet.ErrReport):
		return rest.InvalidRequest("The report cannot be used: " + strings.TrimPrefix(err.Error(), fleet.ErrReport.Error()+": ") + ".")
	case errors.Is(err, fleet.ErrOwned):
		return &rest.Problem{
			Slug: "gateway-owned", Title: "This gateway id belongs to another account.", Status: http.StatusForbidden,
			Detail: "Give the gateway another id, let it report with the account that reported this id first, or have an admin forget the id " +
				"if that gateway is gone for good.",
		}
	case errors.Is(err, fleet.ErrInstance):
		return &rest.Problem{
			Slug: "gateway-instance", Title: "Another process reports with this gateway id.", Status: http.StatusConflict,
			Detail: "The other one was started later, and is believed. Give each gateway an id of its own.",
		}
	case errors.Is(err, fleet.ErrTooMany):
		return &rest.Problem{
			Slug: "too-many-gateways", Title: "There are too many gateways.", Status: http.StatusServiceUnavailable, RetryAfter: manyRetry,
			Detail: "The report was not taken. Have an admin forget those that are gone for good.",
		}
	}
	if err != nil {
		return fmt.Errorf("take report: %w", err)
	}
	return rest.JSON(w, http.StatusOK, told)
}

// readReport reads the body, without looking at what it says. Members that are not known are passed over.
// Its error is a [rest.Problem].
func readReport(w http.ResponseWriter, r *http.Request) (report replica.Report, err error) {
	if coding := r.Header.Get("Content-Encoding"); coding != "" && !strings.EqualFold(coding, "identity") {
		w.Header().Set("Accept-Encoding", "identity")
		return report, rest.Status(http.StatusUnsupportedMediaType, "The body must have no content coding.")
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		w.Header().Set("Accept", "application/json")
		return report, rest.Status(http.StatusUnsupportedMediaType, "The body must be application/json.")
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxReport))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		w.Header().Set("Connection", "close") // the rest of the body is not read
		return report, rest.Status(http.StatusRequestEntityTooLarge, fmt.Sprintf("The body is larger than %d bytes.", maxReport))
	}
	if err != nil {
		p := rest.Status(http.StatusBadRequest, "The body could not be read.")
		p.Cause = err
		return report, p
	}
	if err := json.Unmarshal(body, &report); err != nil {
		return report, unreadable(err)
	}
	return report, nil
}

// unreadable says what is wrong with JSON that is no report.
func unreadable(err error) error {
	wrong := catalog.FieldError{Pointer: "#", Detail: "has not the form of a report"}
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		wrong.Detail = fmt.Sprintf("must be one JSON object, and is malformed at byte %d", e.Offset)
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		wrong.Detail = "must not be of JSON type " + strings.SplitN(e.Value, " ", 2)[0]
		if field := strings.TrimPrefix(strings.ReplaceAll(e.Field, "Position.", ""), "."); field != "" {
			wrong.Pointer = "#/" + strings.ReplaceAll(field, ".", "/")
		}
	}
	p := rest.InvalidRequest("The body is not a report: errors has what is wrong.", wrong)
	p.Cause = err
	return p
}
