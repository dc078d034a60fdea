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

// needed are the revocations of some tenants which are still needed at
// now, Unix seconds.
type needed struct {
	at      revocation.Position
	all     replica.Revocations
	tenants selection
	now     int64
}

func (h *Hub) needed(tenants selection) needed {
	n := needed{tenants: tenants}
	h.state.Replica().View(func(v *replica.View) { n.at, n.all = v.At(), v.Revocations() })
	n.now = time.Now().Unix()
	return n
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
	if rest.AccountOf(r.Context()).RevokedJWTObject {
		return h.revoked(w, r, "object", (*encoder).revokedObject)
	}
	return h.revoked(w, r, "array", (*encoder).revokedArray)
}

func (e *encoder) revokedArray(n needed) {
	e.buf = append(e.buf, '[')
	e.tokens(n, true)
	e.buf = append(e.buf, ']')
}

// tokens appends the tokens among n, with commas between them. Gateways before 3.2 want
// other names.
func (e *encoder) tokens(n needed, oldNames bool) {
	first := true
	n.of(revocation.KindToken, func(rec replica.Record) bool {
		token := rec.Target.ID
		if rec.Target.Digest {
			token = rec.Signature
		}
		if token == "" {
			return true
		}
		e.comma(&first)
		e.buf = append(e.buf, `{"jwt_signature":`...)
		e.buf = appendString(e.buf, token)
		e.buf = append(e.buf, `,"expiry_time":`...)
		e.buf = strconv.AppendInt(e.buf, rec.Exp*1000, 10)
		if oldNames {
			e.buf = append(e.buf, `,"jwtSignature":`...)
			e.buf = appendString(e.buf, token)
			e.buf = append(e.buf, `,"expiryTime":`...)
			e.buf = strconv.AppendInt(e.buf, rec.Exp*1000, 10)
		}
		e.buf = append(e.buf, '}')
		return e.next()
	})
}

func (e *encoder) comma(first *bool) {
	if !*first {
		e.buf = append(e.buf, ',')
	}
	*first = false
}

func (e *encoder) revokedObject(n needed) {
	e.buf = append(e.buf, `{"revokedJWTList":[`...)
	e.tokens(n, false)
	e.buf = append(e.buf, `],"revokedJWTConsumerKeyList":[`...)
	e.timed(n, revocation.KindClient, `{"consumer_key":`, ``)
	e.buf = append(e.buf, `],"revokedJWTSubjectEntityList":[`...)
	e.timed(n, revocation.KindSubject, `{"entity_id":`, `,"entity_type":"USER_ID"`)
	e.buf = append(e.buf, `]}`...)
}

func (e *encoder) timed(n needed, kind revocation.Kind, id, more string) {
	first := true
	n.of(kind, func(rec replica.Record) bool {
		e.comma(&first)
		e.buf = append(e.buf, id...)
		e.buf = appendString(e.buf, rec.Target.ID)
		e.buf = append(e.buf, more...)
		e.buf = append(e.buf, `,"revocation_time":`...)
		e.buf = strconv.AppendInt(e.buf, revokedUntil(rec), 10)
		e.buf = append(e.buf, `,"organization":`...)
		e.buf = appendString(e.buf, rec.Tenant.Domain)
		e.buf = append(e.buf, '}')
		return e.next()
	})
}

// revokedUntil is a revocation's time in Unix milliseconds. Gateways compare it with iat
// * 1000, and the whole second is revoked.
func revokedUntil(rec replica.Record) int64 { return rec.NotAfter*1000 + 999 }
