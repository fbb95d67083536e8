import os
import resource
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import hypothesis
import torch

torch.set_num_threads(1)

# Many tests start processes, which import for 7 seconds, and for 20 where their bytecode is not kept.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Busy machines are slow at times: no test is about time.
hypothesis.settings.register_profile("untimed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("untimed")

# Some tests kill processes: a core dump of one would be gigabytes in the current directory.
resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

FOLDERS = ("end_to_end", "distributed", "parity")  # those that take longest first


def pytest_configure(config) -> None:
    """Tests compute on the CPU whatever the machine has, but for those in gpu/ where they are all that is asked for."""
    if not all("gpu" in Path(argument.partition("::")[0]).parts for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items) -> None:
    """The files that take longest come first, so that tests that run side by side come to an end together."""
    items.sort(key=lambda item: (*FOLDERS, item.path.parent.name).index(item.path.parent.name))
