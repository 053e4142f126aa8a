"""The same calls sent to TorchServe and to pyserve; see README.md."""
