"""The flags of the command ``torchserve``, for scripts that read them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


class ArgParser:
    """Parsers."""

    @staticmethod
    def ts_parser() -> argparse.ArgumentParser:
        """The parser of ``torchserve``."""
        parser = argparse.ArgumentParser(prog="torchserve", description="Serves PyTorch models.")
        action = parser.add_mutually_exclusive_group()
        action.add_argument("-v", "--version", action="store_true", help="print the version")
        action.add_argument("--start", action="store_true", help="start the server")
        action.add_argument("--stop", action="store_true", help="stop the server")
        for flag, text in (
            ("--ts-config", "a config.properties"), ("--model-store", "folder with the archives"),
            ("--workflow-store", "ignored"), ("--log-config", "ignored"), ("--cpp-log-config", "ignored"),
        ):  # fmt: skip
            parser.add_argument(flag, help=text)
        parser.add_argument("--models", nargs="+", help="archives to load")
        parser.add_argument("--foreground", action="store_true", help="stay")
        parser.add_argument("--no-config-snapshots", "--ncs", action="store_true", help="write no snapshots")
        parser.add_argument("--plugins-path", "--ppath", help="ignored")
        parser.add_argument("--disable-token-auth", "--dt", dest="token_auth", action="store_true", help="no tokens")
        parser.add_argument(
            "--enable-model-api", dest="model_mode", action="store_true", help="allow registering models"
        )
        return parser

    @staticmethod
    def model_service_worker_args() -> argparse.ArgumentParser:
        """The parser of TorchServe's worker process; pyserve's workers have no flags."""
        parser = argparse.ArgumentParser(prog="model-server-worker")
        for flag in ("--sock-name", "--host", "--port", "--metrics-config"):
            parser.add_argument(flag)
        parser.add_argument("--sock-type", required=True, choices=["unix", "tcp"])
        parser.add_argument("--async", dest="async_comm", action="store_true")
        return parser

    @staticmethod
    def extract_args(args: Sequence[str] | None = None) -> argparse.Namespace:
        """The flags of ``args``, or of the command line."""
        return ArgParser.ts_parser().parse_args(args)
