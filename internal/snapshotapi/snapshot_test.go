package snapshotapi

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/rest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// entities are one of each noun, and a second application of another tenant.
func entities() []catalog.Entity {
	meta := func(id int32, tenant revocation.Tenant) catalog.Meta {
		return catalog.Meta{ID: id, UUID: fmt.Sprintf("0193a2f4-7c11-7d02-9b1e-%012d", id), Tenant: tenant, Timestamp: 1795200598214}
	}
	super := revocation.SuperTenant
	app, api := catalog.Ref{ID: 5, UUID: meta(5, super).UUID}, catalog.Ref{ID: 4, UUID: meta(4, super).UUID}
	return []catalog.Entity{
		&catalog.Tenant{Meta: meta(7, pizza), DisplayName: "Pizza & <Söhne>"},
		&catalog.KeyManager{Meta: meta(1, super), Name: "Resident", Type: "default", Enabled: true, Resident: true, Iss: iss, MaxTokenLifetime: 3600, TokenType: "DIRECT"},
		&catalog.Policy{Meta: meta(2, super), Kind: catalog.PolicySubscription, Name: "Gold", QuotaType: "requestCount", Quota: 5000, UnitTime: 1, TimeUnit: "min"},
		&catalog.Scope{Meta: meta(3, super), Name: "menu:read", Roles: []string{"chef"}},
		&catalog.API{Meta: meta(4, super), Name: "Menu", Version: "1.0.0", Context: "/menu/1.0.0", Provider: "admin", Type: "HTTP", Status: catalog.APIPublished},
		&catalog.Application{Meta: meta(5, super), Name: "Kiosk", Owner: "ann", Policy: "Unlimited", TokenType: "JWT"},
		&catalog.Application{Meta: meta(9, pizza), Name: "Oven", Owner: "bob", Policy: "Unlimited", TokenType: "JWT"},
		&catalog.KeyMapping{Meta: meta(6, super), Application: app, ConsumerKey: "app-2", KeyType: catalog.Production, KeyManager: "Resident", Iss: iss, Generated: true},
		&catalog.Subscription{Meta: meta(8, super), Application: app, API: api, Policy: "Gold", State: catalog.Unblocked},
	}
}

// ended is the end of tokens whose revocation nobody needs, needed that of those that some do.
var ended, needed = time.Now().Unix() - 720 - cutoffStep - 1, time.Now().Unix() - 720 + 60

const farAway = 4102444800

func records() []replica.Record {
	target := func(k revocation.Kind, id string) revocation.Target {
		return revocation.Target{Kind: k, Iss: iss, ID: id}
	}
	super := revocation.SuperTenant
	return []replica.Record{
		{Target: target(revocation.KindToken, "at-1"), Tenant: super, Exp: farAway},
		{Target: revocation.Target{Kind: revocation.KindToken, Iss: "https://idp.example.com", ID: "at-1"}, Tenant: super, Exp: farAway},
		{Target: target(revocation.KindToken, "at-ended"), Tenant: super, Exp: ended},
		{Target: target(revocation.KindToken, "<\"at\\é\u2028>"), Tenant: super, Exp: farAway},
		{Target: revocation.DigestTarget(iss, "opaque"), Tenant: super, Exp: farAway, Signature: "c2ln"},
		{Target: target(revocation.KindClient, "app-2"), Tenant: super, Exp: farAway, NotAfter: 1795200400},
		{Target: target(revocation.KindSubject, "u-1"), Tenant: super, Exp: farAway, NotAfter: 1795200400},
		{Target: target(revocation.KindSession, "s-1"), Tenant: super, Exp: farAway},
		{Target: target(revocation.KindKey, "k-1"), Tenant: super, Exp: farAway},
		{Target: revocation.Target{Kind: revocation.KindToken, Iss: iss + "/t/pizza.example", ID: "at-1"}, Tenant: pizza, Exp: farAway},
		{Target: revocation.Target{Kind: revocation.KindTenant, ID: pizza.Domain}, Tenant: pizza, Exp: farAway, NotAfter: 1795200400},
	}
}

