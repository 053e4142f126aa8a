import torch


def handle(data, context):
    if data is None:
        return None
    return [{
        "dtype": str(torch.get_default_dtype()), "grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "device": str(torch.get_default_device()),
        "mmap": torch.serialization.get_default_mmap_options() if hasattr(torch.serialization, "get_default_mmap_options") else None,
        "load_mmap": getattr(torch.utils.serialization.config.load, "mmap", None) if hasattr(torch.utils, "serialization") else None,
    }] * len(data)
