"""Models over several processes: not in this version."""

raise ImportError(
    "ts.torch_handler.distributed.base_pippy_handler spreads a model over several processes, which "
    "pyserve does not do yet"
)
