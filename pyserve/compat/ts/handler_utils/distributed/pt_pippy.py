"""Models over several processes: not in this version."""

raise ImportError(
    "ts.handler_utils.distributed.pt_pippy spreads a model over several processes, which pyserve does not do yet"
)
