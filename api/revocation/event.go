package revocation

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

const (
	typePrefix   = "io.github.rescindhq."
	typeSuffix   = ".v1"
	schemaPrefix = "https://rescindhq.github.io/schemas/"
	timeForm     = "2006-01-02T15:04:05.000Z07:00"

	// ContentType is the AMQP content type of an event in CloudEvents' structured mode.
	ContentType = "application/cloudevents+json; charset=utf-8"

	// maxEventBytes is CloudEvents' bound on what an intermediary must forward.
	maxEventBytes = 64 << 10
)

// Event is one change, immutable, at its place in the log. Its form on the wire
// is CloudEvents 1.0 JSON with the extension attributes sequence, previous,
// epoch and traceparent.
type Event struct {
	Position
	// Previous is the seq of the same tenant's preceding event, 0 for its first:
	// a reader of one tenant sees by it that it lost one.
	Previous Seq
	// Source is the issuer of the super tenant.
	Source string
	// Type is "<noun>.<verb>", for example "revocation.token".
	Type string
	// Subject is the identity of what changed.
	Subject string
	// Time is when the transaction committed, in milliseconds.
	Time time.Time
	// Tenant is whose event this is.
	Tenant Tenant
	// Traceparent continues the trace of the request (W3C Trace Context). May be empty.
	Traceparent string
	// Data is the whole state after the change, as JSON. Use [Event.Revocation] to read it.
	Data json.RawMessage
}

// NewEvent is the event that r happened. The log sets the other members.
func NewEvent(r Revocation) (Event, error) {
	data, err := marshal(wireOf(r))
	if err != nil {
		return Event{}, fmt.Errorf("encode revocation %s: %w", r.ID, err)
	}
	return Event{
		Type:    "revocation." + string(r.Target.Kind),
		Subject: r.Target.ID,
		Tenant:  r.Tenant,
		Data:    data,
	}, nil
}

// CloudType is the CloudEvents type attribute.
func (e Event) CloudType() string { return typePrefix + e.Type + typeSuffix }

// RoutingKey is the AMQP topic of e: type and tenant domain, dots in the domain
// as underscores.
func (e Event) RoutingKey() string {
	return e.Type + "." + strings.ReplaceAll(e.Tenant.Domain, ".", "_")
}

// TimeString is the CloudEvents time attribute: RFC 3339, UTC, milliseconds.
func (e Event) TimeString() string { return e.Time.UTC().Format(timeForm) }

type wireEvent struct {
	SpecVersion     string          `json:"specversion"`
	ID              string          `json:"id"`
	Source          string          `json:"source"`
	Type            string          `json:"type"`
	Subject         string          `json:"subject,omitempty"`
	Time            string          `json:"time"`
	DataContentType string          `json:"datacontenttype"`
	DataSchema      string          `json:"dataschema,omitempty"`
	Sequence        string          `json:"sequence,omitempty"`
	Previous        string          `json:"previous,omitempty"`
	Epoch           Epoch           `json:"epoch"`
	Traceparent     string          `json:"traceparent,omitempty"`
	Data            json.RawMessage `json:"data"`
}

// MarshalJSON writes e as a structured CloudEvent of less than 64 KiB. Data goes in
// as it is.
func (e Event) MarshalJSON() ([]byte, error) {
	b := make([]byte, 0, 640+len(e.Data))
	b = append(b, `{"specversion":"1.0","id":"`...)
	b = append(append(b, e.Epoch...), ':')
	b = strconv.AppendInt(b, int64(e.Seq), 10)
	b = appendString(append(b, `","source":`...), e.Source)
	b = append(append(append(append(b, `,"type":"`...), typePrefix...), e.Type...), typeSuffix...)
	b = append(b, '"')
	if e.Subject != "" {
		b = appendString(append(b, `,"subject":`...), e.Subject)
	}
	b = e.Time.UTC().AppendFormat(append(b, `,"time":"`...), timeForm)
	b = append(append(b, `","datacontenttype":"application/json","dataschema":"`...), schemaPrefix...)
	b = append(append(append(b, e.Type...), typeSuffix...), `.json","sequence":"`...)
	b = append(appendPadded(b, e.Seq), `","previous":"`...)
	b = append(appendPadded(b, e.Previous), `","epoch":"`...)
	b = append(append(b, e.Epoch...), '"')
	if e.Traceparent != "" {
		b = appendString(append(b, `,"traceparent":`...), e.Traceparent)
	}
	b = append(append(append(b, `,"data":`...), e.Data...), '}')
	if len(b) >= maxEventBytes {
		return nil, fmt.Errorf("encode event %s: %d bytes, must be below %d", e.Position, len(b), maxEventBytes)
	}
	return b, nil
}

