"""What leaves the caller for a worker: the border that judges it, the proxy that leads there. Runs in the caller."""
