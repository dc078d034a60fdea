package eventhub

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/wso2"
)

// notificationTypes are the types that notifications have.
var notificationTypes = []string{wso2.NotifyToken, wso2.NotifyClient, wso2.NotifySubject, wso2.NotifyBatch}

// The actions that the audit knows notifications by.
const (
	actionToken   = "notify_token"
	actionClient  = "notify_client"
	actionSubject = "notify_subject"
)

// reasonNotified is the reason of revocations that a key manager told of.
const reasonNotified = "notified"

// connectorHeader names the type of the key manager that notifies.
const connectorHeader = "X-WSO2-KEY-MANAGER"

const defaultConnector = "default"

// serveNotify carries out what a key manager tells of (WSO2 contract, section 9.2): 200
// says that it is durable. The sender does not read the answer and does not try again,
// so what can be understood is done rather than refused.
func (h *Hub) serveNotify(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodPost {
		return notAllowed(w, r, []string{http.MethodPost})
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, rest.MaxBody))
	if err != nil {
		h.metrics.notified.WithLabelValues(notifiedUnknown, notifiedRefused).Inc()
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return problem(http.StatusBadRequest, "The notification is larger than %d bytes.", rest.MaxBody)
		}
		return problem(http.StatusBadRequest, "The notification could not be read to its end.")
	}
	n, err := wso2.ParseNotification(body)
	if err != nil {
		h.metrics.notified.WithLabelValues(notifiedUnknown, notifiedRefused).Inc()
		return err
	}
	h.untimed(w)
	// A sender that is gone has still told us.
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(r.Context()), h.cfg.Timeout, errTimeout)
	defer cancel()
	result, err := h.carryOut(ctx, w, r, n, sha256.Sum256(body))
	h.metrics.notified.WithLabelValues(n.Type, result).Inc()
	if err != nil {
		return err
	}
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusOK)
	return nil
}

func (h *Hub) carryOut(ctx context.Context, w http.ResponseWriter, r *http.Request, n wso2.Notification, fingerprint [32]byte) (string, error) {
	about, err := h.about(ctx, r, n)
	if err != nil {
		return resultOf(err), err
	}
	actor := rest.ActorOf(w, r)
	key := keyOfNotification(n, about.tenant)
	const path = dataBase + "/" + notifyName
	earlier := h.begin(ctx, actor.Name, path, key, fingerprint)
	if earlier.Status == http.StatusOK && !earlier.Mismatch {
		return notifiedRepeated, nil
	}
	// Another with this id that has not ended, or has other content, is no reason to lose
	// a revocation: to do it twice changes nothing.
	requests, invalid := h.requests(n, about, time.Now())
	for i := range requests {
		requests[i].Tenant, requests[i].Actor, requests[i].Reason = about.tenant, actor, reasonNotified
		requests[i].Traceparent = rest.ExchangeOf(w).Traceparent()
	}
	added, err := h.revokeAll(ctx, requests)
	err = cmp.Or(err, invalid)
	if earlier.Begun {
		h.finish(ctx, actor.Name, path, key, err == nil)
	}
	switch {
	case err != nil:
		return resultOf(err), err
	case added:
		return notifiedRevoked, nil
	}
	return notifiedNothing, nil
}

// maxRemembering is how many notifications use a connection to the database for what is
// remembered of them; commits of revocations need the rest.
const maxRemembering = 4

// begin tells what is known of a notification. When that cannot be told it is carried out
// as one that is new: at worst it is carried out twice.
func (h *Hub) begin(ctx context.Context, caller, path, key string, fingerprint [32]byte) (earlier rest.Earlier) {
	h.remembering(ctx, func(ctx context.Context) (err error) {
		earlier, err = h.seen.Begin(ctx, caller, http.MethodPost, path, key, fingerprint)
		return err
	})
	return earlier
}

// finish remembers that a notification was carried out, or forgets it. After ctx too.
func (h *Hub) finish(ctx context.Context, caller, path, key string, carriedOut bool) {
	status := 0
	if carriedOut {
		status = http.StatusOK
	}
	h.remembering(context.WithoutCancel(ctx), func(ctx context.Context) error {
		return h.seen.Finish(ctx, caller, http.MethodPost, path, key, status, http.Header{}, nil)
	})
}

// remembering calls use when it is its turn, with a part of the time that a notification
// has.
func (h *Hub) remembering(ctx context.Context, use func(ctx context.Context) error) {
	ctx, cancel := context.WithTimeoutCause(ctx, h.cfg.Timeout/4, errTimeout)
	defer cancel()
	var err error
	select {
	case h.remember <- struct{}{}:
		err = use(ctx)
		<-h.remember
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		h.log.Warn("whether a notification is a repeat cannot be told or remembered; a repeat is carried out again", "error", err)
	}
}

