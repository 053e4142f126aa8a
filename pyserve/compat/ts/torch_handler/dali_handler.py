"""Not built in."""

raise ImportError(
    "ts.torch_handler.dali_handler needs NVIDIA DALI and is not built in: decode in preprocess of a handler of your own"
)
