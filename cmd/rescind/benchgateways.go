package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"
)

// The API of the demo that is called through the gateways.
const benchCall = "/pizzashack/1.0.0/menu"

// gateways measures how long after a /revoke was sent the gateways still let its token through,
// one token after the other. Each gateway is asked all the time.
func (b *bench) gateways(ctx context.Context) error {
	const tokens = 300
	if len(b.dev.GatewayURLs) == 0 {
		return errors.New("this rescind-dev has no gateways")
	}
	list, err := b.tokens(tokens)
	if err != nil {
		return err
	}
	c, err := b.dial()
	if err != nil {
		return err
	}
	all := make([][]time.Duration, len(b.dev.GatewayURLs))
	for _, token := range list {
		for _, url := range b.dev.GatewayURLs { // also that the connections are there
			switch status, err := call(ctx, url, token.compact); {
			case err != nil:
				return err
			case status != http.StatusOK:
				return fmt.Errorf("call %s with a live token: %d", url, status)
			}
		}
		errs := make([]error, len(b.dev.GatewayURLs))
		took := make([]time.Duration, len(b.dev.GatewayURLs))
		var polls sync.WaitGroup
		sent := time.Now()
		for i, url := range b.dev.GatewayURLs {
			polls.Go(func() {
				for time.Since(sent) < 10*time.Second {
					began := time.Since(sent)
					status, err := call(ctx, url, token.compact)
					switch {
					case err != nil || status == http.StatusUnauthorized:
						took[i], errs[i] = began, err
						return
					case status != http.StatusOK:
						errs[i] = fmt.Errorf("call %s with a revoked token: %d", url, status)
						return
					}
				}
				errs[i] = fmt.Errorf("%s lets a revoked token through", url)
			})
		}
		err := c.revoke(token.compact)
		polls.Wait()
		if err := errors.Join(append(errs, err)...); err != nil {
			return err
		}
		for i := range all {
			all[i] = append(all[i], took[i])
		}
	}
	for i, url := range b.dev.GatewayURLs {
		slices.Sort(all[i])
		l := load{latencies: all[i]}
		b.row(fmt.Sprintf("(14) /revoke to the first refused call, gateway %d", i+1), l.String(), url)
	}
	return nil
}

// call calls the demo's API through a gateway.
func call(ctx context.Context, url, token string) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+benchCall, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}
