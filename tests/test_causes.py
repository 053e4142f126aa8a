"""Known causes: what people do about each, the same in answers, `check`, `doctor` and descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.causes import READ_SIZE_MAX, fix_for, package_of
from pyserve.commands import doctor
from pyserve.models.absence import absence, fix_of
from pyserve.request.messages import ErrorFormat
from pyserve.worker.failure import describe_failure


def text_of_real(make: Any) -> str:
    try:
        make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


class Own:
    """Something that no file of weights holds."""


def read_object(folder: Path) -> None:
    torch.save(Own(), folder / "own.pt")
    torch.load(folder / "own.pt", weights_only=True)


def read_no_script(folder: Path) -> None:
    torch.save({"a": torch.ones(1)}, folder / "weights.pt")
    torch.jit.load(str(folder / "weights.pt"))


def load_other_weights(folder: Path) -> None:
    torch.nn.Linear(2, 2).load_state_dict(torch.nn.Linear(3, 2).state_dict())


def load_other_names(folder: Path) -> None:
    torch.nn.Linear(2, 2).load_state_dict({"other": torch.ones(1)})


def import_nothing(folder: Path) -> None:
    import cv2.nothing_like_it  # noqa: F401


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (read_object, "save model.state_dict()"),
        (read_no_script, "the file is no TorchScript"),
        (load_other_weights, "the weights are not those of this model file"),
        (load_other_names, "the weights are not those of this model file"),
        (import_nothing, "pip install opencv-python-headless where pyserve runs"),
    ],
)
def test_what_libraries_really_say_is_known(make: Any, fix: str, tmp_path: Path) -> None:
    assert fix in fix_for(text_of_real(lambda: make(tmp_path)))


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("No module named 'torchvision'", "pip install torchvision where pyserve runs, or pack a requirements.txt"),
        (
            "ImportError: libGL.so.1: cannot open shared object file: No such file or directory",
            "opencv-python-headless",
        ),
        ("libsndfile.so.1: cannot open shared object file", "package of this system that has libsndfile.so.1"),
        ("numpy.core.multiarray failed to import", "pip install 'numpy<2'"),
        ("x.so: undefined symbol: _ZN3c105ErrorC2E", "install it again beside this torch"),
        ("RuntimeError: operator torchvision::nms does not exist", "torchvision that belongs to this torch"),
        ("AssertionError: Torch not compiled with CUDA enabled", "map_location"),
        ("Attempting to deserialize object on a CUDA device but torch.cuda.is_available() is False", "map_location"),
        ("Expected all tensors to be on the same device, but found at least two devices", "tensor.to(self.device)"),
        ("Can't get attribute 'Net' on <module '__main__'>", "--model-file"),
        ("OSError: [Errno 28] No space left on device", "PYSERVE_CACHE"),
        ("[Errno 24] Too many open files", "ulimit -n"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.", "--shm-size"),
        ("ValueError: too few values", ""),
        ("", ""),
    ],
)
def test_a_known_cause_has_its_fix(text: str, fix: str) -> None:
    found = fix_for(text)
    assert fix in found and bool(found) == bool(fix)


def test_long_texts_take_no_time_and_names_are_bounded() -> None:
    assert fix_for("x" * 10_000_000) == "" == fix_for("x" * READ_SIZE_MAX + "No module named 'a'")
    assert fix_for(f"No module named '{'a' * 1000}'") == ""


def test_packages_are_named_as_pip_knows_them() -> None:
    assert package_of("cv2") == package_of("cv2.gapi") == "opencv-python-headless"
    assert package_of("google.protobuf") == "protobuf" and package_of("torchvision.ops") == "torchvision"


def test_answers_descriptions_and_doctor_say_the_same() -> None:
    fix = fix_for("No module named 'torchvision'")
    error = "ModuleNotFoundError: No module named 'torchvision' (handler.py:1)"
    detail = absence("FAILED", error, ErrorFormat())
    assert detail["fix"] == f"{fix}; then register it again" and detail["text"] == error
    assert absence("READY", "", ErrorFormat()) == {"reason": "no worker", "state": "READY"}
    missing = describe_failure(ImportError("libGL.so.1: cannot open shared object file"), "/nowhere")
    assert missing.fix == fix_for("libGL.so.1") and doctor.fix_for is fix_for


def test_strangers_are_told_nothing_of_the_archives_code() -> None:
    assert fix_of("No module named 'secret_project'", ErrorFormat(with_private_detail=False)) == (
        "fix the archive and register it again"
    )
