package wso2test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"
)

// JMSMessage is a message as WSO2's gateways in Java see it: a TextMessage or a
// MapMessage.
type JMSMessage struct {
	// Text is the body of a TextMessage.
	Text string
	// Map is that of a MapMessage, nil for a TextMessage. Values are bool, byte, []byte,
	// int16, uint16 (a char), int32, int64, float32, float64, string or nil.
	Map map[string]any
}

// DecodeJMS decodes d by the rules of the AMQP client in WSO2's gateways (contract,
// sections 2.3 to 2.5). Its error says why a gateway would not take d for one of these
// two kinds of messages, or would read something else into it.
func DecodeJMS(d amqp.Delivery) (JMSMessage, error) {
	switch {
	case d.Exchange != "amq.topic":
		return JMSMessage{}, fmt.Errorf("the exchange is %q: the destination is no topic", d.Exchange)
	case d.ContentEncoding != "" && d.ContentEncoding != "UTF-8":
		return JMSMessage{}, fmt.Errorf("the content encoding is %q: it is taken for a character set", d.ContentEncoding)
	case len(d.Headers) > 0:
		return JMSMessage{}, fmt.Errorf("there are headers, which are taken for instructions: %v", d.Headers)
	case !d.Timestamp.IsZero():
		return JMSMessage{}, fmt.Errorf("the timestamp is %s: its seconds are taken for milliseconds", d.Timestamp)
	}
	switch d.ContentType {
	case "text/plain", "text/xml":
		if !utf8.Valid(d.Body) {
			return JMSMessage{}, errors.New("the text is not UTF-8")
		}
		return JMSMessage{Text: string(d.Body)}, nil
	case "jms/map-message":
		m, err := DecodeMap(d.Body)
		return JMSMessage{Map: m}, err
	}
	return JMSMessage{}, fmt.Errorf("the content type is %q: unsupported message type", d.ContentType)
}

// DecodeMap decodes the body of a MapMessage: the number of entries, then of each the
// name, a type byte and the value, in network order.
func DecodeMap(body []byte) (map[string]any, error) {
	r := mapReader{rest: body}
	count := int32(binary.BigEndian.Uint32(r.take(4)))
	m := map[string]any{}
	for i := int32(0); i < count && r.err == nil; i++ {
		key := r.text()
		if _, twice := m[key]; twice {
			return nil, fmt.Errorf("%q is there twice", key)
		}
		m[key] = r.value()
	}
	switch {
	case r.err != nil:
		return nil, r.err
	case count < 0:
		return nil, fmt.Errorf("there are %d entries", count)
	case len(r.rest) > 0:
		return nil, fmt.Errorf("%d bytes follow the last entry", len(r.rest))
	}
	return m, nil
}

type mapReader struct {
	rest []byte
	err  error
}

// take returns the next n bytes, zeros if there are fewer.
func (r *mapReader) take(n int) []byte {
	if n > len(r.rest) {
		r.err = errors.New("the body ends early")
		r.rest = nil
		return make([]byte, min(n, 8))
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *mapReader) text() string {
	s, rest, ok := bytes.Cut(r.rest, []byte{0})
	if !ok {
		r.err = errors.New("a text does not end")
	}
	r.rest = rest
	return string(s)
}

func (r *mapReader) value() any {
	switch kind := r.take(1)[0]; kind {
	case 1:
		return r.take(1)[0] != 0
	case 2:
		return r.take(1)[0]
	case 3:
		n := int32(binary.BigEndian.Uint32(r.take(4)))
		if n < 0 {
			return nil
		}
		return r.take(int(n))
	case 4:
		return int16(binary.BigEndian.Uint16(r.take(2)))
	case 5:
		return binary.BigEndian.Uint16(r.take(2))
	case 6:
		return int32(binary.BigEndian.Uint32(r.take(4)))
	case 7:
		return int64(binary.BigEndian.Uint64(r.take(8)))
	case 8:
		return math.Float32frombits(binary.BigEndian.Uint32(r.take(4)))
	case 9:
		return math.Float64frombits(binary.BigEndian.Uint64(r.take(8)))
	case 10:
		return r.text()
	case 11:
		return nil
	default:
		if r.err == nil {
			r.err = fmt.Errorf("there is no type %d", kind)
		}
		return nil
	}
}
