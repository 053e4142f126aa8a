"""A load test of any server over HTTP: when requests go out, what comes back, and the figures of it."""
