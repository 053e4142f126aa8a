"""A network in int8: made for a backend that has it, compared with fp32, and served only if it agrees.

TorchScript has no int8, so that there is nothing to serve until it is made: this is done before READY. OpenVINO comes
first, since it is made in seconds; AOTInductor if that is named, or OpenVINO is not to be had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from pyserve.archive.archive import Archive
from pyserve.backends.calibration import Asked, calibration_files, calibration_of, no_calibration
from pyserve.backends.kept import Made
from pyserve.backends.making import Making
from pyserve.backends.precision import INT8, PrecisionAgreement, check_agreement, why_not
from pyserve.backends.shown import shown
from pyserve.backends.table import AOTINDUCTOR, BACKENDS, OPENVINO, TORCHSCRIPT
from pyserve.conversion.torchscript import Progress
from pyserve.errors import ModelLoadError
from pyserve.lanes.network import Network
from pyserve.models.backend_network import (
    Split,
    compare_backend,
    conservative_reason,
    load_backend,
    prove_backend,
    released_unless_used,
)
from pyserve.proof.comparison import ROUNDING
from pyserve.proof.native_proof import BatchProof

log = logging.getLogger(__name__)


def on_int8_backend(
    archive: Archive, network: Network, backend: str, *, batch_size: int, split: Split, timeout_s: float,
    progress: Progress, is_over: Callable[[], bool] = lambda: False,
) -> Network:  # fmt: skip
    """``network``, which was loaded in fp32, in int8; or as it is, and the reason in its findings, if it cannot be had.

    Takes ``network``: it is released if another comes back.

    Args:
        backend: the one that is named, or ``auto``.
        timeout_s: for making it, in seconds.
        is_over: nobody wants the model any more.

    Raises:
        ModelLoadError: what is asked for makes no sense, nothing can be calibrated with, or int8 answers too
            differently; the text says what to do.
    """
    name = network.context.model_name
    candidates = _candidates(archive, backend)
    reason = conservative_reason(network, batch_size)
    failures = [reason] if reason else []
    for each in [] if reason else candidates:
        try:
            made = _made(archive, network, each, batch_size=batch_size, timeout_s=timeout_s, progress=progress,
                         is_over=is_over)  # fmt: skip
            agreement = _checked(archive, made)
            candidate = _loaded(archive, network, made, batch_size=batch_size, split=split)
        except _CannotBeError as error:
            failures.append(f"{BACKENDS[each].label}: {error}")
            continue
        candidate.findings["precisionAgreement"] = _rounded(agreement)
        said = f"precision: int8; {agreement}"
        why = "; ".join([said, *failures, *([made.note] if made.note else [])])
        candidate.findings["backend"] = shown(each, why)
        log.info("%s runs in int8 on %s: %s", name, BACKENDS[each].label, why)
        network.release()
        return candidate
    why = f"'precision: int8' cannot be followed: {'; '.join(failures)}; it is served in fp32"
    log.warning("%s: %s", name, why)
    network.findings["precision"] = why
    network.findings["backend"] = shown(getattr(network.torch_model, "backend", TORCHSCRIPT), why)
    return network


class _CannotBeError(Exception):
    """It cannot be had on a backend; the text says why."""


def _candidates(archive: Archive, backend: str) -> list[str]:
    """Backends to make it for, in order.

    Raises:
        ModelLoadError: the archive asks for what there is not, or has nothing to calibrate with.
    """
    if backend == TORCHSCRIPT:
        raise ModelLoadError(f"{archive.name}: 'precision: int8' with 'backend: torchscript': {why_not(backend, INT8)}")
    if not calibration_files(archive.files):
        raise no_calibration(archive.name, archive.files)
    return [OPENVINO, AOTINDUCTOR] if backend == "auto" else [backend]


def _made(
    archive: Archive, network: Network, backend: str, *, batch_size: int, timeout_s: float, progress: Progress,
    is_over: Callable[[], bool],
) -> Made:  # fmt: skip
    reason = why_not(backend, INT8) or BACKENDS[backend].missing()
    if reason:
        raise _CannotBeError(reason)
    progress(f"making it in int8 for {BACKENDS[backend].label}")
    (made,) = Making(archive, [backend], INT8, batch_size, nice=0, is_over=is_over).wait(progress, timeout_s)
    if made.error:
        # If it is for the files, no other backend can do better: that raises.
        calibration_of(archive, Asked(network.handler, network.context, network.example, network.domains), INT8)
        raise _CannotBeError(made.error)
    return made


def _checked(archive: Archive, made: Made) -> PrecisionAgreement:
    """Raises ModelLoadError: it does not agree as far as model-config.yaml asks for."""
    if made.agreement is None:
        raise _CannotBeError("it was not compared with fp32")
    agreement = PrecisionAgreement.from_json(made.agreement)
    check_agreement(archive.name, made.backend, INT8, agreement, archive.config.precision_agreement_min)
    return agreement


def _loaded(archive: Archive, network: Network, made: Made, *, batch_size: int, split: Split) -> Network:
    own = replace(network, precision=INT8, tolerance=ROUNDING[INT8])
    if network.batches is not None:
        own.batches = _proof_of(network.batches)
    try:
        candidate = load_backend(archive, own, made, split)
    except ModelLoadError as error:
        raise _CannotBeError(error.message) from error
    with released_unless_used(candidate):
        compared = compare_backend(own, candidate)
        problem = compared.objection or prove_backend(network, candidate, batch_size)
        if problem:
            raise _CannotBeError(f"it answers in another way: {problem}")
        candidate.torch_model.settle()
    return candidate


def _proof_of(before: BatchProof) -> BatchProof:
    """What is to be shown of batches. A batch with NaN or infinities runs in fp32 as a whole, which is nearer to the
    truth for the items beside them, but not what int8 gives for them alone: that is not compared."""  # fmt: skip
    rows = replace(before.rows, not_finite=[])
    others = [replace(each, not_finite=[]) for each in before.others]
    return replace(before, rows=rows, others=others, tolerance=ROUNDING[INT8])


def _rounded(agreement: PrecisionAgreement) -> dict[str, float | int]:
    """For a description: what is known, four digits."""
    found = {key: value for key, value in agreement.to_json().items() if value is not None}
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}


def refuse_off_cpu(archive: Archive, devices: Sequence[str]) -> None:
    """Raises ModelLoadError where int8 is asked for on an accelerator."""
    if archive.config.precision == INT8 and any(each != "cpu" for each in devices):
        raise ModelLoadError(
            f"{archive.name}: 'precision: int8' is for CPUs, and it is to run on {devices[0]}; write 'deviceType: cpu' "
            "or another precision (bf16, fp16) in model-config.yaml"
        )
