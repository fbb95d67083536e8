"""The one package that touches Megatron-Core; without a GPU, Core is made to run on CPU before anything of it is imported."""

from megapref.mcore import cpu

cpu.install()
