"""Where a running server takes archives from: names, paths and URLs, by parameter, by JSON body and at the start."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
import torch

from tests.support import serving_models
from tests.support.certificates import signed_by_authority
from tests.support.handler_archives import write_handler
from tests.support.hostile_web import HostileWeb, Peer, canary, endless, file_answer, one_byte_then_nothing, redirect
from tests.support.serving import JSON, Answer, Server, at_once

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

HANDLER = "def handle(data, context):\n    return data\n"
FINE = {"initial_workers": "1"}


class Place(NamedTuple):
    server: Server
    web: HostileWeb
    tls: HostileWeb
    files: Path  # file:// URLs below it are allowed
    archive: bytes

    def register(self, url: str, **parameters: str) -> Answer:
        return register(self.server, url, **parameters)

    def stored(self) -> list[str]:
        return sorted(os.listdir(self.server.store))


def register(server: Server, url: str, **parameters: str) -> Answer:
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in {"url": url, **parameters}.items())
    return server.ask("POST", f"/models?{query}", port="management")


def refused(answer: Answer, status: int, kind: str, message: str, reason: str = "") -> None:
    assert (answer.status, answer.json["type"], answer.json["message"]) == (status, kind, message)
    assert reason in answer.detail.get("reason", ""), answer.detail


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server that may fetch from two web servers, which are on this machine, and from a folder."""
    folder = tmp_path_factory.mktemp("sources")
    files = folder / "files"
    content = serving_models.write_linear(files).read_bytes()
    pair, authority = signed_by_authority(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    server = Server(folder)
    server.environment["SSL_CERT_FILE"] = str(authority)
    for name in ("in-store", "other"):
        serving_models.write_linear(server.store, name)
    (server.store / "deep").mkdir()
    serving_models.write_linear(server.store / "deep", "nested")
    shutil.unpack_archive(server.store / "in-store.mar", server.store / "unpacked", "zip")
    (server.store / "leaves.mar").symlink_to(files / "linear.mar")
    (server.store / "behind").symlink_to(files)
    answers: dict[str, Any] = {"/linear.mar": file_answer(content), "/my%20model.mar": file_answer(content)}
    with HostileWeb(answers) as web, HostileWeb(dict(answers), context) as tls:
        (folder / "config.properties").write_text(
            rf"allowed_urls=http://127\\.0\\.0\\.1:{web.port}/.*,https://localhost:{tls.port}/.*,file://{files}/.*,"
            "http://no-such-host\\\\.invalid/.*,s3://bucket/.*,http://127\\\\.0\\\\.0\\\\.1:1/.*\n"
            "allow_private_addresses=true\ndownload_size_max=200000\ndownload_timeout_s=2\n"
            "install_py_dep_per_model=true\n"
        )
        server.start("--ts-config", "config.properties")
        try:
            yield Place(server, web, tls, files, content)
        finally:
            server.kill()


# --- the model store -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, shown",
    [
        ("in-store.mar", "in-store.mar"),
        ("any/folder/in-store.mar", "in-store.mar"),
        ("/any/folder/in-store.mar", "in-store.mar"),
        ("unpacked", "unpacked"),
        ("unpacked/", "unpacked"),
        ("{store}/in-store.mar", "in-store.mar"),
        ("{store}/deep/nested.mar", "deep/nested.mar"),
        ("{store}/unpacked", "unpacked"),
        ("leaves.mar", "leaves.mar"),  # whoever fills the store may put links there
        ("{store}/leaves.mar", "leaves.mar"),
    ],
)
def test_archive_of_the_store_is_registered_by_name_and_by_path(place: Place, url: str, shown: str) -> None:
    answer = place.register(url.format(store=place.server.store), model_name="here", **FINE)
    assert answer.status == 200, answer.body
    described = place.server.describe("here")
    place.server.manage("DELETE", "/models/here")
    assert described["modelUrl"] == shown
    assert (place.server.store / shown).exists()


