"""For tests of handlers."""