// resultOf is the result of a notification that ended with err.
func resultOf(err error) string {
	if f, _ := failureOf(err); f.status < http.StatusInternalServerError {
		return notifiedRefused
	}
	return notifiedFailed
}

// subject is whose tokens a notification is about.
type subject struct {
	tenant revocation.Tenant
	// issuers are the tenant's key managers of the type that notifies, all of them in
	// all. Neither is empty.
	issuers, all []*catalog.KeyManager
}

// about finds what n is about. If the tenant has no key manager of the type that r
// names it is about all that the tenant has: tokens are not to live on because a type
// is written otherwise here. Nor because the newest state is not known: then the last that
// was known has to do.
func (h *Hub) about(ctx context.Context, r *http.Request, n wso2.Notification) (subject, error) {
	account := rest.AccountOf(ctx)
	newest, cancel := context.WithTimeoutCause(ctx, h.cfg.Timeout/4, errTimeout)
	defer cancel()
	if _, err := h.fresh(newest); err != nil {
		h.log.Warn("a notification is read by a state that may be old", "error", err)
	}
	var tenant *catalog.Tenant
	var all []*catalog.KeyManager
	h.state.Replica().View(func(v *replica.View) {
		tenant, all = findTenant(v, account, n), v.KeyManagers()
	})
	if tenant == nil || !account.Sees(tenant.Tenant.Domain) {
		return subject{}, problem(http.StatusForbidden, "The tenant of the notification does not exist, or is not one that the account sees.")
	}
	s := subject{tenant: tenant.Tenant}
	connector := cmp.Or(r.Header.Get(connectorHeader), defaultConnector)
	for _, k := range all {
		if k.Tenant.ID != tenant.Tenant.ID {
			continue
		}
		s.all = append(s.all, k)
		if strings.EqualFold(k.Type, connector) {
			s.issuers = append(s.issuers, k)
		}
	}
	if len(s.all) == 0 {
		return subject{}, problem(http.StatusInternalServerError, "The tenant of the notification has no key manager.")
	}
	if len(s.issuers) == 0 {
		s.issuers = s.all
	}
	return s, nil
}

// findTenant goes by domain, by id where n has no domain, and by the account where it
// has neither.
func findTenant(v *replica.View, account authn.Account, n wso2.Notification) *catalog.Tenant {
	switch {
	case n.TenantDomain != "":
		return v.Tenant(n.TenantDomain)
	case n.TenantID == 0:
		return v.Tenant(account.Tenant.Domain)
	}
	for _, t := range v.Tenants() {
		if t.Tenant.ID == n.TenantID {
			return t
		}
	}
	return nil
}

// keyOfNotification is the same for a repeat of n. It has no secret in it.
func keyOfNotification(n wso2.Notification, tenant revocation.Tenant) string {
	hash := sha256.New()
	part := func(s string) {
		sum := sha256.Sum256([]byte(s))
		hash.Write(sum[:])
	}
	part(tenant.Domain)
	if n.EventID != "" {
		part("id")
		part(n.EventID)
	} else {
		part(n.Type)
		part(n.ConsumerKey)
		part(n.EntityID)
		part(time.UnixMilli(n.RevocationTimeMillis).UTC().Format(time.RFC3339Nano))
		for _, t := range n.Tokens {
			part(t.Token)
		}
	}
	return hex.EncodeToString(hash.Sum(nil))
}

// requests are the revocations that n asks for, without those that have ended. err is
// why others cannot be.
func (h *Hub) requests(n wso2.Notification, about subject, now time.Time) (requests []ledger.Request, err error) {
	add := func(r ledger.Request) {
		r.Exp = min(r.Exp, now.Add(revocation.MaxExpiryAhead).Unix())
		if invalid := r.Target.Validate(); invalid != nil {
			err = invalid
		} else if r.Exp+maxLeeway > now.Unix() {
			requests = append(requests, r)
		}
	}
	before := func(kind revocation.Kind, id, action string) {
		notAfter := min(n.RevocationTimeMillis/1000, now.Add(h.cfg.ClockSkew).Unix())
		for _, k := range about.issuers {
			add(ledger.Request{
				Target: revocation.Target{Kind: kind, Iss: k.Iss, ID: id}, NotAfter: notAfter, Action: action,
				Exp: notAfter + int64(k.MaxTokenLifetime),
			})
		}
	}
	switch {
	case n.Type == wso2.NotifyClient:
		before(revocation.KindClient, n.ConsumerKey, actionClient)
	case n.Type == wso2.NotifySubject && n.EntityType == wso2.EntityClient:
		before(revocation.KindClient, n.EntityID, actionSubject)
	case n.Type == wso2.NotifySubject:
		before(revocation.KindSubject, n.EntityID, actionSubject)
	}
	for _, t := range n.Tokens {
		known := identify(t)
		for _, k := range about.of(known) {
			// No token of the issuer lives longer, whatever the sender says: it is known to
			// tell the end of the refresh token.
			exp := min(ceilSeconds(t.ExpiryMillis), now.Add(h.cfg.ClockSkew).Unix()+int64(k.MaxTokenLifetime)+ledger.MaxStampAhead)
			if exp+maxLeeway <= now.Unix() {
				continue
			}
			r := ledger.Request{Target: known.target(k.Iss), Signature: known.signature, Exp: max(exp, now.Unix()), Action: actionToken}
			if client := (revocation.Target{Kind: revocation.KindClient, Iss: k.Iss, ID: t.ConsumerKey}); client.Validate() == nil {
				r.ClientID = t.ConsumerKey
			}
			add(r)
		}
	}
	return requests, err
}

