package replica

import (
	"context"

	"github.com/rescindhq/rescind/api/revocation"
)

// Report is what a replica tells the service of itself: the body of POST /v1/gateways/{id}/status.
type Report struct {
	// Instance is a UUID that is new with each start. Started is when that was, Unix milliseconds by the
	// replica's clock: of two instances that report with one id, the one that started later is believed.
	Instance string `json:"instance"`
	Started  int64  `json:"started"`
	// Labels are for people, and for those who select gateways.
	Labels map[string]string `json:"labels,omitempty"`
	// Version is of the software, for people.
	Version string `json:"version,omitempty"`
	// Position is what was applied: everything up to it. Without an epoch nothing is known yet.
	revocation.Position
	// AgeMS is [Replica.Age] in milliseconds, -1 for [Never].
	AgeMS int64 `json:"age_ms"`
	Ready bool  `json:"ready"`
	// Tenants are as in [Status]; not there if they are more than 500, or take more than 24 KiB: then the
	// service goes by what the account sees.
	Tenants         []string     `json:"tenants,omitempty"`
	RevocationsOnly bool         `json:"revocations_only"`
	Revocations     int          `json:"revocations"`
	Entities        int          `json:"entities"`
	Snapshots       uint64       `json:"snapshots"`
	Deltas          uint64       `json:"deltas"`
	Feeds           []FeedStatus `json:"feeds,omitempty"`
	Error           string       `json:"error,omitempty"`
	// Digest is the last one that was asked for, nil if none was.
	Digest *Digest `json:"digest,omitempty"`
	// Leaving: this is the last report, the gateway stops in good order.
	Leaving bool `json:"leaving,omitempty"`
}

// Instructions are the service's answer to a [Report]. What is zero is not asked for.
type Instructions struct {
	// Confirm asks for a report at once when everything up to it is applied.
	Confirm revocation.Position `json:"confirm,omitzero"`
	// Digest asks for a digest, in the report that is sent when there is one.
	Digest *DigestRequest `json:"digest,omitempty"`
	// Load asks for a snapshot to be loaded, because the state was found to differ from the log. It is
	// the name of the request: one that was heard before is not asked for again.
	Load string `json:"load,omitempty"`
	// NextMS is in how many milliseconds the next report is due, from when this was answered. 0: at once,
	// for the service has waited with its answer.
	NextMS int64 `json:"next_ms"`
}

// DigestRequest asks for a [Digest] with this cutoff, at a position not before After.
type DigestRequest struct {
	Cutoff int64               `json:"cutoff"`
	After  revocation.Position `json:"after,omitzero"`
}

// Reporter tells the service of a replica. [HTTP] is one. The service may wait with its answer until it
// has something to ask for, some seconds. Its methods are called by one goroutine at a time. Report must return
// once ctx has ended.
type Reporter interface {
	Report(ctx context.Context, id string, r Report) (Instructions, error)
}