func (f *fakeFollower) fill(seq revocation.Seq) {
	f.t.Helper()
	f.load(revocation.Position{Epoch: epoch, Seq: seq}, func(l *replica.Loader) {
		for _, rec := range records() {
			l.Revocation(rec)
		}
		for _, e := range entities() {
			l.Entity(e)
		}
	})
	f.frames, f.gone = make([]follow.Frame, seq), seq
}

func body(t testing.TB, resp *http.Response) []byte {
	t.Helper()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("read body after %d bytes: %v", len(b), err)
	}
	return b
}

func TestSnapshotBodies(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{})
	s.follower.fill(88213)
	for kind := range kinds {
		for name, accept := range map[string]string{"json": "application/json", "ndjson": "application/x-ndjson"} {
			resp := s.do(s.request("/v1/snapshots/"+kind, "Accept", accept))
			got := body(t, resp)
			if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != string(map[string]form{"json": formJSON, "ndjson": formNDJSON}[name]) {
				t.Errorf("%s as %s: %s of %s", kind, name, resp.Status, resp.Header.Get("Content-Type"))
			}
			if name == "json" && !json.Valid(got) {
				t.Errorf("%s is not JSON:\n%s", kind, got)
			}
			golden(t, kind+"."+name+".golden", got)
		}
	}
}

// What a snapshot says of an entity is what its events say.
func TestSnapshotItemsAreEventData(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{})
	s.follower.fill(1)
	var lines []string
	for line := range bytes.Lines(body(t, s.do(s.request("/v1/snapshots/all", "Accept", "application/x-ndjson")))) {
		lines = append(lines, string(line))
	}
	for _, entity := range entities() {
		e, err := catalog.NewEvent(catalog.Change{Verb: catalog.Created, Entity: entity})
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf(`{"kind":"%s","item":%s}`+"\n", entity.Noun(), e.Data); !slices.Contains(lines, want) {
			t.Errorf("there is no line %s", want)
		}
	}
}

