package fleet

import (
	"fmt"
	"testing"

	"github.com/rescindhq/rescind/internal/pgtest"
)

// BenchmarkReports is one report of each of 1,000 gateways, without HTTP.
func BenchmarkReports(b *testing.B) {
	f, _ := start(b, pgtest.New(b), Config{}, nil)
	nodes := make([]*node, 1000)
	for i := range nodes {
		n := newNode(b, fmt.Sprintf("gateway-%d", i), gw1, at(5))
		if err := n.once(f); err != nil {
			b.Fatal(err)
		}
		nodes[i] = n
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		for _, n := range nodes {
			r := n.base
			r.Position = at(5)
			r.Seq += 1 // at another place each time
			if _, err := f.Report(b.Context(), gw1, n.id, r, false); err != nil {
				b.Fatal(err)
			}
		}
	}
}
