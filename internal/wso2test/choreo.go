// Package wso2test hides how WSO2's gateways take what is published for them: an
// adapter of Choreo Connect that does what the real one does with an AMQP broker and
// with each message, and the rules of JMS by which gateways in Java decode one.
//
// # Decisions
//
// The adapter is written from the contract (sections 2.2, 4.2, 4.4 and 5), not with
// the packages that it tests: a mistake there must show here.
//
// It drops and hangs where the real one does, and has its defect with deleted
// subscription policies, which stay. It does not have the one that mixes up key
// managers after a change (section 5): no message could avoid that.
package wso2test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// ChoreoConnect is an adapter. Its methods may be called from any goroutine of the test.
type ChoreoConnect struct {
	t   testing.TB
	url string

	mu      sync.Mutex
	conn    *amqp.Connection
	readers sync.WaitGroup
	state   State
	// newest has the last timeStamp of each entity. Snapshots do not count.
	newest   map[string]int64
	troubles []string
	changed  chan struct{} // closed when a message was taken
}

// awaitLimit bounds [ChoreoConnect.Await].
const awaitLimit = 30 * time.Second

// NewChoreoConnect connects an adapter that has loaded empty lists. The user of
// amqpURL needs no more than a gateway's permissions. The adapter ends with the test.
func NewChoreoConnect(t testing.TB, amqpURL string) *ChoreoConnect {
	t.Helper()
	c := &ChoreoConnect{t: t, url: amqpURL, state: NewState(), newest: map[string]int64{}, changed: make(chan struct{})}
	t.Cleanup(c.Disconnect)
	c.Reconnect()
	return c
}

// Reconnect connects again. What was published meanwhile is lost, and nothing is
// loaded again.
func (c *ChoreoConnect) Reconnect() {
	c.t.Helper()
	c.Disconnect()
	conn, err := amqp.Dial(c.url)
	if err != nil {
		c.t.Fatalf("connect an adapter: %v", err)
	}
	c.mu.Lock()
	c.conn = conn
	c.mu.Unlock()
	for topic, take := range map[string]func([]byte) fate{
		"tokenRevocation": c.takeRevocation,
		"notification":    c.takeNotification,
		"keymanager":      c.takeKeyManager,
		"throttleData":    c.takeThrottleData,
	} {
		deliveries, err := subscribe(conn, topic)
		if err != nil {
			c.t.Fatalf("subscribe an adapter to %s: %v", topic, err)
		}
		c.readers.Go(func() { c.read(topic, deliveries, take) })
	}
}

// subscribe does what the adapter does, on a channel for each topic.
func subscribe(conn *amqp.Connection, topic string) (<-chan amqp.Delivery, error) {
	ch, err := conn.Channel()
	if err != nil {
		return nil, err
	}
	if err := ch.ExchangeDeclare("amq.topic", amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return nil, err
	}
	queue, err := ch.QueueDeclare("", false, true, false, false, nil)
	if err != nil {
		return nil, err
	}
	if err := ch.QueueBind(queue.Name, topic, "amq.topic", false, nil); err != nil {
		return nil, err
	}
	return ch.Consume(queue.Name, "jms-consumer-key", false, false, false, false, nil)
}

// Disconnect closes the connection, and with it the queues.
func (c *ChoreoConnect) Disconnect() {
	c.mu.Lock()
	conn := c.conn
	c.conn = nil
	c.mu.Unlock()
	if conn != nil {
		conn.Close() // what is wrong with it shows when it is opened again
	}
	c.readers.Wait()
}

// Load adds a snapshot, see [State.Load].
func (c *ChoreoConnect) Load(resource string, body []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.Load(resource, body)
}

// State is a copy of the state.
func (c *ChoreoConnect) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.clone()
}

// Troubles are the messages that the adapter did not take, each as its topic, id, what
// became of it ("dropped", "unacked" or "reader ended") and why.
func (c *ChoreoConnect) Troubles() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.troubles)
}

// Await waits until done holds for the state. What says what is waited for.
func (c *ChoreoConnect) Await(what string, done func(State) bool) {
	c.t.Helper()
	limit := time.After(awaitLimit)
	for {
		c.mu.Lock()
		changed, ok := c.changed, done(c.state)
		c.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-limit:
			c.t.Fatalf("the adapter has not got %s within %s; troubles: %q; state:\n%s", what, awaitLimit, c.Troubles(), c.State())
		}
	}
}

