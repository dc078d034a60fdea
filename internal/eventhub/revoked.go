package eventhub

import (
	"net/http"
	"strconv"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/rest"
)

// maxLeeway is for how many seconds after its end a revocation is still needed.
const maxLeeway = int64(revocation.MaxLeeway / time.Second)

// needed are the revocations of the tenants that r is about which are still needed at
// now, Unix seconds.
type needed struct {
	at      revocation.Position
	all     replica.Revocations
	tenants selection
	now     int64
}

func (h *Hub) needed(r *http.Request) (needed, error) {
	n := needed{tenants: h.query(r, seenBy).tenants}
	if _, err := h.fresh(r.Context()); err != nil {
		return n, err
	}
	h.state.Replica().View(func(v *replica.View) { n.at, n.all = v.At(), v.Revocations() })
	n.now = time.Now().Unix()
	return n, nil
}

// of calls each with those of a kind until it returns false.
func (n needed) of(kind revocation.Kind, each func(rec replica.Record) bool) {
	for rec := range n.all.All() {
		if rec.Target.Kind == kind && rec.Exp+maxLeeway > n.now && n.tenants.has(rec.Tenant.Domain) && !each(rec) {
			return
		}
	}
}

// revokedJWT lists what is revoked, as an array for gateways before API Manager 4.3
// and as an object for those since, which nothing in a request tells apart: the account
// does. Both forms name a token by what gateways look for, its jti or its signature; a
// token that has neither is of no use to them.
func (h *Hub) revokedJWT(w http.ResponseWriter, r *http.Request) error {
	s, done, err := h.stream(w, r)
	if err != nil {
		return err
	}
	defer done()
	n, err := h.needed(r)
	if err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		h.head(w)
		return nil
	}
	if rest.AccountOf(r.Context()).RevokedJWTObject {
		s.revokedObject(n)
	} else {
		s.buf = append(s.buf, '[')
		s.tokens(n, true)
		s.buf = append(s.buf, ']')
	}
	s.end()
	return nil
}

// tokens appends the tokens among n, with commas between them. Gateways before 3.2 want
// other names.
func (s *stream) tokens(n needed, oldNames bool) {
	first := true
	n.of(revocation.KindToken, func(rec replica.Record) bool {
		token := rec.Target.ID
		if rec.Target.Digest {
			token = rec.Signature
		}
		if token == "" {
			return true
		}
		s.comma(&first)
		s.buf = append(s.buf, `{"jwt_signature":`...)
		s.buf = appendString(s.buf, token)
		s.buf = append(s.buf, `,"expiry_time":`...)
		s.buf = strconv.AppendInt(s.buf, rec.Exp*1000, 10)
		if oldNames {
			s.buf = append(s.buf, `,"jwtSignature":`...)
			s.buf = appendString(s.buf, token)
			s.buf = append(s.buf, `,"expiryTime":`...)
			s.buf = strconv.AppendInt(s.buf, rec.Exp*1000, 10)
		}
		s.buf = append(s.buf, '}')
		return s.next()
	})
}

func (s *stream) comma(first *bool) {
	if !*first {
		s.buf = append(s.buf, ',')
	}
	*first = false
}

func (s *stream) revokedObject(n needed) {
	s.buf = append(s.buf, `{"revokedJWTList":[`...)
	s.tokens(n, false)
	s.buf = append(s.buf, `],"revokedJWTConsumerKeyList":[`...)
	s.timed(n, revocation.KindClient, `{"consumer_key":`, ``)
	s.buf = append(s.buf, `],"revokedJWTSubjectEntityList":[`...)
	s.timed(n, revocation.KindSubject, `{"entity_id":`, `,"entity_type":"USER_ID"`)
	s.buf = append(s.buf, `]}`...)
}

func (s *stream) timed(n needed, kind revocation.Kind, id, more string) {
	first := true
	n.of(kind, func(rec replica.Record) bool {
		s.comma(&first)
		s.buf = append(s.buf, id...)
		s.buf = appendString(s.buf, rec.Target.ID)
		s.buf = append(s.buf, more...)
		s.buf = append(s.buf, `,"revocation_time":`...)
		s.buf = strconv.AppendInt(s.buf, revokedUntil(rec), 10)
		s.buf = append(s.buf, `,"organization":`...)
		s.buf = appendString(s.buf, rec.Tenant.Domain)
		s.buf = append(s.buf, '}')
		return s.next()
	})
}

// revokedUntil is a revocation's time in Unix milliseconds. Gateways compare it with iat
// * 1000, and the whole second is revoked.
func revokedUntil(rec replica.Record) int64 { return rec.NotAfter*1000 + 999 }