func ceilSeconds(millis int64) int64 {
	s := millis / 1000
	if millis%1000 > 0 {
		s++
	}
	return s
}

// identified is what is known of a token: the issuer that it names, if any, and its jti
// or what is hashed in place of one.
type identified struct {
	iss, jti, hashed, signature string
}

func (i identified) target(iss string) revocation.Target {
	if i.jti != "" {
		return revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: i.jti}
	}
	return revocation.DigestTarget(iss, i.hashed)
}

// of returns the issuers that may have made a token: that which it names, if the tenant
// has it.
func (s subject) of(t identified) []*catalog.KeyManager {
	for i, k := range s.all {
		if k.Iss == t.iss {
			return s.all[i : i+1]
		}
	}
	return s.issuers
}

// identify tells what t is: a JWT, a jti, the signature of a JWT without jti, or an
// opaque token, which is stored as its SHA-256 alone. Only a type that no opaque token
// has makes it a jti or a signature.
func identify(t wso2.NotifiedToken) identified {
	if token.LooksLikeJWT(t.Token) {
		if i, ok := readJWT(t.Token); ok {
			return i
		}
		return identified{hashed: t.Token}
	}
	if t.TokenType != "JWT" && t.TokenType != "API_KEY" {
		return identified{hashed: t.Token}
	}
	if len(t.Token) > maxJTI && len(t.Token) <= maxSignature && isBase64URL(t.Token) {
		// Our own replicas cannot match the signature of a token, WSO2's gateways do.
		return identified{hashed: t.Token, signature: t.Token}
	}
	return identified{jti: t.Token}
}

// maxJTI is the longest that a jti can be, in bytes; the signatures of RSA are longer.
const maxJTI = 255

// maxSignature is that of RSA with 16384 bits, in base64url.
const maxSignature = 2731

func isBase64URL(s string) bool {
	_, err := base64.RawURLEncoding.DecodeString(s)
	return err == nil
}

// readJWT takes compact apart without verifying it: whoever sent it might as well have
// sent its jti.
func readJWT(compact string) (identified, bool) {
	last := strings.LastIndexByte(compact, '.')
	signingInput, signature := compact[:last], compact[last+1:]
	_, payload64, _ := strings.Cut(signingInput, ".")
	payload, err := base64.RawURLEncoding.DecodeString(payload64)
	claims := make(map[string]any) // not a struct, which would take JTI for jti
	if err != nil || json.Unmarshal(payload, &claims) != nil {
		return identified{}, false
	}
	iss, _ := claims["iss"].(string)
	if jti, _ := claims["jti"].(string); jti != "" {
		return identified{iss: iss, jti: jti}, true
	}
	return identified{iss: iss, hashed: signingInput, signature: signature}, true
}

// maxAtOnce is how many revocations of one notification are given to the ledger at a
// time, which commits them together.
const maxAtOnce = 256

// revokeAll returns nil once all are durable, and whether any was new. All are tried, but
// for those whose turn comes after ctx has ended.
func (h *Hub) revokeAll(ctx context.Context, requests []ledger.Request) (added bool, err error) {
	var (
		mu   sync.Mutex
		errs []error
		wg   sync.WaitGroup
	)
	failed := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if err != nil && len(errs) < 3 { // enough for the log
			errs = append(errs, err)
		}
	}
	places := make(chan struct{}, maxAtOnce)
	for _, r := range requests {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			failed(context.Cause(ctx))
			break
		}
		wg.Go(func() {
			defer func() { <-places }()
			result, err := h.revoke(ctx, r)
			failed(err)
			mu.Lock()
			defer mu.Unlock()
			added = added || result.Added
		})
	}
	wg.Wait()
	return added, errors.Join(errs...)
}

// busyPause is between tries while the ledger has too much to do.
const busyPause = 50 * time.Millisecond

// revoke tries until ctx ends while the ledger is busy: the sender does not.
func (h *Hub) revoke(ctx context.Context, r ledger.Request) (ledger.Result, error) {
	for {
		result, err := h.ledger.Revoke(ctx, r)
		if !errors.Is(err, ledger.ErrBusy) {
			return result, err
		}
		select {
		case <-time.After(busyPause):
		case <-ctx.Done():
			return result, err
		}
	}
}
