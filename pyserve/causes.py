"""What is known to help against errors that people meet: one table, for answers, `check`, `doctor` and the console.

An entry is for an error whose own text does not say what to do. What needs more than the text, such as the files of the
archive, is in `pyserve.worker.failure`. Does not need torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable

READ_SIZE_MAX = 4000

# Module -> what to install for it, where the two differ.
PACKAGES = {
    "PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn", "skimage": "scikit-image",
    "yaml": "pyyaml", "bs4": "beautifulsoup4", "google.protobuf": "protobuf", "dateutil": "python-dateutil",
    "sentence_transformers": "sentence-transformers", "faiss": "faiss-cpu", "Levenshtein": "levenshtein",
    "pillow_heif": "pillow-heif", "attr": "attrs", "Crypto": "pycryptodome", "dotenv": "python-dotenv",
    "fitz": "pymupdf", "git": "gitpython", "jwt": "pyjwt", "soundfile": "soundfile", "umap": "umap-learn",
}  # fmt: skip


def package_of(module: str) -> str:
    """The package that brings ``module``, as pip knows it."""
    top = module.partition(".")[0]
    return PACKAGES.get(module) or PACKAGES.get(top) or top


def _missing(match: re.Match[str]) -> str:
    package = package_of(match[1])
    return f"pip install {package} where pyserve runs, or pack a requirements.txt that names {package}"


# Text -> what helps; the first that is found counts.
_CAUSES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), fix)
    for pattern, fix in (
        (r"No module named '([\w.]{1,80})'", _missing),
        (r"libGL\.so\.1", "pip install opencv-python-headless in place of opencv-python, or apt-get install libgl1"),
        (r"(lib[\w+-]{1,60}\.so[.\d]{0,12}): cannot open shared object file",
         lambda match: f"install the package of this system that has {match[1]} (apt-file search {match[1]})"),
        (r"compiled using NumPy 1\.x|numpy\.core\.multiarray failed to import|numpy\.dtype size changed",
         "a package was built for another NumPy: pip install 'numpy<2', or newer versions of the packages beside it"),
        (r"version `?(GLIBCXX?_[\d.]+)'? not found",
         lambda match: f"a library was built for a newer system ({match[1]}); install one that was built for this one"),
        (r"operator torchvision::\w+ does not exist",
         "pip install the torchvision that belongs to this torch, and import torchvision in the handler"),
        (r"undefined symbol: ",
         "a compiled package was built for another torch or Python; install it again beside this torch"),
        (r"Attempting to deserialize object on (?:a )?\w+ device|Torch not compiled with CUDA enabled",
         "there is no such device here: torch.load(..., map_location=device), and move the model to self.device"),
        (r"Expected all tensors to be on the same device",
         "move the input to the model's device: tensor.to(self.device)"),
        (r"Can't get attribute '\w+' on <module '__(?:mp_)?main__'",
         "the file holds a whole object of a script; save model.state_dict(), and pack the class with --model-file"),
        (r"Weights only load failed",
         "the file holds more than weights, which may run code when it is read; save model.state_dict()"),
        (r"(?:Missing|Unexpected) key\(s\) in state_dict|size mismatch for [\w.]+:",
         "the weights are not those of this model file; pack the two that belong together"),
        (r"PytorchStreamReader failed|file in archive is not in a subdirectory",
         "the file is no TorchScript, or is damaged; save it again and compare sizes after copying it"),
        (r"No space left on device", "free room on the disk, or set PYSERVE_CACHE and TMPDIR to another one"),
        (r"Too many open files",
         "raise the limit on open files: ulimit -n, LimitNOFILE= in a systemd unit, --ulimit nofile= of docker run"),
        (r"DataLoader worker .* killed by signal: Bus error|unable to open shared memory object",
         "raise the size of shared memory: docker run --shm-size=1g"),
        (r"We couldn't connect to 'https://huggingface\.co'|offline mode is enabled",
         "pack the files of the model, and read them from model_dir; nothing is fetched where there is no network"),
    )
)  # fmt: skip


def fix_for(text: str) -> str:
    """What helps against an error with this text; ``""`` if that is not known. Names only what the text names."""
    text = text[:READ_SIZE_MAX]
    for pattern, fix in _CAUSES:
        match = pattern.search(text)
        if match is not None:
            return fix if isinstance(fix, str) else fix(match)
    return ""
