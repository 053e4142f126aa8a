"""``pyserve deploy``: replaces the served version of a model without downtime.

    copy it into the model store -> register it (it loads and warms up) -> try a sample -> make it the default
    -> drain and remove the old one

Until the new version is the default nothing has changed for anybody. If a step before that fails, what was done is
undone: the new version is removed, and its copy in the store too.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import http.client
import mimetypes
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

from pyserve.archive.archive import survey
from pyserve.archive.manifest import check_model_name
from pyserve.commands.client import ApiAnswer, Connection, local_address, management_key
from pyserve.config.address import Address
from pyserve.errors import ConfigError, ServeError
from pyserve.regular_file import read_whole
from pyserve.security.tokens import read_keys
from pyserve.server import pid_file

TIMEOUT_DEFAULT_S = 600.0
TOKEN_VARIABLE = "PYSERVE_TOKEN"
_DRAFT_PREFIX = ".deploy-"
_REGISTERED = re.compile(r'Model "(.*)" Version: (.*) registered with ')


class DeployError(ServeError):
    """The deployment did not come about, or not in full; the text says what is served now."""


def add_deploy_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--pid-file`` comes from the command line itself."""
    add = parser.add_argument
    add("archive", metavar="ARCHIVE", help="the new version: a file or folder, or with --name a file in the store")
    add("--name", metavar="NAME", help="the model; default: the one in the archive's manifest")
    add("--sample", metavar="FILE", help="send this to the new version first; it must answer 200")
    add("--workers", type=int, metavar="N", help="of the new version; default: as many as the old one has")
    add("--keep-old", action="store_true", help="do not remove the old version")
    add("--timeout", type=float, metavar="S", default=TIMEOUT_DEFAULT_S,
        help=f"how long loading or draining may take, in s (default {TIMEOUT_DEFAULT_S:g})")  # fmt: skip
    add("--management", "--management-address", metavar="URL", help="default: of the server that the pid file names")
    add("--inference", "--inference-address", metavar="URL", help="for --sample; default: of that server")
    add("--model-store", metavar="DIR", help="the server's, if it is another than that of the pid file")
    add("--token", metavar="KEY", help=f"for management; default: ${TOKEN_VARIABLE}, then the server's key file")
    add("-k", "--insecure", action="store_true", help="do not check the certificate of an https:// URL")


@dataclass
class _Target:
    """The server to deploy to.

    Attributes:
        inference: None if it is not known.
        store: its model store; None if it is not known or not on this machine.
    """

    management: Address
    inference: Address | None
    store: Path | None
    key: str
    inference_key: str
    checks_certificate: bool
    timeout_s: float

    def connect(self, address: Address, key: str) -> Connection:
        return Connection(address, key, checks_certificate=self.checks_certificate, timeout_s=self.timeout_s)


def deploy_command(parsed: argparse.Namespace, pid_path: Path) -> int:
    """Deploys and says each step. Returns 0.

    Raises:
        ServeError: why not, in one line.
    """
    if parsed.workers is not None and parsed.workers < 1:
        raise DeployError(f"--workers must be 1 or more, not {parsed.workers}: a version without workers cannot answer")
    if not parsed.timeout > 0:
        raise DeployError(f"--timeout must be more than 0 s, not {parsed.timeout:g}")
    sample = _read_sample(parsed.sample)
    target = _target(parsed, pid_path)
    if sample is not None and target.inference is None:
        raise DeployError("--sample needs the address of the inference API; give --inference")
    deployment = _Deployment(parsed, target, sample)
    deployment.run()
    return 0


