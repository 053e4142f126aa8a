"""Archives and a picture to try pyserve with, made on the spot: ``pyserve example densenet161``."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pyserve.errors import ConfigError, ModelLoadError
from pyserve.trace import check_packed

if TYPE_CHECKING:
    # Not at run time: torch takes a second to import, and `pyserve example --help` needs none of it.
    import torch
    from PIL import Image

# Example -> (class in pyserve.zoo, its depth, layer whose rows are the classes, torchvision's file of weights).
NETWORKS = {
    "densenet121": ("DenseNet", 121, "classifier.weight", "densenet121-a639ec97.pth"),
    "densenet161": ("DenseNet", 161, "classifier.weight", "densenet161-8d451a50.pth"),
    "densenet169": ("DenseNet", 169, "classifier.weight", "densenet169-b2777c0a.pth"),
    "densenet201": ("DenseNet", 201, "classifier.weight", "densenet201-c1103571.pth"),
    "resnet18": ("ResNet", 18, "fc.weight", "resnet18-f37072fd.pth"),
    "resnet34": ("ResNet", 34, "fc.weight", "resnet34-b627a593.pth"),
}
NAMES = (*NETWORKS, "digits", "picture")
FORMATS = ("eager", "torchscript")
PICTURE_NAME = "sample.jpg"

_NETWORK_FILE = '''"""{cls}-{depth} as described in pyserve.zoo; its parameters have torchvision's names."""

from pyserve.zoo import {cls}


class {cls}{depth}({cls}):
    def __init__(self) -> None:
        super().__init__(depth={depth}, class_count={class_count})
'''

_DIGITS_FILE = '''"""A small network for 8x8 pictures of digits, described in pyserve.zoo."""

from pyserve.zoo import DigitsNet


class Digits(DigitsNet):
    pass
