"""The engine in somebody else's process and event loop: without sockets, supervisor and state file, called from Python,
or by an HTTP server as an ASGI application. Of the process nothing is changed that docs/embedding.md does not name."""
