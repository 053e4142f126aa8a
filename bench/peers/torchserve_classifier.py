"""The image classifier for TorchServe in start-up comparisons: its own needs torchvision, this one Pillow only.

Same resize, crop, normalisation and top 5 as pyserve's.
"""

import io

import numpy as np
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Classifier(BaseHandler):
    def preprocess(self, data):
        return torch.stack([self._picture(row.get("data") or row.get("body")) for row in data])

    def _picture(self, body):
        picture = Image.open(io.BytesIO(body)).convert("RGB")
        width, height = picture.size
        short = min(width, height)
        picture = picture.resize((256 * width // short, 256 * height // short), Image.Resampling.BILINEAR)
        left, top = round((picture.width - 224) / 2), round((picture.height - 224) / 2)
        pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), dtype=np.float32)
        return (torch.from_numpy(pixels / 255).permute(2, 0, 1) - MEAN) / STD

    def postprocess(self, data):
        values, classes = torch.softmax(data, 1).topk(5)
        return [
            {str(label): value for label, value in zip(row_classes, row_values, strict=True)}
            for row_classes, row_values in zip(classes.tolist(), values.tolist(), strict=True)
        ]
