"""Loading networks into the native extension, and its contract with Python."""

from __future__ import annotations

import ast
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

import pyserve
from pyserve import _core
from tests.support.networks import Affine, Conv, Identity, InPlace, NamedOutputs, Outputs, save_script

STUB = Path(pyserve.__file__).parent / "_core.pyi"
EXAMPLE = [torch.zeros(1, 16)]
PICTURE = [torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))]


def stub_members() -> dict[str, set[str]]:
    """Public names of the stub: of the module under "", and of each class."""
    members: dict[str, set[str]] = {"": set()}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ClassDef):
            members[""].add(node.name)
            members[node.name] = {
                ast.unparse(item.target) if isinstance(item, ast.AnnAssign) else item.name
                for item in node.body
                if isinstance(item, (ast.AnnAssign, ast.FunctionDef))
            } - {"__init__"}
        elif isinstance(node, ast.FunctionDef):
            members[""].add(node.name)
        elif isinstance(node, ast.AnnAssign):
            members[""].add(ast.unparse(node.target))
    return members


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_the_stub_names_what_the_module_has() -> None:
    members = stub_members()
    assert members.pop("") == public(_core)
    for name, wanted in members.items():
        inherited = public(Exception) if issubclass(getattr(_core, name), Exception) else set()
        # Of Python 3.12 on, where a class is a buffer it has the method, too.
        buffers = {"__buffer__"} - set(dir(getattr(_core, name)))
        assert wanted - buffers == public(getattr(_core, name)) - inherited, name


def test_keyword_arguments_of_the_stub_are_those_of_the_module() -> None:
    for owner in ast.parse(STUB.read_text()).body:
        for node in owner.body if isinstance(owner, ast.ClassDef) else ():
            if isinstance(node, ast.FunctionDef) and node.args.kwonlyargs:
                documented = getattr(getattr(_core, owner.name), node.name).__doc__
                for argument in node.args.kwonlyargs:
                    assert f"{argument.arg}:" in documented, (owner.name, node.name, argument.arg)


def test_the_module_was_built_for_this_torch() -> None:
    assert _core.torch_version == torch.__version__


# --- TorchScript ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_a_window_of_a_file_is_loaded(tmp_path: Path, frozen: bool) -> None:
    network = Affine()
    script = save_script(network, tmp_path / "m.pt", frozen=frozen).read_bytes()
    (tmp_path / "window").write_bytes(b"x" * 77 + script + b"y" * 1000)
    model = _core.TorchModel.load(str(tmp_path / "window"), EXAMPLE, offset=77, size=len(script))
    x = torch.randn(3, 16)
    torch.testing.assert_close(model.run([x]), network(x), atol=1e-5, rtol=1e-5)
    assert model.weights_size == (16 * 5 + 5) * 4
    assert model.precision_error == 0


def test_channels_last_changes_no_answer(tmp_path: Path) -> None:
    network = Conv().eval()
    path = save_script(network, tmp_path / "m.pt")
    model = _core.TorchModel.load(str(path), PICTURE, channels_last=True)
    x = torch.rand(4, 3, 12, 12)
    torch.testing.assert_close(model.run([x]), network(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_convolutions_run_in_onednns_layout_and_answer_alike(tmp_path: Path, frozen: bool) -> None:
    network = Conv().eval()
    model = _core.TorchModel.load(str(save_script(network, tmp_path / "m.pt", frozen=frozen)), PICTURE)
    assert model.is_optimized
    for count, size in ((1, 12), (2, 12), (7, 12), (3, 20)):
        pictures = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            torch.testing.assert_close(model.run([pictures]), network(pictures), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_shown_to_answer_alike_stays_as_it_is(tmp_path: Path) -> None:
    path = str(save_script(Conv(), tmp_path / "m.pt"))
    for example in ([], [torch.zeros(1, 5)], [torch.full((1, 3, 12, 12), torch.nan)]):
        model = _core.TorchModel.load(path, example)
        assert not model.is_optimized and model.run(PICTURE) is not None
    assert not _core.TorchModel.load(path, PICTURE, channels_last=True).is_optimized
    assert not _core.TorchModel.load(str(save_script(Affine(), tmp_path / "a.pt")), EXAMPLE).is_optimized


@pytest.mark.parametrize(("precision", "bytes_per_weight"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_a_lower_precision_halves_the_weights_and_says_what_it_costs(
    tmp_path: Path, precision: str, bytes_per_weight: int
) -> None:
    network = Conv().eval()
    model = _core.TorchModel.load(str(save_script(network, tmp_path / "m.pt")), PICTURE, precision=precision)
    output = model.run(PICTURE)
    assert output.dtype is torch.float32
    assert model.weights_size == (3 * 8 * 9 + 8) * bytes_per_weight
    expected = network(PICTURE[0])
    difference = ((output - expected).abs().max() / expected.abs().max()).item()  # relative to the largest number
    if precision == "fp32":
        assert model.precision_error == 0
    else:
        assert 0 < model.precision_error < 0.05
        assert model.precision_error == pytest.approx(difference, rel=0.1, abs=1e-4)


def test_precision_and_channels_last_go_together(tmp_path: Path) -> None:
    network = Conv().eval()
    path = save_script(network, tmp_path / "m.pt")
    model = _core.TorchModel.load(str(path), PICTURE, precision="bf16", channels_last=True)
    torch.testing.assert_close(model.run(PICTURE), network(PICTURE[0]), atol=0.05, rtol=0.05)


def test_measuring_the_precision_leaves_the_example_alone(tmp_path: Path) -> None:
    example = torch.ones(1, 16)
    _core.TorchModel.load(str(save_script(InPlace(), tmp_path / "m.pt")), [example], precision="bf16")
    assert torch.equal(example, torch.ones(1, 16))


def test_several_outputs_keep_their_structure(tmp_path: Path) -> None:
    x = torch.randn(2, 16)
    pair = _core.TorchModel.load(str(save_script(Outputs(), tmp_path / "t.pt")), EXAMPLE).run([x])
    assert isinstance(pair, tuple) and torch.equal(pair[0], x + 1)
    named = _core.TorchModel.load(str(save_script(NamedOutputs(), tmp_path / "d.pt")), EXAMPLE).run([x])
    assert list(named) == ["plus", "sum"]


# --- what cannot be loaded --------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> dict[str, tuple[Path, dict[str, object]]]:
    good = save_script(Affine(), folder / "good.pt")
    content = good.read_bytes()
    files: dict[str, bytes] = {"garbage": b"no zip at all" * 100, "empty": b"", "cut": content[: len(content) // 2]}
    for name, text in files.items():
        (folder / name).write_bytes(text)
    torch.save(Affine().state_dict(), folder / "state")
    rows: dict[str, tuple[Path, dict[str, object]]] = {name: (folder / name, {}) for name in [*files, "state"]}
    rows["missing"] = (folder / "nowhere.pt", {})
    rows["folder"] = (folder, {})
    rows["window past the end"] = (good, {"offset": 10, "size": len(content)})
    rows["offset past the end"] = (good, {"offset": 1 << 62})
    rows["offset below zero"] = (good, {"offset": -1})
    rows["window elsewhere"] = (good, {"offset": 100})
    rows["unknown device"] = (good, {"device": "abacus"})
    rows["unknown precision"] = (good, {"precision": "int8"})
    rows["package in a window"] = (good, {"backend": "aotinductor", "offset": 8})
    rows["package with a precision"] = (good, {"backend": "aotinductor", "precision": "bf16"})
    rows["no package"] = (good, {"backend": "aotinductor"})
    return rows


ROWS = ["garbage", "empty", "cut", "state", "missing", "folder", "window past the end", "offset past the end",
        "offset below zero", "window elsewhere", "unknown device", "unknown precision", "package in a window",
        "package with a precision", "no package"]  # fmt: skip


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, object]]]:
    rows = broken_files(tmp_path_factory.mktemp("broken"))
    assert set(rows) == set(ROWS)
    return rows


@pytest.mark.parametrize("case", ROWS)
def test_what_cannot_be_loaded_raises(broken: dict[str, tuple[Path, dict[str, object]]], case: str) -> None:
    path, options = broken[case]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        _core.TorchModel.load(str(path), EXAMPLE, **options)  # type: ignore[arg-type]
    assert str(caught.value).strip()


def test_the_precision_of_a_frozen_file_cannot_be_changed(tmp_path: Path) -> None:
    path = save_script(Affine(), tmp_path / "m.pt", frozen=True)
    with pytest.raises(ValueError, match="frozen"):
        _core.TorchModel.load(str(path), EXAMPLE, precision="bf16")


def test_a_run_that_raises_is_a_python_exception(tmp_path: Path) -> None:
    model = _core.TorchModel.load(str(save_script(Affine(), tmp_path / "m.pt")), EXAMPLE)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.run([torch.zeros(1, 3)])


def test_a_truncated_file_that_is_loaded_already_does_no_harm(tmp_path: Path) -> None:
    path = save_script(Affine(), tmp_path / "m.pt")
    model = _core.TorchModel.load(str(path), EXAMPLE)
    path.write_bytes(b"")
    assert model.run(EXAMPLE).shape == (1, 5)


# --- .pt2 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None or importlib.util.find_spec("torch._inductor") is None:
        pytest.skip("compiling a package needs g++")
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Affine().eval(), (torch.randn(4, 16),), dynamic_shapes={"x": {0: batch}})
    path = tmp_path_factory.mktemp("package") / "affine.pt2"
    return Path(torch._inductor.aoti_compile_and_package(exported, package_path=str(path)))


@pytest.mark.compiles
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_a_package_answers_as_torch_does(package: Path, batch_size: int) -> None:
    model = _core.TorchModel.load(str(package), EXAMPLE, backend="aotinductor", runners_max=2)
    x = torch.randn(batch_size, 16)
    torch.testing.assert_close(model.run([x]), Affine()(x), atol=1e-5, rtol=1e-5)


def test_identity_of_an_input_is_kept(tmp_path: Path) -> None:
    model = _core.TorchModel.load(str(save_script(Identity(), tmp_path / "m.pt")), EXAMPLE)
    x = torch.arange(16.0)[None]
    assert torch.equal(model.run([x]), x)
