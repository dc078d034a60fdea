package authn

import (
	"fmt"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestThrottle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{AddressFailures: 5, CallerFailures: 3})
		send := func(from, authorization string) int {
			r := postForm("token=t", "Authorization", authorization)
			r.RemoteAddr = from
			w, _ := m.answer(r)
			if w.Code != 200 {
				checkError(t, w, "")
			}
			return w.Code
		}
		want := func(what string, got, want int) {
			t.Helper()
			if got != want {
				t.Errorf("%s: status %d, want %d", what, got, want)
			}
		}
		const thief, elsewhere = "192.0.2.1:1000", "192.0.2.2:1000"

		want("the owner, first", send(thief, basicOne), 200)
		for range 3 {
			want("a guess", send(thief, basicWrong), 401)
		}
		want("one guess too many", send(thief, basicWrong), 429)
		want("the right secret, where others guess it", send(thief, basicTwo), 429)
		want("the right secret from elsewhere", send(elsewhere, basicTwo), 200)
		for i := range 2 {
			want("other ids", send(thief, basicOf(fmt.Sprint("id", i, ":x"))), 401)
		}
		want("an address that has used up its failures", send(thief, basicOf("id9:x")), 429)
		want("an id that has proved itself there", send(thief, basicOne), 200)
		want("its guesses", send(thief, basicOf("app+one:x")), 401)

		time.Sleep(time.Second)
		want("a second later", send(thief, basicTwo), 200)
		want("a second later, a guess", send(thief, basicWrong), 401)
		want("a second later, another", send(thief, basicWrong), 429)
	})
}

func TestThrottleIsBounded(t *testing.T) {
	t.Parallel()
	th := newThrottle(Config{AddressFailures: 1, CallerFailures: 1, MaxSources: 10})
	for i := range 1000 {
		th.failed(caller{id: fmt.Sprint(i), from: bucket(parseAddr(fmt.Sprintf("192.0.%d.%d", i/256, i%256)))})
	}
	if n, m := th.addresses.Len(), th.callers.Len(); n != 10 || m != 10 {
		t.Errorf("%d addresses and %d callers are kept, want 10 each", n, m)
	}
}

// Guesses that wait for one row together are still counted one by one.
func TestThrottleOfVolley(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{CallerFailures: 3})
		m.gate = make(chan struct{})
		codes := make(chan int)
		var group sync.WaitGroup
		for range 100 {
			group.Go(func() {
				w, _ := m.answer(postForm("", "Authorization", basicWrong))
				codes <- w.Code
			})
		}
		synctest.Wait() // all wait for the row
		close(m.gate)
		go func() { group.Wait(); close(codes) }()
		count := map[int]int{}
		for code := range codes {
			count[code]++
		}
		if count[401] != 3 || count[429] != 97 {
			t.Errorf("answers %v, want 3 of 401 and 97 of 429", count)
		}
	})
}

// Who waited for a row while others guessed is not told that a secret is right.
func TestThrottleAfterWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{CallerFailures: 1})
		m.gate = make(chan struct{})
		r := postForm("", "Authorization", basicTwo)
		code := make(chan int, 1)
		go func() {
			w, _ := m.answer(r)
			code <- w.Code
		}()
		synctest.Wait()
		m.throttle.failed(caller{id: "app-2", from: bucket(m.Remote(r))})
		close(m.gate)
		if got := <-code; got != 429 {
			t.Errorf("status %d, want 429", got)
		}
	})
}

func TestNoCredentialsAreNoGuess(t *testing.T) {
	t.Parallel()
	m := newMemory(t, Config{AddressFailures: 1})
	for range 10 {
		if w, _ := m.answer(postForm("token=t")); w.Code != 401 {
			t.Fatalf("status %d, want 401", w.Code)
		}
	}
}

func TestRemote(t *testing.T) {
	t.Parallel()
	proxied := Config{TrustedProxies: prefixes("10.0.0.0/8", "2001:db8:aaaa::/48")}
	tests := []struct {
		name      string
		cfg       Config
		peer      string
		forwarded []string
		want      string
	}{
		{"peer", Config{}, "192.0.2.1:99", nil, "192.0.2.1"},
		{"nobody is trusted", Config{}, "10.0.0.1:99", []string{"198.51.100.7"}, "10.0.0.1"},
		{"peer is no proxy", proxied, "192.0.2.1:99", []string{"198.51.100.7"}, "192.0.2.1"},
		{"proxy", proxied, "10.0.0.1:99", []string{"198.51.100.7"}, "198.51.100.7"},
		{"what the client wrote itself", proxied, "10.0.0.1:99", []string{"203.0.113.9, 198.51.100.7"}, "198.51.100.7"},
		{"two proxies", proxied, "10.0.0.1:99", []string{"203.0.113.9,198.51.100.7 , 10.2.2.2"}, "198.51.100.7"},
		{"two lines", proxied, "10.0.0.1:99", []string{"203.0.113.9", "198.51.100.7"}, "198.51.100.7"},
		{"only proxies", proxied, "10.0.0.1:99", []string{"10.3.3.3, 10.2.2.2"}, "10.3.3.3"},
		{"garbage", proxied, "10.0.0.1:99", []string{"198.51.100.7, unknown, 10.2.2.2"}, "10.2.2.2"},
		{"empty", proxied, "10.0.0.1:99", []string{""}, "10.0.0.1"},
		{"with a port", proxied, "10.0.0.1:99", []string{"198.51.100.7:4444"}, "198.51.100.7"},
		{"IPv6", proxied, "[2001:db8:aaaa::1]:99", []string{"[2001:db8::7]:4444"}, "2001:db8::7"},
		{"IPv6 without a port", proxied, "[2001:db8:aaaa::1]:99", []string{"2001:db8::7"}, "2001:db8::7"},
		{"IPv4 in IPv6", proxied, "[::ffff:10.0.0.1]:99", []string{"::ffff:198.51.100.7"}, "198.51.100.7"},
		{"zone", Config{}, "[fe80::1%eth0]:99", nil, "fe80::1"},
		{"no address", Config{}, "@", nil, "invalid IP"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := httptest.NewRequest("POST", "/", nil)
			r.RemoteAddr = tt.peer
			r.Header["X-Forwarded-For"] = tt.forwarded
			if got := newMemory(t, tt.cfg).Remote(r).String(); got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
		})
	}
	if a, b := bucket(parseAddr("2001:db8::1")), bucket(parseAddr("2001:db8::ffff:1")); a != b {
		t.Errorf("%s and %s: one /64 must share one allowance", a, b)
	}
	if a, b := bucket(parseAddr("2001:db8::1")), bucket(parseAddr("2001:db8:0:1::1")); a == b {
		t.Errorf("%s is shared by two /64", a)
	}
}
