"""What commands do with a cluster: `Session` is one command's connection to it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyserve.errors import ConfigError, JsonObject, ServeError
from pyserve.replicas.bringing import bring, looked_at
from pyserve.replicas.ray_words import ended, plain, ray_version_problem, warnings_off

ANSWER_S = 60.0
CONNECT_S = 5.0
END_S = 120.0
LOOK_S = 0.5
# A control whose process or node died is started again by Ray.
BACK_S = 60.0


class ClusterError(ServeError):
    """A command could not do what it was to; the text says what is served now."""

    def __init__(self, message: str, lines: list[str] | None = None):
        super().__init__(message)
        self.lines = lines or []


class Session:
    """One command's connection to a cluster.

    Args:
        order: ``command``, ``address``, ``application``, and what the command takes.
        tell: sends an event.
    """

    def __init__(self, order: JsonObject, tell: Callable[..., None]):
        self.order = order
        self.tell = tell
        self.application = str(order["application"])
        self.control_name = ""

    # --- connecting -----------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Raises ConfigError: there is no Ray, no cluster, or another version of either."""
        address = str(self.order["address"])
        try:
            import ray
            from ray import serve  # noqa: F401
        except ImportError as error:
            raise ConfigError(f'Ray Serve is missing ({error}); pip install "ray[serve]>=2.60"') from None
        problem = ray_version_problem(ray.__version__)
        if problem:
            raise ConfigError(problem)
        from pyserve.replicas.actor import NAMESPACE, actor_name

        self.control_name = actor_name(self.application, "pyserve")
        warnings_off()
        _check_listens(address)
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's would leave half of a command done
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster is found at {address!r} ({plain(error)}); start one with `ray start --head`, join "
                "this machine to one with `ray start --address=HOST:6379`, or give --cluster HOST:6379"
            ) from None
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(f"the Ray cluster at {address!r} cannot be used: {plain(error)}") from None

    def get(self, ref: Any, limit_s: float = ANSWER_S) -> Any:
        """What a call of the control returns.

        Raises:
            ClusterError: it does not come.
            ServeError: what the call raises.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        try:
            return ray.get(ref, timeout=limit_s)
        except RayTaskError as error:
            if isinstance(error.cause, ServeError):
                raise error.cause from None
            raise ClusterError(f"the control of the cluster failed: {plain(error.cause)}") from None
        except GetTimeoutError:
            raise ClusterError(f"the control of the cluster does not answer within {limit_s:g} s") from None
        except RayError as error:
            raise ClusterError(f"the control of the cluster is gone: {plain(error)}") from None

    def control(self) -> Any:
        """The actor.

        Raises:
            ClusterError: nothing is served.
        """
        from pyserve.replicas.actor import actor_name, control_of

        served = self.served()
        if served is not None and served.deployments:
            self.control_name = actor_name(self.application, next(iter(served.deployments)))
        found = control_of(self.control_name)
        if found is None or served is None:
            raise ClusterError("pyserve serves nothing on this cluster; `pyserve start --cluster` does")
        return found

    def served(self) -> Any:
        """The application as Ray Serve tells of it; None if there is none."""
        from ray import serve

        return serve.status().applications.get(self.application)

    # --- commands -------------------------------------------------------------------------------------------------

    def status(self) -> JsonObject:
        """How the application, its replicas and models are."""
        self.connect()
        return self.look()

    def look(self) -> JsonObject:
        """`status`, of a session that is connected."""
        served = self.served()
        if served is None:
            return {"running": False}
        deployments = {
            name: {"status": str(getattr(each.status, "value", each.status)), "message": ended(each.message),
                   "replicas": {str(getattr(state, "value", state)): count
                                for state, count in each.replica_states.items()}}
            for name, each in served.deployments.items()
        }  # fmt: skip
        found: JsonObject = {"running": True, "status": str(getattr(served.status, "value", served.status)),
                             "message": ended(served.message), "deployments": deployments}  # fmt: skip
        try:
            control = self.control()
            return {**found, **self.get(control.status.remote())}
        except ServeError as error:
            return {**found, "problem": error.message}

    def deploy(self) -> JsonObject:
        """A version in the place of another, on all replicas or on none."""
        order = self.order
        entry, path = looked_at(str(order["archive"]), order.get("name"), order.get("config"))
        self.connect()
        control = self.control()
        before = self.get(control.status.remote())
        old = next(
            (each["version"] for each in before["models"] if each["model"] == entry.name and each["default"]), ""
        )
        if path is not None:
            bring(entry, path, control, self.get)
            self.tell("say", text=f"{entry.shown}: brought to the cluster ({entry.size >> 20} MB)")
        fields = {**vars(entry), "workers": order.get("workers") or None, "settings": dict(entry.settings)}
        arguments: JsonObject = {"entry": fields, "keeps_old": bool(order.get("keep_old"))}
        if order.get("sample") is not None:
            body = Path(order["sample"]).read_bytes()
            arguments["sample"] = {"name": entry.name, "version": entry.version, "body": body,
                                   "type": order.get("sample_type", "")}  # fmt: skip
        answer = self._changed(control, "deploy", arguments, entry.key)
        return {"name": entry.name, "version": entry.version, "old": old, **answer}

    def _changed(self, control: Any, kind: str, arguments: JsonObject, key: tuple[str, str]) -> JsonObject:
        """What a change comes to.

        Raises:
            ClusterError: it was not made; or nobody knows, which it says.
        """
        import ray
        from ray.exceptions import RayError

        timeout_s = float(self.order.get("timeout_s") or 600.0)
        ref = control.change.remote(kind, arguments, timeout_s)
        try:
            answer: JsonObject = ray.get(ref, timeout=timeout_s + 60.0)
        except KeyboardInterrupt:
            with contextlib.suppress(Exception):
                ray.get(control.cancel.remote(), timeout=ANSWER_S)
                ray.get(ref, timeout=ANSWER_S)
            raise
        except RayError as error:
            return self._after_a_loss(key, plain(error))
        if answer.get("error"):
            fix = (answer.get("detail") or {}).get("fix")
            raise ClusterError(f"{answer['error']}{f'; {fix}' if fix else ''}")
        if answer.get("reasons"):
            lines = [f"{node}: {reason}" for node, reason in sorted(answer["reasons"].items())]
            raise ClusterError(
                f"{' '.join(key)} is served nowhere; generation {answer['generation']} is served as before", lines
            )
        return answer

    def _after_a_loss(self, key: tuple[str, str], reason: str) -> JsonObject:
        """The control died meanwhile: what the next one says is so."""
        from pyserve.replicas.actor import control_of

        ends_at = time.monotonic() + BACK_S
        while time.monotonic() < ends_at:
            with contextlib.suppress(ServeError):
                control = control_of(self.control_name)
                if control is not None:
                    found = self.get(control.status.remote(), 5.0)
                    if any((each["model"], each["version"]) == key for each in found["models"]):
                        return {
                            "generation": found["generation"], "committed": 0.0, "silent": {},
                            "replicas": len(found["replicas"]),
                            "nodes": len({each["node"] for each in found["replicas"]}),
                        }  # fmt: skip
                    raise ClusterError(
                        f"the control of the cluster was started again meanwhile ({reason}); generation "
                        f"{found['generation']} is served as before: deploy again"
                    )
            time.sleep(1.0)
        raise ClusterError(f"the control of the cluster is gone ({reason}); see `pyserve status` for what is served")

    def stop(self) -> JsonObject:
        """Ends the application, its control and what nodes keep for it; Ray Serve too if nothing else is served."""
        self.connect()
        from ray import serve

        from pyserve.replicas.ending import end_application, end_controls

        is_served = self.served() is not None
        limit_s = self.order.get("timeout_s")
        limit_s = END_S if limit_s is None else float(limit_s)
        if is_served and not end_application(self.application, limit_s):
            raise ClusterError(
                f"pyserve on the cluster is still draining after {limit_s:g} s; a second `pyserve stop` ends it at once"
            )
        # Only now: a control is made again by replicas that live.
        is_left = end_controls(self.application)
        if is_served and not serve.status().applications:
            serve.shutdown()
        return {"running": is_served or is_left}


def _check_listens(address: str) -> None:
    """Ray itself tries for minutes.

    Raises:
        ConfigError: nobody listens there.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return  # auto, or what Ray will tell
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConfigError(
            f"no Ray cluster is found at {address!r} ({reason}); start one with `ray start --head`, give its HOST:6379"
        ) from None