// fate is what becomes of a message.
type fate struct {
	// trouble is why it was not taken; empty if it was.
	trouble string
	// unacked messages stay with the broker, until it closes the channel for it.
	unacked bool
	// last: the reader of this topic ends.
	last bool
}

func dropped(what string, err error) fate {
	return fate{trouble: fmt.Sprintf("dropped: %s: %v", what, err)}
}

func stuck(what string, err error) fate {
	return fate{trouble: fmt.Sprintf("unacked: %s: %v", what, err), unacked: true}
}

func dead(what string, err error) fate {
	return fate{trouble: fmt.Sprintf("reader ended: %s: %v", what, err), unacked: true, last: true}
}

func (c *ChoreoConnect) read(topic string, deliveries <-chan amqp.Delivery, take func([]byte) fate) {
	for d := range deliveries {
		c.mu.Lock()
		f := take(d.Body)
		if f.trouble != "" {
			c.troubles = append(c.troubles, fmt.Sprintf("%s %s: %s", topic, d.MessageId, f.trouble))
		}
		close(c.changed)
		c.changed = make(chan struct{})
		c.mu.Unlock()
		if !f.unacked {
			_ = d.Ack(false) // fails when the connection is gone, and then the queue is too
		}
		if f.last {
			return
		}
	}
}

// The take functions need c.mu.

func (c *ChoreoConnect) takeRevocation(body []byte) fate {
	var m struct {
		Event struct {
			PayloadData struct {
				EventID      string `json:"eventId"`
				RevokedToken string `json:"revokedToken"`
				TTL          string `json:"ttl"`
				ExpiryTime   int64  `json:"expiryTime"`
				Type         string `json:"type"`
				TenantID     int32  `json:"tenantId"`
			} `json:"payloadData"`
		} `json:"event"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return stuck("the message", err)
	}
	c.state.RevokedTokens[m.Event.PayloadData.RevokedToken] = m.Event.PayloadData.ExpiryTime
	return fate{}
}

type common struct {
	EventID      string `json:"eventId"`
	TimeStamp    int64  `json:"timeStamp"`
	Type         string `json:"type"`
	TenantID     int32  `json:"tenantId"`
	TenantDomain string `json:"tenantDomain"`
}

func (c *ChoreoConnect) takeNotification(body []byte) fate {
	var m struct {
		Event struct {
			PayloadData struct {
				EventType string `json:"eventType"`
				TimeStamp int64  `json:"timeStamp"`
				Event     string `json:"event"`
			} `json:"payloadData"`
		} `json:"event"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return stuck("the message", err)
	}
	event, err := base64.StdEncoding.DecodeString(m.Event.PayloadData.Event)
	if err != nil {
		return stuck("the event", err)
	}
	eventType := m.Event.PayloadData.EventType
	for _, family := range []struct {
		part string
		take func([]byte) error
	}{
		{"LIFECYCLE_CHANGE", c.takeAPI},
		{"API", c.takeAPI},
		{"APPLICATION_REGISTRATION_CREATE", c.takeKeyMapping},
		{"REMOVE_APPLICATION_KEYMAPPING", c.takeKeyMapping},
		{"APPLICATION", c.takeApplication},
		{"SUBSCRIPTION", c.takeSubscription},
		{"POLICY", c.takePolicy},
	} {
		if strings.Contains(eventType, family.part) {
			if err := family.take(event); err != nil {
				return dropped(eventType, err)
			}
			break
		}
	}
	return fate{}
}

var errStale = errors.New("a newer one was there before")

// stale reports whether an event about an entity is older than one that was seen.
func (c *ChoreoConnect) stale(entity string, e common) bool {
	if c.newest[entity] > e.TimeStamp {
		return true
	}
	c.newest[entity] = e.TimeStamp
	return false
}