@pytest.mark.parametrize(
    "url, message, reason",
    [
        ("", "empty url", ""),
        (" ", "empty url", ""),
        ("nope.mar", "Model not found at: nope.mar", ""),
        (".", "Model not found at: .", ""),
        ("/", "Model not found at: /", ""),
        (".hidden.mar", "Model not found at: .hidden.mar", ""),
        ("/etc/passwd", "Model not found at: /etc/passwd", "outside of the model store"),
        ("{files}/linear.mar", "Model not found at: {files}/linear.mar", "outside of the model store"),
        ("{files}", "Model not found at: {files}", "outside of the model store"),
        ("{store}", "Model not found at: {store}", "outside of the model store"),
        ("{store}/behind/linear.mar", "Model not found at: {store}/behind/linear.mar", "leaves the model store"),
        ("../in-store.mar", "Relative path is not allowed in url: ../in-store.mar", ""),
        ("%2e%2e/in-store.mar", "Relative path is not allowed in url: %2e%2e/in-store.mar", ""),
        ("{store}/deep/../in-store.mar", "Relative path is not allowed in url: {store}/deep/../in-store.mar", ""),
    ],
)
def test_what_is_not_in_the_store_is_not_found(place: Place, url: str, message: str, reason: str) -> None:
    names = {"store": place.server.store, "files": place.files}
    refused(place.register(url.format(**names)), 404, "ModelNotFoundException", message.format(**names), reason)


def test_url_is_required(place: Place) -> None:
    answer = place.server.ask("POST", "/models?model_name=m", port="management")
    refused(answer, 400, "BadRequestException", "Parameter url is required.")


# --- URLs that are fetched -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, file",
    [
        ("{web}/linear.mar", "linear.mar"),
        ("{web}/linear.mar?X-Amz-Signature=secret&x=1", "linear.mar"),
        ("{web}/my%20model.mar", "my model.mar"),
        ("https://localhost:{tls}/linear.mar", "linear.mar"),
        ("file://{files}/linear.mar", "linear.mar"),
    ],
)
def test_archive_is_fetched_into_the_store_and_leaves_it_with_its_model(place: Place, url: str, file: str) -> None:
    before = place.stored()
    url = url.format(web=place.web.url, tls=place.tls.port, files=place.files)
    assert place.register(url, model_name="fetched", **FINE).status == 200
    assert (place.server.store / file).read_bytes() == place.archive
    assert place.stored() == sorted([*before, file])  # and no partial file
    assert place.server.describe("fetched")["modelUrl"] == url.partition("?")[0]
    assert place.server.predict("fetched", [1, 2, 3, 4]).status == 200
    # The same again: the file is there.
    refused(place.register(url, model_name="again"), 500, "InternalServerException",
            f"Model file already exists {file}")  # fmt: skip
    assert place.server.predict("fetched", [1, 2, 3, 4]).status == 200
    place.server.manage("DELETE", "/models/fetched")
    assert place.stored() == before
    assert "secret" not in place.server.log()


def test_archive_that_two_models_are_served_from_stays_until_the_last_is_gone(place: Place) -> None:
    before = place.stored()
    assert place.register(f"{place.web.url}/linear.mar", model_name="first").status == 200
    assert place.register("linear.mar", model_name="second").status == 200
    place.server.manage("DELETE", "/models/first")
    assert place.stored() == sorted([*before, "linear.mar"])
    place.server.manage("DELETE", "/models/second")
    assert (place.server.store / "linear.mar").exists()  # registered by its name: it is the store's now
    (place.server.store / "linear.mar").unlink()


def test_fetched_model_survives_a_crash_and_its_archive_still_goes_with_it(place: Place) -> None:
    before = place.stored()
    assert place.register(f"{place.web.url}/linear.mar", model_name="kept", **FINE).status == 200
    place.server.kill_server_process()
    place.server.wait_for(lambda: place.server.predict("kept", [1, 2, 3, 4]).status == 200, "the server to be back")
    place.server.manage("DELETE", "/models/kept")
    assert place.stored() == before


