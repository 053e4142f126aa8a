"""The Python interface of torch-model-archiver, served by pyserve's archiver.

Found as `import model_archiver` where that package itself is not installed.
"""

from model_archiver.model_archiver import ModelArchiver
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.version import __version__

__all__ = ["ModelArchiver", "ModelArchiverConfig", "__version__"]
