"""What is shown of a network before it is believed: state, shared memory, optimisations and precision."""

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyserve import _core
from pyserve.archive.archive import open_archive
from pyserve.conversion.record import NeedsPythonError
from pyserve.errors import ModelLoadError
from pyserve.models.loader import NOT_IN_THREADS, load_network
from pyserve.proof.batch_probe import rows_are_independent
from pyserve.proof.comparison import difference
from pyserve.proof.native_proof import ORDINARY_MAX, find_state, prove_optimization
from pyserve.proof.probe_inputs import InputDomain, batch_rows
from tests.support.networks import save_script
from tests.support.serving_models import write_torchscript


class KeepsItsOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("out", torch.zeros(8, 4))

    def forward(self, x):
        out = self.out[: x.shape[0]]
        out.copy_(x * 2 + 1)
        return out


class SetsAnAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(1, 1)

    def forward(self, x):
        self.last = x
        return x - self.last


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x):
        self.n += 1
        return self.n.expand(x.shape[0], 1)


class UpdatesStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x):
        return F.batch_norm(torch.cat([x, x + 1]), self.mean, self.variance, training=True)[: x.shape[0]]


class WritesThroughAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.ones(4))

    def forward(self, x):
        held = [x, self.b]
        held[1].add_(1)
        return x + held[1]


class WritesInOneBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.ones(4))

    def forward(self, x):
        y = self.b if bool(x.sum() > 0) else x
        y.add_(1)
        return x + y


