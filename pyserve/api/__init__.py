"""What HTTP clients can ask: TorchServe's and KServe's APIs, routing, OpenAPI."""
