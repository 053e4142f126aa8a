"""A compiled package with the plain TorchScript beside it: its answers, their structure, and its threads."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from pyserve import _core
from tests.support.networks import NamedOutputs, save_script

HANG_S = 120


@pytest.mark.compiles
def test_a_package_answers_in_the_structure_of_torchscript_and_leaves_it_what_is_odd(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("compiling a package needs g++")
    network = NamedOutputs()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(network, (torch.rand(4, 16),), dynamic_shapes={"x": {0: batch}}, strict=False)
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "m.pt2"), inductor_configs={"cpp.dynamic_threads": True}
    )
    script = save_script(network, tmp_path / "m.pt")
    model = _core.TorchModel.load(
        str(package),
        [torch.zeros(1, 16)],
        backend="aotinductor",
        plain=(str(script), 0, -1),
        rows_max=64,
        runners_max=2,
    )
    wrong: list[int] = []

    def ask(number: int) -> None:
        for rows in (1, 2, 7, 64):
            x = torch.full((rows, 16), float(number))
            answer = model.run([x])
            if set(answer) != {"plus", "sum"} or not torch.equal(answer["plus"], x + 1):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(HANG_S)
    assert not wrong and model.plain_runs == 0
    for odd in (torch.full((2, 16), torch.nan), torch.zeros(65, 16), torch.zeros(2, 3)):
        torch.testing.assert_close(model.run([odd])["plus"], odd + 1, equal_nan=True)
    assert model.plain_runs == 3
