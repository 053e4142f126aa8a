"""Not built in."""

raise ImportError("ts.torch_handler.trt_llm_handler is not built in: call tensorrt_llm from a handler of your own")