func TestSnapshotConformance(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{})
	s.follower.fill(88213)
	for i := range 50 { // so that applications are worth compressing
		s.follower.change(catalog.Change{Verb: catalog.Created, Entity: &catalog.Application{
			Meta: catalog.Meta{ID: int32(100 + i), UUID: fmt.Sprintf("0193a2f4-7c11-7d02-9b1e-%012d", 100+i), Tenant: revocation.SuperTenant},
			Name: fmt.Sprintf("app %d", i),
		}})
	}
	isTag := regexp.MustCompile(`^"3b0d7c52\.88263\.[0-9a-f]{1,16}(\.gz|\.zst)?"$`)
	problem := func(t *testing.T, resp *http.Response, status int, typ string) {
		t.Helper()
		var p struct {
			Type   string
			Status int
		}
		err := json.Unmarshal(body(t, resp), &p)
		if err != nil || resp.StatusCode != status || p.Status != status || !strings.HasSuffix(p.Type, typ) ||
			resp.Header.Get("Content-Type") != "application/problem+json" || resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("answer is %s of %v, %+v, error %v; want a problem %d %s", resp.Status, resp.Header, p, err, status, typ)
		}
	}
	headers := func(t *testing.T, resp *http.Response) {
		t.Helper()
		for name, want := range map[string]string{
			"Cache-Control": "private, no-cache", "Vary": "Accept-Encoding, Accept", "Accept-Ranges": "none", "Content-Range": "",
		} {
			if got := strings.Join(resp.Header[name], "|"); got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}
		if tag := resp.Header.Get("ETag"); !isTag.MatchString(tag) {
			t.Errorf("ETag is %s", tag)
		}
	}
	t.Run("C097 C098", func(t *testing.T) {
		resp := s.do(s.request("/v1/snapshots/subscriptions?limit=2", "user", "gateway"))
		headers(t, resp)
		var got struct {
			Epoch revocation.Epoch
			Seq   revocation.Seq
			Items []catalog.Subscription
		}
		if err := json.Unmarshal(body(t, resp), &got); err != nil || resp.StatusCode != http.StatusOK {
			t.Fatal(resp.Status, err)
		}
		if got.Epoch != epoch || got.Seq != 88263 || len(got.Items) != 1 {
			t.Errorf("body is %+v", got)
		}
		tag := resp.Header.Get("ETag")
		for _, match := range []string{tag, "W/" + tag, `"other", ` + tag, "*"} {
			resp := s.do(s.request("/v1/snapshots/subscriptions?limit=2", "user", "gateway", "If-None-Match", match))
			headers(t, resp)
			if b := body(t, resp); resp.StatusCode != http.StatusNotModified || len(b) > 0 || resp.Header.Get("ETag") != tag {
				t.Errorf("If-None-Match: %s: %s with %q, ETag %s", match, resp.Status, b, resp.Header.Get("ETag"))
			}
		}
		if resp := s.do(s.request("/v1/snapshots/subscriptions", "user", "gateway", "If-None-Match", `"other"`)); resp.StatusCode != http.StatusOK {
			t.Errorf("with another tag: %s", resp.Status)
		}
	})
	var plain []byte
	t.Run("C101", func(t *testing.T) {
		resp := s.do(s.request("/v1/snapshots/applications", "Range", "bytes=0-9"))
		headers(t, resp)
		plain = body(t, resp)
		if resp.StatusCode != http.StatusOK || !json.Valid(plain) {
			t.Errorf("%s with %d bytes", resp.Status, len(plain))
		}
	})
	t.Run("C102", func(t *testing.T) {
		problem(t, s.do(s.request("/v1/snapshots/applications", "Accept-Encoding", "br, identity;q=0")), 406, "about:blank")
	})
	t.Run("C103", func(t *testing.T) {
		tags := map[string]bool{}
		for accept, coding := range map[string]string{"gzip;q=0.5, zstd": "zstd", "gzip": "gzip", "identity": ""} {
			resp := s.do(s.request("/v1/snapshots/applications", "Accept-Encoding", accept))
			headers(t, resp)
			if got := resp.Header.Get("Content-Encoding"); got != coding {
				t.Fatalf("Accept-Encoding: %s: coding is %q, want %q", accept, got, coding)
			}
			tags[resp.Header.Get("ETag")] = true
			var r io.Reader = resp.Body
			switch coding {
			case "zstd":
				z, err := zstd.NewReader(resp.Body, zstd.WithDecoderMaxWindow(8<<20), zstd.WithDecoderConcurrency(1))
				if err != nil {
					t.Fatal(err)
				}
				defer z.Close()
				r = z
			case "gzip":
				var err error
				if r, err = gzip.NewReader(resp.Body); err != nil {
					t.Fatal(err)
				}
			}
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, plain) {
				t.Errorf("%s: %d bytes, error %v; want the %d of identity", coding, len(got), err, len(plain))
			}
		}
		if len(tags) != 3 {
			t.Errorf("tags are %v, want one for each coding", tags)
		}
	})
	t.Run("HTTP-11 small bodies are not compressed", func(t *testing.T) {
		resp := s.do(s.request("/v1/snapshots/scopes", "Accept-Encoding", "zstd"))
		if b := body(t, resp); resp.Header.Get("Content-Encoding") != "" || !json.Valid(b) || resp.ContentLength != int64(len(b)) {
			t.Errorf("coding %q, length %d, body %.50q", resp.Header.Get("Content-Encoding"), resp.ContentLength, b)
		}
	})
	t.Run("HTTP-21 HEAD", func(t *testing.T) {
		req := s.request("/v1/snapshots/applications", "Accept-Encoding", "zstd")
		req.Method = http.MethodHead
		resp := s.do(req)
		headers(t, resp)
		if b := body(t, resp); resp.StatusCode != http.StatusOK || len(b) > 0 || resp.Header.Get("Content-Encoding") != "zstd" {
			t.Errorf("%s, %v, %d bytes", resp.Status, resp.Header, len(b))
		}
	})
	t.Run("refusals", func(t *testing.T) {
		for path, want := range map[string]struct {
			status int
			typ    string
		}{
			"/v1/snapshots/nonsense":                            {404, "about:blank"},
			"/v1/snapshots/apis?limit=0":                        {400, "/invalid-parameter"},
			"/v1/snapshots/apis?limit=1001":                     {400, "/invalid-parameter"},
			"/v1/snapshots/apis?limit=+2":                       {400, "/invalid-parameter"},
			"/v1/snapshots/apis?limit=2&limit=2":                {400, "/invalid-parameter"},
			"/v1/snapshots/apis?cursor=abc":                     {400, "/invalid-parameter"},
			"/v1/snapshots/apis?tennant=x":                      {400, "/invalid-parameter"},
			"/v1/snapshots/apis?tenant=":                        {400, "/invalid-parameter"},
			"/v1/snapshots/apis?tenant=PIZZA":                   {400, "/invalid-parameter"},
			"/v1/snapshots/apis?tenant=a&tenant=b":              {400, "/invalid-parameter"},
			"/v1/snapshots/apis?%zz":                            {400, "/invalid-parameter"},
			"/v1/snapshots/apis?a;b":                            {400, "/invalid-parameter"},
			"/v1/events?after=x&tenant=" + pizza.Domain + "%0a": {400, "/invalid-parameter"},
		} {
			t.Run(path, func(t *testing.T) { problem(t, s.do(s.request(path)), want.status, want.typ) })
		}
		problem(t, s.do(s.request("/v1/snapshots/apis", "user", "notifier")), 403, "about:blank")
		problem(t, s.do(s.request("/v1/snapshots/apis", "user", "nobody")), 401, "about:blank")
		problem(t, s.do(s.request("/v1/events", "user", "notifier")), 403, "about:blank")
	})
	t.Run("stale", func(t *testing.T) {
		s := serve(t, Config{})
		s.follower.stale = follow.ErrStale
		for _, path := range []string{"/v1/snapshots/apis", "/v1/events?after=" + s.follower.replica.At().String()} {
			resp := s.do(s.request(path))
			problem(t, resp, 503, "about:blank")
			if got := resp.Header.Get("Retry-After"); got != "1" {
				t.Errorf("Retry-After is %q", got)
			}
		}
	})
	t.Run("cannot be made", func(t *testing.T) {
		s := serve(t, Config{})
		s.follower.load(revocation.Position{Epoch: epoch, Seq: 1}, func(l *replica.Loader) {
			e := entities()[1].(*catalog.KeyManager)
			e.Properties = map[string]any{"x": math.Inf(1)}
			l.Entity(e)
		})
		problem(t, s.do(s.request("/v1/snapshots/key-managers")), 500, "about:blank")
		problem(t, s.do(s.request("/v1/snapshots/key-managers", "Accept", replica.SnapshotType)), 500, "about:blank")
	})
}