BAD_ARCHIVES = {
    "/not-an-archive.mar": b"<html>404, kindly put as 200</html>",
    "/empty.zip": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("path", BAD_ARCHIVES)
def test_what_is_no_archive_does_not_stay(place: Place, path: str) -> None:
    before = place.stored()
    place.web.answers[path] = file_answer(BAD_ARCHIVES[path])
    answer = place.register(f"{place.web.url}{path}", model_name="bad")
    assert (answer.status, answer.json["type"]) == (400, "InvalidModelException")
    assert place.stored() == before


def test_conflict_and_failed_start_do_not_leave_the_file(place: Place) -> None:
    before = place.stored()
    assert place.register("in-store.mar", model_name="taken", **FINE).status == 200
    refused(place.register(f"{place.web.url}/linear.mar", model_name="taken"), 409, "ConflictStatusException",
            "Model version 1.0 is already registered for model taken")  # fmt: skip
    assert place.stored() == before
    place.server.manage("DELETE", "/models/taken")
    broken = write_handler(place.files, "broken", f"import nothing_like_it\n{HANDLER}")
    for synchronous in ("true", "false"):
        answer = place.register(f"file://{broken}", synchronous=synchronous, **FINE)
        assert answer.status == (500 if synchronous == "true" else 202), answer.body
        place.server.wait_for(lambda: place.stored() == before, "the archive to be gone")
        assert place.server.ask("GET", "/models/broken", port="management").status == 404


@pytest.mark.parametrize(
    "url, reason",
    [
        ("{web}/nope.mar", "the server answered 404 Not Found"),
        ("{web}/endless.mar", "the most is download_size_max=200000"),
        ("{web}/drip.mar", "it took longer than download_timeout_s=2"),
        ("{web}/short.mar", "the connection ended after 5 of 1000 bytes"),
        ("{web}/large.mar", "the most is download_size_max=200000"),
        ("{web}/loop.mar", "redirected more than 5 times"),
        ("http://no-such-host.invalid/m.mar", "the host no-such-host.invalid cannot be resolved"),
        ("http://127.0.0.1:1/m.mar", "the connection to 127.0.0.1:1 failed: Connection refused"),
        ("https://localhost:{web_port}/", "pattern"),
        ("{web}/", "ends without the name of an archive"),
        ("http://127.0.0.1:99999/m.mar", "has a port that is not from 1 to 65535"),
        ("file://{files}/nope.mar", "the file cannot be opened: No such file or directory"),
        ("file://{files}/folder", "not a regular file"),
        ("file://{files}/pipe.mar", "not a regular file"),
        ("s3://bucket/m.mar", "s3:// needs packages that are not installed"),
    ],
)
def test_failed_download_says_why_and_leaves_nothing(place: Place, url: str, reason: str) -> None:
    before = place.stored()
    place.web.answers |= {
        "/endless.mar": endless, "/drip.mar": one_byte_then_nothing, "/loop.mar": redirect("/loop.mar"),
        "/short.mar": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort",
        "/large.mar": b"HTTP/1.1 200 OK\r\nContent-Length: 200001\r\n\r\n",
    }  # fmt: skip
    (place.files / "folder").mkdir(exist_ok=True)
    if not (place.files / "pipe.mar").exists():
        os.mkfifo(place.files / "pipe.mar")
    url = url.format(web=place.web.url, web_port=place.web.port, files=place.files)
    answer = place.register(url)
    if reason == "pattern":
        refused(answer, 404, "ModelNotFoundException", f"Given URL {url} does not match any allowed URL(s)", reason)
    else:
        refused(answer, 400, "DownloadArchiveException", f"Failed to download archive from: {url}", reason)
    if url.startswith("s3"):
        assert answer.detail["fix"] == "pip install fsspec s3fs"
    assert place.stored() == before
    assert place.server.ask("GET", "/models", port="management").json == {"models": []}


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{canary}/m.mar",
        "http://127.0.0.1:{web}@127.0.0.1:{canary}/m.mar",
        "http://user:secret@127.0.0.1:{web}/m.mar",
        "http://127.0.0.1:{web}\\@127.0.0.1:{canary}/m.mar",
        "http://127.0.0.1:{canary}/http://127.0.0.1:{web}/m.mar",
        "http://127.0.0.1:{canary}?http://127.0.0.1:{web}/m.mar",
        "http://127.0.0.1:{canary}#http://127.0.0.1:{web}/m.mar",
        "http://localhost:{web}/m.mar",
        "http://127.1:{web}/m.mar",
        "http://2130706433:{canary}/m.mar",
        "http://\uff11\uff12\uff17.0.0.1:{canary}/m.mar",
        "https://127.0.0.1:{web}/m.mar",
        "http://127.0.0.1/m.mar",
        "{redirecting}/off.mar",
        "file:///etc/passwd",
        "file://{files}/link.mar",
        "file://evil{files}/linear.mar",
        "s3://other/m.mar",
        "gs://bucket/m.mar",
        "ftp://127.0.0.1:{canary}/m.mar",
        "gopher://127.0.0.1:{canary}/m.mar",
    ],
)
@pytest.mark.parametrize("form", ["query", "json", "twice"])
def test_url_that_is_not_allowed_is_not_asked(place: Place, url: str, form: str) -> None:
    before = place.stored()
    link = place.files / "link.mar"
    if not link.is_symlink():
        link.symlink_to("/etc/passwd")
    with canary() as nobody:
        place.web.answers["/off.mar"] = redirect(f"http://localhost:{nobody.port}/m.mar")
        url = url.format(canary=nobody.port, web=place.web.port, files=place.files, redirecting=place.web.url)
        if form == "json":
            body = json.dumps({"url": url}).encode()
            answer = place.server.ask("POST", "/models?url=in-store.mar", body, JSON, port="management")
        elif form == "twice":
            query = f"url={quote(url, safe='')}&url=in-store.mar"
            answer = place.server.ask("POST", f"/models?{query}", port="management")
        else:
            answer = place.register(url)
    shown = url.replace("user:secret@", "***@").replace(f"127.0.0.1:{place.web.port}@", "***@")
    if "\\" not in url:
        refused(answer, 404, "ModelNotFoundException", f"Given URL {shown} does not match any allowed URL(s)")
    else:
        assert answer.status == 404
    assert "secret" not in answer.body.decode() and "secret" not in place.server.log()
    assert place.stored() == before


