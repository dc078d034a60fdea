package devstack

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
)

func TestEverythingListensOnLoopback(t *testing.T) {
	t.Parallel()
	s := start(t, Config{Dir: dataDir(t), Management: true, NoFsync: true})
	base := uint16(s.folder.PortBase)
	var ports []uint16
	for _, at := range listening(t) {
		if at.Port() < base || at.Port() >= base+portsInRun {
			continue
		}
		if !at.Addr().IsLoopback() {
			t.Errorf("%s can be reached from outside", at)
		}
		if at.Addr().Is4() {
			ports = append(ports, at.Port()-base)
		}
	}
	slices.Sort(ports)
	want := []uint16{guardPort, postgresPort, amqpPort, erlangPort, epmdPort, httpPort, etcdPort, etcdPeersPort}
	if !slices.Equal(ports, want) {
		t.Errorf("ports that are listened at, from the first of ours: %v, want %v", ports, want)
	}
}

// listening lists the addresses that processes of this machine listen at (proc_pid_net(5)).
func listening(t *testing.T) []netip.AddrPort {
	t.Helper()
	const listen = "0A"
	var found []netip.AddrPort
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(table)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			fields := strings.Fields(line)
			if len(fields) < 4 || fields[3] != listen {
				continue
			}
			addr, port, _ := strings.Cut(fields[1], ":")
			a, err1 := hex.DecodeString(addr)
			p, err2 := hex.DecodeString(port)
			if err1 != nil || err2 != nil {
				t.Fatalf("%s: %q", table, line)
			}
			for i := 0; i < len(a); i += 4 { // words in the machine's order
				binary.BigEndian.PutUint32(a[i:], binary.NativeEndian.Uint32(a[i:]))
			}
			ip, ok := netip.AddrFromSlice(a)
			if !ok {
				t.Fatalf("%s: %q", table, line)
			}
			found = append(found, netip.AddrPortFrom(ip.Unmap(), binary.BigEndian.Uint16(p)))
		}
	}
	return found
}
