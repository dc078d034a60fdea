package sidecar

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3" // of envoy.yaml
	managerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3" // of envoy.yaml
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	gocmp "github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/rescindhq/rescind/api/gateway"
)

// dialEnvoyServer serves c, and connects to it as Envoy does.
func dialEnvoyServer(t testing.TB, c checker) (*grpc.Server, *grpc.ClientConn) {
	t.Helper()
	return dialEnvoyServerWith(t, c, time.Minute, quiet)
}

func dialEnvoyServerWith(t testing.TB, c checker, decision time.Duration, log *slog.Logger) (*grpc.Server, *grpc.ClientConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := newEnvoyServer(c, decision, log)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("serve: %v", err)
		}
	})
	return server, conn
}

func envoyAsks(method, path string, header map[string]string) *authv3.CheckRequest {
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{
		Http: &authv3.AttributeContext_HttpRequest{Id: "1", Method: method, Path: path, Headers: header, Host: "api.example.com", Scheme: "https", Protocol: "HTTP/2"},
	}}}
}

// envoySends adds header to a question, as Envoy does with and without encode_raw_headers.
func envoySends(r *authv3.AttributeContext_HttpRequest, header http.Header) {
	for name, values := range header {
		name = strings.ToLower(name)
		if r.GetHeaderMap() == nil {
			if r.Headers == nil {
				r.Headers = map[string]string{}
			}
			r.Headers[name] = strings.Join(values, ",")
			continue
		}
		for _, value := range values {
			r.HeaderMap.Headers = append(r.HeaderMap.Headers, &corev3.HeaderValue{Key: name, RawValue: []byte(value)})
		}
	}
}

// applied is what becomes of a request header, as Envoy does what it is told.
func applied(t testing.TB, header http.Header, ok *authv3.OkHttpResponse) http.Header {
	t.Helper()
	header = header.Clone()
	set := map[string]bool{}
	for _, o := range ok.GetHeaders() {
		if o.GetAppendAction() != corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD {
			t.Errorf("%s is set with %v, which leaves what the client has sent", o.GetHeader().GetKey(), o.GetAppendAction())
		}
		header.Set(o.GetHeader().GetKey(), o.GetHeader().GetValue())
		set[http.CanonicalHeaderKey(o.GetHeader().GetKey())] = true
	}
	for _, name := range ok.GetHeadersToRemove() {
		if set[http.CanonicalHeaderKey(name)] {
			t.Errorf("%s is both set and removed", name)
		}
		header.Del(name)
	}
	return header
}

func TestEnvoyIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, conn := dialEnvoyServer(t, w.live)
	client := authv3.NewAuthorizationClient(conn)
	bearer := func(names ...string) map[string]string {
		var values []string
		for _, name := range names {
			values = append(values, "Bearer "+w.tokens[name])
		}
		return map[string]string{"user-agent": "x", "authorization": strings.Join(values, ",")} // as Envoy joins them
	}
	rawHeader := func(names ...string) *authv3.CheckRequest {
		q := envoyAsks("GET", menuPath, nil)
		fields := &corev3.HeaderMap{Headers: []*corev3.HeaderValue{{Key: ":path", RawValue: []byte(menuPath)}}}
		for _, name := range names {
			fields.Headers = append(fields.Headers, &corev3.HeaderValue{Key: "authorization", RawValue: []byte("Bearer " + w.tokens[name])})
		}
		q.Attributes.Request.Http.HeaderMap = fields
		return q
	}
	for _, tt := range []struct {
		name     string
		question *authv3.CheckRequest
		status   int // 0: it is let through
	}{
		{name: "valid", question: envoyAsks("GET", menuPath+"?a=b", bearer("valid"))},
		{name: "valid, raw", question: rawHeader("valid")},
		{name: "no token needed", question: envoyAsks("GET", helloPath, nil)},
		{name: "no token", question: envoyAsks("GET", menuPath, nil), status: 401},
		{name: "no token, raw", question: rawHeader(), status: 401},
		{name: "revoked", question: envoyAsks("GET", menuPath, bearer("revoked")), status: 401},
		{name: "revoked, raw", question: rawHeader("revoked"), status: 401},
		{name: "two tokens", question: envoyAsks("GET", menuPath, bearer("valid", "valid")), status: 401},
		{name: "two tokens, raw", question: rawHeader("valid", "valid"), status: 401},
		{name: "scope", question: envoyAsks("POST", ordersPath, bearer("unscoped")), status: 403},
		{name: "unknown API", question: envoyAsks("GET", "/nothing", bearer("valid")), status: 403},
		{name: "blocked API", question: envoyAsks("GET", blockedPath, bearer("valid")), status: 503},
		{name: "ambiguous", question: envoyAsks("GET", menuPath+"/%2e%2e/orders", bearer("valid")), status: 400},
		{name: "no path", question: envoyAsks("CONNECT", "", bearer("valid")), status: 400},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := tt.question.GetAttributes().GetRequest().GetHttp()
			forged := http.Header{"Accept": {"x"}}
			for _, name := range gateway.IdentityHeaders {
				for _, as := range []string{name, strings.ReplaceAll(name, "-", "."), strings.ReplaceAll(name, "-", "_"), "X.Rescind-" + name[len("X-Rescind-"):], name + ".x"} {
					forged[http.CanonicalHeaderKey(as)] = []string{"forged", "twice"}
				}
			}
			envoySends(r, forged)
			got, err := client.Check(t.Context(), tt.question)
			if err != nil {
				t.Fatal(err)
			}
			d := w.Decide(t.Context(), gateway.Request{Method: r.GetMethod(), Target: r.GetPath(), Authorization: authorizations(r)})
			if tt.status == 0 {
				// All that a client can pretend to be is overwritten or removed.
				want := http.Header{"Accept": {"x"}}
				d.SetIdentity(want)
				if code := codes.Code(got.GetStatus().GetCode()); code != codes.OK || got.GetOkResponse() == nil {
					t.Fatalf("answer %v, want OK", got)
				}
				if diff := gocmp.Diff(want, applied(t, forged, got.GetOkResponse())); diff != "" {
					t.Errorf("the header that the backend gets (-want +got):\n%s", diff)
				}
				return
			}
			if code := codes.Code(got.GetStatus().GetCode()); code != codes.PermissionDenied || got.GetDeniedResponse() == nil {
				t.Fatalf("answer %v, want a refusal", got)
			}
			denied := got.GetDeniedResponse()
			told := httptest.NewRecorder()
			for _, o := range denied.GetHeaders() {
				told.Header().Set(o.GetHeader().GetKey(), o.GetHeader().GetValue())
			}
			told.WriteHeader(int(denied.GetStatus().GetCode()))
			told.Body.WriteString(denied.GetBody())
			want := httptest.NewRecorder()
			d.WriteError(want)
			want.Header().Del("Content-Length")
			if diff := gocmp.Diff(want.Header(), told.Header()); diff != "" || told.Code != want.Code || told.Body.String() != want.Body.String() {
				t.Errorf("the client is told %d %q, want %d %q; header (-want +got):\n%s", told.Code, told.Body, want.Code, want.Body, diff)
			}
			if told.Code != tt.status || !json.Valid(told.Body.Bytes()) {
				t.Errorf("the client is told %d %q, want %d and JSON", told.Code, told.Body, tt.status)
			}
		})
	}
}

// deciding is a checker that calls a function.
type deciding struct {
	decide func(context.Context, gateway.Request) gateway.Decision
	ready  bool
}

func (d deciding) Decide(ctx context.Context, r gateway.Request) gateway.Decision {
	return d.decide(ctx, r)
}
func (d deciding) Ready() bool { return d.ready }