@pytest.mark.parametrize("url", ["file:///a/../{name}", "http://127.0.0.1:{port}/../{name}",
                                 "http://127.0.0.1:{port}/%2e%2e/{name}", "s3://bucket/../{name}"])  # fmt: skip
def test_relative_path_leaves_no_file_to_be_found_by_its_name(place: Place, url: str) -> None:
    with canary() as nobody:
        url = url.format(port=nobody.port, name="up.mar")
        refused(place.register(url), 404, "ModelNotFoundException", f"Relative path is not allowed in url: {url}")
    refused(place.register("up.mar"), 404, "ModelNotFoundException", "Model not found at: up.mar")


def test_requirements_that_cannot_be_installed_are_a_model_exception(place: Place) -> None:
    file = write_handler(place.server.store, "wants", HANDLER, requirements="--no-index\nno-such-thing==1\n")
    try:
        refused(place.register("wants.mar", **FINE), 400, "ModelException",
                "Custom pip package installation failed for model wants")  # fmt: skip
        assert place.server.ask("GET", "/models/wants", port="management").status == 404
    finally:
        file.unlink()


def test_json_registration_has_the_defaults_of_a_query(place: Place) -> None:
    body = json.dumps({"url": "in-store.mar", "model_name": "json", "synchronous": True, "initial_workers": 2}).encode()
    answer = place.server.ask("POST", "/models", body, JSON, port="management")
    assert answer.json == {"status": 'Model "json" Version: 1.0 registered with 2 initial workers'}
    described = place.server.describe("json")
    assert (described["maxBatchDelay"], described["batchSize"], described["minWorkers"]) == (100, 1, 2)
    place.server.manage("DELETE", "/models/json")


