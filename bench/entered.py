"""How many files and functions of pyserve one request enters, in the server and in its workers.

    python bench/entered.py                # this tree
    python bench/entered.py --tree ../other --list

Each request is made several times to a warm server, over a connection that is open already; what counts is entered by
every one of them and not by a server that nobody asks. Functions of Python only: the engine's are none.
"""

from __future__ import annotations

import argparse
import http.client
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tritonclient.grpc as v2_grpc
import tritonclient.http as v2_http
from PIL import Image

from bench.servers import ROOT, Server, free_ports

REPEATS = 5
SETTLE_S = 0.3
HANDLER = "def handle(data, context):\n    return data and [len(each['body']) for each in data]\n"
ITEM = np.arange(4, dtype=np.float32).reshape(1, 4)


def write_archives(store: Path) -> None:
    """``linear`` (tensor handler), ``pictures`` (image_classifier) and ``own`` (a handler of its own)."""
    code = (
        "import sys; from pathlib import Path; from tests.support import serving_models as m\n"
        "store = Path(sys.argv[1]); m.write_linear(store); m.write_pictures(store)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(store)], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    (store / "handler.py").write_text(HANDLER)
    pack = ["archive", "--model-name", "own", "--version", "1.0", "--handler", str(store / "handler.py")]
    subprocess.run([sys.executable, "-m", "pyserve", *pack, "--export-path", str(store)], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def picture() -> bytes:
    image = io.BytesIO()
    Image.new("RGB", (320, 240), (200, 100, 50)).save(image, "JPEG")
    return image.getvalue()


def requests(server: Server, grpc_port: int) -> dict[str, Callable[[], object]]:
    """Name -> makes the request, and raises if it is not answered well."""
    kserve = v2_http.InferenceServerClient(f"127.0.0.1:{server.inference_port}")
    channel = v2_grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}")
    binary = v2_http.InferInput("input0", [1, 4], "FP32")
    binary.set_data_from_numpy(ITEM)
    message = v2_grpc.InferInput("input0", [1, 4], "FP32")
    message.set_data_from_numpy(ITEM)

    connection = http.client.HTTPConnection("127.0.0.1", server.inference_port, timeout=60)

    def predict(model: str, body: bytes, kind: str) -> None:
        connection.request("POST", f"/predictions/{model}", body, {"Content-Type": kind})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"{model}: {response.status} {answer.decode(errors='replace')}")

    raw, jpeg = ITEM.tobytes(), picture()
    return {
        "/predictions, raw": lambda: predict("linear", raw, "application/octet-stream"),
        "/predictions, JPEG": lambda: predict("pictures", jpeg, "image/jpeg"),
        "/predictions, own handler": lambda: predict("own", b"hello", "application/octet-stream"),
        "v2 REST, binary": lambda: kserve.infer("linear", [binary]),
        "v2 gRPC, ModelInfer": lambda: channel.infer("linear", [message]),
    }


def entered(request: Callable[[], object], folder: Path, tree: Path) -> set[str]:
    """``file:function`` of pyserve that every one of `REPEATS` requests enters."""
    ours = (f"{tree}/pyserve/", f"{tree}/handlers/")
    common: set[str] | None = None
    for _ in range(REPEATS):
        for each in folder.iterdir():
            each.unlink()
        (folder / "on").touch()
        time.sleep(SETTLE_S)
        request()
        time.sleep(SETTLE_S)
        (folder / "on").unlink()
        time.sleep(SETTLE_S)
        lines = {line for file in folder.iterdir() for line in file.read_text().splitlines()}
        functions = {line.removeprefix(f"{tree}/") for line in lines if line.startswith(ours)}
        common = functions if common is None else common & functions
    return common or set()


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/entered.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to count in; default: this one")
    parser.add_argument("--list", action="store_true", help="print the functions too")
    arguments = parser.parse_args()
    tree = arguments.tree.resolve()
    with tempfile.TemporaryDirectory(prefix="pyserve-entered-") as temporary:
        folder, notes = Path(temporary), Path(temporary, "notes")
        notes.mkdir()
        write_archives(folder)
        inference, management, metrics, grpc_inference, grpc_management = free_ports(5)
        (folder / "config.properties").write_text(
            f"inference_address=http://127.0.0.1:{inference}\nmanagement_address=http://127.0.0.1:{management}\n"
            f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc_inference}\n"
            f"grpc_management_port={grpc_management}\nenable_grpc=true\ndisable_token_authorization=true\n"
        )
        command = [
            sys.executable, "-m", "pyserve", "start", "--foreground", "--models", "all",
            "--pid-file", str(folder / "pid"), "--ts-config", str(folder / "config.properties"),
            "--model-store", str(folder),
        ]  # fmt: skip
        environment = {
            **os.environ, "PYTHONPATH": f"{ROOT / 'bench/entered'}:{tree}",
            "PYSERVE_ENTERED": str(notes), "PYSERVE_CACHE": str(folder / "cache"), "LOG_LOCATION": str(folder / "logs"),
        }  # fmt: skip
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            server = Server(inference, management, time.perf_counter())
            for model in ("linear", "pictures", "own"):
                while server.ask("GET", inference, f"/v2/models/{model}/ready")[0] != 200:
                    if process.poll() is not None:
                        raise RuntimeError((folder / "log").read_text())
                    time.sleep(0.1)
            idle = entered(lambda: None, notes, tree)
            for name, request in requests(server, grpc_inference).items():
                for _ in range(3):
                    request()
                found = entered(request, notes, tree) - idle
                files = {each.partition(":")[0] for each in found}
                print(f"{name:28}{len(files):4} files {len(found):4} functions", flush=True)
                if arguments.list:
                    print("".join(f"    {each}\n" for each in sorted(found)))
        finally:
            process.terminate()
            process.wait(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