func TestEnvoyIsBounded(t *testing.T) {
	t.Parallel()
	const decision = 12 * time.Second
	var logs lockedBuffer
	_, conn := dialEnvoyServerWith(t, deciding{decide: func(ctx context.Context, r gateway.Request) gateway.Decision {
		switch r.Target {
		case "/panic":
			panic("a mistake")
		case "/deadline":
			if at, ok := ctx.Deadline(); !ok || time.Until(at) > decision {
				t.Errorf("the deadline is %v (%t), want one within %s", at, ok, decision)
			}
		}
		return gateway.Decision{Allowed: true}
	}}, decision, slog.New(slog.NewTextHandler(&logs, nil)))
	client := authv3.NewAuthorizationClient(conn)
	for _, tt := range []struct {
		name     string
		question *authv3.CheckRequest
		want     codes.Code
	}{
		{"a whole header", envoyAsks("GET", "/", map[string]string{"cookie": strings.Repeat("x", 128<<10)}), codes.OK},
		{"too much", envoyAsks("GET", "/", map[string]string{"cookie": strings.Repeat("x", maxCheckSize)}), codes.ResourceExhausted},
		{"nothing", &authv3.CheckRequest{}, codes.InvalidArgument},
		{"of a TCP connection", &authv3.CheckRequest{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{}}}, codes.InvalidArgument},
		{"without a timeout", envoyAsks("GET", "/deadline", nil), codes.OK},
		{"that finds a mistake", envoyAsks("GET", "/panic", nil), codes.Internal},
		{"after that", envoyAsks("GET", "/", nil), codes.OK},
	} {
		if _, err := client.Check(context.WithoutCancel(t.Context()), tt.question); status.Code(err) != tt.want {
			t.Errorf("a question %s: %v, want %v", tt.name, err, tt.want)
		}
	}
	if got := logs.String(); strings.Count(got, "level=ERROR") != 1 || !strings.Contains(got, `panic="a mistake" stack=`) {
		t.Errorf("the operator is told %q", got)
	}
}

func TestEnvoySeesHealth(t *testing.T) {
	t.Parallel()
	for _, ready := range []bool{false, true} {
		_, conn := dialEnvoyServer(t, deciding{ready: ready})
		client := healthv1.NewHealthClient(conn)
		want := healthv1.HealthCheckResponse_NOT_SERVING
		if ready {
			want = healthv1.HealthCheckResponse_SERVING
		}
		for _, service := range []string{"", "envoy.service.auth.v3.Authorization"} {
			if got, err := client.Check(t.Context(), &healthv1.HealthCheckRequest{Service: service}); err != nil || got.GetStatus() != want {
				t.Errorf("ready %t, service %q: %v, %v", ready, service, got, err)
			}
		}
		if _, err := client.Check(t.Context(), &healthv1.HealthCheckRequest{Service: "other"}); status.Code(err) != codes.NotFound {
			t.Errorf("a service that is not there: %v", err)
		}
	}
}

// A stop waits for questions that are under way, and takes no more.
func TestEnvoyServerStops(t *testing.T) {
	t.Parallel()
	begun, proceed := make(chan struct{}), make(chan struct{})
	server, conn := dialEnvoyServer(t, deciding{decide: func(context.Context, gateway.Request) gateway.Decision {
		close(begun)
		<-proceed
		return gateway.Decision{Allowed: true}
	}})
	client := authv3.NewAuthorizationClient(conn)
	answered := make(chan error, 1)
	go func() {
		_, err := client.Check(t.Context(), envoyAsks("GET", "/", nil))
		answered <- err
	}()
	<-begun
	stopped := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(stopped)
	}()
	// Only when it listens no more has it begun to stop.
	if err := eventually(t.Context(), nil, func() bool {
		c, err := net.Dial("tcp", conn.Target())
		if err == nil {
			c.Close()
		}
		return err != nil
	}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-stopped:
		t.Error("it has stopped while a question was under way")
	default:
	}
	close(proceed)
	if err := <-answered; err != nil {
		t.Errorf("a question that was under way: %v", err)
	}
	<-stopped
}

// messageOf decodes m, which is of this type, and checks it by the rules that Envoy checks it by.
func messageOf[M interface {
	proto.Message
	ValidateAll() error
}](t testing.TB, m *anypb.Any, to M) M {
	t.Helper()
	if err := errors.Join(m.UnmarshalTo(to), to.ValidateAll()); err != nil {
		t.Fatalf("%s: %v", m.GetTypeUrl(), err)
	}
	return to
}

