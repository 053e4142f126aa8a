"""What strangers meet: keys, TLS, other sites' pages, and ports that answer for their own API only."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pyserve.server import pid_file
from tests.support import certificates
from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.serving import LIMIT_S, Answer, Server, random_bytes
from tests.support.serving_models import write_linear

pytest_plugins = ["tests.support.serving_fixtures"]

UI = "https://ui.example"
SECRET_NAME, SECRET = "WORKSHOP_PASSWORD", "open-sesame-7f3a"
ENVIRONMENT_READER = """
import os

def handle(data, context):
    return [dict(os.environ)] * len(data or [])
"""
NUMBERS = b"[1.0, 2.0, 3.0, 4.0]"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Listens everywhere, by TLS, with both keys, CORS for two origins and a hidden variable."""
    server = Server(tmp_path_factory.mktemp("guarded"))
    write_linear(server.store)
    write_handler(server.store, "variables", ENVIRONMENT_READER)
    certificates.self_signed(server.folder)
    (server.folder / "config.properties").write_text(
        "private_key_file=server.key\ncertificate_file=server.pem\ndisable_token_authorization=false\n"
        f"cors_allowed_origin={UI}, http://localhost:3000\ncors_allowed_methods=GET, POST, PUT\n"
        f"cors_allowed_headers=authorization, content-type\nblacklist_env_vars=.*PASSWORD\nmax_request_size=100000\n"
    )
    server.environment[SECRET_NAME] = SECRET
    addresses = [part for name in ("inference", "management", "metrics")
                 for part in (f"--{name}-address", "https://0.0.0.0:0")]  # fmt: skip
    server.started = server.start("--models", "linear.mar", "variables.mar", *addresses)  # type: ignore[attr-defined]
    try:
        yield server
    finally:
        server.kill()


def management(server: Server, method: str, path: str, headers: dict[str, str] | None = None) -> Answer:
    return server.ask(method, path, None, headers, port="management")


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.parametrize(
    ("port", "method", "path"),
    [
        ("inference", "GET", "/ping"), ("inference", "GET", "/ready"), ("inference", "GET", "/live"),
        ("inference", "OPTIONS", "/"), ("inference", "GET", "/api-description"), ("management", "OPTIONS", "/"),
        ("management", "GET", "/api-description"), ("metrics", "GET", "/metrics"), ("metrics", "OPTIONS", "/"),
    ],
)  # fmt: skip
def test_probes_descriptions_and_metrics_need_no_key(guarded: Server, port: str, method: str, path: str) -> None:
    assert guarded.ask(method, path, port=port).status == 200


@pytest.mark.server
@pytest.mark.parametrize(
    ("port", "method", "path", "scope"),
    [
        ("inference", "POST", "/predictions/linear", "inference"),
        ("inference", "POST", "/predictions/linear/1.0", "inference"),
        ("inference", "OPTIONS", "/predictions/linear", "inference"),
        ("inference", "POST", "/v1/models/linear:predict", "inference"),
        ("inference", "POST", "/linear/predict", "inference"),
        ("management", "GET", "/models", "management"),
        ("management", "GET", "/models/linear", "management"),
        ("management", "PUT", "/models/linear?min_worker=1", "management"),
        ("management", "OPTIONS", "/models/linear", "management"),
        ("management", "GET", "/v1/models/linear", "management"),
    ],
)
def test_every_other_call_needs_the_key_of_its_api(
    guarded: Server, port: str, method: str, path: str, scope: str
) -> None:
    def ask(headers: dict[str, str]) -> Answer:
        body = None if method in ("GET", "OPTIONS") or port == "management" else b'{"instances": [[1, 2, 3, 4]]}'
        return guarded.ask(method, path, body, headers | ({} if body is None else JSON), port=port)

    other = "management" if scope == "inference" else "inference"
    for headers in ({}, {"Authorization": "Bearer nonsense"}, guarded.key(other), guarded.key("API")):
        refused = ask(headers)
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json["type"] == "InvalidKeyException"
        assert refused.json["message"].startswith("Token Authorization failed. Token either incorrect, expired")
    assert ask(guarded.key(scope)).status not in (401, 403, 404, 405, 500)


