import torch
from torch.utils.data import DataLoader, TensorDataset


def handle(data, context):
    if data is None:
        return None
    loader = DataLoader(TensorDataset(torch.arange(6.0)), batch_size=2, num_workers=1)
    return [[batch.tolist() for (batch,) in loader]] * len(data)
