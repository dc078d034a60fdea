package rest

import (
	"net/http"
	"regexp"
	"strconv"
	"strings"
)

// Coding is a content coding for responses.
type Coding string

// The codings.
const (
	Identity Coding = ""
	Gzip     Coding = "gzip"
	Zstd     Coding = "zstd"
)

// acceptItem is one item of Accept-Encoding: a coding with its weight, if any.
var acceptItem = regexp.MustCompile("^([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?:[ \t]*;[ \t]*[qQ]=(0(?:\\.[0-9]{0,3})?|1(?:\\.0{0,3})?))?$")

// Negotiate chooses among zstd, gzip and identity by Accept-Encoding (RFC 9110, section
// 12.5.3), in this order where the caller has no preference. One that is not named is
// not wished for, and still acceptable if it is identity. A malformed field is taken for
// none. ok is false when none is acceptable: 406.
func Negotiate(r *http.Request) (c Coding, ok bool) {
	weights := make(map[string]float64)
	for item := range strings.SplitSeq(strings.Join(r.Header["Accept-Encoding"], ","), ",") {
		item = strings.Trim(item, " \t")
		if item == "" {
			continue
		}
		m := acceptItem.FindStringSubmatch(item)
		if m == nil {
			return Identity, true
		}
		name, weight := strings.ToLower(m[1]), 1.0
		if m[2] != "" {
			weight, _ = strconv.ParseFloat(m[2], 64) // it has the form of one
		}
		if name == "x-gzip" { // RFC 9110, section 8.4.1.3
			name = "gzip"
		}
		weights[name] = weight
	}
	weight := func(name string, unnamed float64) float64 {
		if w, ok := weights[name]; ok {
			return w
		}
		if w, ok := weights["*"]; ok {
			return w
		}
		return unnamed
	}
	const last = 0.0001 // below every weight that is not 0
	best := 0.0
	for _, each := range []struct {
		coding Coding
		weight float64
	}{{Zstd, weight("zstd", 0)}, {Gzip, weight("gzip", 0)}, {Identity, weight("identity", last)}} {
		if each.weight > best {
			c, best = each.coding, each.weight
		}
	}
	return c, best > 0
}
