"""Requirements of an archive: what the environment depends on, what pip is asked, and what is said of another torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

from pyserve.archive.archive import Archive, open_archive
from pyserve.errors import RequirementsError
from pyserve.models import requirements
from pyserve.models.requirement_files import read_requirements
from tests.support.wheels import Index, index, source_archive, source_files, wheel, wheel_name

NAME = wheel_name("h1dep")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    wheels = {
        wheel_name("idxdep", "1.0"): wheel("idxdep", "1.0", "first"),
        wheel_name("idxdep", "2.0"): wheel("idxdep", "2.0", "second"),
        wheel_name("torch", "9.9"): wheel("torch", "9.9"),
        wheel_name("old"): wheel("old", requires=("torch==1.13.0",)),
        wheel_name("wants"): wheel("wants", value="wants", requires=("torch>=1.0",)),
    }
    with index(wheels) as served:
        monkeypatch.setenv("PIP_INDEX_URL", served.url)
        yield served


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def archive_with(
    folder: Path, text: str | bytes, files: Mapping[str, str | bytes] | None = None, *, name: str = "m"
) -> Archive:
    """A model folder with this requirements.txt."""
    model = {"modelName": name, "handler": "h.py", "requirementsFile": "requirements.txt"}
    everything = {
        "h.py": "def handle(data, context): return data\n",
        "MAR-INF/MANIFEST.json": json.dumps({"model": model}),
        "requirements.txt": text,
        **(files or {}),
    }
    for each, content in everything.items():
        path = folder / name / each
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_archive(folder / name)


def value_in(archive: Archive, expression: str = "h1dep.V") -> str:
    """What a worker of the archive would see."""
    interpreter = requirements.prepare_environment(archive, "m", lambda text: None)
    module = expression.partition(".")[0]
    code = f"import sys, {module}; print({expression})"
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    return done.stdout.strip() or done.stderr


def refusal(archive: Archive) -> str:
    with pytest.raises(RequirementsError) as caught:
        requirements.prepare_environment(archive, "m", lambda text: None)
    assert caught.value.message == "Custom pip package installation failed for model m"
    return str(caught.value.detail["text"])


@pytest.mark.usefixtures("no_index")
def test_changed_wheel_of_the_same_name_is_installed_anew(tmp_path: Path) -> None:
    for value in ("one", "two", "one"):
        archive = archive_with(tmp_path, f"./{NAME}\n", {NAME: wheel("h1dep", value=value)}, name=value)
        assert value_in(archive) == value
    assert len(list((tmp_path / "cache" / "environments").glob("*/complete"))) == 2


LOCAL = {
    "wheel": (f"./{NAME}\n", {NAME: b"one"}, NAME),
    "bare name": (f"{NAME}\n", {NAME: b"one"}, NAME),
    "found by name": ("h1dep\n", {NAME: b"one"}, NAME),
    "in the wheelhouse": ("h1dep\n", {f"wheels/{NAME}": b"one"}, f"wheels/{NAME}"),
    "with extras": (f"./{NAME}[more]\n", {NAME: b"one"}, NAME),
    "with a marker": (f"./{NAME} ; python_version > '3'\n", {NAME: b"one"}, NAME),
    "direct": (f"h1dep @ file:{NAME}\n", {NAME: b"one"}, NAME),
    "source archive": ("./h1dep-1.0.tar.gz\n", {"h1dep-1.0.tar.gz": b"one"}, "h1dep-1.0.tar.gz"),
    "spaces": (f"./my wheels/{NAME}\n", {f"my wheels/{NAME}": b"one"}, f"my wheels/{NAME}"),
    "folder": ("./pkg\n", {"pkg/setup.py": "", "pkg/h1dep.py": "one"}, "pkg/h1dep.py"),
    "the model's own folder": (".\n", {"setup.py": "", "h1dep.py": "one"}, "h1dep.py"),
    "folder, which reads another": ("./pkg\n", {"pkg/setup.py": "", "version.txt": "one"}, "version.txt"),
    "editable": ("-e ./pkg\n", {"pkg/setup.py": "", "pkg/h1dep.py": "one"}, "pkg/h1dep.py"),
    "editable=": ("--editable=./pkg[x]\n", {"pkg/setup.py": "", "pkg/h1dep.py": "one"}, "pkg/h1dep.py"),
    "included": ("-r more.txt\n", {"more.txt": "one\n"}, "more.txt"),
    "included, joined": ("-rmore.txt\n", {"more.txt": "one\n"}, "more.txt"),
    "included twice over": ("--requirement=a/b.txt\n", {"a/b.txt": "-r c.txt\n", "a/c.txt": "one\n"}, "a/c.txt"),
    "wheel of an included file": ("-r a/b.txt\n", {"a/b.txt": f"./{NAME}\n", NAME: b"one"}, NAME),
    "constraints": ("-c limits.txt\nh1dep\n", {"limits.txt": "one\n"}, "limits.txt"),
    "find-links": ("--find-links wh\nh1dep\n", {f"wh/{NAME}": b"one"}, f"wh/{NAME}"),
    "find-links=": ("--no-index --find-links=./wh\nh1dep\n", {f"wh/{NAME}": b"one"}, f"wh/{NAME}"),
    "-f, joined": ("-fwh\nh1dep\n", {f"wh/{NAME}": b"one"}, f"wh/{NAME}"),
    "continued": ("--find-links \\\n  wh\nh1dep\n", {f"wh/{NAME}": b"one"}, f"wh/{NAME}"),
    "variable": (f"${{H1_PLACE}}/{NAME}\n", {f"wh/{NAME}": b"one"}, f"wh/{NAME}"),
    "byte order mark": (b"\xef\xbb\xbf-r more.txt\r\n", {"more.txt": "one\r\n"}, "more.txt"),
    "UTF-16": ("-r more.txt\n".encode("utf-16"), {"more.txt": "one\n"}, "more.txt"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOCAL.values(), ids=LOCAL)
def test_every_file_that_requirements_name_is_part_of_the_key(
    tmp_path: Path, case: tuple[str, dict[str, str | bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, files, changed = case
    monkeypatch.setenv("H1_PLACE", "wh")
    before = read_requirements(archive_with(tmp_path, text, files))
    again = read_requirements(archive_with(tmp_path, text, files))
    (tmp_path / "m" / changed).write_bytes(b"two")
    after = read_requirements(open_archive(tmp_path / "m"))
    assert again.inputs == before.inputs != after.inputs


def test_what_building_leaves_in_a_folder_does_not_change_the_key(tmp_path: Path) -> None:
    files = {"pkg/setup.py": "", "pkg/h1dep.py": "one"}
    before = read_requirements(archive_with(tmp_path, "./pkg\n", files))
    built = {"pkg/build/lib/h1dep.py": "", "pkg/h1dep.egg-info/PKG-INFO": ""}
    assert read_requirements(archive_with(tmp_path, "./pkg\n", {**files, **built})).inputs == before.inputs


def test_weights_and_code_are_no_part_of_the_key_where_packages_come_from_an_index(tmp_path: Path) -> None:
    text = "numpy>=1\n# ./pkg\nrequests[socks]; python_version > '3'\n--extra-index-url https://h/simple\n"
    before = read_requirements(archive_with(tmp_path, text))
    after = read_requirements(archive_with(tmp_path, text, {"h.py": "changed"}))
    assert before.inputs == after.inputs and set(before.inputs) == {"requirements.txt"}


def test_folder_outside_of_the_archive_counts_by_names_and_times(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    text = f"--find-links {outside}\nh1dep\n"
    before = read_requirements(archive_with(tmp_path, text))
    (outside / NAME).write_bytes(b"")
    assert read_requirements(archive_with(tmp_path, text)).inputs != before.inputs


@pytest.mark.parametrize("change", ["PIP_INDEX_URL", "PIP_CONSTRAINT", "constraints", "torch", "python", "package"])
def test_key_changes_with_the_server_and_the_configuration_of_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    archive = archive_with(tmp_path, "h1dep\n")
    limits = tmp_path / "limits.txt"
    limits.write_text("h1dep<2\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(limits))
    made = []
    monkeypatch.setattr(requirements, "make_environment", lambda folder: made.append(folder) or folder.mkdir())
    monkeypatch.setattr(requirements._Installation, "run", lambda self: None)
    requirements.prepare_environment(archive, "m", lambda text: None)
    requirements.prepare_environment(archive, "m", lambda text: None)
    assert len(made) == 1
    match change:
        case "constraints":
            limits.write_text("h1dep<3\n")
        case "torch":
            monkeypatch.setattr(requirements, "version", lambda name: "2.99.0")
        case "python":
            monkeypatch.setattr(sys, "version", "3.99.0 (main)")
        case "package":
            monkeypatch.setattr(requirements, "distributions", list)
        case _:
            monkeypatch.setenv(change, "/elsewhere")
    requirements.prepare_environment(archive, "m", lambda text: None)
    assert len(made) == 2


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\r\n\r\n  # here\r\n", b"\xef\xbb\xbf# nothing\n"])
def test_requirements_that_ask_for_nothing_need_no_environment(tmp_path: Path, text: str | bytes) -> None:
    archive = archive_with(tmp_path, text)
    assert requirements.prepare_environment(archive, "m", lambda text: None) == sys.executable


def test_wheels_in_the_archive_do_not_switch_the_index_off(tmp_path: Path, packages: Index) -> None:
    archive = archive_with(tmp_path, "h1dep\nidxdep<2\n", {f"wheels/{NAME}": wheel("h1dep", value="ours")})
    assert value_in(archive) == "ours"
    assert value_in(archive, "idxdep.V") == "first"
    assert f"/files/{wheel_name('idxdep')}" in packages.asked


def test_wheels_in_the_archive_are_enough_where_they_have_all(tmp_path: Path, packages: Index) -> None:
    archive = archive_with(tmp_path, "h1dep\n", {NAME: wheel("h1dep", value="ours")})
    assert value_in(archive) == "ours"
    assert packages.asked == []


@pytest.mark.parametrize(
    "text", ["torch==1.13", "torch<2 # old", "Torch ~= 1.0", "torch[opt-einsum]==1.13.1", "torch @ https://h/torch.whl",
             "torch==1.13 --hash=sha256:00", "torch>=99; python_version > '3'", "torch==0.1 \\\n  ; os_name != 'x'"],
)  # fmt: skip
def test_pin_of_another_torch_is_named_and_nothing_is_fetched(tmp_path: Path, packages: Index, text: str) -> None:
    said = refusal(archive_with(tmp_path, f"idxdep\n{text}\n"))
    assert said.startswith(f"requirements.txt:2: {text[:5]}")
    assert f"torch {version('torch')} that the server runs" in said and "leave torch out" in said
    assert packages.asked == []


def test_pin_in_an_included_file_is_named_by_its_place(tmp_path: Path) -> None:
    said = refusal(archive_with(tmp_path, "-r a/more.txt\n", {"a/more.txt": "numpy\ntorch==1.13\n"}))
    assert said.startswith("a/more.txt:2: torch==1.13: ")


def test_package_that_needs_another_torch_is_named(tmp_path: Path, packages: Index) -> None:
    said = refusal(archive_with(tmp_path, "old\n"))
    assert said.startswith("old 1.0 wants torch==1.13.0: that is not the torch ")
    assert not any(each.startswith("/files/torch") for each in packages.asked)


def test_torch_that_the_server_has_is_used(tmp_path: Path, packages: Index) -> None:
    here = version("torch")
    text = f"torch>=2\ntorch=={here.partition('+')[0]}\ntorch<0.1; python_version < '3'\nwants\n"
    archive = archive_with(tmp_path, text)
    assert value_in(archive, "wants.V") == "wants"
    assert value_in(archive, "torch.__version__") == here
    assert [each for each in packages.asked if "torch" in each] == []


def test_failure_of_pip_is_told_in_its_words(tmp_path: Path, packages: Index) -> None:
    assert "No matching distribution found for no-such-thing==1" in refusal(
        archive_with(tmp_path, "no-such-thing==1\n")
    )


@pytest.mark.usefixtures("no_index")
def test_failure_of_a_package_s_own_build_names_its_error(tmp_path: Path) -> None:
    files = {f"pkg/{name}": content for name, content in source_files("h1dep", "one").items()}
    files["pkg/backend.py"] += "\ndef build_wheel(*args): raise KeyError('no compiler')\n"
    assert "KeyError: 'no compiler'" in refusal(archive_with(tmp_path, "./pkg\n", files))


def test_absent_file_is_named(tmp_path: Path) -> None:
    archive = archive_with(tmp_path, "numpy\n")
    (archive.model_dir / "requirements.txt").unlink()
    assert refusal(archive).startswith('requirementsFile "requirements.txt" cannot be read: No such file')


@pytest.mark.usefixtures("no_index")
@pytest.mark.parametrize(("text", "expected"), [("./pkg\n", "one"), ("-e ./pkg\n", "changed")])
def test_package_in_the_archive_is_built_or_used_where_it_lies(tmp_path: Path, text: str, expected: str) -> None:
    files = {f"pkg/{name}": content for name, content in source_files("h1dep", "one").items()}
    archive = archive_with(tmp_path, text, files)
    interpreter = requirements.prepare_environment(archive, "m", lambda text: None)
    (archive.model_dir / "pkg/h1dep/__init__.py").write_text("V = 'changed'\n")
    code = [interpreter, "-c", "import h1dep; print(h1dep.V)"]
    assert subprocess.check_output(code, text=True, cwd="/").strip() == expected


@pytest.mark.usefixtures("no_index")
def test_environment_of_a_folder_that_is_gone_is_removed(tmp_path: Path) -> None:
    files = {f"pkg/{name}": content for name, content in source_files("h1dep", "one").items()}
    first = Path(requirements.prepare_environment(archive_with(tmp_path, "-e ./pkg\n", files), "m", lambda text: None))
    (tmp_path / "m").rename(tmp_path / "moved")
    second = archive_with(tmp_path, f"./{NAME}\n", {NAME: wheel("h1dep", value="two")}, name="other")
    assert value_in(second) == "two"
    assert not first.exists()


@pytest.mark.usefixtures("no_index")
def test_source_archive_is_installed(tmp_path: Path) -> None:
    archive = archive_with(tmp_path, "./h1dep-1.0.tar.gz\n", {"h1dep-1.0.tar.gz": source_archive("h1dep", "packed")})
    assert value_in(archive) == "packed"


@pytest.mark.usefixtures("no_index")
def test_files_of_the_archive_named_like_modules_do_not_disturb_pip(tmp_path: Path) -> None:
    files = {NAME: wheel("h1dep", value="one"), "pip.py": "1 / 0", "logging.py": "1 / 0", "typing.py": "1 / 0"}
    assert value_in(archive_with(tmp_path, f"./{NAME}\n", files)) == "one"
