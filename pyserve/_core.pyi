"""The contract of the native engine (csrc/bindings.cpp). Times are ns of ``time.monotonic_ns()``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

torch_version: str

HistogramSnapshot = tuple[list[float], list[int], float]

class InputRefused(ValueError):
    """A request's input is not what the program was compiled for; the text is for the client."""

class TorchModel:
    @staticmethod
    def load(
        path: str,
        example: list[torch.Tensor],
        *,
        offset: int = 0,
        size: int = -1,
        # "torchscript", "aotinductor" (`path` is a .pt2 package) or "openvino" (an .xml with its .bin; `library` is its
        # C library). ``plain`` (path, offset, size) is the same network as TorchScript, which answers what the other
        # was not tried for: inputs that do not fit ``rules`` (as `Lane.set_input_rules` takes them; by default the
        # example's types and sizes), whole numbers outside ``value_ranges``, batches above ``rows_max``, numbers that
        # are not ordinary.
        backend: str = "torchscript",
        library: str = "",
        plain: tuple[str, int, int] | None = None,
        rules: list[tuple[str, torch.dtype, list[tuple[int, int, str]]]] = ...,
        value_ranges: list[tuple[int, int] | None] = ...,
        rows_max: int = 0,
        device: str = "cpu",
        precision: str = "fp32",
        channels_last: bool = False,
        optimizes: bool = True,
        # Of others than TorchScript: batches that may run at once. Of OpenVINO: workers and threads of each at first.
        runners_max: int = 1,
        workers: int = 1,
        threads: int = 1,
        rows_min: int = 1,
        others: list[list[torch.Tensor]] = ...,
        pixels: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None,  # mean, std
        chooses_layout: bool = False,
    ) -> TorchModel: ...
    def run(self, inputs: list[torch.Tensor]) -> Any: ...
    def run_plain(self, inputs: list[torch.Tensor]) -> Any: ...
    # What pictures as bytes [n, height, width, 3] become if it was loaded with ``pixels``; another input as it is.
    def numbers_of(self, input: torch.Tensor) -> torch.Tensor: ...
    def instance(self) -> TorchModel: ...
    def copy_on(self, device: str) -> TorchModel: ...  # with all that is known of it
    # Threads of a run, and workers (0: as before), where they are compiled in: soon, beside the requests; or when it
    # returns.
    def use_threads(self, count: int, workers: int = 0) -> None: ...
    def prepare_threads(self, count: int, workers: int = 0) -> None: ...
    def forget_optimization(self) -> None: ...
    def settle(self) -> None: ...
    def checksum(self) -> int: ...
    def call_spec(self) -> list[str]: ...
    def note_state(self, text: str) -> None: ...
    @property
    def state(self) -> str: ...  # what calls leave behind in the model; "" for nothing
    @property
    def backend(self) -> str: ...
    @property
    def streams_and_threads(self) -> tuple[int, int]: ...  # runs at once and threads of each; (0, 0) if not compiled in
    @property
    def plain_runs(self) -> int: ...  # those that ``plain`` had to answer
    @property
    def is_autocast(self) -> bool: ...
    @property
    def weights_size(self) -> int: ...
    @property
    def precision_error(self) -> float: ...
    @property
    def device_note(self) -> str: ...  # what became of devices that its code names
    @property
    def is_channels_last(self) -> bool: ...
    @property
    def is_optimized(self) -> bool: ...
    @property
    def optimization_note(self) -> str: ...  # why it is not although it could be

