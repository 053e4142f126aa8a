"""Not built in."""

raise ImportError(
    "ts.torch_handler.vllm_handler is not built in: call vllm from a handler of your own (asyncCommunication: true)"
)