@pytest.mark.server
def test_key_is_replaced_and_kept_by_the_next_server_process(guarded: Server) -> None:
    old, api = guarded.key(), guarded.key("API")
    for headers in ({}, old):
        refused = management(guarded, "GET", "/token?type=management", headers)
        assert (refused.status, refused.json["message"].partition(".")[0]) == (401, "Token Authentication failed")
    assert management(guarded, "GET", "/token?type=nothing", api).status == 400
    assert guarded.key() == old
    answer = management(guarded, "PUT", "/token?type=management", api)
    assert (answer.status, answer.body) == (200, b"\n")
    new = guarded.key()
    assert new != old
    assert management(guarded, "GET", "/models", old).status == 401
    assert management(guarded, "GET", "/models", new).status == 200
    guarded.kill_server_process()
    assert management(guarded, "GET", "/models", new).status == 200
    assert guarded.predict("linear", [1, 2, 3, 4]).status == 401
    assert guarded.ask("POST", "/predictions/linear", NUMBERS, JSON | guarded.key("inference")).status == 200


@pytest.mark.server
def test_keys_are_in_no_log_and_no_answer(guarded: Server) -> None:
    told = guarded.log() + guarded.started.stdout + guarded.started.stderr  # type: ignore[attr-defined]
    told += guarded.run("status").stdout + guarded.run("config").stdout + guarded.pid_path.read_text()
    told += "".join(path.read_text() for path in (guarded.folder / "logs").rglob("*.cfg"))
    assert str(guarded.folder / "key_file.json") in told
    keys = json.loads((guarded.folder / "key_file.json").read_text())
    assert not [name for name, member in keys.items() if member["key"] in told]


@pytest.mark.server
def test_status_finds_its_key(guarded: Server) -> None:
    status = guarded.run("status")
    assert status.returncode == 0
    assert "linear" in status.stdout and "variables" in status.stdout


@pytest.mark.server
def test_registering_is_off_where_strangers_can_ask(guarded: Server) -> None:
    for method, path in (("POST", "/models?url=linear.mar&model_name=other"), ("DELETE", "/models/linear")):
        answer = management(guarded, method, path, guarded.key())
        assert (answer.status, answer.json["type"]) == (405, "MethodNotAllowedException")
        assert answer.json["message"] == "Requested method is not allowed, please refer to API document."
        assert "--enable-model-api" in answer.detail["reason"]
    assert len(management(guarded, "GET", "/models", guarded.key()).json["models"]) == 2


@pytest.mark.server
def test_file_of_keys_goes_with_the_server(server: Server) -> None:
    started = server.start("--management-address", "http://0.0.0.0:0", "--model-store", str(server.store))
    assert "management calls need" in started.stderr
    assert (server.folder / "key_file.json").stat().st_mode & 0o777 == 0o600
    assert management(server, "GET", "/models").status == 401
    assert server.predict("nothing", [1]).status == 404  # predictions need no key
    assert server.run("stop").returncode == 0
    assert not (server.folder / "key_file.json").exists()


# --- TLS ----------------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_a_client_that_trusts_the_certificate_is_served(guarded: Server) -> None:
    context = ssl.create_default_context(cafile=str(guarded.folder / "server.pem"))
    for name in ("inference", "management", "metrics"):
        connection = http.client.HTTPSConnection(*guarded.address(name), context=context, timeout=LIMIT_S)
        connection.request("OPTIONS", "/")
        assert connection.getresponse().status == 200
        assert connection.sock.version() == "TLSv1.3"
        connection.close()


@pytest.mark.server
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_line_that_start_prints_works_once_the_key_is_put_in(guarded: Server) -> None:
    line = guarded.started.stdout.splitlines()[-1]  # type: ignore[attr-defined]
    assert f"--cacert {guarded.folder}/server.pem" in line
    key = guarded.key("inference")["Authorization"].removeprefix("Bearer ")
    pasted = subprocess.run(line.replace("KEY", key), shell=True, capture_output=True, timeout=LIMIT_S, check=True)
    assert json.loads(pasted.stdout)


@pytest.mark.server
@pytest.mark.parametrize(
    "sent", [b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x00\x05hello", random_bytes(300)], ids=[1, 2, 3]
)
def test_what_is_no_handshake_is_closed_without_a_word_in_the_log(guarded: Server, sent: bytes) -> None:
    before = guarded.log()
    with guarded.connect() as connection:
        connection.sendall(sent)
        answer = b""
        while chunk := _received(connection):
            answer += chunk
    assert b"HTTP" not in answer
    assert guarded.ask("GET", "/live").status == 200
    said = guarded.log().removeprefix(before).splitlines()
    assert not [line for line in said if "the event loop stood still" not in line]  # as on a busy machine


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except ConnectionResetError:
        return b""


@pytest.mark.server
def test_old_protocols_are_refused(guarded: Server) -> None:
    context = ssl._create_unverified_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with guarded.connect() as connection, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(connection)


@pytest.mark.server
@pytest.mark.parametrize(
    ("ciphers", "is_served"),
    [
        ("ECDHE+AESGCM", True), ("ECDHE+CHACHA20", True),
        ("ECDHE+AES:!AESGCM:!AESCCM", False), ("AES128-GCM-SHA256", False),
    ],
)  # fmt: skip
def test_suites_of_tls_1_2_have_forward_secrecy_and_authenticated_encryption(
    guarded: Server, ciphers: str, is_served: bool
) -> None:
    context = ssl._create_unverified_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers)
    with guarded.connect() as connection:
        if is_served:
            with context.wrap_socket(connection) as wrapped:
                assert wrapped.version() == "TLSv1.2"
        else:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(connection)