func TestSnapshotScope(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{})
	s.follower.fill(1)
	super, both := []string{"carbon.super"}, []string{"carbon.super", "pizza.example"}
	for _, tt := range []struct {
		user, query string
		want        []string // tenants; of a refusal its status
	}{
		{"admin", "", both},
		{"admin", "?tenant=pizza.example", []string{"pizza.example"}},
		{"admin", "?tenant=nobody.example", []string{"404"}},
		{"admin", "?tenant=carbon.super", super},
		{"gateway-all", "?tenant=nobody.example", []string{"404"}},
		{"gateway", "", super},
		{"gateway", "?tenant=carbon.super", super},
		{"gateway", "?tenant=pizza.example", []string{"403"}},
		{"gateway", "?tenant=nobody.example", []string{"403"}},
		{"gateway-all", "", both},
		{"gateway-two", "", both},
		{"gateway-two", "?tenant=nobody.example", []string{"403"}},
		{"pizza-admin", "", []string{"pizza.example"}},
		{"pizza-admin", "?tenant=carbon.super", []string{"403"}},
		{"auditor", "", []string{"pizza.example"}},
	} {
		t.Run(tt.user+tt.query, func(t *testing.T) {
			resp := s.do(s.request("/v1/snapshots/all"+tt.query, "user", tt.user, "Accept", "application/x-ndjson"))
			if resp.StatusCode != http.StatusOK {
				if diff := cmp.Diff(tt.want, []string{strconv.Itoa(resp.StatusCode)}); diff != "" {
					t.Errorf("status (-want +got):\n%s", diff)
				}
				return
			}
			seen := map[string]bool{}
			tenant := regexp.MustCompile(`"tenant":(?:\{"id":-?\d+,"domain":)?"([^"]+)"`)
			for _, m := range tenant.FindAllStringSubmatch(string(body(t, resp)), -1) {
				seen[m[1]] = true
			}
			got := []string{}
			for domain := range seen {
				got = append(got, domain)
			}
			slices.Sort(got)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("tenants (-want +got):\n%s", diff)
			}
		})
	}
}