func (c *ChoreoConnect) takeAPI(event []byte) error {
	var e struct {
		common
		APIID         int32    `json:"apiId"`
		UUID          string   `json:"uuid"`
		GatewayLabels []string `json:"gatewayLabels"`
	}
	if err := json.Unmarshal(event, &e); err != nil {
		return err
	}
	if len(e.GatewayLabels) == 0 {
		return nil
	}
	switch e.Type {
	case "DEPLOY_API_IN_GATEWAY":
		for _, label := range e.GatewayLabels {
			if !slices.Contains(c.state.Deployed[e.UUID], label) {
				c.state.Deployed[e.UUID] = append(c.state.Deployed[e.UUID], label)
			}
		}
		slices.Sort(c.state.Deployed[e.UUID])
	case "REMOVE_API_FROM_GATEWAY":
		left := slices.DeleteFunc(c.state.Deployed[e.UUID], func(label string) bool { return slices.Contains(e.GatewayLabels, label) })
		if c.state.Deployed[e.UUID] = left; len(left) == 0 {
			delete(c.state.Deployed, e.UUID)
		}
	}
	return nil
}

func (c *ChoreoConnect) takeApplication(event []byte) error {
	var e struct {
		common
		UUID              string            `json:"uuid"`
		ApplicationID     int32             `json:"applicationId"`
		ApplicationName   string            `json:"applicationName"`
		TokenType         string            `json:"tokenType"`
		ApplicationPolicy string            `json:"applicationPolicy"`
		GroupID           string            `json:"groupId"`
		Attributes        map[string]string `json:"attributes"`
		Subscriber        string            `json:"subscriber"`
	}
	if err := json.Unmarshal(event, &e); err != nil {
		return err
	}
	if c.stale(fmt.Sprintf("application %d", e.ApplicationID), e.common) {
		return errStale
	}
	switch e.Type {
	case "APPLICATION_CREATE", "APPLICATION_UPDATE":
		c.state.Applications[e.UUID] = Application{
			UUID: e.UUID, ID: e.ApplicationID, Name: e.ApplicationName, SubName: e.Subscriber, Policy: e.ApplicationPolicy,
			TokenType: e.TokenType, TenantDomain: e.TenantDomain,
		}
	case "APPLICATION_DELETE":
		delete(c.state.Applications, e.UUID)
	}
	return nil
}

func (c *ChoreoConnect) takeKeyMapping(event []byte) error {
	var e struct {
		common
		ApplicationID   int32  `json:"applicationId"`
		ApplicationUUID string `json:"applicationUUID"`
		ConsumerKey     string `json:"consumerKey"`
		KeyType         string `json:"keyType"`
		KeyManager      string `json:"keyManager"`
	}
	if err := json.Unmarshal(event, &e); err != nil {
		return err
	}
	m := KeyMapping{
		ApplicationID: e.ApplicationID, ApplicationUUID: e.ApplicationUUID, ConsumerKey: e.ConsumerKey, KeyType: e.KeyType,
		KeyManager: e.KeyManager, TenantDomain: e.TenantDomain,
	}
	if c.stale("key mapping "+m.key(), e.common) {
		return errStale
	}
	switch e.Type {
	case "APPLICATION_REGISTRATION_CREATE":
		c.state.KeyMappings[m.key()] = m
	case "REMOVE_APPLICATION_KEYMAPPING":
		delete(c.state.KeyMappings, m.key())
	}
	return nil
}

func (c *ChoreoConnect) takeSubscription(event []byte) error {
	var e struct {
		common
		SubscriptionID    int32  `json:"subscriptionId"`
		SubscriptionUUID  string `json:"subscriptionUUID"`
		APIID             int32  `json:"apiId"`
		APIUUID           string `json:"apiUUID"`
		ApplicationID     int32  `json:"applicationId"`
		ApplicationUUID   string `json:"applicationUUID"`
		PolicyID          string `json:"policyId"`
		SubscriptionState string `json:"subscriptionState"`
	}
	if err := json.Unmarshal(event, &e); err != nil {
		return err
	}
	if c.stale(fmt.Sprintf("subscription %d", e.SubscriptionID), e.common) {
		return errStale
	}
	switch e.Type {
	case "SUBSCRIPTIONS_CREATE", "SUBSCRIPTIONS_UPDATE":
		c.state.Subscriptions[e.SubscriptionID] = Subscription{
			SubscriptionID: e.SubscriptionID, SubscriptionUUID: e.SubscriptionUUID, PolicyID: e.PolicyID, APIID: e.APIID, APIUUID: e.APIUUID,
			AppID: e.ApplicationID, AppUUID: e.ApplicationUUID, SubscriptionState: e.SubscriptionState, TenantDomain: e.TenantDomain,
		}
	case "SUBSCRIPTIONS_DELETE":
		delete(c.state.Subscriptions, e.SubscriptionID)
	}
	return nil
}

