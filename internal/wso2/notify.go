package wso2

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"

	"github.com/rescindhq/rescind/api/revocation"
)

// The types of [Notification].
const (
	NotifyToken   = "token_revocation"
	NotifyClient  = "consumer_app_revocation_event"
	NotifySubject = "subject_entity_revocation_event"
	NotifyBatch   = "token_revocation_batch"
)

// The types of entities: [Notification.EntityID] is a user, or a consumer key.
const (
	EntityUser   = "USER_ID"
	EntityClient = "CLIENT_ID"
)

// Unlimited is the expiry of a token whose lifetime is not limited, or not known.
const Unlimited = math.MaxInt64

// Notification is what a key manager reports with POST /internal/data/v1/notify
// (WSO2 contract, section 9.2). Its texts are as they came: they may be too long for a
// [revocation.Target], and Validate there says so.
type Notification struct {
	// EventID is the same when the report is repeated. May be empty.
	EventID string
	// Type is one of the four.
	Type string
	// TenantID and TenantDomain are 0 and empty where the sender does not say.
	TenantID     int32
	TenantDomain string
	// Tokens are those of NotifyToken, exactly one, and of NotifyBatch, any number.
	Tokens []NotifiedToken
	// ConsumerKey is that of NotifyClient and NotifyBatch.
	ConsumerKey string
	// EntityID and EntityType are those of NotifySubject.
	EntityID, EntityType string
	// RevocationTimeMillis, Unix milliseconds, is when the last token was issued that
	// NotifyClient or NotifySubject revokes. Positive.
	RevocationTimeMillis int64
}

// NotifiedToken is one token of a [Notification].
type NotifiedToken struct {
	// EventID is the report's of which this token is; in a batch each has its own. May be empty.
	EventID string
	// Token is a jti, an opaque token or the signature of a JWT. It may be a secret.
	Token string
	// TokenType is JWT, Default or whatever the sender calls it. May be empty.
	TokenType string
	// ConsumerKey is the client that the token was issued to. May be empty.
	ConsumerKey string
	// ExpiryMillis, Unix milliseconds, is when the token ends, [Unlimited] if never or if
	// the sender does not say. Senders are known to report a later end than the token has.
	ExpiryMillis int64
}

// wireToken is a token_revocation.
type wireToken struct {
	EventID     string `json:"eventId"`
	AccessToken string `json:"accessToken"`
	ExpiryTime  int64  `json:"expiryTime"`
	ConsumerKey string `json:"consumerKey"`
	TokenType   string `json:"tokenType"`
}

// ParseNotification reads the body of a report. Members that are not known are
// ignored. Its error is a [revocation.InvalidError].
//
// WSO2 finds the type by looking for its name anywhere in the body. That is done here
// only where there is no member type, for a user may be named after one.
func ParseNotification(body []byte) (Notification, error) {
	var w struct {
		wireToken
		Type           string      `json:"type"`
		TenantID       int32       `json:"tenantId"`
		TenantDomain   string      `json:"tenantDomain"`
		EntityID       string      `json:"entityId"`
		EntityType     string      `json:"entityType"`
		RevocationTime int64       `json:"revocationTime"`
		Tokens         []wireToken `json:"tokenRevocationEventList"`
	}
	if err := json.Unmarshal(body, &w); err != nil {
		return Notification{}, explain(err)
	}
	n := Notification{EventID: w.EventID, Type: w.Type, TenantID: w.TenantID, TenantDomain: w.TenantDomain}
	if n.Type == "" {
		n.Type = mentioned(body)
	}
	switch n.Type {
	case NotifyToken:
		w.Tokens = []wireToken{w.wireToken}
	case NotifyBatch:
		if w.Tokens == nil {
			return Notification{}, invalid("the notification has no tokenRevocationEventList")
		}
		n.ConsumerKey = w.ConsumerKey
	case NotifyClient:
		n.ConsumerKey, n.RevocationTimeMillis = w.ConsumerKey, w.RevocationTime
		if n.ConsumerKey == "" {
			return Notification{}, invalid("the notification has no consumerKey")
		}
	case NotifySubject:
		n.EntityID, n.EntityType, n.RevocationTimeMillis = w.EntityID, w.EntityType, w.RevocationTime
		if n.EntityID == "" {
			return Notification{}, invalid("the notification has no entityId")
		}
		if n.EntityType != EntityUser && n.EntityType != EntityClient {
			return Notification{}, invalid("the notification's entityType is neither USER_ID nor CLIENT_ID")
		}
	case "":
		return Notification{}, invalid("the notification has no type")
	default:
		return Notification{}, invalid("the notification's type is not token_revocation, token_revocation_batch, " +
			"consumer_app_revocation_event or subject_entity_revocation_event")
	}
	if n.Type == NotifyToken || n.Type == NotifyBatch {
		for _, t := range w.Tokens {
			if t.AccessToken == "" {
				return Notification{}, invalid("the notification has a token without accessToken")
			}
			// An end that is not known is taken for none: the sender does not try again, and
			// an entry that is kept too long does less harm than a token that lives on.
			expiry := t.ExpiryTime
			if expiry <= 0 {
				expiry = Unlimited
			}
			n.Tokens = append(n.Tokens, NotifiedToken{
				EventID: t.EventID, Token: t.AccessToken, TokenType: t.TokenType,
				ConsumerKey: cmp.Or(t.ConsumerKey, w.ConsumerKey), ExpiryMillis: expiry,
			})
		}
	} else if n.RevocationTimeMillis <= 0 {
		return Notification{}, invalid("the notification has no revocationTime, or it is not positive")
	}
	return n, nil
}

// mentioned is the type whose name is in body, the one that WSO2 looks for first if
// there are more.
func mentioned(body []byte) string {
	for _, t := range []string{NotifyClient, NotifySubject, NotifyBatch, NotifyToken} {
		if bytes.Contains(body, []byte(t)) {
			return t
		}
	}
	return ""
}

// explain says what is wrong with a body without a word of what is in it.
func explain(err error) error {
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && wrong.Field != "" {
		want := map[string]string{"string": "text", "int32": "an integer of 32 bits", "int64": "an integer"}[wrong.Type.String()]
		return invalid(fmt.Sprintf("the notification's %s is not %s", wrong.Field, cmp.Or(want, "of the expected type")))
	}
	return invalid("the notification is not a JSON object")
}

func invalid(detail string) error { return &revocation.InvalidError{Detail: detail} }
