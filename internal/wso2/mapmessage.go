package wso2

import (
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// MapContentType is that of every message of [MapMessages].
const MapContentType = "jms/map-message"

// MapMessages are what gateways that know only maps of JMS are told about e as of now
// (WSO2 contract, section 2.5): API Manager 3.2, API Microgateway 3.0 and 3.1.
// It is like [Messages], but that these gateways have no word for the revocation of
// more than one token, and know [TopicKeyManagerJava] only. A newer gateway drops
// these messages, so they need routing keys of their own.
func MapMessages(e revocation.Event, now time.Time) ([]Message, error) {
	said, err := say(e, now)
	if err != nil {
		return nil, err
	}
	var messages []Message
	for _, s := range said {
		entries := s.payload.entries()
		if entries == nil || s.topic == TopicKeyManagerGo {
			continue
		}
		body, err := encodeMap(entries)
		if err != nil {
			return nil, fmt.Errorf("encode event %s: %w", e.Position, err)
		}
		messages = append(messages, Message{Topic: s.topic, Body: body})
	}
	return messages, nil
}

// entry is one of a map. Its value is a bool, int32, int64 or string.
type entry struct {
	key   string
	value any
}

// The type bytes of values.
const (
	mapBool   = 1
	mapInt32  = 6
	mapInt64  = 7
	mapString = 10
)

// encodeMap is the body of a map message as WSO2's AMQP client reads it: the number of
// entries, then of each the key, a type byte and the value.
func encodeMap(entries []entry) ([]byte, error) {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(entries)))
	var err error
	for _, e := range entries {
		if b, err = appendText(b, e.key); err != nil {
			return nil, err
		}
		switch v := e.value.(type) {
		case bool:
			b = append(b, mapBool, 0)
			if v {
				b[len(b)-1] = 1
			}
		case int32:
			b = binary.BigEndian.AppendUint32(append(b, mapInt32), uint32(v))
		case int64:
			b = binary.BigEndian.AppendUint64(append(b, mapInt64), uint64(v))
		case string:
			if b, err = appendText(append(b, mapString), v); err != nil {
				return nil, err
			}
		default:
			panic(fmt.Sprintf("a map entry of type %T", v))
		}
	}
	return b, nil
}

// appendText appends s and the zero byte that ends it.
func appendText(b []byte, s string) ([]byte, error) {
	if strings.Contains(s, "\x00") {
		return nil, fmt.Errorf("text with a zero byte cannot be in a map message")
	}
	return append(append(b, s...), 0), nil
}