@pytest.mark.server
def test_idle_clients_do_not_keep_a_server_from_stopping(server: Server) -> None:
    started = server.start("--inference-address", "https://127.0.0.1:0")
    assert "curl needs -k" in started.stderr
    with server.client() as one, server.client() as other, server.connect():  # the third never begins its handshake
        assert one.ask("GET", "/ping").status == other.ask("GET", "/ping").status == 200
        assert server.run("stop").returncode == 0
    log = server.log()
    assert "drained" in log and "is over" not in log


@pytest.mark.server
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("private_key_file=other.key\ncertificate_file=server.pem\n", "do not belong together"),
        ("private_key_file=absent.key\ncertificate_file=server.pem\n", "absent.key cannot be read"),
        ("keystore=server.pem\n", "no PKCS12 file"),
    ],
)
def test_a_certificate_that_cannot_be_used_ends_the_start(server: Server, settings: str, said: str) -> None:
    certificates.self_signed(server.folder)
    certificates.self_signed(server.folder, "other")
    (server.folder / "config.properties").write_text(settings)
    started = server.run("start", "--inference-address", "https://127.0.0.1:0")
    assert started.returncode == 1
    assert said in started.stderr
    assert pid_file.read(server.pid_path) is None


# --- other sites' pages -------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.parametrize(("origin", "shown"), [(UI, UI), ("http://localhost:3000", "http://localhost:3000"),
                                               ("https://evil.example", ""), ("null", ""), ("", "")])  # fmt: skip
def test_pages_of_the_listed_origins_may_read_every_answer(guarded: Server, origin: str, shown: str) -> None:
    headers = {"Origin": origin} if origin else {}
    asked = [
        guarded.ask("GET", "/ping", None, headers),
        guarded.ask("GET", "/nothing", None, headers),
        guarded.ask("POST", "/predictions/linear", NUMBERS, headers),  # 401
        guarded.ask("POST", "/predictions/linear", NUMBERS, JSON | headers | guarded.key("inference")),
        guarded.ask("POST", "/predictions/linear", bytes(100_001), headers),  # 413, by the protocol itself
        guarded.ask("POST", "/ping", b"x", headers | {"Expect": "nonsense"}),  # 417, too
        management(guarded, "GET", "/models", headers | guarded.key()),
        guarded.ask("GET", "/metrics", None, headers, port="metrics"),
    ]
    assert [answer.status for answer in asked] == [200, 404, 401, 200, 413, 417, 200, 200]
    for answer in asked:
        assert answer.headers.get("access-control-allow-origin", "") == shown
        assert "Origin" in answer.headers["vary"].split(", ")  # beside Accept-Encoding, for long answers
        assert answer.headers["access-control-allow-headers"] == "authorization, content-type"