class WritesToItsOwn(nn.Module):
    """In-place operations of all kinds, none of which reaches the module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x).view(-1, 2)
        y.add_(1)
        y = F.relu(y.view(-1, 4), inplace=True)
        for i in range(x.shape[1]):
            y[:, i] += self.linear.bias[i]
        x.mul_(2)
        return y


class GivesAwayItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0).unsqueeze(0))

    def forward(self, x):
        return self.table.expand(x.shape[0], 4)


class Resizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1))

    def forward(self, x):
        self.kept.resize_(x.shape)
        self.kept.copy_(x)
        return self.kept * 2


class TiesInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tied = [self.linear.weight]

    def forward(self, x):
        return self.linear(x) @ self.tied[0]


ITEM = [torch.tensor([[0.5, -1.0, 2.0, 0.25]])]


def loaded(module: nn.Module, folder: Path, example: list[torch.Tensor] | None = None, **options: Any) -> Any:
    return _core.TorchModel.load(str(save_script(module, folder / "m.pt", **options)), example or ITEM)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "module", [KeepsItsOutput, SetsAnAttribute, Counts, UpdatesStatistics, WritesThroughAList, WritesInOneBranch]
)
def test_a_graph_that_writes_to_its_module_is_found(module: type[nn.Module], frozen: bool, tmp_path: Path) -> None:
    assert loaded(module(), tmp_path, frozen=frozen).state


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("module", [WritesToItsOwn, GivesAwayItsWeight])
def test_a_graph_that_writes_to_its_own_tensors_has_no_state(
    module: type[nn.Module], frozen: bool, tmp_path: Path
) -> None:
    model = loaded(module(), tmp_path, frozen=frozen)
    assert not model.state
    assert model.instance() is model
    unchanged = model.checksum()
    find_state(model, ITEM, is_package=False)
    assert not model.state
    find_state(model, ITEM, is_package=False, unchanged=unchanged)
    assert not model.state
    find_state(model, ITEM, is_package=False, unchanged=unchanged + 1)
    assert model.state == "a call changes a weight or a constant of the model"


def test_a_buffer_that_was_read_from_a_file_may_grow(tmp_path: Path) -> None:
    model = loaded(Resizes(), tmp_path).instance()
    for count in (1, 3, 2, 8):
        x = torch.rand(count, 4)
        assert torch.equal(model.run([x]), x * 2)


def items() -> list[tuple[torch.Tensor, ...]]:
    return batch_rows(ITEM, [InputDomain(torch.float32, ((4, 4),))], 8)


@pytest.mark.parametrize("count", [2, 4])
def test_filling_a_batch_up_needs_rows_that_do_not_depend_on_each_other(count: int) -> None:
    assert rows_are_independent(lambda inputs: inputs[0] * 2, items(), count)
    assert not rows_are_independent(lambda inputs: inputs[0].softmax(0), items(), count)


def test_a_module_that_cannot_be_frozen_runs_as_it_is(tmp_path: Path) -> None:
    network = TiesInAList().eval()
    model = loaded(network, tmp_path)
    assert not model.state
    torch.testing.assert_close(model.run(ITEM), network(ITEM[0]).detach())


def test_each_instance_of_a_model_with_state_begins_as_it_was_saved(tmp_path: Path) -> None:
    model = loaded(Counts(), tmp_path)
    first, second = model.instance(), model.instance()
    assert [first.run(ITEM).item() for _ in range(3)] == [1, 2, 3]
    assert second.run(ITEM).item() == 1
    assert model.instance().run(ITEM).item() == 1


def test_an_answer_of_a_model_with_state_does_not_change_with_the_next(tmp_path: Path) -> None:
    model = loaded(KeepsItsOutput(), tmp_path).instance()
    first = model.run(ITEM)
    model.run([ITEM[0] * 100])
    assert torch.equal(first, ITEM[0] * 2 + 1)


def test_a_handler_that_changes_an_answer_does_not_change_the_weights(tmp_path: Path) -> None:
    model = loaded(GivesAwayItsWeight(), tmp_path)
    answer = model.run(ITEM)
    with torch.inference_mode():
        answer.add_(5)
    assert model.run(ITEM).tolist() == [[0, 1, 2, 3]]


def test_a_file_that_was_overwritten_makes_no_further_instance(tmp_path: Path) -> None:
    model = loaded(Counts(), tmp_path)
    (tmp_path / "m.pt").write_bytes(b"")
    with pytest.raises(RuntimeError, match="overwritten since it was loaded; register the model again"):
        model.instance()


class MaskedEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder, self.table = nn.TransformerEncoder(layer, 1), nn.Embedding(9, 4)

    def forward(self, ids):
        return self.encoder(self.table(ids), src_key_padding_mask=ids == 0).sum(1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_graph_whose_operators_may_end_the_process_is_left_to_worker_processes(tmp_path: Path) -> None:
    ids = [torch.tensor([[1, 2, 0, 0]])]
    assert loaded(MaskedEncoder(), tmp_path, ids).state == "forward makes nested tensors"


# --- optimisations ----------------------------------------------------------------------------------------------------


PICTURE = [torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))]
DOMAIN = [InputDomain(torch.float32, ((1, 1), (8, 8), (8, 8)))]


class Relu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 2)

    def forward(self, x):
        return self.linear(self.conv(x).relu().flatten(1))


class RootFirst(Relu):
    """Makes what is no number of negative ones, before a relu that would hide it."""

    def forward(self, x):
        return self.linear(self.conv(x.sqrt()).relu().flatten(1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 2 * ORDINARY_MAX])
@pytest.mark.parametrize("place", [0, 63])
def test_one_number_out_of_the_ordinary_is_answered_as_torch_does(value: float, place: int, tmp_path: Path) -> None:
    network = Relu().eval()
    model = loaded(network, tmp_path, PICTURE)
    assert model.is_optimized
    odd = PICTURE[0].clone()
    odd.view(-1)[place] = value
    batch = torch.cat([PICTURE[0], odd])
    assert difference(network(batch).detach(), model.run([batch])) < 1e-4
    assert difference(network(odd).detach(), model.run([odd])) < 1e-4


def test_an_optimisation_is_kept_where_it_agrees(tmp_path: Path) -> None:
    model = loaded(Relu(), tmp_path, PICTURE)
    assert prove_optimization(model, PICTURE, DOMAIN) == ""
    assert (model.is_optimized, model.optimization_note) == (True, "")
    model.forget_optimization()
    assert not model.is_optimized
    torch.testing.assert_close(model.run(PICTURE), Relu().eval()(PICTURE[0]).detach())


class DividesByItself(Relu):
    def forward(self, x):
        x = (x - 7) / (x - 7).abs()
        return self.linear(self.conv(x).relu().flatten(1))


class OverflowsBetween(Relu):
    def forward(self, x):
        return self.linear((self.conv(x) * 100).exp().sub_(1).relu().flatten(1))


class MasksWithInfinity(Relu):
    def forward(self, x):
        masked = self.conv(x).masked_fill(x[:, :, :6, :6] > 5, -math.inf)
        return self.linear((masked - masked.amax((2, 3), keepdim=True)).relu().flatten(1))


@pytest.mark.parametrize(
    ("module", "odd", "operator"),
    [(RootFirst, -PICTURE[0], "sqrt"), (DividesByItself, PICTURE[0] * 0 + 7, "div"),
     (OverflowsBetween, PICTURE[0] * 1000, "exp"), (MasksWithInfinity, PICTURE[0] + 9, "infinity")],
)  # fmt: skip
def test_an_optimisation_is_left_out_where_nan_could_come_up_within_the_model(
    module: type[nn.Module], odd: torch.Tensor, operator: str, tmp_path: Path
) -> None:
    network = module().eval()
    model = loaded(network, tmp_path, PICTURE)
    assert not model.is_optimized
    assert f"({operator})" in model.optimization_note
    assert difference(network(odd).detach(), model.run([odd])) < 1e-4


class NormalizesItsAnswer(Relu):
    """Divides by a constant before, by what it computed after the convolutions: both are common, neither is hidden."""

    def forward(self, x):
        y = super_forward(self, x / 255)
        return y / y.norm(2, 1, True)


def super_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.linear(self.conv(x).relu().flatten(1))


def test_operators_behind_the_last_kernel_hide_nothing(tmp_path: Path) -> None:
    traced = torch.jit.trace(NormalizesItsAnswer().eval(), PICTURE[0], check_trace=False)
    traced.save(str(tmp_path / "m.pt"))
    model = _core.TorchModel.load(str(tmp_path / "m.pt"), PICTURE)
    assert (model.is_optimized, model.optimization_note) == (True, "")


class Seeds(nn.Module):
    def forward(self, x):
        torch.manual_seed(0)
        return x + torch.randn(x.shape[0], 4)


def test_a_graph_that_seeds_random_numbers_is_left_to_worker_processes(tmp_path: Path) -> None:
    assert loaded(Seeds(), tmp_path).state in NOT_IN_THREADS
    with pytest.raises(NeedsPythonError, match="forward seeds torch's random numbers"):
        network_of(tmp_path, Seeds(), {"input": {"dtype": "float32", "shape": [4]}})


def test_the_plain_graph_may_be_let_go_of_while_it_runs(tmp_path: Path) -> None:
    network = Relu().eval()
    model = loaded(network, tmp_path, PICTURE)
    odd = torch.full((4, 1, 8, 8), math.nan)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(model.run, [odd]) for _ in range(200)]
        for _ in range(50):
            model.settle()
        assert all(torch.isnan(each.result()).all() for each in running)
    assert model.is_optimized


# --- precision --------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """An id, a double and a flag among weights that may be lowered."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("first_id", torch.tensor([100085]))
        self.register_buffer("scale", torch.tensor([1 + 2**-40], dtype=torch.float64))
        self.register_buffer("flag", torch.tensor([True]))
        self.register_buffer("turn", torch.tensor([1j], dtype=torch.complex64))

    def forward(self, x):
        ids = x.argmax(1) + self.first_id
        return (
            self.linear(x),
            ids,
            self.scale.expand(x.shape[0]),
            self.flag.expand(x.shape[0]),
            self.turn.expand(x.shape[0]),
        )


