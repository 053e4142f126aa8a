"""What a server says of its settings when it starts: one record in the log, with TorchServe's labels."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from pyserve import TORCHSERVE_VERSION, __version__
from pyserve.config.archive_url import without_secrets
from pyserve.config.config import Config
from pyserve.cpu_budget import cpu_budget
from pyserve.launch import ROOT_DIR


def settings_lines(config: Config, *, gpus: int) -> list[str]:
    """``label: value`` for each, as they are in effect.

    Args:
        gpus: how many are used.
    """
    logs = Path(os.environ.get("LOG_LOCATION") or "logs").absolute()
    places = (place.rpartition(":") for place in config.origin.values())
    file = next((file for file, _, line in places if line.isdigit()), "")
    cpus = cpu_budget(config.cpu_budget)
    default_workers = config.default_workers_per_model or gpus or (cpus if config.compat == "strict" else 1)
    rows = {
        "Torchserve version": f"{TORCHSERVE_VERSION} (pyserve {__version__})",
        "TS Home": ROOT_DIR,
        "Current directory": Path.cwd(),
        "Temp directory": tempfile.gettempdir(),
        "Metrics config path": config.metrics_config or "built in",
        "Number of GPUs": gpus,
        "Number of CPUs": cpus,
        "Python executable": sys.executable,
        "Config file": file or "N/A",
        **{f"{name.capitalize()} address": address for name, address in config.addresses().items()},
        "Model Store": config.model_store or "N/A",
        "Initial Models": ",".join(map(without_secrets, config.load_models.split(","))) or "N/A",
        "Log dir": logs,
        "Metrics dir": Path(os.environ.get("METRICS_LOCATION") or logs).absolute(),
        "Default workers per model": default_workers,
        "Default response timeout": f"{config.default_response_timeout} s",
        "Job queue size": config.job_queue_size,
        "Blacklist Regex": config.blacklist_env_vars or "N/A",
        "Maximum Response Size": config.max_response_size,
        "Maximum Request Size": config.max_request_size,
        "Limit Maximum Image Pixels": config.limit_max_image_pixels,
        "Allowed Urls": config.allowed_urls or "none",
        "Custom python dependency for model allowed": config.install_py_dep_per_model,
        "Enable metrics API": config.enable_metrics_api,
        "Metrics mode": (config.metrics_mode or ("log" if config.compat == "strict" else "prometheus")).upper(),
        "Disable system metrics": config.disable_system_metrics,
        "Model config": ", ".join(sorted(config.models)) or "N/A",
        "Model API enabled": config.allows_model_api,
        "Compat": config.compat,
    }
    return [f"{label}: {_text(value)}" for label, value in rows.items()]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
