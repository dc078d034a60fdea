package devstack

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
)

// A stack has ten ports in a row. The first is only held, by the process that runs the stack: the kernel then keeps
// others of our kind from these ten, also while a server is down or has not yet bound its own, and lets go of them
// however the process ends. They lie below the ports that Linux gives to outgoing connections (32768 and up): one of
// those could otherwise take the place of a server that is stopped for a moment.
const (
	firstPort     = 20000
	portRuns      = 1000
	portsInRun    = 10
	guardPort     = 0
	postgresPort  = 1
	amqpPort      = 2
	erlangPort    = 3
	epmdPort      = 4
	httpPort      = 5
	etcdPort      = 6
	etcdPeersPort = 7
)

// takePorts holds the run of ports that the folder had before, or another one if that is not free.
func (f *folder) takePorts() (guard net.Listener, err error) {
	base := f.PortBase
	for try := range 100 {
		if try > 0 || base == 0 {
			base = firstPort + portsInRun*rand.IntN(portRuns)
		}
		if guard := tryPorts(base); guard != nil {
			f.PortBase = base
			return guard, f.saveState()
		}
	}
	return nil, fmt.Errorf("find %d free ports in a row on 127.0.0.1 between %d and %d: none after 100 tries",
		portsInRun, firstPort, firstPort+portRuns*portsInRun)
}

func tryPorts(base int) net.Listener {
	guard, err := net.Listen("tcp4", loopback(base+guardPort))
	if err != nil {
		return nil
	}
	for port := base + guardPort + 1; port < base+portsInRun; port++ {
		l, err := net.Listen("tcp4", loopback(port))
		if err != nil {
			guard.Close()
			return nil
		}
		l.Close()
	}
	return guard
}

// addr is the address of one of the ports. Everything listens on 127.0.0.1, and nothing anywhere else.
func (f *folder) addr(port int) string { return loopback(f.PortBase + port) }

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
