package gateway_test

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"

	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
)

// A gateway in 20 lines: in front of what greets those who may call it. The service, the tokens and the
// caller are demo's, see its file.
func Example() {
	service := startDemo()
	defer service.Close()

	source, err := replica.NewHTTP(replica.HTTPConfig{URL: service.URL, Username: "gateway-1", Password: "hush"})
	if err != nil {
		log.Fatal(err)
	}
	known, err := replica.New(replica.Config{Source: source}) // Folder: "/var/lib/gateway" for a start without the service
	if err != nil {
		log.Fatal(err)
	}
	g, err := gateway.New(gateway.Config{Replica: known, URL: service.URL, Audiences: []string{"https://api.example.com"}})
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go g.Run(ctx)

	backend := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d, _ := gateway.FromContext(r.Context())
		fmt.Fprintf(w, "Hello %s, by way of %s", r.Header.Get("X-Rescind-Subject"), d.Info.ApplicationName)
	})
	api := httptest.NewServer(g.Handler(backend)) // or http.ListenAndServe(":8080", g.Handler(backend))
	defer api.Close()

	token := service.token("alice", "jti-1")
	fmt.Println(call(api.URL+"/shop/1.0.0/orders", ""))
	fmt.Println(call(api.URL+"/shop/1.0.0/orders", token))
	service.revoke("jti-1")
	fmt.Println(callUntil(401, api.URL+"/shop/1.0.0/orders", token))

	// Output:
	// 401 {"code":"900902","message":"Missing Credentials","description":"Make sure your API invocation has the header 'Authorization: Bearer ACCESS_TOKEN'"}
	// 200 Hello alice, by way of Till
	// 401 {"code":"900901","message":"Invalid Credentials","description":"Make sure you have provided the correct security credentials"}
}
