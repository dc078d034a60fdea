package gateway_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// demo speaks as the service does, as far as a gateway listens: a snapshot, events, and its keys.
type demo struct {
	*httptest.Server
	state  *replica.State
	key    *ecdsa.PrivateKey
	events chan revocation.Event
}

const (
	demoIssuer = "https://km.example.com"
	demoEpoch  = "0b8ff9b7-4a4d-4a8e-9c53-4d7f7e0c52c5"
)

func startDemo() *demo {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	d := &demo{state: replica.NewState(replica.StateConfig{}), key: key, events: make(chan revocation.Event)}
	id := func(n int32) catalog.Meta {
		return catalog.Meta{ID: n, UUID: fmt.Sprintf("00000000-0000-4000-8000-%012d", n), Tenant: revocation.SuperTenant, Timestamp: 1}
	}
	ref := func(n int32) catalog.Ref { return catalog.Ref{ID: n, UUID: id(n).UUID} }
	must(d.state.Load(revocation.Position{Epoch: demoEpoch, Seq: 1}, func(l *replica.Loader) error {
		for _, e := range []catalog.Entity{
			&catalog.KeyManager{Meta: id(1), Name: "Resident", Enabled: true, Resident: true, Iss: demoIssuer, MaxTokenLifetime: 3600},
			&catalog.Policy{Meta: id(2), Kind: catalog.PolicySubscription, Name: "Gold", QuotaType: "requestCount"},
			&catalog.Policy{Meta: id(3), Kind: catalog.PolicyApplication, Name: "Large", QuotaType: "requestCount"},
			&catalog.API{Meta: id(4), Name: "Shop", Version: "1.0.0", Context: "/shop/1.0.0", Status: catalog.APIPublished},
			&catalog.Application{Meta: id(5), Name: "Till", Policy: "Large"},
			&catalog.KeyMapping{Meta: id(6), Application: ref(5), ConsumerKey: "till", KeyType: catalog.Production, KeyManager: "Resident", Iss: demoIssuer},
			&catalog.Subscription{Meta: id(7), Application: ref(5), API: ref(4), Policy: "Gold", State: catalog.Unblocked},
		} {
			l.Entity(e)
		}
		return nil
	}))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /oauth2/jwks", func(w http.ResponseWriter, _ *http.Request) {
		must(json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "1", Use: "sig"}}}))
	})
	mux.HandleFunc("GET /v1/snapshots/all", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", replica.SnapshotType)
		_, err := d.state.WriteSnapshot(w)
		must(err)
	})
	mux.HandleFunc("GET /v1/events", func(w http.ResponseWriter, r *http.Request) {
		at := d.state.At()
		if r.Header.Get("Accept") != "text/event-stream" {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(w, `{"epoch":%q,"head":%d,"through":%d,"events":[]}`, at.Epoch, at.Seq, at.Seq)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		for {
			_ = http.NewResponseController(w).Flush()
			select {
			case e := <-d.events:
				body, err := e.MarshalJSON()
				must(err)
				fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", e.Position, e.Type, body)
			case <-r.Context().Done():
				return
			}
		}
	})
	d.Server = httptest.NewServer(mux)
	return d
}

// token is one of the application Till.
func (d *demo) token(sub, jti string) string {
	now := time.Now().Unix()
	claims, err := json.Marshal(map[string]any{
		"iss": demoIssuer, "sub": sub, "client_id": "till", "aud": "https://api.example.com", "jti": jti, "iat": now, "exp": now + 600,
	})
	must(err)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: d.key, KeyID: "1"}},
		(&jose.SignerOptions{}).WithType("at+jwt"))
	must(err)
	jws, err := signer.Sign(claims)
	must(err)
	compact, err := jws.CompactSerialize()
	must(err)
	return compact
}

// revoke tells the gateway that is connected.
func (d *demo) revoke(jti string) {
	e, err := revocation.NewEvent(revocation.Revocation{
		ID: "00000000-0000-7000-8000-000000000001", Target: revocation.Target{Kind: revocation.KindToken, Iss: demoIssuer, ID: jti},
		Tenant: revocation.SuperTenant, Exp: time.Now().Unix() + 600, Reason: "client",
	})
	must(err)
	e.Position, e.Source, e.Time = revocation.Position{Epoch: demoEpoch, Seq: 2}, demoIssuer, time.Now()
	d.events <- e
}

func call(url, token string) string { return callUntil(0, url, token) }

// callUntil calls until the answer has a status, or with 0 until it is not 503: that is what a gateway
// says that was started a moment ago.
func callUntil(status int, url, token string) string {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		req, err := http.NewRequest(http.MethodGet, url, nil)
		must(err)
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := http.DefaultClient.Do(req)
		must(err)
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		must(err)
		if resp.StatusCode == status || status == 0 && resp.StatusCode != http.StatusServiceUnavailable {
			return fmt.Sprintf("%d %s", resp.StatusCode, body)
		}
		<-tick.C
	}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
