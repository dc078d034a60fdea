// Package wso2 hides how WSO2's gateways want to be told things: our events in
// their words, byte for byte, without a broker or a clock; and how their key
// managers tell us.
//
// # Decisions
//
// A gateway that knows only jti and signature cannot match a digest, so a token
// that has neither gets no message: the opaque token itself would be a secret
// in the clear, and all that its message does there is empty a cache.
//
// An event that these gateways have no word for gets no message: revocations of
// sessions, tenants and keys, and changes of tenants. Those who issue tokens of a
// tenant or with a key that must die have to revoke them by client or one by one.
//
// Every message is a pure function of its event, but for the seconds that a
// revocation has left: sent again, it changes nothing where it was heard before.
package wso2

import (
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// ContentType is that of every message of [Messages]. Gateways in Java drop a
// message that has any other, or a parameter.
const ContentType = "text/plain"

// The topics, which are routing keys too (WSO2 contract, section 2.1). What is told
// on one of the two of key managers is told on both: gateways in Go know the first,
// gateways in Java the second, and RabbitMQ tells them apart.
const (
	TopicTokenRevocation = "tokenRevocation"
	TopicNotification    = "notification"
	TopicKeyManagerGo    = "keymanager"
	TopicKeyManagerJava  = "keyManager"
)

// Message is one message for gateways.
type Message struct {
	// Topic is one of the topics.
	Topic string
	// Body is JSON, or a map in the form of JMS: that of [MapMessages].
	Body []byte
}

// Messages are what gateways are told about e as of now, in the order in which they
// must hear it, with JSON as bodies. There are none when they have no word for e, or
// what e revokes has ended. An error means that e is not one of our events.
func Messages(e revocation.Event, now time.Time) ([]Message, error) {
	said, err := say(e, now)
	if err != nil || len(said) == 0 {
		return nil, err
	}
	messages := make([]Message, len(said))
	for i, s := range said {
		if messages[i], err = s.message(); err != nil {
			return nil, fmt.Errorf("encode event %s: %w", e.Position, err)
		}
	}
	return messages, nil
}

// told is one thing that gateways are told. Its payload has a form for each of the
// two eras of messages.
type told struct {
	topic   string
	payload interface {
		// entries are those of the map for gateways that know maps only; nil if
		// none of these has a word for it.
		entries() []entry
	}
}

func (s told) message() (Message, error) {
	var m struct { // as WSO2's event streams nest it
		Event struct {
			PayloadData any `json:"payloadData"`
		} `json:"event"`
	}
	m.Event.PayloadData = s.payload
	body, err := marshal(m)
	return Message{Topic: s.topic, Body: body}, err
}

func say(e revocation.Event, now time.Time) ([]told, error) {
	var said []told
	var err error
	switch {
	case strings.HasPrefix(e.Type, "revocation."):
		var r revocation.Revocation
		if r, err = e.Revocation(); err == nil {
			said, err = sayRevocation(r, EventID(e.Position), now)
		}
	case catalog.IsChange(e.Type):
		var c catalog.Change
		if c, err = catalog.ParseChange(e); err == nil {
			said, err = sayChange(c, e.Position)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("read event %s: %w", e.Position, err)
	}
	return said, nil
}

// namespaceURL is the name space of RFC 9562, section 6.6, for names that are URLs.
var namespaceURL = [16]byte{0x6b, 0xa7, 0xb8, 0x11, 0x9d, 0xad, 0x11, 0xd1, 0x80, 0xb4, 0x00, 0xc0, 0x4f, 0xd4, 0x30, 0xc8}

// EventID is what WSO2 calls the event at p by: the version-5 UUID of p, so that a
// repeated message has the id of the first.
func EventID(p revocation.Position) string { return uuidOf(p.String()) }

// uuidOf is the version-5 UUID of name.
func uuidOf(name string) string {
	h := sha1.New()
	h.Write(namespaceURL[:])
	h.Write([]byte(name))
	u := h.Sum(nil)[:16]
	u[6] = u[6]&0x0f | 0x50
	u[8] = u[8]&0x3f | 0x80
	s := hex.EncodeToString(u)
	return strings.Join([]string{s[:8], s[8:12], s[12:16], s[16:20], s[20:]}, "-")
}

// marshal leaves <, > and & as they are.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }
