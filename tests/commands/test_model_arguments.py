"""One rule for the models of all commands: archives, folders, and models' files by themselves, in any mix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyserve.archive.archive import open_archive
from pyserve.archive.given import Given, given_for
from pyserve.commands import cli
from pyserve.commands.model_arguments import nothing_there, prepare, prepare_all, prepare_served
from pyserve.config.config import Config
from pyserve.errors import ConfigError, InvalidModelError, ModelNotFoundError, ServeError
from tests.support.serving import Server

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

MODEL_FILE = """
import torch


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        return x * self.factor
"""
FOUR = ("float32:4",)


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def write_all(folder: Path) -> None:
    """The same model in every form."""
    model = Twice().eval()
    torch.jit.save(torch.jit.script(model), str(folder / "script.pt"))
    program = torch.export.export(model, (torch.ones(2, 4),), dynamic_shapes=({0: torch.export.Dim("b", min=1)},))
    torch.export.save(program, folder / "program.pt2")
    torch.save(model.state_dict(), folder / "weights.pth")
    (folder / "model.py").write_text(MODEL_FILE)
    (folder / "plain").mkdir()
    torch.jit.save(torch.jit.script(model), str(folder / "plain" / "net.pt"))
    (folder / "plain" / "model-config.yaml").write_text("input: {dtype: float32, shape: [4]}\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYSERVE_GIVEN", "{}")
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    write_all(tmp_path)
    return tmp_path


def test_a_mix_is_prepared_and_what_was_given_goes_to_the_files(here: Path) -> None:
    paths = [Path(name) for name in ("script.pt", "program.pt2", "weights.pth", "plain")]
    notes = prepare_all(paths, Given(inputs=FOUR, model_file=str(here / "model.py")))
    assert [note.partition(":")[0] for note in notes if "served as" in note] == [str(path) for path in paths[:3]]
    assert "handler tensor, weights net.pt, configuration model-config.yaml" in notes[-1]
    for path in paths:
        with open_archive(path) as archive:
            assert archive.manifest.handler == "tensor"
            assert archive.config.raw["input"]["shape"] == [4]


def test_archives_and_folders_say_themselves_what_they_need(here: Path) -> None:
    assert cli.main(["archive", "script.pt", "--input", "float32:4", "--no-check"]) == 0
    with pytest.raises(ConfigError, match="is an archive, which says itself"):
        prepare(Path("script.mar"), Given(inputs=FOUR))
    assert given_for(Path("script.mar")) == Given()
    assert prepare(Path("script.mar"), Given()) == []
    with pytest.raises(ConfigError, match="is a folder: put"):
        prepare(Path("plain"), Given(inputs=FOUR))
    with pytest.raises(ConfigError, match="and none is given"):
        prepare_all([Path("script.mar"), Path("plain")], Given(inputs=FOUR))


def test_packing_a_file_packs_what_was_given(here: Path) -> None:
    Path("labels.json").write_text('{"0": "cat"}')
    flags = "--model-file model.py --handler image_classifier --labels labels.json --input float32:3,8,8 --no-check"
    assert cli.main(["archive", "weights.pth", *flags.split(), "--model-name", "cats", "-v", "2.0"]) == 0
    with open_archive("cats.mar") as archive:
        assert archive.manifest.model_version == "2.0" and archive.manifest.model_file == "model.py"
        assert archive.manifest.handler == "image_classifier"
        assert archive.config.raw == {"input": {"dtype": "float32", "shape": [3, 8, 8]}}
        assert (archive.model_dir / "index_to_name.json").read_text() == '{"0": "cat"}'
        assert archive.weights is not None
        with archive.weights.open() as file:
            assert file.read() == Path("weights.pth").read_bytes()


def test_packing_a_folder_packs_all_of_it(here: Path) -> None:
    handler = "def handle(data, context):\n    return data\n"
    contents = {"handler.py": handler, "help/deep/code.py": "X = 1\n", "a,b.txt": "1", "c[1].txt": "2", "*": "3",
                "requirements.txt": "", "help/requirements.txt": ""}  # fmt: skip
    for name, text in contents.items():
        (here / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "folder" / name).write_text(text)
    assert cli.main(["archive", "folder", "--no-check"]) == 0
    with open_archive("folder.mar") as archive:
        assert archive.manifest.requirements_file == "requirements.txt"
        assert set(archive.files) - {"MAR-INF/MANIFEST.json"} == set(contents)
        assert {name: (archive.model_dir / name).read_text() for name in contents} == contents


@pytest.mark.parametrize("written", ["mine.py", "mine", "./mine.py:run", "mine:run"])
def test_a_handler_is_found_from_every_folder(here: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    (here / "mine.py").write_text("def run(data, context):\n    return data\n")
    prepare(Path("script.pt"), Given(handler=written))
    monkeypatch.chdir("plain")
    with open_archive("../script.pt") as archive:
        assert archive.manifest.handler == "mine.py" + (":run" if written.endswith(":run") else "")


def test_packing_without_a_file_still_names_what_is_missing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["archive", "--handler", "tensor"]) == 2
    assert "--model-name, -v/--version" in capsys.readouterr().err
    assert cli.main(["archive", "script.pt", "--serialized-file", "script.pt"]) == 2


def test_a_link_to_nothing_is_named_with_where_it_leads(here: Path) -> None:
    (here / "linked.pt").symlink_to("moved.pt")
    with pytest.raises(ModelNotFoundError, match=r"linked\.pt; it is a link to moved\.pt, which is not there"):
        prepare(Path("linked.pt"), Given())


def test_what_is_not_there_is_named_with_the_nearest(here: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean script\.pt\?"):
        prepare(Path("scirpt.pt"), Given())
    with pytest.raises(ModelNotFoundError, match=r"did you mean script\.pt\?"):
        prepare(Path("script"), Given())
    with pytest.raises(ModelNotFoundError, match="there is no folder nowhere"):
        prepare(Path("nowhere/a.pt"), Given())
    error = ConfigError("no store")
    assert nothing_there(["script.pt"], error) is error
    assert "x.pt" in str(nothing_there(["name=x.pt"], error))


def test_start_refuses_before_it_starts_anything(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in [
        (["scirpt.pt"], "did you mean script.pt?"),
        (["script.pt"], "--input float32:3,224,224"),
        (["weights.pth", "--input", "float32:4"], "--model-file"),
        (["script.pt", "--input", "4,4"], "write dtype:shape"),
        (["--models", "script.pt"], "--input float32:3,224,224"),
    ]:
        assert cli.main(["start", *arguments, "--pid-file", "pid"]) == 1
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error


def test_a_configuration_with_one_bad_model_is_left_to_the_server(here: Path) -> None:
    (here / "store").mkdir()
    config = Config(model_store=str(here / "store"), load_models=str(here / "script.pt"))
    config.origin["load_models"] = "config.properties:1"
    assert prepare_served(config, [], Given()) == []
    config.origin["load_models"] = "--models"
    with pytest.raises(InvalidModelError):
        prepare_served(config, [], Given())
    with pytest.raises(ServeError, match=r"Model not found at: no\.mar"):
        prepare_served(Config(load_models="no.mar"), ["no.mar"], Given())


@pytest.mark.server
def test_every_form_is_served_and_restored(tmp_path: Path) -> None:
    write_all(tmp_path)
    server = Server(tmp_path)
    forms = ["script.pt", "named=program.pt2", "weights.pth", "plain"]
    said = server.start(*forms, "--model-file", "model.py", "--input", "float32:4", "--metrics-address",
                        "http://127.0.0.1:0")  # fmt: skip
    with server:
        assert "served as script with handler tensor" in said.stderr
        for restored in (False, True):
            if restored:
                server.run("stop")
                server.start("--restore")
            with server.client("inference") as client:
                for name in ("script", "named", "weights", "plain"):
                    answer = client.predict(name, [1, 2, 3, 4])
                    assert (answer.status, json.loads(answer.body)) == (200, [2, 4, 6, 8]), name
        (server.store / "late.pt2").write_bytes((tmp_path / "program.pt2").read_bytes())
        (server.store / "w.pth").write_bytes((tmp_path / "weights.pth").read_bytes())
        with server.client("management") as client:
            assert client.ask("POST", "/models?url=late.pt2&initial_workers=1&synchronous=true").status == 200
            answer = client.ask("POST", "/models?url=w.pth")
            assert answer.status == 400 and "holds weights only" in answer.json["message"]
            assert client.ask("POST", f"/models?url={tmp_path}/script.pt&model_name=other").status == 404


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "shown"),
    [("check", "script 1.0: nothing found"), ("doctor", "PASS  archive        script 1.0, handler tensor"),
     ("tune", "serve it with `pyserve start script.pt --config-file tuned.yaml`"), ("inspect", "weights: script.pt")],
)  # fmt: skip
def test_commands_take_a_file_by_itself(
    here: Path, command: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        "tune": "--workers 1 --batch-sizes 1 --precisions fp32 --backends torchscript --seconds 0.05 --out tuned.yaml"
    }
    arguments = [command, "script.pt", "--input", "float32:4", *more.get(command, "").split()]
    code = cli.main(arguments)
    out, error = capsys.readouterr()
    assert code == 0 or command == "doctor", error  # which finds fault with the machine, too
    assert shown in out


@pytest.mark.slow
def test_inspect_shows_the_input_that_a_file_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "program.pt2"]) == 0
    assert 'input: {"dtype": "float32", "shape": [4]}, read from the exported program\n' in capsys.readouterr().out
