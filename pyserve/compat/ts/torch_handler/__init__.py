"""The built-in handlers under TorchServe's names."""
