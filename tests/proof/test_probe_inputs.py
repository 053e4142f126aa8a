"""Inputs made to disagree: in range, of every size that is allowed, and the same ones each time."""

from __future__ import annotations

import torch

from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.proof.probe_inputs import InputDomain, Probe, batch_rows, probe_inputs, probe_rows

FLOATS = InputDomain(torch.float32, ((4, 4),))


def shapes(probes: list[Probe], position: int = 0) -> set[tuple[int, ...]]:
    return {tuple(probe.inputs[position].shape[1:]) for probe in probes}


def test_probes_are_the_same_each_time_and_finite() -> None:
    example, domains = [torch.rand(1, 4)], [FLOATS]
    first, second = probe_inputs(example, domains), probe_inputs(example, domains)
    assert [probe.name for probe in first] == [probe.name for probe in second]
    assert all(torch.equal(a.inputs[0], b.inputs[0]) for a, b in zip(first, second, strict=True))
    assert all(torch.isfinite(probe.inputs[0]).all() for probe in first)
    other = probe_inputs(example, domains, seed=1)
    assert not torch.equal(first[0].inputs[0], other[0].inputs[0])


def test_floats_are_negative_large_tiny_and_all_zero_in_batches_of_1_and_3() -> None:
    probes = probe_inputs([torch.rand(1, 4)], [FLOATS])
    numbers = [probe.inputs[0] for probe in probes]
    assert {len(each) for each in numbers} == {1, 3}
    assert any((each < 0).all() for each in numbers)
    assert any(each.abs().max() > 1e4 for each in numbers)
    assert any(0 < each.abs().max() < 1e-5 for each in numbers)
    assert any((each == 0).all() for each in numbers)
    assert not any(probe.may_fail for probe in probes)


def test_numbers_stay_in_the_range_that_is_described() -> None:
    domains = [InputDomain(torch.int64, ((8, 8),), (0, 49)), InputDomain(torch.float32, ((2, 2),), (-1.0, 2.0))]
    probes = probe_inputs([torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 2)], domains)
    ids = torch.cat([probe.inputs[0].flatten() for probe in probes])
    assert ids.min() == 0 and ids.max() == 49 and len(ids.unique()) > 30
    floats = torch.cat([probe.inputs[1].flatten() for probe in probes])
    assert floats.min() >= -1 and floats.max() <= 2 and len(floats.unique()) > 10


def test_every_dtype_has_probes() -> None:
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool, torch.float16, torch.complex64):
        probes = probe_inputs([torch.zeros(1, 3, dtype=dtype)], [InputDomain(dtype, ((3, 3),))])
        assert all(probe.inputs[0].dtype is dtype for probe in probes)


def test_a_mask_is_zero_alone_and_one_alone_and_ends_early() -> None:
    ids, mask = InputDomain(torch.int64, ((8, 8),), (0, 49)), InputDomain(torch.int64, ((8, 8),))
    probes = probe_inputs([torch.zeros(1, 8, dtype=torch.int64)] * 2, [ids, mask])
    masks = [probe.inputs[1] for probe in probes if len(probe.inputs[0].unique()) > 3]
    assert any((each == 0).all() for each in masks) and any((each == 1).all() for each in masks)
    assert any((each[:, 0] > 0).all() and (each[:, -1] == 0).all() for each in masks)


def test_a_free_dimension_is_probed_at_its_ends_and_between() -> None:
    domain = InputDomain(torch.int64, ((2, 64),), (0, 9))
    sizes = {shape[0] for shape in shapes(probe_inputs([torch.zeros(1, 16, dtype=torch.int64)], [domain]))}
    assert {2, 5, 17, 33, 64} <= sizes and min(sizes) == 2 and max(sizes) == 64


def test_a_free_dimension_without_a_maximum_is_probed_at_1_and_beyond_the_example() -> None:
    domain = InputDomain(torch.float32, ((1, None), (4, 4)))
    found = shapes(probe_inputs([torch.rand(1, 16, 4)], [domain]))
    assert {(1, 4), (17, 4), (40, 4), (65, 4)} <= found


def test_a_padded_dimension_has_only_the_sizes_that_it_is_padded_to() -> None:
    spec = TensorSpec("int64", (-1,), pad_to=(8, 32))
    handler = type("Handler", (), {"specs": [spec]})()
    domains = InputDomain.of(handler, [spec.example()])
    assert shapes(probe_inputs([spec.example()], domains)) == {(8,), (32,)}