// appendString appends s as a JSON string.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, err := marshal(s)
			if err != nil {
				panic(err) // every string can be encoded
			}
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

// appendPadded appends the form in which text order is number order.
func appendPadded(b []byte, s Seq) []byte {
	var digits [20]byte
	n := strconv.AppendInt(digits[:0], int64(s), 10)
	return append(append(b, "00000000000000000000"[len(n):]...), n...)
}

// marshal leaves <, > and & as they are: events are not HTML, and every byte counts.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// ParseEvent reads a structured CloudEvent of ours. Unknown members are ignored.
// Its error is an [InvalidError].
func ParseEvent(b []byte) (Event, error) {
	w, err := parseEnvelope(b)
	if err != nil {
		return Event{}, err
	}
	typ, ok := cutType(w.Type)
	if !ok {
		return Event{}, invalidf("the event's type is not one of ours")
	}
	seq, err := parseSeq("sequence", w.Sequence)
	if err != nil {
		return Event{}, err
	}
	previous, err := parseSeq("previous", w.Previous)
	if err != nil {
		return Event{}, err
	}
	e := Event{
		Position: Position{Epoch: w.Epoch, Seq: seq}, Previous: previous, Source: w.Source, Type: typ,
		Subject: w.Subject, Traceparent: w.Traceparent, Data: w.Data,
	}
	if w.ID != e.String() {
		return Event{}, invalidf("the event's id is not its epoch and sequence")
	}
	if previous >= seq {
		return Event{}, invalidf("the event's previous is not below its sequence")
	}
	if e.Time, err = time.Parse(time.RFC3339Nano, w.Time); err != nil {
		return Event{}, invalidf("the event's time is not RFC 3339")
	}
	var owner struct {
		Tenant Tenant `json:"tenant"`
	}
	if err := json.Unmarshal(w.Data, &owner); err != nil || owner.Tenant.Domain == "" {
		return Event{}, invalidf("the event's data names no tenant")
	}
	e.Tenant = owner.Tenant
	return e, nil
}

func parseEnvelope(b []byte) (wireEvent, error) {
	var w wireEvent
	if len(b) >= maxEventBytes {
		return w, invalidf("the event has %d bytes, must be below %d", len(b), maxEventBytes)
	}
	if err := json.Unmarshal(b, &w); err != nil {
		return w, invalidf("the event is not a JSON object")
	}
	switch {
	case w.SpecVersion != "1.0":
		return w, invalidf("the event's specversion is not 1.0")
	case w.Source == "":
		return w, invalidf("the event has no source")
	case !validUUID(string(w.Epoch)):
		return w, invalidf("the event's epoch is not a canonical UUID")
	}
	return w, nil
}

func cutType(s string) (string, bool) {
	s, okPrefix := strings.CutPrefix(s, typePrefix)
	s, okSuffix := strings.CutSuffix(s, typeSuffix)
	return s, okPrefix && okSuffix && s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789._") == ""
}

func parseSeq(name, s string) (Seq, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || len(s) != 20 || n < 0 {
		return 0, invalidf("the event's %s is not 20 decimal digits", name)
	}
	return Seq(n), nil
}

func validUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(s) {
		switch i {
		case 8, 13, 18, 23:
			if c != '-' {
				return false
			}
		default:
			if !('0' <= c && c <= '9' || 'a' <= c && c <= 'f') {
				return false
			}
		}
	}
	return true
}

// wireRevocation is the data of a revocation event.
type wireRevocation struct {
	ID        string `json:"id"`
	Kind      Kind   `json:"kind"`
	Tenant    Tenant `json:"tenant"`
	Iss       string `json:"iss,omitempty"`
	JTI       string `json:"jti,omitempty"`
	Digest    string `json:"digest,omitempty"`
	Sub       string `json:"sub,omitempty"`
	SID       string `json:"sid,omitempty"`
	KID       string `json:"kid,omitempty"`
	Exp       int64  `json:"exp"`
	NotAfter  int64  `json:"not_after,omitempty"`
	ClientID  string `json:"client_id,omitempty"`
	Signature string `json:"signature,omitempty"`
	Reason    string `json:"reason,omitempty"`
}

func wireOf(r Revocation) wireRevocation {
	w := wireRevocation{
		ID: r.ID, Kind: r.Target.Kind, Tenant: r.Tenant, Iss: r.Target.Iss, Exp: r.Exp, NotAfter: r.NotAfter,
		ClientID: r.ClientID, Signature: r.Signature, Reason: r.Reason,
	}
	switch {
	case r.Target.Digest:
		w.Digest = r.Target.ID
	case r.Target.Kind == KindToken:
		w.JTI = r.Target.ID
	case r.Target.Kind == KindClient:
		w.ClientID = r.Target.ID
	case r.Target.Kind == KindSubject:
		w.Sub = r.Target.ID
	case r.Target.Kind == KindSession:
		w.SID = r.Target.ID
	case r.Target.Kind == KindKey:
		w.KID = r.Target.ID
	}
	return w
}

