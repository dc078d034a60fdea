package replica_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// A gateway in 20 lines: it verifies the JWT, and asks the replica in memory whether it is revoked.
func Example() {
	demo := newDemo()
	defer demo.Close()

	source, err := replica.NewHTTP(replica.HTTPConfig{URL: demo.URL, Username: "gateway", Password: "secret"})
	if err != nil {
		log.Fatal(err)
	}
	revocations, err := replica.New(replica.Config{ // and a Folder, to start without the service
		Source: source, ID: "gateway-1", Labels: map[string]string{"region": "eu-1"},
	})
	if err != nil {
		log.Fatal(err)
	}
	go revocations.Run(demo.Context)

	verifier, err := token.NewVerifier(token.Issuer{Iss: demo.Issuer, Tenant: revocation.SuperTenant, Keys: demo.Keys})
	if err != nil {
		log.Fatal(err)
	}
	accepts := token.Acceptance{Audiences: []string{"https://api.example.com"}}
	gateway := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		bearer, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		t, err := verifier.Accept(r.Context(), bearer, accepts, time.Now())
		if err != nil || revocations.Check(replica.TokenOf(t, revocation.SuperTenant.Domain)).Outcome != replica.Valid {
			w.Header().Set("WWW-Authenticate", `Bearer realm="api", error="invalid_token"`)
			http.Error(w, "Invalid Credentials", http.StatusUnauthorized)
			return
		}
		fmt.Fprintln(w, "Hello", t.Subject) // or pass it on: httputil.ReverseProxy
	})

	demo.Call(gateway, revocations)
	demo.Revoke()
	demo.Call(gateway, revocations)
	// Output:
	// 200 Hello u-1009
	// 401 Invalid Credentials
}

// Past an age of what is known, each path gets what its operator has chosen.
func ExampleReplica_CheckWith() {
	demo := newDemo()
	defer demo.Close()
	source, err := replica.NewHTTP(replica.HTTPConfig{URL: demo.URL, Username: "gateway", Password: "secret"})
	if err != nil {
		log.Fatal(err)
	}
	r, err := replica.New(replica.Config{
		Source:    source,
		Staleness: replica.Staleness{Max: 5 * time.Minute, Then: replica.Deny},
		Routes: []replica.Route{
			{Path: "/payments", Staleness: replica.Staleness{Max: 30 * time.Second, Then: replica.Deny}},
			{Path: "/account", Staleness: replica.Staleness{Max: 30 * time.Second, Then: replica.Introspect}},
			{Path: "/catalog", Staleness: replica.Staleness{Max: 30 * time.Second, Then: replica.Serve}},
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, path := range []string{"/payments/7", "/account", "/catalog/1.0.0/items", "/payments-archive"} {
		s := r.StalenessOf(path)
		fmt.Printf("%s: past %s %s\n", path, s.Max, s.Then)
	}
	fmt.Println("while nothing is known:", r.CheckWith(replica.Token{Iss: demo.Issuer, JTI: "at-1"}, r.StalenessOf("/catalog")).Outcome)
	// Output:
	// /payments/7: past 30s deny
	// /account: past 30s introspect
	// /catalog/1.0.0/items: past 30s serve
	// /payments-archive: past 5m0s deny
	// while nothing is known: refused
}

// demo is a service with one token, in this process.
type demo struct {
	*httptest.Server
	Context context.Context
	Issuer  string
	Keys    token.KeySet

	token   string
	head    revocation.Seq
	revoked chan revocation.Event
	stop    context.CancelFunc
}

const demoEpoch revocation.Epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"

func newDemo() *demo {
	d := &demo{Issuer: "https://km.example.com", revoked: make(chan revocation.Event, 1)}
	d.Context, d.stop = context.WithCancel(context.Background())
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/snapshots/all", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", replica.SnapshotType)
		e := replica.NewSnapshotEncoder(replica.SnapshotHeader{Position: revocation.Position{Epoch: demoEpoch}, Kind: "all"})
		_, _ = w.Write(e.AppendEnd(e.AppendHeader(nil)))
	})
	mux.HandleFunc("GET /v1/events", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Accept") != "text/event-stream" {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(w, `{"epoch":%q,"head":0,"through":0,"events":[]}`, demoEpoch)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		_ = http.NewResponseController(w).Flush()
		for {
			select {
			case e := <-d.revoked:
				data, _ := e.MarshalJSON()
				fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", e.Position, e.Type, data)
				_ = http.NewResponseController(w).Flush()
			case <-r.Context().Done():
				return
			}
		}
	})
	d.Server = httptest.NewServer(mux)

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	set, _ := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "key-1"}}})
	if d.Keys, err = token.ParseKeySet(set); err != nil {
		log.Fatal(err)
	}
	options := (&jose.SignerOptions{}).WithType("at+jwt").WithHeader("kid", "key-1")
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, options)
	if err != nil {
		log.Fatal(err)
	}
	claims, _ := json.Marshal(map[string]any{
		"iss": d.Issuer, "aud": "https://api.example.com", "jti": "at-1", "sub": "u-1009", "client_id": "app-1",
		"iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(),
	})
	signed, err := signer.Sign(claims)
	if err != nil {
		log.Fatal(err)
	}
	d.token, _ = signed.CompactSerialize()
	return d
}

// Close ends everything.
func (d *demo) Close() {
	d.stop()
	d.CloseClientConnections()
	d.Server.Close()
}

// Revoke revokes the token.
func (d *demo) Revoke() {
	e, err := revocation.NewEvent(revocation.Revocation{
		ID: "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", Tenant: revocation.SuperTenant, Exp: time.Now().Add(time.Hour).Unix(),
		Target: revocation.Target{Kind: revocation.KindToken, Iss: d.Issuer, ID: "at-1"}, Reason: "client",
	})
	if err != nil {
		log.Fatal(err)
	}
	d.head = 1
	e.Position, e.Source, e.Time = revocation.Position{Epoch: demoEpoch, Seq: d.head}, d.Issuer, time.Now()
	d.revoked <- e
}

// Call calls the gateway with the token once the replica has everything.
func (d *demo) Call(gateway http.Handler, r *replica.Replica) {
	for tick := time.Tick(time.Millisecond); !r.Ready() || r.State().At().Seq < d.head; {
		<-tick
	}
	w := httptest.NewRecorder()
	req := httptest.NewRequest(http.MethodGet, "/hello", nil)
	req.Header.Set("Authorization", "Bearer "+d.token)
	gateway.ServeHTTP(w, req)
	fmt.Print(w.Code, " ", w.Body)
}