def test_registration_that_does_not_wait_says_at_once_what_is_wrong_with_the_archive(place: Place) -> None:
    refused(place.register("nope.mar", synchronous="false", **FINE), 404, "ModelNotFoundException",
            "Model not found at: nope.mar")  # fmt: skip
    answer = place.register("in-store.mar", model_name="later", synchronous="false", **FINE)
    assert (answer.status, answer.json) == (202, {"status": "Processing worker updates..."})
    refused(place.register("in-store.mar", model_name="later", synchronous="false", **FINE), 409,
            "ConflictStatusException", "Model version 1.0 is already registered for model later")  # fmt: skip
    place.server.wait_for(lambda: place.server.predict("later", [1, 2, 3, 4]).status == 200, "the model to be loaded")
    place.server.manage("DELETE", "/models/later")


# --- many at once ----------------------------------------------------------------------------------------------------


def test_of_fifty_registrations_of_one_url_one_wins_and_the_file_is_whole(place: Place) -> None:
    url = f"{place.web.url}/linear.mar"
    answers = at_once([lambda: place.register(url, model_name="race", **FINE)] * 20)
    statuses = sorted(answer.status for answer in answers)
    assert statuses == [200] + [500] * 19
    assert (place.server.store / "linear.mar").read_bytes() == place.archive
    assert place.server.predict("race", [1, 2, 3, 4]).status == 200
    place.server.manage("DELETE", "/models/race")
    assert not (place.server.store / "linear.mar").exists()


def test_of_fifty_registrations_of_one_version_one_wins(place: Place) -> None:
    answers = at_once([lambda: place.register("in-store.mar", model_name="fifty", **FINE)] * 50)
    assert sorted(answer.status for answer in answers) == [200] + [409] * 49
    assert place.server.predict("fifty", [1, 2, 3, 4]).status == 200
    place.server.manage("DELETE", "/models/fifty")


def test_of_fifty_versions_registered_at_once_all_are_there(place: Place) -> None:
    files = [f"v{number}" for number in range(50)]
    for number, file in enumerate(files):
        write_handler(place.server.store, "many", HANDLER, version=f"{number}.0", file=file)
    answers = at_once([lambda file=file: place.register(f"{file}.mar") for file in files])  # type: ignore[misc]
    assert [answer.status for answer in answers] == [200] * 50
    described = place.server.manage("GET", "/models/many/all")
    assert sorted(each["modelVersion"] for each in described) == sorted(f"{number}.0" for number in range(50))
    default = place.server.describe("many")["modelVersion"]
    others = [f"{number}.0" for number in range(50) if f"{number}.0" != default]
    at_once([lambda version=version: place.server.manage("DELETE", f"/models/many/{version}")  # type: ignore[misc]
             for version in others])  # fmt: skip
    place.server.manage("DELETE", "/models/many")
    for file in files:
        (place.server.store / f"{file}.mar").unlink()


@pytest.mark.parametrize("other", ["DELETE", "PUT"])
def test_registration_that_races_another_call_leaves_one_of_the_two_states(place: Place, other: str) -> None:
    query = "" if other == "DELETE" else "?min_worker=2&synchronous=true"
    for _ in range(5):
        registered, raced = at_once([
            lambda: place.register("in-store.mar", model_name="raced", **FINE),
            lambda: place.server.ask(other, f"/models/raced{query}", port="management"),
        ])  # fmt: skip
        there = place.server.ask("GET", "/models/raced", port="management").status == 200
        if other == "DELETE":
            # Either it came first and found nothing, or the model is gone, whatever its registration had answered.
            assert (registered.status, raced.status, there) in {
                (200, 404, True), (200, 200, False), (409, 200, False)
            }, (registered.body, raced.body)  # fmt: skip
        else:
            assert (registered.status, raced.status) in {(200, 404), (200, 200)} and there
            [described] = place.server.manage("GET", "/models/raced")
            assert len(described["workers"]) == described["minWorkers"] == (1 if raced.status == 404 else 2)
        if there:
            assert place.server.predict("raced", [1, 2, 3, 4]).status == 200
            place.server.manage("DELETE", "/models/raced")


