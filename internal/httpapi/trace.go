package httpapi

import (
	"crypto/rand"
	"encoding/hex"
	"net/http"
	"strings"
)

// continueTrace returns a traceparent (W3C Trace Context) for this request: in
// the caller's trace if it sent a sound one, else in a new one that is not sampled.
func continueTrace(h http.Header) string {
	trace, sampled := "", false
	if given := h["Traceparent"]; len(given) == 1 {
		trace, sampled = parseTraceparent(strings.Trim(given[0], " \t"))
	}
	if trace == "" {
		trace = randomHex(16)
	}
	flags := "00"
	if sampled {
		flags = "01"
	}
	return "00-" + trace + "-" + randomHex(8) + "-" + flags
}

// parseTraceparent returns an empty trace id for what is not to be continued. Of
// versions after 00 it reads what they share with it.
func parseTraceparent(s string) (trace string, sampled bool) {
	const length = 55
	if len(s) < length || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return "", false
	}
	version, trace, parent, flags := s[:2], s[3:35], s[36:52], s[53:length]
	switch {
	case version == "ff", version == "00" && len(s) != length, len(s) > length && s[length] != '-':
		return "", false
	case !isLowerHex(version), !isLowerHex(trace), !isLowerHex(parent), !isLowerHex(flags):
		return "", false
	case strings.Trim(trace, "0") == "", strings.Trim(parent, "0") == "":
		return "", false
	}
	bits, err := hex.DecodeString(flags)
	return trace, err == nil && bits[0]&1 == 1
}

// traceID is the trace id of a traceparent of ours.
func traceID(traceparent string) string { return traceparent[3:35] }

func isLowerHex(s string) bool {
	return strings.Trim(s, "0123456789abcdef") == ""
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
