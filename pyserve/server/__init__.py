"""The processes that serve: supervisor, server, sockets, pid file, and the wiring of all rooms below."""
