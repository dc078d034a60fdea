package sink

import (
	"fmt"
	"strings"
)

// continueTrace is a W3C traceparent of the same trace as traceparent with
// another parent id. It is empty if traceparent is not valid (W3C Trace Context,
// section 3.2); of a version above 00 it keeps what version 00 knows.
func continueTrace(traceparent string, parent uint64) string {
	const length = len("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	if len(traceparent) < length {
		return ""
	}
	version, rest := traceparent[:2], traceparent[length:]
	fields := strings.Split(traceparent[:length], "-")
	if len(fields) != 4 || len(fields[0]) != 2 || len(fields[1]) != 32 || len(fields[2]) != 16 {
		return ""
	}
	for _, f := range fields {
		if strings.Trim(f, "0123456789abcdef") != "" {
			return ""
		}
	}
	traceID, flags := fields[1], fields[3]
	switch {
	case version == "ff" || version == "00" && rest != "" || rest != "" && rest[0] != '-':
		return ""
	case strings.Trim(traceID, "0") == "" || strings.Trim(fields[2], "0") == "":
		return ""
	case version != "00" && strings.IndexByte("13579bdf", flags[1]) >= 0:
		flags = "01" // sampled
	case version != "00":
		flags = "00"
	}
	if parent == 0 {
		parent = 1 // zero means none
	}
	return fmt.Sprintf("00-%s-%016x-%s", traceID, parent, flags)
}
