package fleet

// Served reports whether a process that takes reports lives and has answered the last question of this one;
// a process that takes reports itself always does. Without such a process no gateway can report: what is known
// of them is what the database remembers. It is asked after [Fleet.Refresh] or [Fleet.Wait].
func (f *Fleet) Served() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.cfg.Observe {
		return true
	}
	for _, p := range f.talk.peers {
		if p.asked >= f.talk.lastAsked {
			return true
		}
	}
	return false
}
