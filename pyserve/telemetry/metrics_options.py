"""What a configuration says of metrics."""

from __future__ import annotations

import logging

from pyserve.config.config import Config
from pyserve.errors import ConfigError
from pyserve.telemetry.metrics import MetricsOptions
from pyserve.telemetry.metrics_config import MetricsConfig, MetricsConfigError, read_metrics_config
from pyserve.telemetry.server_logs import metrics_mode

log = logging.getLogger("pyserve.site")


def metrics_options(config: Config) -> MetricsOptions:
    """Without the declarations of a metrics.yaml that cannot be used, unless the configuration is strict.

    Raises:
        ConfigError: under ``strict``, metrics.yaml cannot be used.
    """
    declared = MetricsConfig()
    if config.metrics_config:
        try:
            declared = read_metrics_config(config.metrics_config)
        except MetricsConfigError as error:
            if config.strict:
                raise ConfigError(str(error)) from None
            log.error("%s; the built-in list of metrics is used", error)
    return MetricsOptions(
        declared, metrics_mode(config), is_strict=config.compat == "strict",
        takes_undeclared=config.model_metrics_auto_detect,
    )  # fmt: skip
