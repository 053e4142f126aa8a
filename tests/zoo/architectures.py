"""Architectures as people publish them, in small: timm, transformers, segmentation-models-pytorch.

Weights are seeded, configurations small. The packages are those of the extra ``nightly``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from .case import Case, Item, Items, tensor

STAND_INS = Path(__file__).parent / "stand_ins"
PACKAGES = ("timm", "transformers", "segmentation_models_pytorch")
VOCABULARY = 100

# Of bf16 a refusal for its error is right; how many there are is in docs/correctness.md.
_AS_PUBLISHED: dict[str, Any] = {"precisions": ("fp32", "bf16"), "may_refuse": ("bf16",), "is_pure": True}


def missing() -> list[str]:
    """Packages that are not installed. The others' models can be built in this process from now on."""
    if str(STAND_INS) not in sys.path:
        sys.path.append(str(STAND_INS))
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _pictures(size: int) -> Items:
    """Noise, a gradient, dark and bright pictures, and one far outside of [0, 1]."""

    def make(generator: torch.Generator) -> list[Item]:
        noise = torch.rand(1, 3, size, size, generator=generator)
        ramp = torch.linspace(-2, 2, size).expand(1, 3, size, size).clone()
        return [(noise,), (ramp,), (noise * 0.01,), (noise * 3 - 1.5,), (torch.zeros(1, 3, size, size),), (noise * 20,)]

    return make


def _texts(generator: torch.Generator) -> list[Item]:
    """Ids with their mask, of several lengths, some with nothing at the end."""
    items: list[Item] = []
    for length, kept in ((8, 8), (16, 16), (5, 3), (24, 10), (1, 1), (31, 31)):
        mask = torch.zeros(1, length, dtype=torch.int64)
        mask[:, :kept] = 1
        items.append((torch.randint(0, VOCABULARY, (1, length), generator=generator), mask))
    return items


def _timm(name: str, size: int = 64, **arguments: Any) -> Case:
    source = f"""
from without_torchvision import stand_in

with stand_in():
    import timm

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model({name!r}, num_classes=10, **{arguments!r})

    def forward(self, x):
        return self.model(x)
"""
    return Case(f"timm_{name}", "timm", source, (tensor(3, size, size),), _pictures(size), **_AS_PUBLISHED)


def _segmentation(name: str, encoder: str = "tu-resnet10t", size: int = 64) -> Case:
    source = f"""
from without_torchvision import stand_in

with stand_in():
    import segmentation_models_pytorch as smp

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = smp.{name}({encoder!r}, encoder_weights=None, classes=3)

    def forward(self, x):
        return self.model(x)
"""
    return Case(
        f"smp_{name.lower()}",
        "segmentation-models-pytorch",
        source,
        (tensor(3, size, size),),
        _pictures(size),
        **_AS_PUBLISHED,
    )


_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def _hugging_face(name: str, config: str, arguments: dict[str, Any]) -> str:
    return f"""
import transformers

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = transformers.AutoModel.from_config(transformers.{config}(**{arguments!r}))
"""


def _text(name: str, config: str, *, model: str = "self.model", **arguments: Any) -> Case:
    source = (
        _hugging_face(name, config, {"vocab_size": VOCABULARY, **arguments})
        + f"""
    def forward(self, ids, mask):
        return {model}(input_ids=ids, attention_mask=mask).last_hidden_state
"""
    )
    inputs = tuple(tensor("1..32", dtype="int64", name=each, same="length") for each in ("ids", "mask"))
    bounded = ({**inputs[0], "vocabulary": VOCABULARY}, {**inputs[1], "values": [0, 1]})
    return Case(f"transformers_{name}", "transformers", source, bounded, _texts, **_AS_PUBLISHED)


def _picture(name: str, config: str, size: int = 32, **arguments: Any) -> Case:
    source = (
        _hugging_face(name, config, arguments)
        + """
    def forward(self, x):
        return self.model(pixel_values=x).last_hidden_state
"""
    )
    return Case(
        f"transformers_{name}", "transformers", source, (tensor(3, size, size),), _pictures(size), **_AS_PUBLISHED
    )


def _sound(name: str, config: str, **arguments: Any) -> Case:
    source = (
        _hugging_face(name, config, arguments)
        + """
    def forward(self, x):
        return self.model(x).last_hidden_state
"""
    )
    return Case(
        f"transformers_{name}", "transformers", source, (tensor(800),),
        lambda generator: [(torch.randn(1, 800, generator=generator) * scale,) for scale in (1, 0.1, 3, 1, 0.01)],
        **_AS_PUBLISHED,
    )  # fmt: skip


_BERT: dict[str, Any] = {**_SMALL, "max_position_embeddings": 40}

CASES = [
    _timm("resnet10t"),
    _timm("mobilenetv3_small_050"),
    _timm("efficientnet_lite0"),
    _timm("regnetx_002"),
    _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
    _timm("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48),
    _timm("deit_tiny_distilled_patch16_224", img_size=64, depth=2, embed_dim=48),
    _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(1, 2, 1),
          num_heads=(1, 2, 4)),
    _timm("xcit_nano_12_p16_224", img_size=64, depth=2),
    _timm("edgenext_xx_small"),
    _timm("mobilevit_xxs"),
    _timm("pvt_v2_b0"),
    _timm("repvgg_a0"),
    _timm("tinynet_e"),
    _timm("ghostnet_050"),
    _timm("densenet121", growth_rate=8, block_config=(1, 2, 2, 1)),
    _timm("coat_lite_tiny", img_size=64),
    _text("bert", "BertConfig", **_BERT),
    _text("roberta", "RobertaConfig", **{**_BERT, "max_position_embeddings": 50}),
    _text("electra", "ElectraConfig", embedding_size=16, **_BERT),
    _text("albert", "AlbertConfig", embedding_size=16, **_BERT),
    _text("distilbert", "DistilBertConfig", dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40),
    _text("gpt2", "GPT2Config", n_embd=32, n_layer=2, n_head=2, n_positions=40),
    _text("llama", "LlamaConfig", num_key_value_heads=1, max_position_embeddings=40, **_SMALL),
    _text("qwen2", "Qwen2Config", num_key_value_heads=1, max_position_embeddings=40, **_SMALL),
    _text("t5_encoder", "T5Config", model="self.model.encoder", d_model=32, d_kv=16, d_ff=64, num_layers=2,
          num_heads=2),
    _text("deberta", "DebertaV2Config", relative_attention=True, pos_att_type=["c2p", "p2c"], **_BERT),
    _picture("vit", "ViTConfig", image_size=32, patch_size=8, **_SMALL),
    _picture("clip_vision", "CLIPVisionConfig", image_size=32, patch_size=8, **_SMALL),
    _picture("yolos", "YolosConfig", image_size=[32, 32], patch_size=8, num_detection_tokens=4, **_SMALL),
    _picture("dinov2", "Dinov2Config", image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2,
             num_attention_heads=2),
    _sound("wav2vec2", "Wav2Vec2Config", conv_dim=[16, 16, 16], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 3],
           num_feat_extract_layers=3, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, **_SMALL),
    _segmentation("Unet"),
    _segmentation("FPN"),
    _segmentation("Linknet"),
    _segmentation("DeepLabV3Plus"),
    _segmentation("Segformer", "mit_b0"),
]  # fmt: skip