class Completion:
    """One batch that came to an end. ``owners[i]`` belongs to row ``i`` of ``output``; None if it was cancelled."""

    owners: list[Any]
    answers: list[tuple[int, int, bytes, bytes | memoryview]]
    expired: list[Any]
    stamps: list[tuple[int, int]]
    code: str
    message: str
    started_at: int
    staged_at: int
    finished_at: int
    batch_size: int  # of the batch that they were part of
    release: str  # why it left the queue: idle, full, bytes, min_batch, delay, deadline, closing
    was_alone: bool  # of worker_died and not_begun: nothing else can have been the cause
    @property
    def output(self) -> Any: ...
    @property
    def finished(self) -> Any: ...  # what `Lane.set_finish` asked for; None if the output is left as it is
    def rows(self) -> list[bytes | memoryview | None] | None: ...
    @property
    def row_lane(self) -> Any: ...  # the owner of `LaneRows` that had requests among these; None if there were none
    @property
    def row_counts(self) -> list[tuple[str, list[int], int, float, float]]:
        """Answers that have left: version as in the URL, counts by duration, how many, durations and waits, s."""

    @property
    def row_arrived_at(self) -> int: ...  # of the first of them, ns; 0 if none has left

class Engine:
    def __init__(self) -> None: ...
    def fileno(self) -> int: ...
    def drain(self) -> list[Completion]: ...
    @property
    def signals(self) -> int: ...
    @property
    def lost_count(self) -> int: ...  # workers of all lanes that were given up and have not come back

class ThreadRuns:
    """The runs of `TorchModel` on one thread, so that another thread can end them."""

    def __init__(self) -> None: ...
    def enter(self) -> None: ...  # the calling thread's are these from now on
    def leave(self) -> None: ...
    # The one that goes on raises at its next operator, later ones at once; to be repeated.
    def refuse(self) -> None: ...
    @property
    def since(self) -> int: ...  # when the one that goes on began; 0 if none does