// load reads a binary snapshot into a state.
func load(t testing.TB, resp *http.Response) (*replica.State, replica.SnapshotHeader) {
	t.Helper()
	var r io.Reader = resp.Body
	switch resp.Header.Get("Content-Encoding") {
	case "zstd":
		z, err := zstd.NewReader(resp.Body, zstd.WithDecoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		r = z
	case "gzip":
		z, err := gzip.NewReader(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		r = z
	}
	s := replica.NewState(replica.StateConfig{})
	h, err := s.ReadSnapshot(r)
	if err != nil {
		t.Fatalf("%s of %s: %v", resp.Status, resp.Header.Get("Content-Type"), err)
	}
	return s, h
}

// revocationsIn is how many s has.
func revocationsIn(t testing.TB, s *replica.State) int {
	t.Helper()
	var b bytes.Buffer
	if _, err := s.WriteSnapshot(&b); err != nil {
		t.Fatal(err)
	}
	h, err := replica.NewState(replica.StateConfig{}).ReadSnapshot(&b)
	if err != nil {
		t.Fatal(err)
	}
	return h.Entries
}

// listed is what a snapshot in lines says: of revocations what they are, of entities their JSON.
func listed(t testing.TB, body []byte) (revocations []replica.Record, items []string) {
	t.Helper()
	for i, line := range bytes.Split(bytes.TrimSpace(body), []byte("\n")) {
		var item struct {
			Kind string
			Item json.RawMessage
		}
		if err := json.Unmarshal(line, &item); err != nil {
			t.Fatal(err)
		}
		switch {
		case i == 0:
			continue
		case item.Item == nil:
			item.Item = line
		}
		var r struct {
			Kind                            revocation.Kind
			Tenant                          json.RawMessage
			Iss, JTI, Digest, Sub, SID, KID string
			ClientID                        string `json:"client_id"`
			Exp                             int64
			NotAfter                        int64 `json:"not_after"`
		}
		if err := json.Unmarshal(item.Item, &r); err != nil {
			t.Fatal(err)
		}
		if r.Exp == 0 {
			items = append(items, string(item.Item))
			continue
		}
		rec := replica.Record{Target: revocation.Target{Kind: r.Kind, Iss: r.Iss}, Exp: r.Exp, NotAfter: r.NotAfter}
		rec.Target.ID, rec.Target.Digest = r.JTI+r.Digest+r.Sub+r.SID+r.KID+r.ClientID, r.Digest != ""
		if r.Kind == revocation.KindTenant {
			rec.Target.ID = strings.Trim(string(r.Tenant), `"`)
		}
		revocations = append(revocations, rec)
	}
	return revocations, items
}

// revoked reports whether s has rec, to the second.
func revoked(s *replica.State, rec replica.Record) bool {
	tok := replica.Token{Iss: rec.Target.Iss, IssuedAt: rec.NotAfter}
	switch id := rec.Target.ID; rec.Target.Kind {
	case revocation.KindToken:
		if tok.JTI = id; rec.Target.Digest {
			tok.JTI, tok.Digest = "", id
		}
	case revocation.KindClient:
		tok.ClientID = id
	case revocation.KindSubject:
		tok.Sub = id
	case revocation.KindSession:
		tok.SID = id
	case revocation.KindTenant:
		tok.Tenant = id
	case revocation.KindKey:
		tok.KID = id
	}
	end := rec.Exp + int64(revocation.MaxLeeway/time.Second)
	kind, ok := s.Check(tok, end)
	_, later := s.Check(tok, end+1)
	tok.IssuedAt++
	_, younger := s.Check(tok, end)
	return ok && kind == rec.Target.Kind && !later && younger != rec.Target.Kind.HasTime()
}

// In the binary form a snapshot says what it says as JSON.
func TestBinarySnapshot(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{})
	s.follower.fill(88213)
	tags := make(map[string]string)
	for kind := range kinds {
		for user, tenants := range map[string][]string{
			"admin": nil, "gateway": {"carbon.super"}, "pizza-admin": {"pizza.example"}, "gateway-two": {"carbon.super", "pizza.example"},
		} {
			for _, coding := range []string{"identity", "gzip", "zstd"} {
				name := kind + " of " + user + " as " + coding
				path := "/v1/snapshots/" + kind
				resp := s.do(s.request(path, "user", user, "Accept", replica.SnapshotType+", application/json;q=0.9", "Accept-Encoding", coding))
				tag := resp.Header.Get("ETag")
				if resp.Header.Get("Content-Type") != replica.SnapshotType || resp.Header.Get("Vary") != "Accept-Encoding, Accept" || tag == "" {
					t.Errorf("%s: %s %v", name, resp.Status, resp.Header)
				}
				if tags[tag] == "" {
					tags[tag] = kind + user
				}
				got, header := load(t, resp)
				want := replica.SnapshotHeader{Position: revocation.Position{Epoch: epoch, Seq: 88213}, Kind: kind, Tenants: tenants}
				if diff := cmp.Diff(want, header, cmpopts.IgnoreFields(want, "Entries")); diff != "" {
					t.Errorf("%s: header (-want +got):\n%s", name, diff)
				}
				plain := s.do(s.request(path, "user", user, "Accept", "application/x-ndjson", "Accept-Encoding", "identity"))
				if other := plain.Header.Get("ETag"); tags[other] != "" {
					t.Errorf("%s: %s has the ETag of %s", name, plain.Header.Get("Content-Type"), tags[other])
				}
				revocations, items := listed(t, body(t, plain))
				for _, rec := range revocations {
					if !revoked(got, rec) {
						t.Errorf("%s: %+v is missing, or another", name, rec)
					}
				}
				if n := revocationsIn(t, got); n != len(revocations) {
					t.Errorf("%s: %d revocations, want %d", name, n, len(revocations))
				}
				if diff := cmp.Diff(items, itemsOf(t, got)); diff != "" {
					t.Errorf("%s: entities (-JSON +binary):\n%s", name, diff)
				}
				if again := s.do(s.request(path, "user", user, "Accept", replica.SnapshotType, "Accept-Encoding", coding, "If-None-Match", tag)); again.StatusCode != http.StatusNotModified {
					t.Errorf("%s: with its own tag it is %s", name, again.Status)
				}
			}
		}
	}
}

// itemsOf is the JSON of the catalog in s.
func itemsOf(t testing.TB, s *replica.State) (items []string) {
	t.Helper()
	for _, all := range contentOf(s, kind{nouns: catalog.Nouns}).entities {
		for entity := range all {
			e, err := catalog.NewEvent(catalog.Change{Entity: entity})
			if err != nil {
				t.Fatal(err)
			}
			items = append(items, string(e.Data))
		}
	}
	return items
}

// However many issuers take turns, what is sent at once is no more than a few chunks, and
// a revocation takes no more than 20 bytes.
func TestBinarySnapshotOfManyIssuers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFakeFollower(t)
		const n, issuers = 90_000, 600
		exp := time.Now().Add(time.Hour).Unix()
		rnd := rand.New(rand.NewPCG(1, 2))
		f.load(revocation.Position{Epoch: epoch, Seq: 1}, func(l *replica.Loader) {
			for i := range n {
				l.Revocation(replica.Record{
					Target: revocation.Target{Kind: revocation.KindToken, Iss: fmt.Sprint(iss, "/", i%issuers), ID: uuid.NewString()},
					Tenant: revocation.SuperTenant, Exp: exp + rnd.Int64N(3600),
				})
			}
		})
		c := testCache(t, f, 64<<20)
		rd := mustOpen(t, c, key{kind: "all", scope: "*", form: formBinary, coding: rest.Identity})
		defer rd.close()
		var all bytes.Buffer
		for {
			chunk, err := rd.next(t.Context())
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(chunk) > 2*chunkSize {
				t.Errorf("a chunk has %d bytes", len(chunk))
			}
			all.Write(chunk)
		}
		if got := all.Len(); got > 20*n {
			t.Errorf("%d bytes for %d revocations", got, n)
		}
		s := replica.NewState(replica.StateConfig{})
		if _, err := s.ReadSnapshot(&all); err != nil {
			t.Fatal(err)
		}
		if got := revocationsIn(t, s); got != n {
			t.Errorf("%d revocations, want %d", got, n)
		}
	})
}

