"""The one package that touches Megatron-Core; without a GPU, Core is made to run on CPU before anything of it is imported."""

import faulthandler
import logging
import signal
import warnings

# What Core and torch.distributed.checkpoint say of their own insides is for their developers; cpu.py is named as the caller of what it wraps.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.|megapref\.mcore\.cpu")
warnings.filterwarnings("ignore", category=SyntaxWarning, message="invalid escape sequence")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found" on every CPU machine

from megapref.mcore import cpu  # noqa: E402

cpu.install()

from megatron.core.inference.engines import dynamic_engine  # noqa: E402, F401

# With its engine Core has a stack printed by every process that is asked to end; what there is to say signals.py and watch.py say.
for number in (signal.SIGTERM, signal.SIGINT):
    faulthandler.unregister(number)