class Lane:
    def __init__(self, engine: Engine, model: TorchModel, example: list[torch.Tensor], capacity: int) -> None: ...
    def submit(
        self,
        owner: object,
        inputs: torch.Tensor | list[torch.Tensor],
        arrived_at: int,
        deadline: int,
        announces: bool = True,
        wants_output: bool = False,  # the model's own, whatever `set_finish` says
    ) -> int: ...
    def submit_bytes(
        self, owner: object, body: bytes | bytearray | memoryview, arrived_at: int, deadline: int
    ) -> int: ...
    # (name, dtype, [(smallest size, largest size, symbol), ...] without the batch) of each input.
    def set_input_rules(self, rules: list[tuple[str, torch.dtype, list[tuple[int, int, str]]]]) -> None: ...
    # What workers make of scores: "none", "ranked" (probabilities and classes [n, count], the most probable first) or
    # "classes" ([n, height, width, 2]: class and probability of each pixel). Before `set_workers`.
    def set_finish(self, kind: str, count: int) -> None: ...
    # Of batches on an accelerator, before there are workers: why none is filled up or recorded, the sizes to run, and
    # rows [1, ...] per input to compare batches with.
    def set_batching(
        self, *, no_padding: str = "", no_graphs: str = "", sizes: list[int] = ..., rows: list[list[torch.Tensor]] = ...
    ) -> None: ...
    # Why there are no ``graphs`` and no ``padding``, "" if there are; the ``sizes`` that were warmed up.
    def batching_notes(self) -> dict[str, Any]: ...
    # What workers run beside the example before they are ready, begun ``items_limit_s`` after they were at the latest,
    # and sizes of batches between one and the largest, ``sizes_limit_s`` at the latest. Before there are workers.
    def set_warm_up(
        self, *, items: list[list[torch.Tensor]] = ..., items_limit_s: float = 0.0, sizes_limit_s: float = 0.0
    ) -> None: ...
    # (item, rows, why it was left out, "" if it was run), in order; item 0 is the example.
    def warm_up_runs(self) -> list[tuple[int, int, str]]: ...
    def announce(self) -> None: ...
    def has_room(self, waiting_max: int) -> bool: ...
    def cancel(self, ticket: int) -> bool: ...
    def started_at(self, ticket: int) -> int: ...
    def set_limits(
        self, *, batch_size_max: int, batch_size_min: int, batch_delay_max_ns: int, running_max: int
    ) -> None: ...
    def set_intra_op_threads(self, count: int) -> None: ...
    # Workers of that device keep to these CPUs; only before there are any workers.
    def set_cpus(self, device: str, cpus: list[int]) -> None: ...
    # The model, once on each device; new workers go to the one with the fewest.
    def set_models(self, models: list[TorchModel]) -> None: ...
    # Another for the same requests, on a CPU: workers take it between two batches, once they have warmed it up.
    # ``set_models`` ends the exchange; the one before may be offered again to take it back.
    def exchange_model(self, model: TorchModel) -> None: ...
    # Workers that still run the model before, and why one of them goes on with it.
    def exchange_state(self) -> tuple[int, str]: ...
    def set_workers(self, count: int) -> None: ...
    def reap(self) -> None: ...
    # Makes the batch fail that a worker began at ``since``, as soon as it calls an operator; to be repeated.
    def interrupt(self, id: int, since: int) -> bool: ...
    def lose(self, id: int) -> bool: ...  # gives a worker up: nobody waits for it any more
    def forget_ceiling(self) -> None: ...
    def purge(self) -> None: ...
    def close(self) -> None: ...
    def join(self) -> None: ...
    def workers(self) -> list[dict[str, Any]]: ...
    def stats(self) -> dict[str, Any]: ...
    @property
    def running_since(self) -> int: ...  # when the oldest batch began, of workers that are not lost; 0 if none runs
    @property
    def lost_count(self) -> int: ...
    @property
    def ceiling(self) -> int: ...  # the largest batch that fits the device's memory; 0 while nothing has shown one
    @property
    def ready_count(self) -> int: ...
    @property
    def queue_size(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def running(self) -> int: ...

class Body:
    """Memory behind the memoryview of a large answer."""

class Row:
    """A row of an output, behind a memoryview."""

class ProcessLane:
    """The python lane of one version: requests are bytes, workers are processes."""

    def __init__(self, engine: Engine, capacity: int) -> None: ...
    def submit(
        self,
        owner: object,
        head: bytes,
        body: bytes | bytearray | memoryview,
        flags: int,
        arrived_at: int,
        deadline: int,
    ) -> int: ...
    def has_room(self, waiting_max: int) -> bool: ...
    def cancel(self, ticket: int) -> bool: ...
    def started_at(self, ticket: int) -> int: ...
    def batch_size_of(self, ticket: int) -> int: ...
    def set_limits(
        self, *, batch_size_max: int, batch_size_min: int, batch_delay_max_ns: int, running_max: int
    ) -> None: ...
    def set_intra_op_threads(self, count: int) -> None: ...
    def add_worker(
        self, socket_fd: int, request_memory_fd: int, answer_memory_fd: int, *, in_flight_max: int = 0
    ) -> int: ...
    def stop_worker(self, id: int) -> None: ...
    def remove_worker(self, id: int) -> None: ...
    def purge(self) -> None: ...
    def close(self) -> None: ...
    def join(self) -> None: ...
    def workers(self) -> list[dict[str, Any]]: ...
    def stats(self) -> dict[str, Any]: ...
    @property
    def ready_count(self) -> int: ...
    @property
    def queue_size(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def running(self) -> int: ...

class WorkerBatch:
    """A batch as a worker process receives it; items are (ticket, flags, head, body)."""

    id: int
    intra_op_threads: int
    items: list[tuple[int, int, bytes, bytearray]]

class WorkerChannel:
    """A worker process's end of the wire."""

    def __init__(self, socket_fd: int, request_memory_fd: int, answer_memory_fd: int) -> None: ...
    def receive(self, timeout_ms: int = -1) -> WorkerBatch | None: ...
    def begin(self, batch_id: int) -> None: ...
    def begin_alone(self, ticket: int) -> bool: ...
    def send(
        self, batch_id: int, answers: list[tuple[int, int, int, bytes, bytes | bytearray | memoryview]]
    ) -> None: ...
    def is_cancelled(self, ticket: int) -> bool: ...
    def cancelled_tickets(self) -> list[int]: ...
    def fileno(self) -> int: ...

class JsonNumbers:
    """A regular array of numbers: a buffer of int64, or of float64 if one has a fraction or an exponent."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def is_float(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def json_plan(text: str, piece: int, takes_numbers: bool) -> tuple[list[tuple[int, int, int]], list[JsonNumbers]]:
    """Where to cut ``text``, as (step, begin, end), see csrc/json_plan.h, and the arrays of the steps ``numbers``.

    Does not hold the interpreter meanwhile.
    """

def json_depth(body: bytes | bytearray | memoryview) -> int:
    """How deep arrays and objects are nested; of something that is not JSON, some number."""

def has_graphs(kind: str) -> bool: ...  # of devices of this kind, such as "cuda"
def now_ns() -> int: ...

# Whether a device writes a number within the time: ("well", ""), ("lost", why) or ("silent", "").
def probe_device(device: str, limit_s: float) -> tuple[str, str]: ...
def note_lost_device(device: str, reason: str) -> bool: ...  # False if it was known
def lost_devices() -> list[tuple[str, str]]: ...  # of this process, with the reason of each

class LaneRows:
    """Requests of front ends whose bodies are tensors, in one lane: taken and answered without Python.

    Args:
        lane: a `Lane` of a model that takes one tensor of the host; kept.
        owner: gives who has ``watch_rows()`` and ``adopt(link, ticket, head, url_version)``, or None.
        bounds: of durations, s.
        stage_bounds: of what is done to a request here before and after the engine, s.

    Attributes:
        count: requests that are under way.
        is_open: whether more are taken.
        is_watched: whether somebody looks at their time limits; `owner` is asked to when a request finds that not so.
    """

    count: int
    is_open: bool
    is_watched: bool

    def __init__(
        self, lane: Lane, owner: Callable[[], Any], bounds: Sequence[float], stage_bounds: Sequence[float]
    ) -> None: ...
    def take_stages(self) -> tuple[tuple[list[int], float], tuple[list[int], float]]:
        """Counts for each of ``stage_bounds`` and above, none at all for nothing, and the sum in s: of bodies that
        became tensors here, and of outputs that became answers, since this was last asked."""

    def set_limits(self, *, is_open: bool, waiting_max: int, queue_limit_ns: int, answer_size_max: int) -> None: ...
    def take_overdue(self, now: int, queue_limit_ns: int, run_limit_ns: int) -> list[tuple[Any, int, bytes, str, int]]:
        """Requests that wait, or run, for too long; they are the caller's from now on, who gives them an owner.

        Each is (link, the front end's ticket, head, version as in the URL, the lane's ticket).
        """

    def take_all(self, *, waiting_only: bool) -> list[tuple[Any, int, bytes, str, int]]: ...
    def give(self, ticket: int, owner: object) -> bool:
        """Has `owner` own a request of `take_all` or `take_overdue`; False if it has come to its end."""

class RowTable:
    """What front ends may send as tensors: a number, and places in a list."""

    def __init__(self) -> None: ...
    def set(self, generation: int, routes: Sequence[tuple[LaneRows, str]]) -> None:
        """Each route with the version as in the URL. Rows that name another generation have to come again."""

class Writer:
    """As `_front.Writer`."""

    has_waiting: bool

    def __init__(self, fd: int, offset: int, size: int) -> None: ...
    def put(
        self, kind: int, flags: int, ticket: int, head: bytes, body: bytes | bytearray | memoryview, total: int
    ) -> bool: ...
    def reader_sleeps(self) -> bool: ...
    def wait_for_room(self) -> None: ...

class Reader:
    """As `_front.Reader`."""

    def __init__(
        self, fd: int, offset: int, size: int, *, body_size_max: int, coming_size_max: int, keeps_bodies: bool
    ) -> None: ...
    def take(self, count_max: int) -> list[Any]: ...
    def sleep(self) -> bool: ...
    def writer_waits(self) -> bool: ...

class FrontRows:
    """The same of one front end.

    Args:
        link: has ``send_row(ticket, head, body)``, ``send_again(ticket)`` and ``adopt(ticket, head)``; kept until
            `close`.
        wake: the front end's eventfd.
        count_max, size_max: requests, and bytes of their tensors, that are under way. More ends the link.

    Attributes:
        count, size: of what is under way.
        request_count: of what was taken so far.
    """

    count: int
    size: int
    request_count: int

    def __init__(
        self, link: object, writer: Writer, wake: int, table: RowTable, count_max: int, size_max: int
    ) -> None: ...
    def read_from(self, reader: Reader) -> None:
        """Has ``reader`` hand over frames of kind `ROW`."""

    def cancel(self, ticket: int) -> tuple[Any, str] | None:
        """A client has gone. The owner of its lane and its version as in the URL; None if there is no such request."""

    def close(self) -> list[tuple[Any, str]]:
        """Cancels all, and lets go of the link."""

class FastRoute:
    """A path whose plain requests are answered without Python.

    Args:
        describes_items: bodies are JSON that describes an item (Inference-Header-Content-Length), and then its bytes.
        form_of: called once for requests that look alike, with their content type and accepted types, or with that
            JSON, and with the codings that are accepted. Returns a `fronts.fast_path.FastForm`, or None if they go
            their usual way.
        log_head: what lines of the log have between the client and the time that it took.
        kind, shape: of an item, as JSON has it.
    """

    def __init__(
        self, rows: LaneRows, url_version: str, *, describes_items: bool, form_of: Callable[..., object], log_head: str,
        kind: str, shape: Sequence[int], takes_json: bool,
    ) -> None: ...  # fmt: skip

class FastPath:
    """The requests of one listener's connections that are answered without Python.

    Args:
        table: nothing is taken once its generation is another than that of `set`.
        budget: of the bytes of bodies; has ``size`` and ``quick_max``.
        call_soon: the loop's.
        log: has ``when()`` and ``put_all(lines)``; None for none.
        key_until: until when requests with this ``Authorization`` are let in, s since the epoch, or None. None if all
            are.
        coded_size_min: bytes of bodies that may leave compressed; 0 if none does.

    Attributes:
        request_count: of what was taken so far.
    """

    request_count: int

    def __init__(
        self, table: RowTable, *, budget: object, call_soon: Callable[..., object], log: object,
        key_until: Callable[[str], float | None] | None, head_size_max: int, line_size_max: int, header_count_max: int,
        body_size_max: int, takes_ids: bool, coded_size_min: int, json_size_max: int,
    ) -> None: ...  # fmt: skip
    def set(self, generation: int, routes: dict[str, FastRoute]) -> None: ...
    def wait_awake(self, engine: Engine, drain: Callable[[], object]) -> None:
        """Answers that are expected within microseconds may be waited for awake; ``drain`` takes what has come."""

    def announce(self) -> None:
        """Has workers begin with what was taken; the loop calls it."""

    def close(self) -> None:
        """Takes nothing any more."""

class FastConnection:
    """One connection's part.

    Attributes:
        is_ready: the protocol has nothing under way, so that the next request may be taken; False once one was not.
        is_busy: one that was taken is under way.
        arrived_at: of the last request that was taken, ns.
        answered_at: of the last answer, ns; 0 before the first.
        receive: to be called with what comes.
    """

    is_ready: bool
    is_busy: bool
    arrived_at: int
    answered_at: int
    receive: Callable[[bytes], None]

    def __init__(self, path: FastPath) -> None: ...
    def open(self, protocol: object, write: Callable[[bytes], None], client: str) -> None:
        """``protocol`` has ``received(data)``, ``adopt(ticket, data)`` and ``again(data)``; kept until `close`."""

    def close(self) -> tuple[Any, str] | None:
        """The client has gone: the owner of the lane and the version as in the URL, of a request that it had."""

    def hand_over(self) -> tuple[Any, tuple[Any, int, bytes, str, int]] | None:
        """The request that is under way is the caller's from now on: the lane's owner, and as of `take_all`."""