def test_archive_replaced_while_it_is_loaded_gives_one_content(place: Place) -> None:
    """Old or new, never a mixture; and never a server that cannot tell."""
    target = place.server.store / "swapped.mar"
    contents = [serving_models.write_linear(place.files, "swapped", version=f"{version}.0", seed=version).read_bytes()
                for version in (1, 2)]  # fmt: skip
    target.write_bytes(contents[0])
    for turn in range(10):
        new = target.with_suffix(".new")
        new.write_bytes(contents[turn % 2])
        registered, _ = at_once([
            lambda: place.register("swapped.mar", **FINE), lambda new=new: os.replace(new, target)  # type: ignore[misc]
        ])  # fmt: skip
        assert registered.status == 200, registered.body
        version = place.server.describe("swapped")["modelVersion"]
        network = serving_models.Linear(int(float(version)))
        expected = network(torch.ones(1, 4))[0].tolist()
        assert place.server.predict("swapped", [1, 1, 1, 1]).json == pytest.approx(expected, rel=1e-5)
        place.server.manage("DELETE", "/models/swapped")
    target.unlink()


# --- other configurations --------------------------------------------------------------------------------------------


def test_by_default_nothing_is_fetched(site: Server) -> None:
    with canary() as nobody:
        for url in (f"http://127.0.0.1:{nobody.port}/m.mar", f"file://{site.store}/linear.mar", "s3://bucket/m.mar"):
            refused(register(site, url), 404, "ModelNotFoundException",
                    f"Given URL {url} does not match any allowed URL(s)", "allowed_urls is empty")  # fmt: skip


def test_private_address_is_refused_and_a_url_at_the_start_is_fetched_once(server: Server, tmp_path: Path) -> None:
    archive = serving_models.write_linear(tmp_path / "web")
    config = tmp_path / "config.properties"
    with HostileWeb({"/linear.mar": file_answer(archive.read_bytes())}) as web:
        url = f"{web.url}/linear.mar?sig=secret"
        config.write_text("allowed_urls=http://.*\n")
        started = server.start("--ts-config", str(config), "--models", f"it={url}")
        assert "127.0.0.1 has a loopback address" in started.stdout and "FAILED" in started.stdout
        shown = f"{web.url}/linear.mar?sig=***"
        refused(register(server, url), 404, "ModelNotFoundException",
                f"Given URL {shown} does not match any allowed URL(s)", "has a loopback address")  # fmt: skip
        assert web.connection_count == 0 and os.listdir(server.store) == []
        assert server.run("stop").returncode == 0
        config.write_text("allowed_urls=http://.*\nallow_private_addresses=true\n")
        for model_url in (f"{web.url}/linear.mar", "linear.mar"):  # the second time it is in the store
            server.start("--ts-config", str(config), "--models", f"it={url}")
            assert server.predict("it", [1, 2, 3, 4]).status == 200
            assert server.describe("it")["modelUrl"] == model_url
            assert server.run("stop").returncode == 0
        assert len(web.requests) == 1
        assert "secret" not in server.log()


def test_stopping_does_not_wait_for_a_download(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "config.properties"
    config.write_text("allowed_urls=http://.*\nallow_private_addresses=true\n")
    came = threading.Event()

    def hang(peer: Peer) -> None:
        came.set()
        peer.wait_until_gone()

    def stop() -> subprocess.CompletedProcess[str]:
        assert came.wait(60)
        return server.run("stop")

    server.start("--ts-config", str(config))
    with HostileWeb({"/hang.mar": hang}) as web, ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(stop)
        answer = register(server, f"{web.url}/hang.mar")
        refused(answer, 400, "DownloadArchiveException", f"Failed to download archive from: {web.url}/hang.mar",
                "the server is stopping")  # fmt: skip
        assert stopping.result().returncode == 0
    assert os.listdir(server.store) == [] and "before everything was answered" not in server.log()


def test_pattern_that_cannot_be_read_ends_the_start(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "config.properties"
    config.write_text("allowed_urls=models\n")
    started: subprocess.CompletedProcess[str] = server.run("start", "--ts-config", str(config))
    assert started.returncode != 0
    assert "config.properties:1: allowed_urls cannot be 'models'" in started.stderr