class NeedsAutocast(nn.Module):
    """Meets its weights with numbers in fp32 that it makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        positions = torch.arange(4, dtype=torch.float32)
        return self.linear(x + positions)


def test_a_lower_precision_changes_floats_only(tmp_path: Path) -> None:
    path = save_script(Mixed(), tmp_path / "m.pt")
    _, ids, scale, flag, turn = _core.TorchModel.load(str(path), ITEM, precision="bf16").run(ITEM)
    assert ids.tolist() == [100087]
    assert scale.dtype is torch.float64
    assert scale.tolist() == [1 + 2**-40]
    assert flag.tolist() == [True]
    assert turn.tolist() == [1j]


def test_what_does_not_run_at_the_lower_precision_runs_with_autocast(tmp_path: Path) -> None:
    network = NeedsAutocast().eval()
    path = save_script(network, tmp_path / "m.pt")
    model = _core.TorchModel.load(str(path), ITEM, precision="bf16")
    assert model.is_autocast
    expected = network(ITEM[0]).detach()
    found = difference(expected, model.run(ITEM))
    assert 0 < found < 0.03  # lowered, and near
    assert model.precision_error == pytest.approx(found, rel=1e-3)


class Cosine(nn.Module):
    def forward(self, x):
        return torch.cos(x)


def test_the_cost_of_a_precision_is_measured_on_harder_inputs_than_the_example(tmp_path: Path) -> None:
    path = str(save_script(Cosine(), tmp_path / "m.pt"))
    easy = _core.TorchModel.load(path, ITEM, precision="bf16").precision_error
    hard = _core.TorchModel.load(path, ITEM, precision="bf16", others=[[ITEM[0] * 301.7]]).precision_error
    assert 0 < easy < 0.01
    assert hard > 0.05


# --- an archive on its way into the engine ----------------------------------------------------------------------------


def network_of(folder: Path, module: nn.Module, config: dict[str, Any], batch_size: int = 1) -> Any:
    with open_archive(write_torchscript(folder, module, "m", config=config)) as archive:
        return load_network(
            archive, name="m", devices=["cpu"], batch_size=batch_size, cpu_budget=1,
            limit_max_image_pixels=True, startup_timeout_s=60, progress=lambda text: None,
        )  # fmt: skip


def test_a_precision_that_costs_too_much_is_refused_unless_that_is_allowed(tmp_path: Path) -> None:
    config = {"input": {"dtype": "float32", "shape": [4]}, "precision": "bf16"}
    with pytest.raises(ModelLoadError, match=r"differs from fp32's by \d+\.\d%, more than precisionErrorMax \(5%\)"):
        network_of(tmp_path, Cosine(), config)
    assert network_of(tmp_path, Cosine(), {**config, "precisionErrorMax": 2.0}).findings["precisionError"] > 0.05
    narrow = {"input": {"dtype": "float32", "shape": [4], "values": [0, 1]}, "precision": "bf16"}
    assert network_of(tmp_path, Cosine(), narrow).findings["precisionError"] < 0.01


class GivesBackItsSize(nn.Module):
    def forward(self, x):
        return x.sum()


def test_a_model_whose_output_cannot_be_answered_is_refused_at_load(tmp_path: Path) -> None:
    config = {"input": {"dtype": "float32", "shape": [4]}}
    with pytest.raises(ModelLoadError, match=r"m\.mar cannot answer an example of its input \(.*\): postprocess"):
        network_of(tmp_path, GivesBackItsSize(), config)


def test_loading_a_model_draws_no_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    network_of(tmp_path, Cosine(), {"input": {"dtype": "float32", "shape": [4]}}, batch_size=4)
    assert torch.equal(torch.rand(3), expected)
