"""Two refs or more, asked the same: what differs in outputs, state, modules, code, time and memory. Side: caller."""