'''

_DIGITS_CONFIG = """\
# One item: an 8x8 picture, grey values from 0 (paper) to 16 (ink).
input:
  dtype: float32
  shape: [1, 8, 8]
"""


def add_example_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``pyserve example``."""
    parser.add_argument("name", choices=NAMES, metavar="NAME", help="one of " + ", ".join(NAMES))
    parser.add_argument("--weights", type=Path, metavar="FILE.pth", help="trained weights, e.g. torchvision's file")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class labels, packed as index_to_name.json")
    parser.add_argument("--export-path", type=Path, metavar="DIR", help="where to write (model-store; picture: .)")
    parser.add_argument("--format", choices=FORMATS, default="eager", help="a model file with weights, or TorchScript")
    parser.add_argument("-f", "--force", action="store_true", help="overwrite")


def example_command(args: argparse.Namespace) -> int:
    """Run ``pyserve example`` and return its exit code; prints the path written and how to go on."""
    if args.name == "picture":
        picture = (args.export_path or Path()) / PICTURE_NAME
        if picture.exists() and not args.force:
            raise ConfigError(f"{picture} exists; overwrite it with --force")
        print(write_sample_picture(picture))
        return 0
    export_path = args.export_path or Path("model-store")
    archive = write_example(
        args.name, export_path, args.weights, labels=args.labels, model_format=args.format, force=args.force
    )
    check_packed(archive, lambda text: None)
    print(archive)
    print(f"serve it:  pyserve start --model-store {export_path} --models {archive.name}")
    return 0


def write_example(
    name: str,
    export_path: Path,
    weights: Path | None = None,
    *,
    labels: Path | None = None,
    model_format: str = "eager",
    force: bool = False,
) -> Path:
    """Write ``{name}.mar`` into ``export_path`` and return its path.

    Args:
        name: a key of `NETWORKS`, or ``digits``, which is trained here (a few seconds, always alike).
        export_path: folder, created if absent.
        weights: state dict for a network; without it random weights are used, with a loud warning on stderr.
        labels: class labels in a form of index_to_name.json; without it an answer names class numbers.
        model_format: ``eager`` (model file and state dict) or ``torchscript``.
        force: overwrite an existing archive.

    Raises:
        ConfigError: the arguments do not go together, or scikit-learn is missing (digits).
        ModelLoadError: weights or labels cannot be used.
        ServeError: the archive cannot be written.
    """
    from pyserve.archiver import ArchiverConfig, write_archive

    if name not in NETWORKS and name != "digits":
        raise ConfigError(f"there is no example {name!r}; one of {', '.join(NETWORKS)}, digits")
    if model_format not in FORMATS:
        raise ConfigError(f"there is no format {model_format!r}; one of {', '.join(FORMATS)}")
    if name == "digits" and (weights is not None or labels is not None):
        raise ConfigError("digits is trained on the spot and answers with ten scores: it takes no weights or labels")
    with tempfile.TemporaryDirectory(prefix="pyserve-example-") as temporary:
        folder = Path(temporary)
        if name == "digits":
            model, source, serialized = _digits(folder)
        else:
            model, source, serialized = _network(name, folder, weights)
        config_file = None
        if name == "digits":
            config_file = folder / "model-config.yaml"
            config_file.write_text(_DIGITS_CONFIG)
        if model_format == "torchscript":
            serialized = folder / f"{name}.pt"
            _save_torchscript(model, serialized)
        return write_archive(
            ArchiverConfig(
                model_name=name,
                handler="tensor" if name == "digits" else "image_classifier",
                version="1.0",
                serialized_file=str(serialized),
                model_file=str(source) if model_format == "eager" else None,
                extra_files=str(_copied_labels(labels, folder)) if labels is not None else None,
                export_path=str(export_path),
                config_file=str(config_file) if config_file is not None else None,
                force=force,
            )
        )


def _network(name: str, folder: Path, weights: Path | None) -> tuple[torch.nn.Module, Path, Path]:
    """A network with its weights, its model file, and the file of the weights."""
    import torch

    from pyserve import zoo
    from pyserve.handlers.eager import read_state_dict

    cls_name, depth, head, official = NETWORKS[name]
    cls: type[torch.nn.Module] = getattr(zoo, cls_name)
    class_count = 1000
    if weights is None:
        _warn_random(name, official)
        with torch.device("meta"):
            model = cls(depth)
        model = model.to_empty(device="cpu")
        zoo.seed_weights(model)
        serialized = folder / f"{name}-random.pth"
        torch.save(model.state_dict(), serialized)
    else:
        serialized = weights
        state = read_state_dict(weights, str(weights))
        if head in state and state[head].dim() == 2:
            class_count = len(state[head])
        with torch.device("meta"):
            model = cls(depth, class_count)
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            text = " ".join(str(error).split())[:400]
            raise ModelLoadError(f"{weights.name} holds other weights than {name}'s ({official}): {text}") from error
    source = folder / "model.py"
    source.write_text(_NETWORK_FILE.format(cls=cls_name, depth=depth, class_count=class_count))
    return model.eval(), source, serialized


def _warn_random(name: str, official: str) -> None:
    lines = (
        f"WARNING: {name} gets RANDOM WEIGHTS. It runs like the real one, but every answer will be MEANINGLESS.",
        "For real answers give the official weights, which fit unchanged:",
        f"  https://download.pytorch.org/models/{official}",
        f"  pyserve example {name} --weights {official} --force",
    )
    bar = "*" * max(map(len, lines))
    print("\n".join((bar, *lines, bar)), file=sys.stderr, flush=True)


def _digits(folder: Path) -> tuple[torch.nn.Module, Path, Path]:
    """The trained digits network, its model file, and the file of its weights."""
    import torch

    model, accuracy = train_digits()
    print(f"trained digits: {accuracy:.1%} of the held-out pictures are recognised", file=sys.stderr)
    source, serialized = folder / "model.py", folder / "digits.pth"
    source.write_text(_DIGITS_FILE)
    torch.save(model.state_dict(), serialized)
    return model, source, serialized


def train_digits(seed: int = 0) -> tuple[torch.nn.Module, float]:
    """A `zoo.DigitsNet` trained on four fifths of scikit-learn's digits, and its accuracy (0 to 1) on the last fifth.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    import torch

    from pyserve.zoo import DigitsNet

    (pictures, digits), (held_out, held_out_digits) = digits_split(seed)
    thread_count = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network is trained several times faster by one thread than by two
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DigitsNet()
            _train(model, pictures, digits)
    finally:
        torch.set_num_threads(thread_count)
    model.eval()
    with torch.inference_mode():
        correct = model(held_out).argmax(1) == held_out_digits
    return model, correct.float().mean().item()


def _train(model: torch.nn.Module, pictures: torch.Tensor, digits: torch.Tensor) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        for chosen in torch.randperm(len(pictures)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pictures[chosen]), digits[chosen]).backward()
            optimizer.step()


def digits_split(
    seed: int = 0,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """scikit-learn's digits, shuffled: (pictures, digits) to train on and (pictures, digits) held out.

    Pictures are float32 [n, 1, 8, 8] in [0, 16], digits int64 [n].

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the digits example is trained on scikit-learn's digits: pip install scikit-learn, then run it again"
        ) from error
    samples = load_digits()
    pictures = torch.from_numpy(samples.images).float().unsqueeze(1)
    digits = torch.from_numpy(samples.target).long()
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    train, held_out = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return (pictures[train], digits[train]), (pictures[held_out], digits[held_out])


def _save_torchscript(model: torch.nn.Module, path: Path) -> None:
    import torch

    torch.jit.script(model).save(str(path))


def _copied_labels(labels: Path, folder: Path) -> Path:
    from pyserve.handlers.labels import read_labels

    if read_labels(labels) is None:
        raise ModelLoadError(f"there is no file of labels {labels}")
    target = folder / "index_to_name.json"
    shutil.copyfile(labels, target)
    return target


def write_sample_picture(path: Path) -> Path:
    """Draw a kitten on a meadow into a JPEG of 400 x 300 pixels, always the same one; returns ``path``."""
    import numpy as np
    from PIL import Image, ImageChops

    path.parent.mkdir(parents=True, exist_ok=True)
    scale = 2  # drawn twice as large: scaling down smooths the edges
    scene = Image.new("RGB", (400 * scale, 300 * scale))
    _draw_kitten(scene)
    picture = scene.resize((400, 300), Image.Resampling.BOX)
    # Grain, as a camera has it, so that decoding costs what it costs for a photo.
    grain = np.random.Generator(np.random.PCG64(0)).integers(0, 16, (300, 400, 1), dtype=np.uint8)
    picture = ImageChops.add(picture, Image.fromarray(grain.repeat(3, axis=2)))
    picture.save(path, "JPEG", quality=90)
    return path


def _draw_kitten(scene: Image.Image) -> None:
    """Coordinates are in hundredths of the picture's height, from its centre."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(scene)
    width, height = scene.size
    for y in range(height):
        share = y / height
        sky, grass = (120 + int(110 * share), 180 + int(40 * share), 230), (60, 150 - int(70 * share), 50)
        draw.line((0, y, width, y), fill=sky if share < 0.62 else grass)

    def at(x: float, y: float) -> tuple[float, float]:
        return width / 2 + x * height / 100, height / 2 + y * height / 100

    def oval(x: float, y: float, wide: float, high: float, colour: str) -> None:
        draw.ellipse((*at(x - wide, y - high), *at(x + wide, y + high)), fill=colour)

    fur, stripe, pale = "#c8864a", "#8a5524", "#f4dcc0"
    draw.arc((*at(10, 0), *at(52, 44)), 260, 90, fill=fur, width=height // 18)  # tail
    oval(0, 34, 28, 24, fur)  # body
    oval(0, 38, 15, 18, pale)
    for side in (-1, 1):
        oval(12 * side, 46, 8, 5, pale)  # paw
        draw.polygon([at(27 * side, -40), at(6 * side, -24), at(26 * side, -8)], fill=fur)  # ear
        draw.polygon([at(24 * side, -33), at(11 * side, -22), at(23 * side, -12)], fill="#e8a8a0")
    oval(0, -6, 27, 23, fur)  # head
    for x in (-8, 0, 8):
        draw.line((*at(x, -28 + abs(x) / 4), *at(x * 0.7, -18)), fill=stripe, width=height // 60)
    oval(0, 5, 13, 9, pale)  # muzzle
    for side in (-1, 1):
        oval(11 * side, -8, 6, 6.5, "#e9f2c0")
        oval(11 * side, -8, 2.6, 6, "#1c2413")
        oval(11 * side + 1.5, -10.5, 1.2, 1.2, "white")
        draw.arc((*at(3 * side - 3, 3), *at(3 * side + 3, 9)), 0, 180, fill=stripe, width=height // 150)
        for angle in (-0.12, 0.06, 0.24):
            end = at(side * (14 + 24 * math.cos(angle)), 5 + 24 * math.sin(angle))
            draw.line((*at(8 * side, 5 + angle * 8), *end), fill="white", width=height // 200)
    draw.polygon([at(-3, 0), at(3, 0), at(0, 4)], fill="#d07070")  # nose
