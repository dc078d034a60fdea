// Package sink hides how each kind of far side is fed from the log: RabbitMQ in
// our own words and in WSO2's, and etcd. The relay decides what is delivered and
// when; a sink knows only how to get it there and when it is safe.
//
// # Decisions
//
// What a sink delivers is a pure function of the events; only to build and repair
// its directory does the etcd sink read the state. After any error a sink drops its
// connection and starts again in Open. What was under way
// is then sent again, because a repeat changes nothing for a reader and a loss
// would spare a revoked token.
package sink
