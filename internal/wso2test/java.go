package wso2test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
)

// JavaGateway is what API Manager's gateway makes of notifications about subscriptions
// and APIs, where what was there before matters (WSO2 contract, sections 4.2 and 4.4).
type JavaGateway struct {
	// Subscriptions are the states, by "<application id>.<API id>".
	Subscriptions map[string]string
	// APIs are those that it has, by UUID.
	APIs map[string]bool

	newest map[string]int64
	listed func(uuid string) bool
}

// NewJavaGateway is one that has loaded empty lists. Listed reports whether an API is in
// the answer to GET /internal/data/v1/apis now.
func NewJavaGateway(listed func(uuid string) bool) *JavaGateway {
	return &JavaGateway{Subscriptions: map[string]string{}, APIs: map[string]bool{}, newest: map[string]int64{}, listed: listed}
}

// Take does what the gateway does with a message. An error means that it cannot read it.
func (g *JavaGateway) Take(topic string, body []byte) error {
	if topic != "notification" {
		return nil
	}
	var m struct {
		Event struct {
			PayloadData struct {
				EventType string `json:"eventType"`
				Event     string `json:"event"`
			} `json:"payloadData"`
		} `json:"event"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return err
	}
	event, err := base64.StdEncoding.DecodeString(m.Event.PayloadData.Event)
	if err != nil {
		return err
	}
	var e struct {
		TimeStamp     int64  `json:"timeStamp"`
		APIID         int32  `json:"apiId"`
		ApplicationID int32  `json:"applicationId"`
		State         string `json:"subscriptionState"`
		UUID          string `json:"uuid"`
		Status        string `json:"apiStatus"`
	}
	if err := json.Unmarshal(event, &e); err != nil {
		return err
	}
	key := fmt.Sprintf("%d.%d", e.ApplicationID, e.APIID)
	switch m.Event.PayloadData.EventType {
	case "SUBSCRIPTIONS_CREATE", "SUBSCRIPTIONS_UPDATE":
		_, there := g.Subscriptions[key]
		if there && (e.TimeStamp < g.newest[key] || e.State == "ON_HOLD") {
			return nil
		}
		g.Subscriptions[key], g.newest[key] = e.State, e.TimeStamp
	case "SUBSCRIPTIONS_DELETE":
		delete(g.Subscriptions, key)
	case "API_UPDATE":
		g.read(e.UUID)
	case "API_LIFECYCLE_CHANGE":
		if e.Status == "RETIRED" {
			delete(g.APIs, e.UUID)
		} else {
			g.read(e.UUID)
		}
	}
	return nil
}

// read reads an API again. One that is not listed stays as it was.
func (g *JavaGateway) read(uuid string) {
	if g.listed(uuid) {
		g.APIs[uuid] = true
	}
}
