package app_test

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
)

// A token of our own is revoked; Postgres, both exchanges and etcd have it.
func TestMainJob(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve()
	client := newHTTPClient(t)
	events := w.consume(w.amqpURL, "rescind.events", "revocation.#")
	wso2 := w.consume(w.amqpURL, "amq.topic", "tokenRevocation")
	beats := w.consume(w.amqpURL, "rescind.events", revocation.HeartbeatRoutingKey)

	got, err := send(client, http.MethodPost, s.base+"/oauth2/token", form(basic("own-1", clientSecret)), "grant_type=client_credentials")
	if err != nil || got.status != http.StatusOK {
		t.Fatalf("token: %+v, %v", got, err)
	}
	var issued struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"`
	}
	if err := json.Unmarshal([]byte(got.body), &issued); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second changes nothing
		got, err = send(client, http.MethodPost, s.base+"/revoke", form(basic("own-1", clientSecret)), "token="+issued.AccessToken)
		if err != nil || got.status != http.StatusOK || got.body != "" {
			t.Fatalf("revoke: %+v, %v", got, err)
		}
	}
	if n := w.events(); n != 1 {
		t.Fatalf("%d events, want 1", n)
	}
	await(t, "the event on rescind.events", func() bool { return len(events.seen()) == 1 })
	e := events.events[0]
	rev, err := e.Revocation()
	if err != nil {
		t.Fatal(err)
	}
	if rev.Target.Iss != ourISS || rev.ClientID != "own-1" || rev.Reason != "client" || e.RoutingKey() != "revocation.token.carbon_super" {
		t.Errorf("event %+v says %+v", e, rev)
	}
	await(t, "the message on amq.topic", func() bool {
		wso2.mu.Lock()
		defer wso2.mu.Unlock()
		return len(wso2.messages) == 1
	})
	m := wso2.messages[0]
	var payload struct {
		Event struct {
			PayloadData struct {
				RevokedToken string `json:"revokedToken"`
				TTL          string `json:"ttl"`
				ExpiryTime   int64  `json:"expiryTime"`
				Type         string `json:"type"`
				TenantID     int    `json:"tenantId"`
			} `json:"payloadData"`
		} `json:"event"`
	}
	if err := json.Unmarshal(m.Body, &payload); err != nil {
		t.Fatal(err)
	}
	if p := payload.Event.PayloadData; m.ContentType != "text/plain" || len(m.Headers) != 0 ||
		p.RevokedToken != rev.Target.ID || p.ExpiryTime != rev.Exp*1000 || p.Type != "JWT" || p.TenantID != -1234 {
		t.Errorf("WSO2's message %q: %+v", m.ContentType, p)
	}

	etcd := w.etcdClient()
	await(t, "the key in etcd", func() bool { return w.inEtcd(etcd)[rev.Target.ID] })
	resp, err := etcd.Get(t.Context(), directory.Key(w.prefix, ourISS, rev.Target))
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("%v, %v", resp, err)
	}
	if key := string(resp.Kvs[0].Key); key != w.prefix+"/jti/"+rev.Target.ID {
		t.Errorf("the key is %s", key)
	}
	lease, err := etcd.TimeToLive(t.Context(), clientv3.LeaseID(resp.Kvs[0].Lease))
	if err != nil || lease.TTL < issued.ExpiresIn {
		t.Errorf("lease %+v, %v; the token lives %d s", lease, err, issued.ExpiresIn)
	}
	await(t, "a heartbeat after the event", func() bool {
		beats.mu.Lock()
		defer beats.mu.Unlock()
		if len(beats.messages) == 0 {
			return false
		}
		h, err := revocation.ParseHeartbeat(beats.messages[len(beats.messages)-1].Body)
		if err != nil {
			t.Fatal(err)
		}
		return h.Head >= e.Seq && h.Through >= e.Seq && h.Epoch == e.Epoch
	})
	if log := s.logs.String(); strings.Contains(log, issued.AccessToken) || strings.Contains(log, clientSecret) {
		t.Error("a token or a secret is in the log")
	}
}

// An issuer may have a path; what its metadata names is there.
func TestIssuerWithPath(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.iss = ourISS + "/sts"
	s := w.serve()
	client := newHTTPClient(t)
	got, err := send(client, http.MethodGet, s.base+"/.well-known/oauth-authorization-server/sts", nil, "")
	if err != nil || got.status != http.StatusOK {
		t.Fatalf("metadata: %+v, %v", got, err)
	}
	var metadata struct {
		Issuer     string `json:"issuer"`
		Token      string `json:"token_endpoint"`
		Revocation string `json:"revocation_endpoint"`
		JWKS       string `json:"jwks_uri"`
	}
	if err := json.Unmarshal([]byte(got.body), &metadata); err != nil || metadata.Issuer != w.iss {
		t.Fatalf("%s: %v", got.body, err)
	}
	for _, tt := range []struct {
		method, url, body string
		status            int
	}{
		{http.MethodPost, metadata.Token, "grant_type=client_credentials", http.StatusOK},
		{http.MethodPost, metadata.Revocation, "token=opaque", http.StatusOK},
		{http.MethodPost, metadata.Revocation, "", http.StatusBadRequest},
		{http.MethodGet, metadata.JWKS, "", http.StatusOK},
	} {
		at := strings.Replace(tt.url, ourISS, s.base, 1)
		got, err := send(client, tt.method, at, form(basic("own-1", clientSecret)), tt.body)
		if err != nil || got.status != tt.status {
			t.Errorf("%s %s: %+v, %v; want %d", tt.method, tt.url, got, err, tt.status)
		}
	}
}

// A token that is revoked again with a later end is dead until then, everywhere.
func TestLaterEndWinsEverywhere(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve()
	client, etcd := newHTTPClient(t), w.etcdClient()
	events := w.consume(w.amqpURL, "rescind.events", "revocation.#")
	now := time.Now().Unix()
	for _, life := range []int64{600, 1800, 900} {
		s.mustRevoke(client, mint("ES256", nil, claims("t-1", map[string]any{"exp": now + life})))
	}
	s.mustRevoke(client, accessToken("last"))
	await(t, "the events", func() bool { return events.seen()["last"] })
	var ends []int64
	for _, e := range events.events {
		rev, err := e.Revocation()
		if err != nil {
			t.Fatal(err)
		}
		if rev.Target.ID == "t-1" {
			ends = append(ends, rev.Exp-now)
		}
	}
	if diff := cmp.Diff([]int64{600, 1800}, ends); diff != "" {
		t.Errorf("ends on RabbitMQ: %s", diff)
	}
	key := directory.Key(w.prefix, ourISS, revocation.Target{Kind: revocation.KindToken, Iss: idpISS, ID: "t-1"})
	await(t, "the later end in etcd", func() bool {
		resp, err := etcd.Get(t.Context(), key)
		if err != nil || len(resp.Kvs) != 1 {
			return false
		}
		entry, err := directory.Parse(w.prefix, ourISS, key, resp.Kvs[0].Value)
		if err != nil {
			t.Fatal(err)
		}
		lease, err := etcd.TimeToLive(t.Context(), clientv3.LeaseID(resp.Kvs[0].Lease))
		return err == nil && entry.Exp == now+1800 && lease.TTL >= 1700
	})
}