func TestSnapshotHasWhatGatewaysNeed(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{})
	s.follower.load(revocation.Position{Epoch: epoch, Seq: 1}, func(l *replica.Loader) {
		for name, exp := range map[string]int64{"at-ended": ended, "at-needed": needed} {
			l.Revocation(replica.Record{Target: revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: name}, Tenant: revocation.SuperTenant, Exp: exp})
		}
	})
	got := string(body(t, s.do(s.request("/v1/snapshots/revocations"))))
	if strings.Contains(got, "at-ended") || !strings.Contains(got, "at-needed") {
		t.Errorf("snapshot is %s", got)
	}
	binary, _ := load(t, s.do(s.request("/v1/snapshots/revocations", "Accept", replica.SnapshotType)))
	if _, ok := binary.Check(replica.Token{Iss: iss, JTI: "at-needed"}, needed); !ok || revocationsIn(t, binary) != 1 {
		t.Error("the binary snapshot differs")
	}
}

// All who ask for the same at a time share one making of it.
func TestSnapshotIsShared(t *testing.T) {
	t.Parallel()
	entries := size(15_000, 50_000)
	f := manyRevocations(t, entries)
	s := serveFollower(t, Config{}, f)
	for _, coding := range []string{"", "zstd"} {
		before := s.metric("rescind_snapshot_builds_total")
		client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
		var all sync.WaitGroup
		type sum struct {
			crc          uint32
			bytes, lines int
		}
		sums := make([]sum, size(100, 200))
		for i := range sums {
			all.Go(func() {
				resp, err := client.Do(s.request("/v1/snapshots/revocations", "Accept-Encoding", coding))
				if err != nil {
					t.Error(err)
					return
				}
				defer resp.Body.Close()
				buf := make([]byte, 64<<10)
				for err == nil {
					var n int
					n, err = resp.Body.Read(buf)
					sums[i].crc = crc32.Update(sums[i].crc, crc32.IEEETable, buf[:n])
					sums[i].bytes += n
					sums[i].lines += bytes.Count(buf[:n], []byte("\n"))
				}
				if err != io.EOF {
					t.Error(err)
				}
			})
		}
		all.Wait()
		client.CloseIdleConnections()
		for _, sum := range sums {
			if sum != sums[0] {
				t.Fatalf("coding %q: two readers got different bytes", coding)
			}
		}
		if got := s.metric("rescind_snapshot_builds_total") - before; got != 1 {
			t.Errorf("coding %q: %v snapshots were made, want 1", coding, got)
		}
		if coding == "" && sums[0].lines != entries+2 {
			t.Errorf("%d lines", sums[0].lines)
		}
	}
	await(t, "readers are gone", func() bool { return s.metric("rescind_snapshot_readers") == 0 })
}