def test_two_free_dimensions_differ_from_each_other() -> None:
    domain = InputDomain(torch.float32, ((3, 3), (1, None), (1, None)))
    found = shapes(probe_inputs([torch.rand(1, 3, 16, 16)], [domain]))
    assert any(height != width for _, height, width in found) and (3, 17, 17) in found


def test_inputs_that_share_a_dimension_share_its_size() -> None:
    for same in (("length",), ()):
        domain = InputDomain(torch.int64, ((1, None),), (0, 1), same)
        probes = probe_inputs([torch.zeros(1, 16, dtype=torch.int64)] * 2, [domain, domain])
        assert len(shapes(probes)) > 4
        assert all(probe.inputs[0].shape == probe.inputs[1].shape for probe in probes)


def test_inputs_of_other_names_differ_in_size() -> None:
    one, two = (InputDomain(torch.float32, ((1, None),), None, (name,)) for name in ("a", "b"))
    probes = probe_inputs([torch.zeros(1, 16)] * 2, [one, two])
    assert any(probe.inputs[0].shape != probe.inputs[1].shape for probe in probes)


def test_rows_of_a_batch_have_one_shape_and_different_numbers() -> None:
    items = batch_rows([torch.rand(1, 4)], [FLOATS], 5)
    assert [tuple(item[0].shape) for item in items] == [(1, 4)] * 5
    assert len({tuple(item[0].flatten().tolist()) for item in items}) == 5


def test_a_handler_without_specs_has_the_shape_of_its_example() -> None:
    assert InputDomain.of(object(), [torch.rand(1, 3, 8, 8)]) == [InputDomain(torch.float32, ((3, 3), (8, 8), (8, 8)))]


def test_rows_of_a_batch_differ_in_kind() -> None:
    ids, mask = InputDomain(torch.int64, ((8, 8),), (0, 49)), InputDomain(torch.int64, ((8, 8),))
    items = batch_rows([torch.zeros(1, 8, dtype=torch.int64)] * 2, [ids, mask], 12)
    masks = [item[1] for item in items[:6]]
    assert any((each == 1).all() for each in masks) and not any((each == 0).all() for each in masks)
    assert any(each[0, 0] == 1 and each[0, -1] == 0 for each in masks)
    assert all(len(item[0].unique()) > 3 for item in items[:6])
    assert any((item[0] == 1).all() for item in items[6:])


def test_the_first_row_of_a_batch_is_large_and_the_second_is_not() -> None:
    first, second, *_ = batch_rows([torch.rand(1, 4)], [FLOATS], 2)
    assert first[0].min() >= 64 and second[0].abs().max() == 0


def test_rows_that_are_alike_differ_by_a_thousandth_or_one_whole_number_in_range() -> None:
    ids, mask = InputDomain(torch.int64, ((8, 8),), (0, 49)), InputDomain(torch.bool, ((8, 8),))
    domains = [FLOATS, ids, mask]
    example = [torch.rand(1, 4), torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.bool)]
    first, *nearly = probe_rows(example, domains).alike
    for each in nearly:
        assert torch.allclose(each[0], first[0], rtol=1.1e-3, atol=0) and not torch.equal(each[0], first[0])
        assert [int((one != other).sum()) for one, other in zip(first[1:], each[1:], strict=True)] == [1, 1]
        assert each[1].min() >= 0 and each[1].max() <= 49
    bounded = InputDomain(torch.float32, ((4, 4),), (1, 1))
    assert all(torch.equal(item[0], torch.ones(1, 4)) for item in probe_rows([torch.ones(1, 4)], [bounded]).alike)


def test_nan_and_infinities_stand_in_inputs_that_may_hold_any_number_only() -> None:
    bounded = InputDomain(torch.float32, ((4, 4),), (0, 1))
    whole = InputDomain(torch.int64, ((4, 4),), (0, 9))
    example = [torch.rand(1, 4), torch.rand(1, 4), torch.zeros(1, 4, dtype=torch.int64)]
    nan, infinite = probe_rows(example, [FLOATS, bounded, whole]).not_finite
    assert nan[0].isnan().all() and infinite[0].isinf().all()
    assert all(0 <= number <= 9 for item in (nan, infinite) for each in item[1:] for number in each.flatten().tolist())
    assert probe_rows(example[1:], [bounded, whole]).not_finite == []
