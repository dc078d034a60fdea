// Package sink hides how each kind of far side is fed from the log: RabbitMQ in
// our own words, in WSO2's, and in those of WSO2's older gateways; etcd; and webhooks.
// The relay decides what is delivered and when; a sink knows only how to get it there
// and when it is safe. How to write another one is said at [relay.Sink]; [Webhook] is
// the one to read first.
//
// # Decisions
//
// What a sink delivers is a pure function of the events; only to build and repair
// its directory does the etcd sink read the state, and the one for WSO2's gateways to
// tell them again, beside its deliveries, what they may have lost. After any error a
// sink drops its connection and starts again in Open. What was under way is then sent
// again, because a repeat changes nothing for a reader and a loss would spare a
// revoked token.
package sink
