"""Bytes to `Request`, `Response` to bytes. No endpoints, no policy."""
