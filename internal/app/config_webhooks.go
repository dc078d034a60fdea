package app

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Webhook is a receiver that events are posted to.
type Webhook struct {
	// Name is unique; the sink is called webhook-<name>.
	Name string
	URL  Secret // may have a key in its query
	// Secrets sign the posts: the first and, while it is replaced, a second.
	Secrets []Secret
	// AllowHTTP permits http to other hosts than loopback.
	AllowHTTP bool
	// Types are nouns or whole types of events. Empty: all.
	Types []string
	// MaxEvents, MaxBytes and Timeout bound one post; 0 is the sink's default.
	MaxEvents, MaxBytes int
	Timeout             time.Duration
	// CA is the file of the authorities that may vouch for the receiver. Empty: the system's.
	CA string
}

// sink is the name that its cursor and lock go by.
func (w Webhook) sink() string { return "webhook-" + w.Name }

var webhookName = regexp.MustCompile(`^[a-z0-9-]{1,40}$`)

func webhooksFileValue(p *[]Webhook) value {
	return value{rule: "the name of a file with a JSON array of webhooks", set: func(name string) error {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		*p, err = parseWebhooks(b, filepath.Dir(name))
		return err
	}}
}

// parseWebhooks reports all mistakes, none of which repeats a URL or a secret.
// Relative files lie in dir.
func parseWebhooks(b []byte, dir string) ([]Webhook, error) {
	var items []json.RawMessage
	if err := json.Unmarshal(b, &items); err != nil {
		return nil, fmt.Errorf("not a JSON array: %w", err)
	}
	var (
		out      []Webhook
		mistakes []string
	)
	for i, item := range items {
		hook, wrong := parseWebhook(item, dir)
		if slices.ContainsFunc(out, func(o Webhook) bool { return o.Name == hook.Name }) {
			wrong = append(wrong, "name is another's too")
		}
		for _, w := range wrong {
			mistakes = append(mistakes, fmt.Sprintf("[%d]: %s", i, w))
		}
		out = append(out, hook)
	}
	if len(mistakes) > 0 {
		return nil, errors.New(strings.Join(mistakes, "; "))
	}
	return out, nil
}

func parseWebhook(b []byte, dir string) (hook Webhook, wrong []string) {
	given, err := jsonMembers(b)
	if err != nil {
		return hook, []string{err.Error()}
	}
	member := func(name, rule string, into any, valid func() bool) {
		raw, ok := given[name]
		delete(given, name)
		if ok && (string(raw) == "null" || json.Unmarshal(raw, into) != nil) || !valid() {
			wrong = append(wrong, name+" must be "+rule)
		}
	}
	var address string
	var files []string
	member("allow_http", "true or false", &hook.AllowHTTP, func() bool { return true })
	member("types", `a list of event types such as "revocation" or "application.deleted"`, &hook.Types, func() bool { return true })
	member("max_events", "1 to 10000", &hook.MaxEvents, func() bool { return hook.MaxEvents >= 0 && hook.MaxEvents <= 10000 })
	member("max_bytes", "a number of bytes, at least 131072", &hook.MaxBytes, func() bool { return hook.MaxBytes == 0 || hook.MaxBytes >= 128<<10 })
	var timeout string
	member("timeout", "a duration with its unit, 1s to 5m", &timeout, func() (ok bool) {
		if timeout == "" {
			return true
		}
		d, err := time.ParseDuration(timeout)
		hook.Timeout = d
		return err == nil && d >= time.Second && d <= 5*time.Minute
	})
	member("ca_file", "the name of a file", &hook.CA, func() bool { return true })
	if hook.CA != "" && !filepath.IsAbs(hook.CA) {
		hook.CA = filepath.Join(dir, hook.CA)
	}
	member("name", "1 to 40 of a-z 0-9 -", &hook.Name, func() bool { return webhookName.MatchString(hook.Name) })
	member("url", "an https URL (http to loopback, or with allow_http)", &address, func() bool {
		u, err := url.Parse(address)
		return err == nil && u.Hostname() != "" && u.Fragment == "" &&
			(u.Scheme == "https" || u.Scheme == "http" && (hook.AllowHTTP || isLoopback(u.Host)))
	})
	hook.URL = Secret(address)
	member("secret_files", "the names of one or two files", &files, func() bool { return len(files) == 1 || len(files) == 2 })
	for _, name := range files {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		secret, err := os.ReadFile(name)
		if err != nil {
			wrong = append(wrong, err.Error())
			continue
		}
		hook.Secrets = append(hook.Secrets, Secret(strings.TrimSpace(string(secret))))
	}
	for name := range given {
		wrong = append(wrong, fmt.Sprintf("%q is not known", name))
	}
	slices.Sort(wrong)
	return hook, wrong
}