@pytest.mark.server
def test_a_browser_may_ask_first_without_a_key(guarded: Server) -> None:
    asking = {"Origin": UI, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    paths = [("inference", "/predictions/linear"), ("management", "/models/linear"), ("management", "/token")]
    for port, path in paths:
        answer = guarded.ask("OPTIONS", path, None, asking, port=port)
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers["access-control-allow-origin"] == UI
        assert answer.headers["access-control-allow-methods"] == "GET, POST, PUT"


@pytest.mark.server
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1", "HTTPS://EVIL.EXAMPLE"])
def test_a_page_cannot_change_models_through_a_browser_here(site: Server, origin: str) -> None:
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    before = site.manage("GET", "/models")
    for method, path in (("POST", "/models?url=linear.mar&model_name=other"), ("PUT", "/models/linear?min_worker=2"),
                         ("DELETE", "/models/linear"), ("PUT", "/models/linear/1.0/set-default")):  # fmt: skip
        answer = management(site, method, path, headers)
        assert (answer.status, answer.json["type"]) == (403, "BadRequestException")
        assert "access-control-allow-origin" not in answer.headers
    assert site.manage("GET", "/models") == before
    assert len(site.describe("linear")["workers"]) == 1


@pytest.mark.server
def test_a_name_that_was_bound_to_this_machine_later_reads_nothing(site: Server) -> None:
    port = site.address("management")[1]
    for host in ("evil.example", f"evil.example:{port}", f"0.0.0.0:{port}", "127.0.0.1.evil.example"):
        answer = management(site, "GET", "/models", {"Host": host})
        assert answer.status == 403 and b"linear" not in answer.body
    for host in ("localhost:1", "LOCALHOST", "[::1]:80", "127.0.0.1"):
        assert management(site, "GET", "/models", {"Host": host}).status == 200
    assert site.ask("GET", "/metrics", headers={"Host": "evil.example"}, port="metrics").status == 403
    assert site.ask("GET", "/metrics", headers={"Host": "localhost"}, port="metrics").status == 200
    # Predictions stand behind proxies, which pass on the names that clients use.
    headers = {"Host": "models.example", "Origin": "https://models.example"}
    assert site.ask("POST", "/predictions/linear", NUMBERS, JSON | headers).status == 200


# --- ports --------------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_only_loopback_is_listened_on_unless_said(site: Server) -> None:
    supervisor = psutil.Process(site.running.pid)
    listening = [
        each.laddr for process in (supervisor, *supervisor.children(recursive=True))
        for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN
    ]  # fmt: skip
    ports = {site.address(name)[1] for name in ("inference", "management", "metrics")}
    assert ports <= {each.port for each in listening}
    assert {each.ip for each in listening} <= {"127.0.0.1", "::1"}
    inherited = [each.status for process in supervisor.children(recursive=True)[1:]
                 for each in process.net_connections("inet")]  # fmt: skip
    assert psutil.CONN_LISTEN not in inherited, "worker processes hold no listening socket"


@pytest.mark.server
@pytest.mark.parametrize(
    ("port", "method", "path"),
    [
        ("inference", "GET", "/models"), ("inference", "GET", "/models/linear"), ("inference", "POST", "/models"),
        ("inference", "DELETE", "/models/linear"), ("inference", "PUT", "/models/linear/1.0/set-default"),
        ("inference", "GET", "/token?type=management"), ("inference", "GET", "/metrics"),
        ("management", "POST", "/predictions/linear"), ("management", "POST", "/invocations"),
        ("management", "GET", "/ping"), ("management", "GET", "/metrics"), ("management", "GET", "/token"),
        ("metrics", "GET", "/models"), ("metrics", "POST", "/predictions/linear"), ("metrics", "GET", "/ping"),
    ],
)  # fmt: skip
def test_each_port_answers_for_its_own_api_only(site: Server, port: str, method: str, path: str) -> None:
    answer = site.ask(method, path, port=port)
    assert (answer.status, answer.json["type"]) == (404, "ResourceNotFoundException")


@pytest.mark.server
def test_one_port_asks_each_call_for_one_key(server: Server) -> None:
    write_linear(server.store)
    address = f"http://127.0.0.1:{free_port()}"
    (server.folder / "config.properties").write_text("disable_token_authorization=false\n")
    server.start("--models", "linear.mar", "--inference-address", address, "--management-address", address,
                 "--metrics-address", address)  # fmt: skip
    for path in ("/models", "/models/linear", "/models/linear/1.0"):
        assert server.ask("GET", path).status == 401
        assert server.ask("GET", path, None, server.key("inference")).status == 401
        assert server.ask("GET", path, None, server.key()).status == 200
    assert server.ask("POST", "/predictions/linear", NUMBERS, JSON | server.key()).status == 401
    assert server.ask("POST", "/predictions/linear", NUMBERS, JSON | server.key("inference")).status == 200
    for path in ("/v1/models/linear", "/v2/models/linear", "/v2/models/linear/ready"):  # both APIs have them
        assert server.ask("GET", path, None, server.key()).status == 200
        assert server.ask("GET", path, None, server.key("inference")).status == 200
        assert (
            server.ask("GET", path).status == server.ask("GET", path, None, {"Authorization": "Bearer a"}).status == 401
        )
    assert server.ask("GET", "/ping").status == server.ask("GET", "/metrics").status == 200


# --- secrets ------------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_hidden_variables_reach_no_worker(guarded: Server) -> None:
    answer = guarded.ask("POST", "/predictions/variables", b"x", guarded.key("inference"))
    seen = answer.json
    assert "PATH" in seen and SECRET_NAME not in seen
    described = management(guarded, "GET", "/models/variables", guarded.key()).body.decode()
    assert SECRET not in answer.body.decode() + described + guarded.log()
    assert Path(f"/proc/{guarded.process.pid}/environ").read_bytes().count(SECRET.encode()) == 1  # the server has it