// No Envoy is at hand in tests, but what it makes of its configuration is.
func TestEnvoyExample(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../api/examples/gateway/envoy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc any
	if err := yaml.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	asJSON, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	config := &bootstrapv3.Bootstrap{}
	if err := errors.Join(protojson.Unmarshal(asJSON, config), config.ValidateAll()); err != nil {
		t.Fatal(err)
	}
	filter := config.GetStaticResources().GetListeners()[0].GetFilterChains()[0].GetFilters()[0]
	manager := messageOf(t, filter.GetTypedConfig(), &managerv3.HttpConnectionManager{})
	mutation := messageOf(t, manager.GetHttpFilters()[0].GetTypedConfig(), &mutationv3.HeaderMutation{})
	authz := messageOf(t, manager.GetHttpFilters()[1].GetTypedConfig(), &authzv3.ExtAuthz{})

	if !manager.GetNormalizePath().GetValue() || !manager.GetMergeSlashes() ||
		manager.GetPathWithEscapedSlashesAction() != managerv3.HttpConnectionManager_REJECT_REQUEST {
		t.Error("what is checked may not be what is forwarded")
	}
	if manager.GetCommonHttpProtocolOptions().GetHeadersWithUnderscoresAction() != corev3.HttpProtocolOptions_DROP_HEADER {
		t.Error("fields such as X_Rescind_Subject get through")
	}
	if authz.GetFailureModeAllow() || authz.GetWithRequestBody() != nil || len(manager.GetUpgradeConfigs()) > 0 {
		t.Error("requests get through that nobody decides about, or the gateway gets bodies")
	}
	matches := func(m *matcherv3.StringMatcher, name string) bool {
		switch {
		case m.GetSafeRegex() != nil:
			return regexp.MustCompile("^(?:" + m.GetSafeRegex().GetRegex() + ")$").MatchString(name) // Envoy matches whole names
		case m.GetContains() != "":
			return strings.Contains(name, m.GetContains())
		}
		return name == m.GetExact()
	}
	// With fields in lower case, as Envoy has them; those with _ it has dropped.
	for name, want := range map[string]bool{
		"authorization": true, "x-rescind-subject": true, "x.rescind.subject": true, "x-rescind.subject": true, "cookie": false, "x-authorization": false,
	} {
		if got := slices.ContainsFunc(authz.GetAllowedHeaders().GetPatterns(), func(m *matcherv3.StringMatcher) bool { return matches(m, name) }); got != want {
			t.Errorf("the gateway sees %s: %t, want %t", name, got, want)
		}
	}
	removed := mutation.GetMutations().GetRequestMutations()[0].GetRemoveOnMatch().GetKeyMatcher()
	for _, name := range otherRequest {
		for _, as := range append(otherSpellings(name), name) {
			if !matches(removed, strings.ToLower(as)) {
				t.Errorf("%s reaches the backend", as)
			}
		}
	}
	for _, name := range []string{"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-http", "accept", "authorization"} {
		if matches(removed, name) {
			t.Errorf("%s does not reach the backend", name)
		}
	}
	clusters := map[string]bool{}
	for _, c := range config.GetStaticResources().GetClusters() {
		clusters[c.GetName()] = true
		for _, options := range c.GetTypedExtensionProtocolOptions() {
			if _, err := options.UnmarshalNew(); err != nil {
				t.Error(err)
			}
		}
	}
	for _, name := range []string{authz.GetGrpcService().GetEnvoyGrpc().GetClusterName(), manager.GetRouteConfig().GetVirtualHosts()[0].GetRoutes()[0].GetRoute().GetCluster()} {
		if !clusters[name] {
			t.Errorf("there is no cluster %q", name)
		}
	}
}

// The configuration of rescind-gateway that goes with the others.
func TestGatewayExample(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "password"), "secret\n")
	path := filepath.Join(dir, "rescind-gateway.yaml")
	example(t, "rescind-gateway.yaml", path, "/etc/rescind-gateway/password", "password", "/var/lib/rescind-gateway", "state")
	cfg, err := ReadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Auth.Listen != "127.0.0.1:8081" || cfg.Envoy.Listen != "127.0.0.1:8082" {
		t.Errorf("it listens at %s and %s, where the other examples do not ask", cfg.Auth.Listen, cfg.Envoy.Listen)
	}
}