// stuck sends a request and reads nothing of the answer.
func (s *served) stuck(req *http.Request) net.Conn {
	s.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	if err := req.Write(conn); err != nil {
		s.t.Fatal(err)
	}
	return conn
}

func TestSnapshotSlowReaderIsDropped(t *testing.T) {
	t.Parallel()
	s := serveFollower(t, Config{}, manyRevocations(t, size(80_000, 300_000)), func(a *API) { a.sendTimeout = time.Second })
	conn := s.stuck(s.request("/v1/snapshots/revocations"))
	whole := body(t, s.do(s.request("/v1/snapshots/revocations")))
	if !json.Valid(whole) {
		t.Error("the fast reader did not get all")
	}
	await(t, "the slow reader is dropped", func() bool { return s.metric("rescind_snapshot_dropped_total") == 1 })
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("the slow reader's %d bytes look whole", len(got))
	}
	if got := s.metric("rescind_snapshot_builds_total"); got != 1 {
		t.Errorf("%v snapshots were made, want 1", got)
	}
}

func TestSnapshotBounds(t *testing.T) {
	t.Parallel()
	s := serveFollower(t, Config{MaxReaders: 4}, manyRevocations(t, 80_000))
	refused := func(path, user string) {
		t.Helper()
		resp := s.do(s.request(path, "user", user))
		if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") != "2" {
			t.Errorf("%s for %s: %s, Retry-After %q", path, user, resp.Status, resp.Header.Get("Retry-After"))
		}
	}
	s.stuck(s.request("/v1/snapshots/revocations"))
	s.stuck(s.request("/v1/snapshots/revocations"))
	await(t, "two read", func() bool { return s.metric("rescind_snapshot_readers") == 2 })
	refused("/v1/snapshots/revocations", "admin") // half of the places is taken
	s.stuck(s.request("/v1/snapshots/revocations", "user", "gateway-all"))
	s.stuck(s.request("/v1/snapshots/revocations", "user", "gateway-all"))
	await(t, "four read", func() bool { return s.metric("rescind_snapshot_readers") == 4 })
	refused("/v1/snapshots/revocations", "gateway") // no place
	s.api.readers.mu.Lock()
	s.api.readers.max = 20
	s.api.readers.mu.Unlock()
	cached := 0
	await(t, "they take no more", func() bool {
		s.api.cache.mu.Lock()
		defer s.api.cache.mu.Unlock()
		before := cached
		cached = s.api.cache.bytes
		s.api.cache.max = cached // from now on, what there is
		return cached == before
	})
	refused("/v1/snapshots/apis", "admin") // no memory
}

