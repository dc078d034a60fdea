package snapshotapi

import (
	"bytes"
	"encoding/json"
	"iter"
	"strconv"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// kind is what a snapshot is of.
type kind struct {
	revocations bool
	nouns       []catalog.Noun
}

// kinds are by the last segment of their path.
var kinds = map[string]kind{
	"all":           {true, catalog.Nouns},
	"revocations":   {true, nil},
	"tenants":       {false, []catalog.Noun{catalog.NounTenant}},
	"key-managers":  {false, []catalog.Noun{catalog.NounKeyManager}},
	"policies":      {false, []catalog.Noun{catalog.NounPolicy}},
	"scopes":        {false, []catalog.Noun{catalog.NounScope}},
	"apis":          {false, []catalog.Noun{catalog.NounAPI}},
	"applications":  {false, []catalog.Noun{catalog.NounApplication}},
	"key-mappings":  {false, []catalog.Noun{catalog.NounKeyMapping}},
	"subscriptions": {false, []catalog.Noun{catalog.NounSubscription}},
}

// members are what lists are called in the JSON of all.
var members = map[catalog.Noun]string{
	catalog.NounTenant: "tenants", catalog.NounKeyManager: "key_managers", catalog.NounPolicy: "policies",
	catalog.NounScope: "scopes", catalog.NounAPI: "apis", catalog.NounApplication: "applications",
	catalog.NounKeyMapping: "key_mappings", catalog.NounSubscription: "subscriptions",
}

// form is how a snapshot looks.
type form string

const (
	formJSON   form = "application/json"
	formNDJSON form = "application/x-ndjson"
	formBinary form = replica.SnapshotType
)

// content is what a snapshot is made of: the state at one position.
type content struct {
	at          revocation.Position
	loads       uint64 // see [replica.View.Loads]
	revocations replica.Revocations
	entities    []iter.Seq[catalog.Entity] // as kind.nouns
}

// contentOf copies out of r what a snapshot of kind k needs, without looking at it.
func contentOf(r *replica.State, k kind) content {
	var c content
	r.View(func(v *replica.View) {
		c.at, c.loads = v.At(), v.Loads()
		if k.revocations {
			c.revocations = v.Revocations()
		}
		for _, noun := range k.nouns {
			c.entities = append(c.entities, entitiesOf(v, noun))
		}
	})
	return c
}

func entitiesOf(v *replica.View, noun catalog.Noun) iter.Seq[catalog.Entity] {
	switch noun {
	case catalog.NounTenant:
		return each(v.Tenants())
	case catalog.NounKeyManager:
		return each(v.KeyManagers())
	case catalog.NounPolicy:
		return each(v.Policies())
	case catalog.NounScope:
		return each(v.Scopes())
	case catalog.NounAPI:
		return each(v.APIs())
	case catalog.NounApplication:
		return each(v.Applications())
	case catalog.NounKeyMapping:
		return each(v.KeyMappings())
	case catalog.NounSubscription:
		return each(v.Subscriptions())
	}
	panic("snapshotapi: a noun that replicas do not list: " + string(noun))
}

func each[E catalog.Entity](list []E) iter.Seq[catalog.Entity] {
	return func(yield func(catalog.Entity) bool) {
		for _, e := range list {
			if !yield(e) {
				return
			}
		}
	}
}

// kept is how long after its end a revocation is listed, in seconds.
const kept = int64(replica.Kept / time.Second)

// encoder writes a snapshot. Revocations take no reflection and no allocation: there may
// be a million of them.
type encoder struct {
	kind  string
	form  form
	scope scope
	// cutoff, in Unix seconds: what gateways no longer need since then is left out.
	cutoff int64

	buf []byte
	// emit takes a buffer that is full and returns an empty one.
	emit func(full []byte) (empty []byte, err error)

	// row is how the revocation before this one began; most begin the same.
	row struct {
		tenant, iss string
		kind        revocation.Kind
		digest      bool
		visible     bool
		prefix      []byte
	}
}

// encode writes all of c but for what remains in e.buf.
func (e *encoder) encode(c content) error {
	if e.form == formBinary {
		return e.encodeBinary(c)
	}
	return e.encodeText(c)
}

func (e *encoder) encodeText(c content) error {
	k := kinds[e.kind]
	e.buf = append(append(e.buf, `{"epoch":"`...), c.at.Epoch...)
	e.buf = strconv.AppendInt(append(e.buf, `","seq":`...), int64(c.at.Seq), 10)
	whole := e.kind == "all"
	if e.form == formNDJSON {
		e.buf = append(append(append(e.buf, `,"kind":"`...), e.kind...), '"', '}', '\n')
	}
	list := func(name, item string, write func(between, after string) error) error {
		if e.form == formNDJSON {
			if whole {
				return write(`{"kind":"`+item+`","item":`, "}\n")
			}
			return write("", "\n")
		}
		if !whole {
			name = "items"
		}
		e.buf = append(append(append(e.buf, ",\n\""...), name...), "\":[\n"...)
		if err := write("", ",\n"); err != nil {
			return err
		}
		e.buf = append(bytes.TrimSuffix(e.buf, []byte(",\n")), ']')
		return nil
	}
	if k.revocations {
		err := list("revocations", "revocation", func(before, after string) error {
			return e.writeRevocations(c.revocations, before, after)
		})
		if err != nil {
			return err
		}
	}
	for i, noun := range k.nouns {
		err := list(members[noun], string(noun), func(before, after string) error {
			return e.writeEntities(c.entities[i], before, after)
		})
		if err != nil {
			return err
		}
	}
	if e.form == formJSON {
		e.buf = append(e.buf, "}\n"...)
	}
	return nil
}

// spill makes room. It leaves a little, so that what a list ends with can still be seen.
func (e *encoder) spill() (err error) {
	if len(e.buf) < chunkSize {
		return nil
	}
	const keep = 2
	var last [keep]byte
	n := len(e.buf) - copy(last[:], e.buf[len(e.buf)-keep:])
	if e.buf, err = e.emit(e.buf[:n]); err != nil {
		return err
	}
	e.buf = append(e.buf, last[:]...)
	return nil
}

func (e *encoder) writeEntities(all iter.Seq[catalog.Entity], before, after string) error {
	enc := json.NewEncoder(e)
	enc.SetEscapeHTML(false) // as in events
	for entity := range all {
		if !e.scope.has(entity.Base().Tenant.Domain) {
			continue
		}
		e.buf = append(e.buf, before...)
		if err := enc.Encode(entity); err != nil {
			return err
		}
		e.buf = append(e.buf[:len(e.buf)-1], after...) // without the encoder's line end
		if err := e.spill(); err != nil {
			return err
		}
	}
	return nil
}

// Write is for [json.Encoder].
func (e *encoder) Write(p []byte) (int, error) {
	e.buf = append(e.buf, p...)
	return len(p), nil
}

// ended is the end, in Unix seconds, of the last that are left out.
func (e *encoder) ended() int64 { return e.cutoff - kept }

func (e *encoder) writeRevocations(all replica.Revocations, before, after string) error {
	ended := e.ended()
	for rec := range all.All() {
		if rec.Exp <= ended || !e.begins(rec) {
			continue
		}
		e.buf = append(append(e.buf, before...), e.row.prefix...)
		if rec.Target.Kind != revocation.KindTenant {
			e.buf = appendString(e.buf, rec.Target.ID)
		}
		e.buf = strconv.AppendInt(append(e.buf, `,"exp":`...), rec.Exp, 10)
		if rec.NotAfter != 0 {
			e.buf = strconv.AppendInt(append(e.buf, `,"not_after":`...), rec.NotAfter, 10)
		}
		e.buf = append(append(e.buf, '}'), after...)
		if err := e.spill(); err != nil {
			return err
		}
	}
	return nil
}

// begins makes e.row that of rec, and reports whether rec is to be seen.
func (e *encoder) begins(rec replica.Record) bool {
	t, row := rec.Target, &e.row
	if row.kind == t.Kind && row.digest == t.Digest && row.iss == t.Iss && row.tenant == rec.Tenant.Domain {
		return row.visible
	}
	row.kind, row.digest, row.iss, row.tenant = t.Kind, t.Digest, t.Iss, rec.Tenant.Domain
	row.visible = e.scope.has(rec.Tenant.Domain)
	b := append(append(row.prefix[:0], `{"kind":"`...), t.Kind...)
	b = appendString(append(b, `","tenant":`...), rec.Tenant.Domain)
	if t.Kind != revocation.KindTenant {
		b = appendString(append(b, `,"iss":`...), t.Iss)
		b = append(append(append(b, `,"`...), idMember(t)...), `":`...)
	}
	row.prefix = b
	return row.visible
}

// encodeBinary writes the form that api/snapshot.md describes.
func (e *encoder) encodeBinary(c content) error {
	enc := replica.NewSnapshotEncoder(replica.SnapshotHeader{
		Position: c.at, Kind: e.kind, Tenants: e.scope.domains, Entries: c.revocations.Len(),
	})
	enc.Expect(c.revocations)
	e.buf = enc.AppendHeader(e.buf)
	ended := e.ended()
	var tenant string // of the revocation before; most are of the same
	var visible bool
	for rec := range c.revocations.All() {
		if rec.Tenant.Domain != tenant {
			tenant, visible = rec.Tenant.Domain, e.scope.has(rec.Tenant.Domain)
		}
		if rec.Exp <= ended || !visible {
			continue
		}
		e.buf = enc.AppendRevocation(e.buf, rec)
		if err := e.spill(); err != nil {
			return err
		}
	}
	for _, all := range c.entities {
		for entity := range all {
			if !e.scope.has(entity.Base().Tenant.Domain) {
				continue
			}
			var err error
			if e.buf, err = enc.AppendEntity(e.buf, entity); err != nil {
				return err
			}
			if err := e.spill(); err != nil {
				return err
			}
		}
	}
	e.buf = enc.AppendEnd(e.buf)
	return nil
}

// idMember is what events call the identifier of t.
func idMember(t revocation.Target) string {
	switch t.Kind {
	case revocation.KindToken:
		if t.Digest {
			return "digest"
		}
		return "jti"
	case revocation.KindClient:
		return "client_id"
	case revocation.KindSubject:
		return "sub"
	case revocation.KindSession:
		return "sid"
	}
	return "kid"
}

// appendString appends s as a JSON string.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			var quoted bytes.Buffer
			enc := json.NewEncoder(&quoted)
			enc.SetEscapeHTML(false)
			if err := enc.Encode(s); err != nil {
				panic(err) // every string can be encoded
			}
			return append(b, bytes.TrimSuffix(quoted.Bytes(), []byte("\n"))...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}
