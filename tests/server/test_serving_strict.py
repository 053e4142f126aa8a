"""A server with `compat=strict`, and with TorchServe's other habits: what the last column of DEVIATIONS.md promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.handler_archives import write_handler
from tests.support.serving import RAW, Server, at_once
from tests.support.serving_models import write_pictures

HANDLER = """
import os
import time
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def initialize(self, context):
        self.initialized = True

    def handle(self, data, context):
        rows = [row.get("body") for row in data]
        if "bad" in rows:
            raise ValueError("one is bad")
        if "hang" in rows:
            time.sleep(60)
        if "nan" in rows:
            return [{"p": float("nan")} for _ in rows]
        names = ("TS_IPEX_ENABLE", "TS_IPEX_GPU_ENABLE", "SECRET_THING", "PLAIN_THING")
        return [{name: os.environ.get(name) for name in names} for _ in rows]
"""
SHOW = """
def handle(data, context):
    return data and [
        {"row": [[name, str(value)] for name, value in row.items()],
         "types": {name: context.get_request_header(index, name) for name in row}}
        for index, row in enumerate(data)
    ]
"""
PROPERTIES = """
enable_envvars_config=true
ipex_enable=true
blacklist_env_vars=SECRET.*
default_service_handler=handler.py
"""


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("strict"))
    write_handler(server.store, "told", HANDLER)
    pair = {"batchSize": 2, "minBatch": 2, "maxBatchDelay": 600_000, "minWorkers": 1, "maxWorkers": 1}
    write_handler(server.store, "pair", HANDLER, config=pair)
    one = {"minWorkers": 1, "maxWorkers": 1}
    write_handler(server.store, "slow", HANDLER, config={**one, "responseTimeout": 1, "clientTimeoutInMills": 60_000})
    write_handler(server.store, "brief", HANDLER, config={**one, "sequenceBatching": True, "sequenceMaxIdleMSec": 1})
    write_handler(server.store, "other", HANDLER)
    write_handler(server.store, "show", SHOW, config=one)
    write_pictures(server.store)
    (server.folder / "config.properties").write_text(PROPERTIES)
    server.environment |= {
        "PYSERVE_COMPAT": "strict", "PYSERVE_CPU_BUDGET": "2", "TS_IPEX_GPU_ENABLE": "true",
        "SECRET_THING": "s", "PLAIN_THING": "p", "PYSERVE_DISABLE_TOKEN_AUTHORIZATION": "true",
    }  # fmt: skip
    with server:
        server.start("--models", "told.mar", "pair.mar", "slow.mar", "brief.mar", "pictures.mar", "show.mar")
        yield server


@pytest.mark.server
def test_a_worker_per_cpu_is_started(strict: Server) -> None:
    assert len(strict.describe("told")["workers"]) == 2
    assert len(strict.describe("pair")["workers"]) == 1


@pytest.mark.server
def test_workers_environment_is_what_the_configuration_says(strict: Server) -> None:
    assert strict.predict("told", 1).json == {
        "TS_IPEX_ENABLE": "true",
        "TS_IPEX_GPU_ENABLE": "true",
        "SECRET_THING": None,
        "PLAIN_THING": "p",
    }


@pytest.mark.server
def test_of_what_is_given_twice_the_last_counts(strict: Server) -> None:
    def ask(*texts: str) -> int:
        head = '--B\r\nContent-Disposition: form-data; name="body"; filename="f"\r\nContent-Type: text/plain\r\n\r\n'
        form = "".join(f"{head}{text}\r\n" for text in texts) + "--B--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=B"}
        return strict.ask("POST", "/predictions/told", form.encode(), headers).status

    assert (ask("bad", "good"), ask("good", "bad")) == (200, 503)
    answer = strict.ask("POST", "/predictions/told", b'{"a": 1, "a": 2}', {"Content-Type": "application/json"})
    assert answer.status == 200


@pytest.mark.server
@pytest.mark.parametrize(
    ("target", "head", "row"),
    [
        ("/predictions/show?x=1", 'name="x"\r\nContent-Type: application/json', [["x", "bytearray(b'[1]')"]]),
        ("/show/predict?z=1&x=3", 'name="x"; filename="f"\r\nContent-Type: application/json',
         [["z", "bytearray(b'1')"], ["x", "[1]"]]),
    ],
)  # fmt: skip
def test_a_form_reaches_the_handler_as_from_torchserve(
    strict: Server, target: str, head: str, row: list[list[str]]
) -> None:
    form = f"--B\r\nContent-Disposition: form-data; {head}\r\n\r\n[1]\r\n--B--\r\n".encode()
    answer = strict.ask("POST", target, form, {"Content-Type": "multipart/form-data; boundary=B"}).json
    assert answer["row"] == row
    assert answer["types"]["x"] == {"content-type": "application/json" if "filename" in head else ""}


@pytest.mark.server
def test_request_id_is_always_a_new_one(strict: Server) -> None:
    ids = {
        strict.ask("GET", "/ping", headers={"x-request-id": "mine"}).headers["x-request-id"],
        strict.ask("GET", "/ping", headers={"x-request-id": "mine"}).headers["x-request-id"],
    }
    assert len(ids) == 2 and "mine" not in ids


@pytest.mark.server
def test_errors_have_torchserves_three_members(strict: Server) -> None:
    for answer in (strict.predict("none", 1), strict.ask("GET", "/nowhere"), strict.predict("told", "bad")):
        assert answer.json.keys() == {"code", "type", "message"}


@pytest.mark.server
def test_one_bad_item_fails_its_batch(strict: Server) -> None:
    answers = at_once([lambda: strict.predict("pair", "bad"), lambda: strict.predict("pair", "good")])
    assert [answer.status for answer in answers] == [503, 503]


@pytest.mark.server
def test_nan_stays_nan(strict: Server) -> None:
    assert b"NaN" in strict.predict("told", "nan").body


@pytest.mark.server
def test_a_picture_that_is_none_is_503(strict: Server) -> None:
    answer = strict.ask("POST", "/predictions/pictures", b"no picture", RAW)
    assert (answer.status, answer.json["message"]) == (503, "Prediction failed")


@pytest.mark.server
def test_a_call_over_its_time_is_500(strict: Server) -> None:
    answer = strict.predict("slow", "hang")
    assert (answer.status, answer.json) == (
        500, {"code": 500, "type": "InternalServerException", "message": "Worker died."},
    )  # fmt: skip
    assert strict.predict("slow", 1).status == 200


@pytest.mark.server
def test_a_sequence_that_ended_begins_again_silently(strict: Server) -> None:
    id = {"ts_request_sequence_id": "s-1"}
    for _ in range(2):
        assert strict.ask("POST", "/predictions/brief", b"1", id).status == 200
        strict.wait_for(lambda: "sequence s-1 ended" in strict.log(), "the end")


@pytest.mark.server
def test_models_cannot_be_registered(strict: Server) -> None:
    assert strict.ask("POST", "/models?url=other.mar", port="management").status == 405


@pytest.mark.server
def test_unknown_parameters_are_passed_over(strict: Server) -> None:
    assert strict.ask("PUT", "/models/told?min_worker=2&bogus=1", port="management").status in (200, 202)


@pytest.mark.server
def test_settings_are_in_the_log(strict: Server) -> None:
    wanted = ("Compat: strict", "Default workers per model: 2", "Model API enabled: false", "Blacklist Regex: SECRET.*")
    for line in wanted:
        strict.wait_for_log(f"    {line}\n")


@pytest.mark.server
def test_keys_are_asked_for_and_the_last_snapshot_is_restored_unasked(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_handler(server.store, "told", HANDLER)
    server.environment |= {"PYSERVE_COMPAT": "strict", "PYSERVE_CPU_BUDGET": "1"}
    with server:
        server.start("--models", "told.mar")
        for port, path in (("inference", "/predictions/told"), ("management", "/models")):
            assert server.ask("GET", path, headers=server.key(port), port=port).status == 200
            refused = server.ask("GET", path, port=port)
            assert refused.status == 400 and refused.json == {
                "code": 400, "type": "InvalidKeyException",
                "message": "Token Authorization failed. Token either incorrect, expired, or not provided correctly",
            }  # fmt: skip
            assert "www-authenticate" not in refused.headers
        scaled = server.ask(
            "PUT", "/models/told?min_worker=2&synchronous=true", headers=server.key(), port="management"
        )  # fmt: skip
        assert scaled.status == 200
        server.run("stop")

        server.start()
        [told] = server.ask("GET", "/models/told", headers=server.key(), port="management").json
        assert (told["minWorkers"], len(told["workers"])) == (2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job_queue_size=many", "config.properties:1: job_queue_size cannot be 'many'"),
        ("metrics_mode=loud", "config.properties:1: metrics_mode cannot be 'loud'"),
        ("model_store=$$NOT_SET_ANYWHERE$$", "the environment variable NOT_SET_ANYWHERE, which is not set"),
        ("a=\\u12", "config.properties:1: \\u needs four hexadecimal digits"),
    ],
)
def test_a_wrong_configuration_ends_the_start_before_a_port_is_opened(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.properties").write_text(text)
    server = Server(tmp_path)
    started = server.run("start")
    assert started.returncode == 1
    assert message in started.stderr
    assert not server.pid_path.exists() and server.log() == ""