def _read_sample(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return read_whole(Path(path))
    except OSError as error:
        raise DeployError(f"--sample {path} cannot be read: {error.strerror}") from None


def _target(parsed: argparse.Namespace, pid_path: Path) -> _Target:
    running = pid_file.read(pid_path) if parsed.management is None else None
    if parsed.management is None and running is None:
        raise DeployError(
            "pyserve is not currently running; start it, or name a server with --management http://host:8081"
        )
    store = parsed.model_store or (running.model_store if running is not None else "")
    if parsed.model_store and not Path(parsed.model_store).is_dir():
        raise DeployError(f"--model-store directory not found: {parsed.model_store}")
    key, inference_key = parsed.token or os.environ.get(TOKEN_VARIABLE, ""), ""
    if running is not None and running.key_file:
        key = key or management_key(running.key_file)
        found = read_keys(Path(running.key_file)).get("inference")
        inference_key = found.text if found is not None else ""
    return _Target(
        management=_address("--management", parsed.management or _listening(running, "management"), 8081),
        inference=_address("--inference", parsed.inference or _listening(running, "inference"), 8080)
        if parsed.inference or running is not None
        else None,
        store=Path(store).absolute() if store else None,
        key=key,
        inference_key=inference_key,
        checks_certificate=parsed.management is not None and not parsed.insecure,
        timeout_s=parsed.timeout,
    )


def _listening(running: pid_file.RunningServer | None, name: str) -> str:
    assert running is not None
    return str(local_address(running.addresses[name]))


def _address(flag: str, text: str, port_default: int) -> Address:
    try:
        return Address.parse(text, port_default)
    except ValueError as error:
        raise DeployError(f"{flag} {text}: {error}") from None


class _Deployment:
    """One run of the command."""

    def __init__(self, parsed: argparse.Namespace, target: _Target, sample: bytes | None):
        self._parsed = parsed
        self._target = target
        self._sample = sample
        self._management = target.connect(target.management, target.key)
        self._copied: Path | None = None
        self._name = ""
        self._version = ""
        self._old = ""  # the version that is the default now
        self._workers = parsed.workers or 1
        self._may_be_registered = False

    def run(self) -> None:
        """All steps.

        Raises:
            ServeError: a step failed; what the ones before it did is undone, unless the new version is the default.
        """
        path = Path(self._parsed.archive)
        is_here = path.exists()
        self._name, self._version = _identity(path, self._parsed.name) if is_here else (self._parsed.name or "", "")
        if not self._name:
            raise DeployError(
                f"{path} is not a file here; give --name NAME if it is a file in the server's model store"
            )
        with self._told_plainly():
            self._look_at_what_is_served()
            with self._undone_on_failure():
                file = self._bring_into_store(path) if is_here else path.name
                self._register(file)
                self._try_sample()
                self._make_default()
            self._copied = None
            self._remove_old()

    def _look_at_what_is_served(self) -> None:
        answer = self._ask("GET", "/all", ok=(200, 404))
        if answer.status == 404:
            return
        if any(row["modelVersion"] == self._version and row.get("state") != "FAILED" for row in answer.json):
            is_default = self._ask("GET", "").json[0]["modelVersion"] == self._version
            # Of several versions the default one cannot be removed; alone, it would be missed.
            raise DeployError(
                f"{self._name} {self._version} is served already"
                + (", as the default version; pack the new one with another --version" if is_default else
                   f"; pack the new one with another --version, or remove this one first: curl -X DELETE "
                   f"{self._url(self._version)}")
            )  # fmt: skip
        [default] = self._ask("GET", "").json
        self._old = default["modelVersion"]
        self._workers = self._parsed.workers or max(1, default["minWorkers"], len(default["workers"]))

    def _bring_into_store(self, path: Path) -> str:
        """The name of the archive in the model store, where it is put if it is not there yet."""
        store = self._target.store
        if store is None:
            # A server elsewhere, whose store we cannot look into: it will say if the file is not there.
            return path.name
        if path.resolve().parent == store.resolve():
            return path.name
        suffix = "".join(each for each in path.suffixes if each in (".mar", ".tar", ".gz", ".tgz"))
        stem = path.name.removesuffix(suffix) if suffix else path.name
        for name in (path.name, f"{stem}-{self._version}{suffix}"):
            if not (store / name).exists():
                _copy(path, store / name)
                self._copied = store / name
                self._say(f"copied to {store / name}")
                return name
            if _is_same(path, store / name):
                return name
        raise DeployError(
            f"the model store {store} has another {path.name} and another {stem}-{self._version}{suffix}; rename the "
            "archive, or remove the file that is not needed any more"
        )

    def _register(self, file: str) -> None:
        query = urlencode({
            "url": file, "model_name": self._name, "initial_workers": self._workers, "synchronous": "true",
        })  # fmt: skip
        self._may_be_registered = True
        try:
            answer = self._management.ask("POST", f"/models?{query}", headers={"Content-Length": "0"})
        except TimeoutError:
            raise DeployError(
                f"{self._new} was not loaded within {self._target.timeout_s:g} s; raise --timeout"
            ) from None
        if answer.status != 200:
            self._may_be_registered = False  # the server keeps nothing of what it refuses
            if answer.status == 409:
                self._copied = None  # whoever was faster may serve it from the very file
            raise DeployError(f"{self._new} was not loaded: {self._registration_problem(answer)}")
        found = _REGISTERED.match(str(answer.json.get("status")))
        if found is not None:
            self._version = found[2]
        self._say(f"loaded and warm, {self._workers} worker{'s' if self._workers > 1 else ''}")

    def _registration_problem(self, answer: ApiAnswer) -> str:
        text = answer.text
        if answer.status == 404 and self._target.store is None:
            text += "; it must lie in the server's model store: put it there, or name that folder with --model-store"
        elif answer.status == 405:
            text += "; the server must be started with --enable-model-api"
        elif answer.status == 409:
            text += "; pack it with another --version"
        return text

    def _try_sample(self) -> None:
        address = self._target.inference
        if self._sample is None or address is None:
            return
        kind = mimetypes.guess_type(self._parsed.sample)[0]
        path = f"/predictions/{_quoted(self._name)}/{_quoted(self._version)}"
        with contextlib.closing(self._target.connect(address, self._target.inference_key)) as connection:
            # As curl -T would send it; JSON has to say that it is JSON.
            headers = {"Content-Type": kind} if kind == "application/json" else {}
            try:
                answer = connection.ask("POST", path, self._sample, headers)
            except (OSError, http.client.HTTPException) as error:
                raise DeployError(f"{self._new} does not answer the sample at {address}: {error}") from None
        if answer.status != 200:
            raise DeployError(f"{self._new} answers the sample with {answer.text}")
        self._say(f"answers the sample ({len(answer.body)} bytes)")

    def _make_default(self) -> None:
        if not self._old:
            self._say("is the first version that is served")
            return
        self._ask("PUT", f"/{_quoted(self._version)}/set-default")
        print(f"{self._name}: default version {self._old} -> {self._version}", flush=True)

    def _remove_old(self) -> None:
        if not self._old:
            return
        if self._parsed.keep_old:
            print(f"{self._name} {self._old}: kept; back to it: curl -X PUT {self._url(self._old)}/set-default")
            return
        answer = self._ask("DELETE", f"/{_quoted(self._old)}", ok=(200, 404, 408))
        is_draining = answer.status == 408
        gone = "is still answering requests, and goes when it is done" if is_draining else "drained and removed"
        print(f"{self._name} {self._old}: {gone}", flush=True)

    # --- when a step fails ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _told_plainly(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DeployError(f"{self._target.management} does not answer: {reason}") from None
        finally:
            self._management.close()

    @contextlib.contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        asked = False
        try:
            yield
            asked = True
        finally:
            if not asked:
                self._undo()

    def _undo(self) -> None:
        """Whatever went wrong, Ctrl-C too: as it was before, as far as the server can be reached."""
        served = f"{self._name} {self._old} is served as before" if self._old else f"{self._name} is not served"
        try:
            if self._may_be_registered:
                self._management.close()  # an answer that we did not wait for may still come on the old connection
                if self._old and self._ask("GET", "").json[0]["modelVersion"] == self._version:
                    self._ask("PUT", f"/{_quoted(self._old)}/set-default")
                self._ask("DELETE", f"/{_quoted(self._version)}", ok=(200, 404))
            print(f"nothing is changed: {served}", flush=True)
        except (ServeError, OSError, http.client.HTTPException) as error:
            print(f"{self._new} could not be removed again ({error}); see `pyserve status`", flush=True)
        if self._copied is not None:
            _remove(self._copied)

    # --- asking ---------------------------------------------------------------------------------------------------

    def _ask(self, method: str, rest: str, ok: tuple[int, ...] = (200,)) -> ApiAnswer:
        """A call about the model; ``rest`` follows its path."""
        answer = self._management.ask(method, f"/models/{_quoted(self._name)}{rest}")
        if answer.status not in ok:
            raise DeployError(f"{method} /models/{self._name}{rest}: {answer.text}")
        return answer

    def _url(self, version: str) -> str:
        return f"{self._target.management.client_url}/models/{_quoted(self._name)}/{_quoted(version)}"

    def _say(self, text: str) -> None:
        print(f"{self._new}: {text}", flush=True)

    @property
    def _new(self) -> str:
        return f"{self._name} {self._version}".rstrip()


def _identity(path: Path, name: str | None) -> tuple[str, str]:
    """Name and version of an archive."""
    with survey(path) as found:
        name = name or found.manifest.model_name
        check_model_name(name)
        return name, found.manifest.model_version


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _is_same(one: Path, other: Path) -> bool:
    """Folders never are: looking through them is not worth it."""
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def _copy(source: Path, target: Path) -> None:
    """Puts a copy there in one step, so that no server finds half of one.

    Raises:
        ConfigError: it cannot be written.
    """
    draft: Path | None = None
    try:
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=_DRAFT_PREFIX))
        inside = draft / target.name
        if source.is_dir():
            shutil.copytree(source, inside)
        else:
            shutil.copyfile(source, inside)
        os.rename(inside, target)
    except OSError as error:
        raise ConfigError(
            f"{source.name} cannot be copied into the model store {target.parent}: {error.strerror or error}; put it "
            "there as a user who may, and give its name"
        ) from None
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
