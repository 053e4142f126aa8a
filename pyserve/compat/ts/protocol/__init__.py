"""TorchServe's wire, as far as handlers import it."""
