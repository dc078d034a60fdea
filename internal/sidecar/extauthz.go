package sidecar

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/rescindhq/rescind/api/gateway"
)

// Bounds for what Envoy may ask.
const (
	// maxCheckSize is of one question. It has a request's header, which Envoy bounds at 60 KiB unless
	// told otherwise, and the client's certificate if it is told to add that, but no body.
	maxCheckSize = 256 << 10
	// maxCheckMetadata is of the header of the question itself, where traces are.
	maxCheckMetadata = 16 << 10
	// maxChecks are under way on one connection. Envoy has a connection for each of its threads, and
	// holds back what is more.
	maxChecks = 1024
)

// newEnvoyServer makes the server of Envoy's ext_authz filter: envoy.service.auth.v3.Authorization, and
// grpc.health.v1.Health, which says SERVING while c is ready. Whoever serves it ends it with GracefulStop,
// which waits for the questions under way. A decision ends after some time, also where Envoy has set no timeout or
// a longer one. Panics are told to log.
func newEnvoyServer(c checker, decision time.Duration, log *slog.Logger) *grpc.Server {
	s := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxCheckSize),
		grpc.MaxHeaderListSize(maxCheckMetadata),
		grpc.MaxConcurrentStreams(maxChecks),
		grpc.ConnectionTimeout(5*time.Second),
		// A connection whose Envoy is gone without a word must end; one that is idle may stay, or the next
		// request would pay for a new one.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	authv3.RegisterAuthorizationServer(s, envoyServer{checker: c, decision: decision, log: log})
	healthv1.RegisterHealthServer(s, envoyHealth{checker: c})
	return s
}

// envoyServer answers Envoy.
type envoyServer struct {
	authv3.UnimplementedAuthorizationServer
	checker  checker
	decision time.Duration
	log      *slog.Logger
}

// Check implements [authv3.AuthorizationServer]. Its errors make Envoy refuse the request, unless its operator
// has chosen failure_mode_allow.
func (s envoyServer) Check(ctx context.Context, question *authv3.CheckRequest) (answer *authv3.CheckResponse, err error) {
	r := question.GetAttributes().GetRequest().GetHttp()
	if r == nil {
		return nil, status.Error(codes.InvalidArgument, "attributes.request.http is missing: this is for Envoy's HTTP filter")
	}
	ctx, cancel := context.WithTimeout(ctx, s.decision)
	defer cancel()
	defer func() {
		// As net/http does for the others: a request that finds a mistake of ours must not end the process.
		if p := recover(); p != nil {
			tellPanic(s.log, p)
			answer, err = nil, status.Error(codes.Internal, "the gateway has failed to decide")
		}
	}()
	d := s.checker.Decide(ctx, gateway.Request{Method: r.GetMethod(), Target: r.GetPath(), Authorization: authorizations(r)})
	if d.Allowed {
		return envoyAllows(d, r), nil
	}
	return envoyRefuses(d), nil
}

// authorizations are the values of the header field of that name. Envoy joins those of fields that are there more than
// once with commas, which no token has in it, unless encode_raw_headers is on.
func authorizations(r *authv3.AttributeContext_HttpRequest) []string {
	if r.GetHeaderMap() == nil {
		if v, ok := r.GetHeaders()["authorization"]; ok {
			return []string{v}
		}
		return nil
	}
	var values []string
	for _, f := range r.GetHeaderMap().GetHeaders() {
		switch {
		case !strings.EqualFold(f.GetKey(), "Authorization"):
		case len(f.GetRawValue()) > 0:
			values = append(values, string(f.GetRawValue()))
		default:
			values = append(values, f.GetValue())
		}
	}
	return values
}

// envoyAllows passes r on with who calls, and without what only looks like it. Envoy removes fields by their exact names
// only, so other spellings are those that it has sent.
func envoyAllows(d gateway.Decision, r *authv3.AttributeContext_HttpRequest) *authv3.CheckResponse {
	identity := make(http.Header, len(gateway.IdentityHeaders))
	d.SetIdentity(identity)
	ok := &authv3.OkHttpResponse{}
	for _, name := range gateway.IdentityHeaders {
		if v := identity.Get(name); v != "" {
			ok.Headers = append(ok.Headers, envoyHeader(name, v))
		} else {
			ok.HeadersToRemove = append(ok.HeadersToRemove, strings.ToLower(name))
		}
	}
	remove := func(name string) {
		if gateway.IsIdentityHeader(name) && identity.Get(name) == "" {
			ok.HeadersToRemove = append(ok.HeadersToRemove, strings.ToLower(name)) // once more does no harm
		}
	}
	for name := range r.GetHeaders() {
		remove(name)
	}
	for _, f := range r.GetHeaderMap().GetHeaders() {
		remove(f.GetKey())
	}
	return &authv3.CheckResponse{
		Status:       &rpcstatus.Status{Code: int32(codes.OK)},
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: ok},
	}
}

// envoyRefuses answers a request as [gateway.Decision.WriteError] does.
func envoyRefuses(d gateway.Decision) *authv3.CheckResponse {
	answer := refusal{header: http.Header{}}
	d.WriteError(&answer)
	denied := &authv3.DeniedHttpResponse{
		Status: &typev3.HttpStatus{Code: typev3.StatusCode(answer.status)},
		Body:   string(answer.body),
	}
	for name, values := range answer.header {
		if name != "Content-Length" { // Envoy's own
			denied.Headers = append(denied.Headers, envoyHeader(name, strings.Join(values, ", ")))
		}
	}
	return &authv3.CheckResponse{
		Status:       &rpcstatus.Status{Code: int32(codes.PermissionDenied)},
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: denied},
	}
}

func envoyHeader(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:       &corev3.HeaderValue{Key: strings.ToLower(name), Value: value},
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}
}

// refusal is an [http.ResponseWriter] that keeps what is written, so that a refusal is the same
// whichever way it goes out.
type refusal struct {
	status int
	header http.Header
	body   []byte
}

func (r *refusal) Header() http.Header { return r.header }

func (r *refusal) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
}

func (r *refusal) Write(b []byte) (int, error) {
	r.WriteHeader(http.StatusOK)
	r.body = append(r.body, b...)
	return len(b), nil
}

// envoyHealth lets Envoy prefer gateways that are ready. It has no Watch: a stream that never ends would hold up
// GracefulStop, and Envoy and kubelet ask with Check.
type envoyHealth struct {
	healthv1.UnimplementedHealthServer
	checker checker
}

// Check implements [healthv1.HealthServer].
func (h envoyHealth) Check(_ context.Context, r *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	if name := r.GetService(); name != "" && name != authv3.Authorization_ServiceDesc.ServiceName {
		return nil, status.Error(codes.NotFound, "there is no such service")
	}
	if !h.checker.Ready() {
		return &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_NOT_SERVING}, nil
	}
	return &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_SERVING}, nil
}
