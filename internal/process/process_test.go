package process_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rescindhq/rescind/internal/process"
)

// journal is what parts have done, in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(line string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
}

func (j *journal) all() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.lines)
}

// part runs until it is stopped, and takes some time to finish.
func (j *journal) part(name string, takes time.Duration, fails error) process.Part {
	return process.Part{Name: name, Grace: time.Minute, Run: func(ctx context.Context) error {
		<-ctx.Done()
		time.Sleep(takes)
		j.add(name)
		return fails
	}}
}

func TestRunStopsInReverse(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var j journal
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		broken := errors.New("no space")
		go func() {
			done <- process.Run(ctx, []process.Part{
				j.part("first", 0, nil), j.part("second", 0, broken), j.part("third", time.Minute-1, nil),
			})
		}()
		synctest.Wait()
		if len(j.all()) > 0 {
			t.Errorf("stopped before the end: %q", j.all())
		}
		cancel()
		if err := <-done; !errors.Is(err, broken) || err.Error() != "second: no space" {
			t.Errorf("error %v", err)
		}
		if want := []string{"third", "second", "first"}; !slices.Equal(j.all(), want) {
			t.Errorf("stopped in the order %q, want %q", j.all(), want)
		}
	})
}

// One part that returns ends the others, whatever it says.
func TestRunEndsWithAPart(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	for _, tt := range []struct {
		fails error
		want  string
	}{{nil, "early: ended before it was stopped"}, {broken, "early: broken"}} {
		synctest.Test(t, func(t *testing.T) {
			var j journal
			err := process.Run(t.Context(), []process.Part{
				j.part("other", 0, nil), {Name: "early", Grace: time.Minute, Run: func(context.Context) error { return tt.fails }},
			})
			if err == nil || err.Error() != tt.want || len(j.all()) != 1 {
				t.Errorf("error %v, want %s; stopped %q", err, tt.want, j.all())
			}
		})
	}
}

func TestRunWaitsNoLongerThanAGrace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var j journal
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		err := process.Run(ctx, []process.Part{j.part("first", 0, nil), j.part("slow", time.Hour, nil)})
		if err == nil || err.Error() != "slow: still running 1m0s after it was stopped" || !slices.Equal(j.all(), []string{"first"}) {
			t.Errorf("error %v; stopped %q", err, j.all())
		}
		time.Sleep(time.Hour) // its goroutine ends
	})
}

// Open requests are waited for, and cut off when their time is over.
func TestServeHTTP(t *testing.T) {
	t.Parallel()
	const grace = 300 * time.Millisecond // real time: it must only be reached
	for _, ends := range []bool{true, false} {
		t.Run(fmt.Sprintf("ends %t", ends), func(t *testing.T) {
			t.Parallel()
			begun, end := make(chan struct{}), make(chan struct{})
			server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				close(begun)
				select {
				case <-end:
				case <-r.Context().Done():
				}
				_, _ = io.WriteString(w, "whole")
			})}
			on, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			patience := grace
			if ends {
				patience = time.Hour
			}
			var logs strings.Builder
			ctx, cancel := context.WithCancel(t.Context())
			served, answered := make(chan error, 1), make(chan error, 1)
			go func() {
				served <- process.ServeHTTP(ctx, server, on, patience, slog.New(slog.NewTextHandler(&logs, nil)))
			}()
			go func() {
				resp, err := http.Get("http://" + on.Addr().String())
				if err == nil {
					_, err = io.ReadAll(resp.Body)
					resp.Body.Close()
				}
				answered <- err
			}()
			<-begun
			cancel()
			if ends {
				for { // it listens no more
					c, err := net.Dial("tcp", on.Addr().String())
					if err != nil {
						break
					}
					c.Close()
				}
				close(end)
			}
			if err := <-answered; (err == nil) != ends {
				t.Errorf("the request: %v", err)
			}
			if err := <-served; err != nil || strings.Contains(logs.String(), "cut off") == ends {
				t.Errorf("error %v, log %s", err, logs.String())
			}
		})
	}
	t.Run("cannot serve", func(t *testing.T) {
		t.Parallel()
		on, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		on.Close()
		if err := process.ServeHTTP(t.Context(), &http.Server{}, on, time.Hour, slog.New(slog.DiscardHandler)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("error %v, want that the listener is closed", err)
		}
	})
}
