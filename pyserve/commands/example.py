"""Archives and a picture to try pyserve with, made on the spot: ``pyserve example densenet161``."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pyserve.conversion.torchscript import check_packed
from pyserve.errors import ConfigError, ModelLoadError
from pyserve.models.sample import PICTURE_NAME, write_sample_picture

if TYPE_CHECKING:
    # Not at run time: torch takes a second to import, and `pyserve example --help` needs none of it.
    import torch

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
    """Run ``pyserve example`` and return its exit code; prints the path written and what to run next."""
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
    from pyserve.archive.packing import ArchiverConfig, write_archive

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