// Who takes a little again and again is dropped as well.
func TestSnapshotTricklingReaderIsDropped(t *testing.T) {
	t.Parallel()
	s := serveFollower(t, Config{}, manyRevocations(t, size(80_000, 300_000)), func(a *API) { a.slowFor = -time.Hour })
	resp := s.do(s.request("/v1/snapshots/revocations"))
	if b, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("%d bytes look whole", len(b))
	}
	if got := s.metric("rescind_snapshot_dropped_total"); got != 1 {
		t.Errorf("%v were dropped", got)
	}
	for _, tt := range []struct {
		sent int64
		took time.Duration // after the first half minute
		slow bool
	}{{0, -time.Second, false}, {leastRate, time.Second, false}, {leastRate - 1, time.Second, true}, {150 << 20, time.Hour, true}, {150 << 20, 40 * time.Minute, false}} {
		if got := isSlow(tt.sent, tt.took); got != tt.slow {
			t.Errorf("%d bytes in %s are slow: %t", tt.sent, tt.took, got)
		}
	}
}

// A request that promises a body would hold its connection until it is there.
func TestNoBody(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{})
	for path, accept := range map[string]string{
		"/v1/snapshots/apis": "*/*", "/v1/events?wait=60s&after=" + string(epoch) + ":0": "*/*", "/v1/events": "text/event-stream",
	} {
		for _, length := range []string{"Content-Length: 5", "Transfer-Encoding: chunked"} {
			conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			req := s.request(path)
			_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\nAccept: %s\r\nAuthorization: %s\r\n%s\r\n\r\n", path, accept, req.Header.Get("Authorization"), length)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != http.StatusBadRequest || !resp.Close || resp.Header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("%s with %s: %s %v", path, length, resp.Status, resp.Header)
			}
			resp.Body.Close()
		}
	}
}