func (c *ChoreoConnect) takePolicy(event []byte) error {
	var e struct {
		common
		PolicyID             int32  `json:"policyId"`
		PolicyName           string `json:"policyName"`
		QuotaType            string `json:"quotaType"`
		PolicyType           string `json:"policyType"`
		RateLimitCount       int32  `json:"rateLimitCount"`
		RateLimitTimeUnit    string `json:"rateLimitTimeUnit"`
		StopOnQuotaReach     bool   `json:"stopOnQuotaReach"`
		GraphQLMaxDepth      int32  `json:"graphQLMaxDepth"`
		GraphQLMaxComplexity int32  `json:"graphQLMaxComplexity"`
		SubscriberCount      int32  `json:"subscriberCount"`
	}
	if err := json.Unmarshal(event, &e); err != nil {
		return err
	}
	p := Policy{ID: e.PolicyID, Name: e.PolicyName, QuotaType: e.QuotaType}
	ofSubscriptions := strings.EqualFold(e.PolicyType, "SUBSCRIPTION")
	switch {
	case !ofSubscriptions && !strings.EqualFold(e.PolicyType, "APPLICATION"):
	case e.Type == "POLICY_DELETE":
		delete(c.state.ApplicationPolicies, e.PolicyID) // also of subscriptions: the defect
	case ofSubscriptions:
		c.state.SubscriptionPolicies[e.PolicyID] = SubscriptionPolicy{
			Policy: p, GraphQLMaxComplexity: e.GraphQLMaxComplexity, GraphQLMaxDepth: e.GraphQLMaxDepth, RateLimitCount: e.RateLimitCount,
			RateLimitTimeUnit: e.RateLimitTimeUnit, StopOnQuotaReach: e.StopOnQuotaReach,
		}
	default:
		c.state.ApplicationPolicies[e.PolicyID] = p
	}
	return nil
}

func (c *ChoreoConnect) takeKeyManager(body []byte) fate {
	var m struct {
		Event struct {
			PayloadData struct {
				EventType    string `json:"event_type"`
				Action       string `json:"action"`
				Name         string `json:"name"`
				Type         string `json:"type"`
				Enabled      bool   `json:"enabled"`
				Value        string `json:"value"`
				TenantID     string `json:"tenantId"`
				TenantDomain string `json:"tenantDomain"`
			} `json:"payloadData"`
		} `json:"event"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return dead("the message", err)
	}
	data := m.Event.PayloadData
	value, err := base64.StdEncoding.DecodeString(data.Value)
	if err != nil {
		return dead("the value", err)
	}
	var configuration map[string]any
	if err := json.Unmarshal(value, &configuration); err != nil {
		return dead("the value", err)
	}
	if !strings.EqualFold(data.EventType, "key_manager_configuration") {
		return fate{}
	}
	name := strings.ToLower(data.Name)
	switch strings.ToLower(data.Action) {
	case "add", "update":
		c.state.KeyManagers[name] = KeyManager{
			Name: data.Name, Type: data.Type, Enabled: data.Enabled, TenantDomain: data.TenantDomain, Configuration: configuration,
		}
	case "delete":
		delete(c.state.KeyManagers, name)
	}
	return fate{}
}

func (c *ChoreoConnect) takeThrottleData(body []byte) fate {
	var m struct {
		Event struct {
			PayloadData map[string]any `json:"payloadData"`
		} `json:"event"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return dead("the message", err)
	}
	if m.Event.PayloadData["blockingCondition"] == "SUBSCRIPTION" {
		return dead("the message", fmt.Errorf("it blocks a subscription, among %q", slices.Sorted(maps.Keys(m.Event.PayloadData))))
	}
	return fate{}
}
