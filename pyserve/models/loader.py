"""From an archive to a network in the native engine: finds the handler, traces eager models, loads the weights.

Runs in a thread of its own; nothing here touches the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyserve import TORCHSERVE_VERSION
from pyserve.archive.archive import Archive
from pyserve.backends.precision import INT8, plain_precision, precision_note
from pyserve.backends.table import TORCHSCRIPT
from pyserve.context import ThreadContext
from pyserve.conversion.exported import exported_rules, fit_inputs
from pyserve.conversion.record import TORCHSCRIPT_SUFFIXES, compile_reason
from pyserve.conversion.torchscript import (
    NeedsPythonError,
    Progress,
    Tracing,
    conversion_of,
    is_converted,
    native_example,
    needs_tracing,
    python_reason,
    traced_file,
)
from pyserve.devices import CPU, count, give_back, index_of
from pyserve.engine import load_core
from pyserve.errors import ModelLoadError, is_memory_error
from pyserve.handler import Handler
from pyserve.handlers.loading import without_model_file
from pyserve.handlers.pixels import Normalization
from pyserve.handlers.safetensors_file import SUFFIX as SAFETENSORS
from pyserve.lanes.device_batching import batching_options
from pyserve.lanes.device_copies import no_room, spread
from pyserve.lanes.network import Network
from pyserve.lanes.numa import cpus_near_devices
from pyserve.lanes.warm_up import warm_up_items
from pyserve.models.backend_network import Split, on_named_backend
from pyserve.models.first_answer import rehearse
from pyserve.models.fitting import fitting_devices
from pyserve.models.int8_network import on_int8_backend, refuse_off_cpu
from pyserve.models.kept_backend import on_kept_backend
from pyserve.models.later_layout import IN_LAYOUT, LATER, LATER_MIN_S
from pyserve.models.pixels import choose_jpeg_decoder, choose_pixels, prove_pixels
from pyserve.proof.batch_probe import rows_are_independent
from pyserve.proof.comparison import ROUNDING
from pyserve.proof.graph_reads import program_reads
from pyserve.proof.native_proof import BUDGET_S, BatchProof, find_state, prove_optimization, single_row_differs
from pyserve.proof.package_machine import check_machine
from pyserve.proof.package_rules import (
    SPECIALIZED_MIN,
    Program,
    check_filling,
    is_compiled,
    out_structure,
    read_program,
)
from pyserve.proof.probe_inputs import ITEMS_MAX, InputDomain, ProbeRows, batch_rows, other_examples, probe_rows
from pyserve.torch_error import cause_of
from pyserve.worker.handler_choice import load_handler

log = logging.getLogger(__name__)

PYTHON_SUFFIXES = (".onnx", ".so")
# Sizes of free dimensions at which batches are tried, beside the example's.
OTHER_SHAPES = 2
# As csrc/graph_state.h has it.
NOT_IN_THREADS = {
    "forward seeds torch's random numbers": "which all models of the server would draw from",
    "forward makes nested tensors": "whose operators may end the process",
}
# Relative to fp32; model-config.yaml's precisionErrorMax sets another limit.
PRECISION_ERROR_MAX = 0.05


def load_network(
    archive: Archive, *, name: str, devices: Sequence[str], batch_size: int, cpu_budget: int,
    limit_max_image_pixels: bool, startup_timeout_s: float, progress: Progress, workers: int = 1,
    tracing: Tracing | None = None, backend: str = "auto", is_over: Callable[[], bool] = lambda: False,
    defers: bool = False,
) -> Network:  # fmt: skip
    """Loads the network of ``archive`` onto the first of ``devices``.

    Args:
        devices: where its workers are to run, in turn.
        workers: how many there are to be at first; as many of ``devices`` get the weights.
        tracing: a conversion of this archive that was started already.
        backend: what it is to run on where model-config.yaml does not say; one that is named is made first.
        is_over: nobody wants the model any more: its conversion, and what is being made for a backend, is to end.
        defers: of a large model that is converted just now, oneDNN's layout is left for behind its first requests, see
            ``Network.in_layout``.

    Raises:
        ServeError: of any kind; the text names what is wrong with the archive and how to fix it.
    """
    handler = load_handler(archive)
    archive.check_complete()
    devices = fitting_devices(archive, devices)
    device = devices[0]
    # Ours writes nothing.
    folder = archive.model_dir if handler_is_built_in(handler) else archive.own_folder()
    context = ThreadContext(
        name,
        str(folder),
        archive.manifest.raw,
        batch_size,
        index_of(device),
        TORCHSERVE_VERSION,
        limit_max_image_pixels,
        model_yaml_config=archive.config.raw,
    )
    handler.prepare(context)
    handler.device = torch.device("cpu")  # the engine brings inputs to the model's device and outputs back
    example = list(native_example(handler, context))
    network = Network(handler, context, None, example, device, list(devices))
    network.is_bound = bool(archive.config.device_ids)
    refuse_off_cpu(archive, devices)
    network.precision = plain_precision(archive.config.precision)
    network.tolerance = ROUNDING[network.precision]
    domains = network.domains = InputDomain.of(handler, example)
    program = _read_package(archive, network, domains)
    choose_pixels(network)
    random_state = torch.get_rng_state()
    waits = _convert(archive, startup_timeout_s, progress, tracing, is_over)
    load = partial(
        _load_weights, archive, network.example, device, precision=network.precision, pixels=network.pixels,
        domains=domains, program=program, package_runners_max=cpu_budget, progress=progress,
    )  # fmt: skip
    if waits and defers and (device, network.precision, archive.config.memory_format) == (CPU, "fp32", None):
        network.in_layout = partial(load, progress=lambda text: None)
    if network.precision != "fp32" and device == CPU:
        network.in_fp32 = partial(load, precision="fp32", optimizes=False, progress=lambda text: None)
    if network.precision == "fp32" and device == CPU and (program is None or not program.is_compiled):
        network.in_double = partial(_load_script, archive)
    network.torch_model = load(optimizes=network.in_layout is None)
    _note_compilation(archive, network)
    if device != "cpu":
        network.near_cpus = cpus_near_devices(torch.device(device).type, count())
    progress("trying it")
    _prove(archive, network, domains, program, batch_size, is_built_in=handler_is_built_in(handler))
    network = _on_backend(
        archive, network, archive.config.backend or backend, batch_size=batch_size,
        split=Split.of(workers, cpu_budget), timeout_s=startup_timeout_s, progress=progress, is_over=is_over,
    )  # fmt: skip
    spread(network, workers, archive.name)
    torch.set_rng_state(random_state)
    network.torch_model.settle()
    give_back()  # what trying it took, and is in no stream's reach that its workers have
    return network


def _on_backend(
    archive: Archive, network: Network, backend: str, *, batch_size: int, split: Split, timeout_s: float,
    progress: Progress, is_over: Callable[[], bool],
) -> Network:  # fmt: skip
    """``network`` on the backend that it is to begin on."""
    given: dict[str, Any] = {"batch_size": batch_size, "split": split}
    made: dict[str, Any] = {**given, "timeout_s": timeout_s, "progress": progress, "is_over": is_over}
    if archive.config.precision == INT8:
        if archive.config.backend is None and backend == TORCHSCRIPT:
            backend = "auto"  # int8 is the model's own word, which goes before the server's
        return on_int8_backend(archive, network, backend, **made)
    if backend == "auto":
        return on_kept_backend(archive, network, **given)
    return on_named_backend(archive, network, backend, **made)


def handler_is_built_in(handler: Handler) -> bool:
    """Whether its class comes with pyserve; else it was imported from an archive."""
    return type(handler).__module__.startswith("pyserve.handlers.")


def _read_package(archive: Archive, network: Network, domains: list[InputDomain]) -> Program | None:
    """What the archive's ``.pt2`` file was compiled or exported for; None if it has none. Fits the example and
    ``domains`` to it.

    Raises:
        ModelLoadError: requests cannot be checked, or it does not go with what model-config.yaml says.
    """
    weights = archive.weights
    if weights is None or archive.manifest.model_file is not None or weights.suffix != ".pt2":
        return None
    if is_converted(archive):
        program = exported_rules(archive)
    else:
        path = weights.as_file()
        is_compiled(path)  # for its error, of a damaged file
        check_machine(path, f"{archive.name}: {weights.name}")
        program = read_program(path, f"{archive.name}: {weights.name}")
    network.example, domains[:], names = fit_inputs(program, network.handler, network.example, domains, archive.name)
    network.rules = program.rules(names, domains)
    return program


def _note_compilation(archive: Archive, network: Network) -> None:
    """Says why ``pt2`` in model-config.yaml changes nothing, where it does not."""
    reason = compile_reason(archive)
    if not reason:
        return
    said = f"{reason}, which compiles eager models; this one runs as it is"
    if archive.manifest.model_file is not None:
        said = f"{reason}; 'backend: {archive.config.backend}' there is followed in its place"
    network.findings["pt2"] = said
    log.warning("%s: %s", archive.name, said)


def _prove(
    archive: Archive, network: Network, domains: list[InputDomain], program: Program | None, batch_size: int, *,
    is_built_in: bool,
) -> None:  # fmt: skip
    """Finds out what may be believed of a network that was loaded, and answers a first request with it.

    Raises:
        ModelLoadError: it cannot be answered, or its precision is too low.
    """
    model, config = network.torch_model, archive.config
    example = network.on_device(network.example)
    conversion = conversion_of(archive) if is_converted(archive) else None
    rows_max = program.rows_max if program is not None else None
    if program is not None and not program.is_compiled:
        program = None  # it is TorchScript by now
    if conversion is not None:
        network.findings["conversion"] = f"{conversion.how}: {conversion.reason}"
        log.info("%s: its model is %s: %s", network.context.model_name, conversion.how, conversion.reason)
    if program is not None:
        network.restored = out_structure(model.call_spec())
    precision = network.precision
    _check_precision(archive, network, precision)
    if program is not None and program.written:
        model.note_state(f"the package writes to its buffer {program.written[0]}, or gives it away")
    if model.state in NOT_IN_THREADS:
        raise NeedsPythonError(f"{model.state}, {NOT_IN_THREADS[model.state]}")
    unchanged = model.checksum()
    prove_pixels(network)
    choose_jpeg_decoder(network, config.jpeg_decoder)
    if model.is_channels_last and program is None:
        chosen = f", as suits convolutions at {precision} on {network.device}" if config.memory_format is None else ""
        network.findings["memoryFormat"] = f"channels_last{chosen}"
    if model.device_note:
        network.findings["devices"] = model.device_note
    odd = prove_optimization(model, network.example, domains)
    if network.in_layout is not None:
        network.findings["optimization"] = LATER
    elif odd:
        model.forget_optimization()
        network.findings["optimization"] = f"left out: it changes what is computed for {odd}"
        log.info("%s: runs without oneDNN's layout, which changes what is computed for %s",
                 network.context.model_name, odd)  # fmt: skip
    elif model.is_optimized:
        network.findings["optimization"] = IN_LAYOUT
    elif model.optimization_note:
        network.findings["optimization"] = model.optimization_note
    try:
        answered = rehearse(
            archive.name, network.handler, network.context, network.example, network.run, is_built_in=is_built_in
        )
    except ModelLoadError as error:
        if not is_converted(archive):
            raise
        raise NeedsPythonError(error.message) from error  # the model itself may do better; worker processes try it too
    find_state(model, example, is_package=program is not None, unchanged=unchanged)  # it has run by now
    _note_state(network)
    network.warm_up = warm_up_items(network.example, domains, answered, network.usual_item)
    network.batching = batching_options(config, batch_rows(network.example, domains, ITEMS_MAX))
    own = model.instance()
    network.batches = BatchProof(
        lambda inputs: network.run_on(own, inputs),
        _rows_to_try(network, domains),
        ROUNDING[precision],
        rows_max,
        config.batch_dependent == "allowed",
        lambda: _looks_at_numbers(archive) if program is None else "",
        [probe_rows(each, domains) for each in other_examples(network.example, domains, OTHER_SHAPES)],
    )
    network.batches.extend(batch_size, BUDGET_S)


def _note_state(network: Network) -> None:
    model = network.torch_model
    if not model.state:
        return
    if network.in_layout is not None:
        network.in_layout = None
        del network.findings["optimization"]
    network.findings["state"] = model.state
    log.info("%s: each worker has a model of its own, since %s", network.context.model_name, model.state)


def _rows_to_try(network: Network, domains: list[InputDomain]) -> ProbeRows:
    rows = probe_rows(network.example, domains)
    # An index made of what is no number ends an accelerator for the whole process.
    return rows if network.device == CPU else replace(rows, not_finite=[])


def _looks_at_numbers(archive: Archive) -> str:
    """Why items of one batch may depend on each other, though no trial shows it: a branch may be taken for one number
    in a million only. ``""`` if the model's code never looks at numbers.
    """
    made = is_converted(archive)
    conversion = conversion_of(archive) if made else None
    reads = conversion.reads if conversion is not None else ""
    try:
        if not reads and conversion is not None:
            with open(traced_file(archive), "rb") as file:
                reads = program_reads(file)
        elif archive.weights is not None and not made:
            with archive.weights.open() as file:
                reads = program_reads(file)
    except Exception as error:  # torch's, of many classes
        return f"its graph cannot be searched: {cause_of(str(error)) or type(error).__name__}"
    return f"its forward looks at the numbers of a whole batch ({reads})" if reads else ""


def _check_precision(archive: Archive, network: Network, precision: str) -> None:
    if precision == "fp32":
        return
    error, limit = network.torch_model.precision_error, archive.config.precision_error_max or PRECISION_ERROR_MAX
    log.info("%s: largest difference of %s to fp32 on inputs made up for it: %.1e (relative)",
             archive.name, precision, error)  # fmt: skip
    network.findings["precisionError"] = error
    if network.torch_model.is_autocast:
        network.findings["precision"] = f"torch's autocast to {precision}: the model does not run at it throughout"
    if network.device == CPU and (note := precision_note("torchscript", precision)):
        network.findings["precision"] = "; ".join(filter(None, [network.findings.get("precision"), note]))
        log.warning("%s: %s", archive.name, note)
    if not error <= limit:
        raise ModelLoadError(
            f"{archive.name}: with 'precision: {precision}' an answer differs from fp32's by "
            f"{error:.1%}, more than precisionErrorMax ({limit:.0%}); take precision out of model-config.yaml, or "
            "raise precisionErrorMax there if that much is good enough"
        )


def _convert(
    archive: Archive, timeout_s: float, progress: Progress, tracing: Tracing | None, is_over: Callable[[], bool]
) -> bool:
    """Makes TorchScript of an eager model, unless it is kept. Returns whether somebody has waited for it, and the model
    is so large that all else should come behind its first answer.

    Raises:
        NeedsPythonError: it cannot be made.
        ModelLoadError: the model cannot be built.
    """
    if reason := python_reason(archive):
        raise NeedsPythonError(reason)
    if not is_converted(archive) or not needs_tracing(archive):
        return False
    (tracing or Tracing(archive)).wait(progress, timeout_s, is_over)
    made = conversion_of(archive)
    return made is not None and made.run_s >= LATER_MIN_S


def _load_weights(
    archive: Archive,
    example: list[torch.Tensor],
    device: str,
    *,
    precision: str,
    pixels: Normalization | None,
    package_runners_max: int,
    domains: list[InputDomain],
    program: Program | None,
    progress: Progress,
    optimizes: bool = True,
) -> Any:
    weights = archive.weights
    options: dict[str, Any] = {
        "optimizes": optimizes,
        "device": device,
        "precision": precision,
        "channels_last": archive.config.memory_format == "channels_last",
        "chooses_layout": archive.config.memory_format is None,
        "pixels": pixels,
    }
    if options["precision"] != "fp32" or device != CPU:
        options["others"] = [list(item) for item in batch_rows(example, domains, ITEMS_MAX)]
    if is_converted(archive):
        progress("loading the TorchScript")
        try:
            return _load(archive.name, traced_file(archive), example, options)
        except ModelLoadError as error:
            # The model itself works, as the conversion has shown.
            raise NeedsPythonError(error.message) from error
    if weights is None:
        raise ModelLoadError(
            f"{archive.name} has neither --serialized-file nor --model-file, so there is no model in it; repack it"
        )
    progress(f"reading {weights.name} ({weights.size / 1e6:.0f} MB)")
    if program is not None:
        return _load_package(archive.name, weights.as_file(), example, program,
                             {**options, "backend": "aotinductor", "runners_max": package_runners_max})  # fmt: skip
    if weights.suffix in PYTHON_SUFFIXES:
        raise NeedsPythonError(f"{weights.name} is loaded by libraries that are called from Python")
    if weights.suffix == SAFETENSORS:
        raise ModelLoadError(f"{archive.name}: {without_model_file(weights.name)}")
    if weights.suffix not in TORCHSCRIPT_SUFFIXES:
        raise ModelLoadError(
            f"{archive.name}: {weights.name} is neither TorchScript ({', '.join(TORCHSCRIPT_SUFFIXES)}) nor a .pt2 "
            "package; export the model to one of these, or pack its --model-file too"
        )
    with weights.pinned() as descriptor:
        # Opened again through the descriptor: the archive may have been replaced under its name meanwhile.
        return _load(archive.name, Path(f"/proc/self/fd/{descriptor}"), example,
                     {**options, "offset": weights.offset, "size": weights.size})  # fmt: skip


def _load_script(archive: Archive) -> torch.jit.ScriptModule:
    """Its TorchScript, as torch loads it."""
    if is_converted(archive):
        return torch.jit.load(str(traced_file(archive)), map_location=CPU)
    assert archive.weights is not None
    with archive.weights.open() as file:
        return torch.jit.load(file, map_location=CPU)


def _load_package(
    label: str, path: Path, example: list[torch.Tensor], program: Program, options: dict[str, Any]
) -> Any:
    domains = [InputDomain(each.dtype, tuple((size, size) for size in each.shape[1:])) for each in example]
    items = batch_rows(example, domains, ITEMS_MAX)
    if any(each.is_channels_last for each in program.inputs):
        options["channels_last"] = True
    elif options["channels_last"]:
        raise ModelLoadError(
            f"{label}: the package was compiled for contiguous inputs; take memoryFormat out of model-config.yaml"
        )
    model = _load(label, path, example, {**options, "rows_min": program.rows_min})
    if program.takes_one_row_unsaid:
        # If rows depend on each other, two copies of a row are another question than the row alone.
        if single_row_differs(model, example) and rows_are_independent(model.run, items, SPECIALIZED_MIN):
            model = _load(label, path, example, {**options, "rows_min": SPECIALIZED_MIN})
    else:
        check_filling(model.run, program, label)
    return model


def _load(label: str, path: Path, example: list[torch.Tensor], options: dict[str, Any]) -> Any:
    try:
        return load_core().TorchModel.load(str(path), example, **options)
    except (RuntimeError, ValueError) as error:
        if is_memory_error(error) and options["device"] != CPU:
            raise no_room(label, options["device"]) from error
        reason = cause_of(str(error)) or type(error).__name__
        fix = ""
        if "constants.pkl" in reason or "PytorchStreamReader" in reason:
            fix = (
                ". It looks like a state dict or a damaged file: pack a TorchScript file (torch.jit.save), or pack "
                "the model's class too with --model-file"
            )
        if options.get("backend") == "aotinductor":
            fix = f". Compile it again with this torch ({torch.__version__}) on this kind of machine"
        raise ModelLoadError(f"{label}: its weights cannot be loaded: {reason}{fix}") from error
