package relaytest

import (
	"net"
	"sync"
	"testing"
)

// Proxy passes TCP connections on to one address, until it is told to misbehave
// as networks do. Its methods may be called from any goroutine.
type Proxy struct {
	target   string
	listener net.Listener
	done     chan struct{} // closed when the test ends
	running  sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]bool
	refuse bool
	budget int           // bytes that may still go to the target; negative: any number
	healed chan struct{} // closed unless stalled
	held   chan struct{} // closed when bytes for the target wait for healed
}

// NewProxy starts a proxy on loopback that ends with the test.
func NewProxy(t *testing.T, target string) *Proxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{
		target: target, listener: ln, done: make(chan struct{}),
		conns: map[net.Conn]bool{}, budget: -1, healed: make(chan struct{}),
	}
	close(p.healed)
	p.running.Go(p.accept)
	t.Cleanup(func() {
		close(p.done)
		p.listener.Close()
		p.Refuse()
		p.running.Wait()
	})
	return p
}

// Addr is where the proxy listens: host:port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Cut resets every connection. New ones are served.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut()
}

// Refuse resets every connection, and each new one, until [Proxy.Heal].
func (p *Proxy) Refuse() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = true
	p.cut()
}

// CutAfter lets n more bytes through to the target, in the middle of whatever
// they belong to, and then refuses as [Proxy.Refuse] does.
func (p *Proxy) CutAfter(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.budget = n
}

// Stall keeps connections, and accepts new ones, but lets nothing through, not
// even that the other side has closed, until [Proxy.Heal]. The channel that it returns is closed when bytes for the target
// wait.
func (p *Proxy) Stall() (held <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.stalled() {
		p.healed, p.held = make(chan struct{}), make(chan struct{})
	}
	return p.held
}

// Heal ends every misbehaviour.
func (p *Proxy) Heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse, p.budget = false, -1
	if p.stalled() {
		close(p.healed)
	}
}

// stalled needs p.mu.
func (p *Proxy) stalled() bool {
	select {
	case <-p.healed:
		return false
	default:
		return true
	}
}

// cut needs p.mu.
func (p *Proxy) cut() {
	for c := range p.conns {
		reset(c)
	}
	clear(p.conns)
}

func reset(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetLinger(0) // RST instead of FIN
	}
	c.Close()
}

func (p *Proxy) accept() {
	for {
		near, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.running.Go(func() { p.serve(near) })
	}
}

func (p *Proxy) serve(near net.Conn) {
	defer reset(near)
	if !p.add(near) {
		return
	}
	far, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer reset(far)
	if !p.add(far) {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { p.pipe(far, near, true) })
	both.Go(func() { p.pipe(near, far, false) })
	both.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, near)
	delete(p.conns, far)
}

func (p *Proxy) add(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refuse {
		return false
	}
	p.conns[c] = true
	return true
}

// pipe copies until either side ends, and then ends both.
func (p *Proxy) pipe(dst, src net.Conn, toTarget bool) {
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			n, cut := p.admit(n, toTarget)
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
			if cut {
				p.Refuse()
				return
			}
		}
		if err != nil {
			p.admit(0, false)
			return
		}
	}
}

// admit waits while the proxy is stalled. It says how many of n bytes may pass,
// and whether these are the last.
func (p *Proxy) admit(n int, toTarget bool) (pass int, cut bool) {
	p.mu.Lock()
	healed := p.healed
	if toTarget && p.stalled() {
		select {
		case <-p.held:
		default:
			close(p.held)
		}
	}
	p.mu.Unlock()

	select {
	case <-healed:
	case <-p.done:
		return 0, true
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	if !toTarget || p.budget < 0 {
		return n, false
	}
	pass = min(n, p.budget)
	p.budget -= pass
	return pass, p.budget == 0
}
