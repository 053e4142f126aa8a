"""The HTTP API as an ASGI 3 application: under uvicorn, hypercorn or granian, mounted in FastAPI or Starlette, or
called without a port.

    app = pyserve.asgi.application(["densenet.mar"])                          # uvicorn module:app
    host.mount("/models", pyserve.asgi.application(engine))                   # the host's lifespan starts the engine
"""

from __future__ import annotations

from pyserve.embedding.application import Application, application, management

__all__ = ["Application", "application", "management"]
