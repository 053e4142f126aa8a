"""TorchScript of eager models, made in a child process and kept only if it was shown to answer as the model does."""
