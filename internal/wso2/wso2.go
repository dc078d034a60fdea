// Package wso2 hides how WSO2's gateways want to be told things: our events in
// their words, byte for byte, without a broker or a clock.
//
// # Decisions
//
// A gateway that knows only jti and signature cannot match a digest, so a token
// that has neither gets no message: the opaque token itself would be a secret
// in the clear, and all that its message does there is empty a cache.
package wso2

import (
	"bytes"
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// ContentType is that of every message. Gateways in Java drop a message that has
// any other, or a parameter.
const ContentType = "text/plain"

// message nests the payload as WSO2's event streams do.
type message struct {
	Event struct {
		PayloadData tokenRevocation `json:"payloadData"`
	} `json:"event"`
}

// tokenRevocation has the fields in the order of WSO2's stream. Ttl is text and
// the others numbers: a gateway in Go drops a message that has it otherwise.
type tokenRevocation struct {
	EventID      string `json:"eventId"`
	RevokedToken string `json:"revokedToken"`
	TTL          string `json:"ttl"`        // seconds
	ExpiryTime   int64  `json:"expiryTime"` // Unix milliseconds
	Type         string `json:"type"`
	TenantID     int32  `json:"tenantId"`
}

// TokenRevocation is the body of the message about e on the topic of token
// revocations, as of now. It is nil, without an error, when these gateways get
// none: e revokes something else than a JWT, or the JWT has expired. An error
// means that e is not one of our events.
func TokenRevocation(e revocation.Event, now time.Time) ([]byte, error) {
	if e.Type != "revocation."+string(revocation.KindToken) {
		return nil, nil
	}
	r, err := e.Revocation()
	if err != nil {
		return nil, fmt.Errorf("read event %s: %w", e.Position, err)
	}
	token := r.Target.ID
	if r.Target.Digest {
		token = r.Signature
	}
	ttl := r.Exp - now.Unix()
	if token == "" || ttl <= 0 {
		return nil, nil
	}
	var m message
	m.Event.PayloadData = tokenRevocation{
		EventID:      eventID(e.Position),
		RevokedToken: token,
		TTL:          strconv.FormatInt(ttl, 10),
		ExpiryTime:   r.Exp * 1000,
		Type:         "JWT",
		TenantID:     r.Tenant.ID,
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(m); err != nil {
		return nil, fmt.Errorf("encode event %s: %w", e.Position, err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// namespaceURL is the name space of RFC 9562, section 6.6, for names that are URLs.
var namespaceURL = [16]byte{0x6b, 0xa7, 0xb8, 0x11, 0x9d, 0xad, 0x11, 0xd1, 0x80, 0xb4, 0x00, 0xc0, 0x4f, 0xd4, 0x30, 0xc8}

// eventID is the version-5 UUID of p, so that a repeated message has the id of
// the first.
func eventID(p revocation.Position) string {
	h := sha1.New()
	h.Write(namespaceURL[:])
	h.Write([]byte(p.String()))
	u := h.Sum(nil)[:16]
	u[6] = u[6]&0x0f | 0x50
	u[8] = u[8]&0x3f | 0x80
	s := hex.EncodeToString(u)
	return strings.Join([]string{s[:8], s[8:12], s[12:16], s[16:20], s[20:]}, "-")
}
