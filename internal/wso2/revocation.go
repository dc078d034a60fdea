package wso2

import (
	"strconv"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// tokenRevocation is the payload of the topic of token revocations (WSO2 contract,
// section 3), with the fields in the order of WSO2's stream. Ttl is text and the
// others numbers: a gateway in Go drops a message that has it otherwise.
type tokenRevocation struct {
	EventID      string `json:"eventId"`
	RevokedToken string `json:"revokedToken"`
	TTL          string `json:"ttl"`        // seconds
	ExpiryTime   int64  `json:"expiryTime"` // Unix milliseconds
	Type         string `json:"type"`
	TenantID     int32  `json:"tenantId"`
}

const typeJWT = "JWT"

// consumerApp and subjectEntity are what revokedToken holds, as base64, for more than
// one token. Gateways in Java cast the time, in Unix milliseconds, to a string.
type consumerApp struct {
	ConsumerKey    string `json:"consumer_key"`
	RevocationTime string `json:"revocationTime"`
}

type subjectEntity struct {
	EntityID       string `json:"entityId"`
	EntityType     string `json:"entityType"`
	RevocationTime string `json:"revocationTime"`
}

// sayRevocation is what gateways are told about r while it has not ended.
func sayRevocation(r revocation.Revocation, eventID string, now time.Time) ([]told, error) {
	ttl := r.Exp - now.Unix()
	if ttl <= 0 {
		return nil, nil
	}
	m := tokenRevocation{EventID: eventID, TTL: strconv.FormatInt(ttl, 10), TenantID: r.Tenant.ID}
	// Gateways compare with iat * 1000: the whole second is revoked.
	revocationTime := strconv.FormatInt(r.NotAfter*1000+999, 10)
	var inner any
	switch r.Target.Kind {
	case revocation.KindToken:
		m.RevokedToken, m.Type, m.ExpiryTime = r.Target.ID, typeJWT, r.Exp*1000
		if r.Target.Digest {
			m.RevokedToken = r.Signature
		}
		if m.RevokedToken == "" {
			return nil, nil
		}
		return []told{{TopicTokenRevocation, m}}, nil
	case revocation.KindClient:
		m.Type = NotifyClient
		inner = consumerApp{ConsumerKey: r.Target.ID, RevocationTime: revocationTime}
	case revocation.KindSubject:
		m.Type = NotifySubject
		inner = subjectEntity{EntityID: r.Target.ID, EntityType: EntityUser, RevocationTime: revocationTime}
	default:
		return nil, nil
	}
	b, err := marshal(inner)
	if err != nil {
		return nil, err
	}
	m.RevokedToken = base64Of(b)
	return []told{{TopicTokenRevocation, m}}, nil
}

// entries are those of one token only: a gateway of that era keeps whatever string it
// is given as one more token that nobody has.
func (m tokenRevocation) entries() []entry {
	if m.Type != typeJWT {
		return nil
	}
	return []entry{
		{"revokedToken", m.RevokedToken},
		{"ttl", m.TTL},
		{"expiryTime", m.ExpiryTime},
		{"type", m.Type},
		{"tenantId", m.TenantID},
	}
}

// Replay is the message of [Messages] about one token, as of now, for a revocation
// whose place in the log is not known: its eventId is made of what is revoked. Ok is
// false when there is no message: r is about something else, or gateways have no word
// for it, or it has ended.
func Replay(r revocation.Revocation, now time.Time) (m Message, ok bool) {
	if r.Target.Kind != revocation.KindToken {
		return m, false
	}
	said, err := sayRevocation(r, uuidOf(r.Target.Iss+" "+r.Target.ID), now)
	if err != nil || len(said) == 0 {
		return m, false
	}
	m, err = said[0].message()
	return m, err == nil
}
