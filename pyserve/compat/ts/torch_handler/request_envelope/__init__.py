"""Envelopes: what other servers' requests and answers look like, around a handler."""
