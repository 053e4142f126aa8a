"""The networks are the published ones: sizes, names, old files; they trace, script, and take random weights well."""

from __future__ import annotations

import hashlib

import pytest
import torch

from pyserve.zoo import BasicBlock, DenseNet, DigitsNet, ResNet, seed_weights


def on_meta(cls: type[torch.nn.Module], *args: int) -> torch.nn.Module:
    """Shapes without memory or initialisation."""
    with torch.device("meta"):
        return cls(*args)


def ready(cls: type[torch.nn.Module], *args: int) -> torch.nn.Module:
    model = on_meta(cls, *args).to_empty(device="cpu")
    seed_weights(model)
    return model.eval()


@pytest.mark.parametrize(
    ("cls", "depth", "parameter_count"),
    [
        (DenseNet, 121, 7_978_856),
        (DenseNet, 161, 28_681_000),
        (DenseNet, 169, 14_149_480),
        (DenseNet, 201, 20_013_928),
        (ResNet, 18, 11_689_512),
        (ResNet, 34, 21_797_672),
    ],
)
def test_parameter_count_is_the_published_one(cls: type[torch.nn.Module], depth: int, parameter_count: int) -> None:
    assert sum(parameter.numel() for parameter in on_meta(cls, depth).parameters()) == parameter_count


def test_densenet_parameters_have_torchvisions_names() -> None:
    state = on_meta(DenseNet, 161).state_dict()
    shapes = {
        "features.conv0.weight": [96, 3, 7, 7],
        "features.norm0.running_mean": [96],
        "features.denseblock1.denselayer1.norm1.weight": [96],
        "features.denseblock1.denselayer1.conv1.weight": [192, 96, 1, 1],
        "features.denseblock1.denselayer6.conv2.weight": [48, 192, 3, 3],
        "features.transition1.norm.num_batches_tracked": [],
        "features.transition1.conv.weight": [192, 384, 1, 1],
        "features.denseblock3.denselayer36.norm2.bias": [192],
        "features.denseblock4.denselayer24.conv1.weight": [192, 2160, 1, 1],
        "features.norm5.running_var": [2208],
        "classifier.weight": [1000, 2208],
        "classifier.bias": [1000],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes
    # Per layer: two norms with five entries each and two convolutions.
    layer_count = 6 + 12 + 36 + 24
    assert len(state) == 1 + 5 + layer_count * 12 + 3 * 6 + 5 + 2


def test_resnet_parameters_have_torchvisions_names() -> None:
    state = on_meta(ResNet, 18).state_dict()
    shapes = {
        "conv1.weight": [64, 3, 7, 7],
        "bn1.running_mean": [64],
        "layer1.0.conv1.weight": [64, 64, 3, 3],
        "layer2.0.downsample.0.weight": [128, 64, 1, 1],
        "layer2.0.downsample.1.num_batches_tracked": [],
        "layer4.1.bn2.bias": [512],
        "fc.weight": [1000, 512],
        "fc.bias": [1000],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes
    assert len(state) == 122
    assert not any("layer1.0.downsample" in name for name in state)


@pytest.mark.slow
def test_densenet_loads_the_names_of_2017() -> None:
    model = ready(DenseNet, 121)
    old = {}
    for name, value in model.state_dict().items():
        head, found, tail = name.partition(".denselayer")
        for part in ("norm1", "norm2", "conv1", "conv2"):
            if found and f".{part}." in tail:
                tail = tail.replace(part, f"{part[:-1]}.{part[-1]}")
        old[head + found + tail] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    # Files of that time have no count of batches either.
    old = {name: value for name, value in old.items() if "num_batches_tracked" not in name}
    other = on_meta(DenseNet, 121).to_empty(device="cpu").eval()
    other.load_state_dict(old)
    pictures = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(other(pictures), model(pictures))


def test_unknown_depth_is_named() -> None:
    with pytest.raises(ValueError, match="DenseNet-160"):
        DenseNet(160)
    with pytest.raises(ValueError, match="ResNet-50"):
        ResNet(50)


def test_block_gives_input_plus_residual() -> None:
    block = BasicBlock(4, 4, stride=1).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    features = torch.rand(1, 4, 5, 5)
    assert torch.equal(block(features), features)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "args", "shape"),
    [(DenseNet, (121, 7), (3, 64, 64)), (ResNet, (18, 7), (3, 64, 64)), (DigitsNet, (), (1, 8, 8))],
)
def test_scripted_and_traced_models_answer_alike(
    cls: type[torch.nn.Module], args: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    model = ready(cls, *args)
    example = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    batch = torch.rand(3, *shape, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(batch)
        assert list(expected.shape) == [3, args[1] if args else 10]
        scripted = torch.jit.script(model)
        traced = torch.jit.freeze(torch.jit.trace(model, example))
        torch.testing.assert_close(scripted(batch), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(traced(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "depth"), [(DenseNet, 161), (ResNet, 18), (ResNet, 34)])
def test_random_weights_keep_scores_finite_and_tell_pictures_apart(cls: type[torch.nn.Module], depth: int) -> None:
    model = ready(cls, depth)
    flat = torch.linspace(-2, 2, 224).expand(3, 224, 224)
    noise = torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        scores = model(torch.stack((flat, flat.transpose(1, 2), noise)))
    assert torch.isfinite(scores).all()
    spread = scores.std(dim=1)
    assert (spread > 0.05).all() and (spread < 20).all()
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (scores[first] - scores[second]).abs().mean() > 0.05 * spread.min()


def test_same_seed_gives_the_same_weights() -> None:
    def fingerprint(seed: int) -> str:
        model = on_meta(ResNet, 18).to_empty(device="cpu")
        seed_weights(model, seed)
        digest = hashlib.sha256()
        for value in model.state_dict().values():
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    assert fingerprint(5) == fingerprint(5)
    assert fingerprint(5) != fingerprint(6)
