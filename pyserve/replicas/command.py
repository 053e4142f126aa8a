"""``python -m pyserve.replicas.command``: what a command does with a cluster, in a process of its own.

Ray writes to the terminal, changes signals, and ends its process when the cluster goes away: none of that is to be the
command's. The order comes as a line of JSON on stdin, what happens goes out as JSON lines on the descriptor of the
first argument:

    say      {"text": ...}              a step is done
    progress {"text": ...}              what is being waited for
    done     {...}                      the command's result
    failed   {"reason": ..., "lines": [...]}     nothing is changed, or the reason says what is
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pyserve.errors import JsonObject, ServeError
from pyserve.replicas.ray_words import plain
from pyserve.replicas.session import Session
from pyserve.serving import ServingError


@contextlib.contextmanager
def told(tell: Callable[..., None]) -> Iterator[None]:
    """Sends why the command failed, in place of raising it."""
    try:
        yield
    except KeyboardInterrupt:
        tell("failed", reason="interrupted", lines=[])
    except (ServeError, ServingError) as error:
        text = error.reason() if isinstance(error, ServeError) else str(error)
        tell("failed", reason=text, lines=getattr(error, "lines", []), code=getattr(error, "exit_code", 1))
    except Exception as error:
        tell("failed", reason=f"the cluster cannot do it: {plain(error)}", lines=[])


def _wait_for_the_end() -> None:
    """Of the command's process, which holds our stdin: without it, what was begun is undone."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _start(session: Session) -> JsonObject:
    from pyserve.replicas.starting import start  # which takes time that the other commands need not wait

    return start(session)


def main() -> None:
    """Does one order."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_wait_for_the_end, daemon=True).start()
    out = os.fdopen(int(sys.argv[1]), "w")

    def tell(event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=out, flush=True)

    session = Session(order, tell)
    commands = {
        "start": lambda: _start(session),
        "status": session.status,
        "deploy": session.deploy,
        "stop": session.stop,
    }
    with told(tell):
        tell("done", **commands[order["command"]]())
    out.flush()
    os._exit(0)  # Ray's own threads are not worth waiting for


if __name__ == "__main__":
    main()