// Revocation reads the data of an event whose type begins with "revocation.".
// Its error is an [InvalidError].
func (e Event) Revocation() (Revocation, error) {
	kind, ok := strings.CutPrefix(e.Type, "revocation.")
	if !ok {
		return Revocation{}, invalidf("an event of type %q is no revocation", e.Type)
	}
	var w wireRevocation
	if err := json.Unmarshal(e.Data, &w); err != nil {
		return Revocation{}, invalidf("the revocation's data is not the expected JSON object")
	}
	if string(w.Kind) != kind {
		return Revocation{}, invalidf("the revocation's kind is not that of the event's type")
	}
	r := Revocation{
		ID: w.ID, Target: Target{Kind: w.Kind, Iss: w.Iss}, Tenant: w.Tenant, Exp: w.Exp, NotAfter: w.NotAfter,
		ClientID: w.ClientID, Signature: w.Signature, Reason: w.Reason,
	}
	switch w.Kind {
	case KindToken:
		r.Target.ID = w.JTI
		if w.Digest != "" {
			if w.JTI != "" {
				return Revocation{}, invalidf("the revocation has both jti and digest")
			}
			r.Target.ID, r.Target.Digest = w.Digest, true
		}
	case KindClient:
		r.Target.ID, r.ClientID = w.ClientID, ""
	case KindSubject:
		r.Target.ID = w.Sub
	case KindSession:
		r.Target.ID = w.SID
	case KindTenant:
		r.Target.ID = w.Tenant.Domain
	case KindKey:
		r.Target.ID = w.KID
	}
	if err := r.Target.Validate(); err != nil {
		return Revocation{}, err
	}
	return r, nil
}

// Heartbeat says how far the log reaches and how much of it this feed has sent.
// It is no log event and has no seq.
type Heartbeat struct {
	Epoch Epoch
	// ID is unique: "<epoch>:hb:<uuid>".
	ID string
	// Source is the issuer of the super tenant.
	Source string
	Time   time.Time
	// Head is the last seq of the log, read from the database for this heartbeat.
	Head Seq
	// Through is the last seq that was sent on this feed before the heartbeat.
	Through Seq
}

const heartbeatType = typePrefix + "heartbeat" + typeSuffix

// HeartbeatRoutingKey is the AMQP routing key of heartbeats.
const HeartbeatRoutingKey = "heartbeat"

// CloudType is the CloudEvents type attribute.
func (Heartbeat) CloudType() string { return heartbeatType }

type wireHeartbeat struct {
	Head    Seq `json:"head"`
	Through Seq `json:"through"`
}

// MarshalJSON writes h as a structured CloudEvent.
func (h Heartbeat) MarshalJSON() ([]byte, error) {
	data, err := json.Marshal(wireHeartbeat{h.Head, h.Through})
	if err != nil {
		return nil, err
	}
	return marshal(wireEvent{
		SpecVersion: "1.0", ID: h.ID, Source: h.Source, Type: heartbeatType, Time: h.Time.UTC().Format(timeForm),
		DataContentType: "application/json", DataSchema: schemaPrefix + "heartbeat.v1.json", Epoch: h.Epoch, Data: data,
	})
}

// ParseHeartbeat reads what [Heartbeat.MarshalJSON] writes. Its error is an [InvalidError].
func ParseHeartbeat(b []byte) (Heartbeat, error) {
	w, err := parseEnvelope(b)
	if err != nil {
		return Heartbeat{}, err
	}
	if w.Type != heartbeatType {
		return Heartbeat{}, invalidf("the event is no heartbeat")
	}
	if !strings.HasPrefix(w.ID, string(w.Epoch)+":hb:") {
		return Heartbeat{}, invalidf("the heartbeat's id is not that of one")
	}
	h := Heartbeat{Epoch: w.Epoch, ID: w.ID, Source: w.Source}
	if h.Time, err = time.Parse(time.RFC3339Nano, w.Time); err != nil {
		return Heartbeat{}, invalidf("the heartbeat's time is not RFC 3339")
	}
	var data wireHeartbeat
	dec := json.NewDecoder(bytes.NewReader(w.Data))
	if err := dec.Decode(&data); err != nil || data.Head < 0 || data.Through < 0 || data.Through > data.Head {
		return Heartbeat{}, invalidf("the heartbeat's head and through are not two seqs in order")
	}
	if _, err := dec.Token(); err != io.EOF {
		return Heartbeat{}, invalidf("the heartbeat's data is more than one JSON value")
	}
	h.Head, h.Through = data.Head, data.Through
	return h, nil
}
