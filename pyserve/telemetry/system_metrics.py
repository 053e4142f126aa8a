"""The machine's CPU, memory, disk and GPUs as TorchServe's gauges, measured now and then beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shlex

import psutil

from pyserve.telemetry.gpu_usage import Ask, ask_usage
from pyserve.telemetry.host_metrics import HostMetrics
from pyserve.telemetry.metrics_config import SERVER_METRICS

log = logging.getLogger(__name__)

CPU_SAMPLE_S = 0.1
COMMAND_TIMEOUT_S = 30.0
OUTPUT_SIZE_MAX = 1 << 20
_LINE = re.compile(r"(?:\[METRICS\])?(?P<name>\w+)\.\w+:(?P<value>[-+0-9.eE]+)\|#(?P<labels>[^|]*)\|#.*")
_MIB, _GIB = 1 << 20, 1 << 30


def measure() -> dict[str, float]:
    """The host's values; blocks for CPU_SAMPLE_S."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    return {  # in TorchServe's order
        "CPUUtilization": psutil.cpu_percent(CPU_SAMPLE_S),
        "DiskAvailable": disk.free / _GIB,
        "DiskUsage": disk.used / _GIB,
        "DiskUtilization": disk.percent,
        "MemoryAvailable": memory.available / _MIB,
        "MemoryUsed": memory.used / _MIB,
        "MemoryUtilization": memory.percent,
    }


def parse_lines(text: str) -> list[tuple[str, float, int | None]]:
    """(name, value, GPU) of each line that is one of TorchServe's metrics of the system; others are left out."""
    found: list[tuple[str, float, int | None]] = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None or match["name"] not in SERVER_METRICS or SERVER_METRICS[match["name"]].kind != "gauge":
            continue
        pairs = (pair.partition(":") for pair in match["labels"].split(","))
        labels = {key.strip().lower(): value.strip() for key, _, value in pairs}
        device = labels.get("deviceid", labels.get("device_id", ""))
        is_gpu = match["name"].startswith("GPU")
        with contextlib.suppress(ValueError):
            found.append((match["name"], float(match["value"]), int(device) if is_gpu else None))
    return found


class SystemMetrics:
    """Measures every ``interval_s``.

    Args:
        command: run instead of measuring, split into words as a shell does but without one.
        gpus: how many accelerators there are.
        ask: see `ask_usage`.
    """

    def __init__(
        self, host: HostMetrics, interval_s: float, *, command: str = "", gpus: int = 0,
        ask: Ask = ask_usage,
    ):  # fmt: skip
        self._host = host
        self._interval_s = max(1.0, interval_s)
        self._command = command
        self._gpus = gpus
        self._ask = ask

    async def run(self) -> None:
        """Continues until it is cancelled."""
        while True:
            try:
                await self.measure_once()
            except Exception as error:
                log.error("metrics of the system cannot be had: %s", error or type(error).__name__)
            await asyncio.sleep(self._interval_s)

    async def measure_once(self) -> None:
        if self._command:
            for name, value, device in parse_lines(await self._run_command()):
                if device is None:
                    self._host.set(name, value)
                else:
                    self._host.set_gpu(name, value, device)
            return
        for name, value in (await asyncio.to_thread(measure)).items():
            self._host.set(name, value)
        if self._gpus:
            await self._measure_gpus()

    async def _measure_gpus(self) -> None:
        try:
            usages = await self._ask(range(self._gpus))
        except (OSError, ValueError, LookupError, RuntimeError, TimeoutError) as error:
            log.debug("the usage of GPUs cannot be had: %s", error)
            return
        for index, usage in usages.items():
            if usage.busy is not None:
                self._host.set_gpu("GPUUtilization", usage.busy, index)
            self._host.set_gpu("GPUMemoryUsed", usage.used_size / _MIB, index)
            if usage.total_size:
                self._host.set_gpu("GPUMemoryUtilization", usage.used_size / usage.total_size * 100, index)

    async def _run_command(self) -> str:
        process = await asyncio.create_subprocess_exec(
            *shlex.split(self._command), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            output, _ = await asyncio.wait_for(process.communicate(), COMMAND_TIMEOUT_S)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if isinstance(error, TimeoutError):
                raise ValueError(f"system_metrics_cmd did not end within {COMMAND_TIMEOUT_S:g} s") from None
            raise
        if process.returncode:
            raise ValueError(f"system_metrics_cmd exited with {process.returncode}")
        return output[:OUTPUT_SIZE_MAX].decode("utf-8", "replace")
