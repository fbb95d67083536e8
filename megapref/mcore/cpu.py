"""Stand-ins that let unmodified Megatron-Core run on CPU. Nothing here is active where a GPU is.

Core (0.19) calls `torch.cuda.*` and names `device="cuda"` on its training, checkpoint and inference paths. `install()` replaces the calls once;
`core_calls()` is a context that rewrites the device of tensors made inside it. The context costs time on every torch call, so it is entered
around the calls into Core that need it (construction, optimizer, checkpoint, engine bookkeeping), never around a training forward or backward.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

ACTIVE = not torch.cuda.is_available()
_CPU = torch.device("cpu")


class _Inert:
    """Stands in for torch.cuda.Stream and torch.cuda.Event: CPU work is in order already."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: _Inert()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def elapsed_time(self, other) -> float:
        return 0.0


def _is_cuda(device) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, torch.device) and device.type == "cuda")


_WITH_DEVICE_IN_PLACE = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.to, torch.Tensor.type})  # rather than by keyword


class _OnCpu(TorchFunctionMode):
    """Makes what Core asks to put on a CUDA device on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not kwargs and func not in _WITH_DEVICE_IN_PLACE:
            return func(*args)
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # needs a GPU runtime
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to:
            args = (args[0], *(_CPU if _is_cuda(argument) else argument for argument in args[1:]))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")  # optimizer/distrib_optimizer.py compares these strings
        return func(*args, **kwargs)


def core_calls() -> contextlib.AbstractContextManager:
    """Context for calls into Core that make tensors; nothing on a GPU machine."""
    return _OnCpu() if ACTIVE else contextlib.nullcontext()


def plain_torch() -> contextlib.AbstractContextManager:
    """Context for model computation inside `core_calls()`: nothing there names a device, and the rewriting costs on every torch call."""
    return torch._C.DisableTorchFunction() if ACTIVE else contextlib.nullcontext()


def install() -> None:
    """Replaces the torch.cuda functions and Core helpers that need a GPU. Idempotent; nothing on a GPU machine."""
    if not ACTIVE or torch.cuda.current_device is _current_device:
        return
    _import_core()
    _install_cuda_runtime()
    _install_random()
    _install_expert_dispatch()
    _install_lone_rank()
    _install_inference()


def _import_core() -> None:
    """Imports Core with its torch.compile decorators left out: they fuse GPU kernels, and on CPU cost seconds of import in every process."""
    compile_function = torch.compile
    torch.compile = lambda function=None, **options: function if function is not None else (lambda decorated: decorated)
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile_function


def _current_device() -> torch.device:
    return _CPU


def _nothing() -> Callable[..., None]:
    # A new function for each use: torch._dynamo tells torch's functions apart by identity.
    return lambda *args, **kwargs: None


def _install_cuda_runtime() -> None:
    cuda = torch.cuda
    cuda.current_device = _current_device
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, _nothing())
    cuda.Stream, cuda.Event = type("Stream", (_Inert,), {}), type("Event", (_Inert,), {})
    cuda.current_stream, cuda.default_stream = lambda *args: _Inert(), lambda *args: _Inert()
    cuda.stream, cuda.device = lambda *args: contextlib.nullcontext(), lambda *args: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _nothing(), _nothing()
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *args: 0)
    cuda.memory_stats = lambda *args, **kwargs: defaultdict(int)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)


def _install_random() -> None:
    from megatron.core.tensor_parallel import random  # tensor_parallel/random.py keeps CUDA generator states

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _install_expert_dispatch() -> None:
    from megatron.core.transformer.moe import token_dispatcher  # converts split sizes to numpy only when they are on a GPU

    def as_is(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = as_is
    _install_uneven_collectives()


def _install_uneven_collectives() -> None:
    """Joining and summing parts of different lengths, which tensor-parallel ranks have of the tokens for their experts; gloo's parts are equal."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(rows, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(rows, group, None, use_global_buffer)
        longest = max(1, *output_split_sizes)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = gather(padded, group).split(longest)
        return torch.cat([part[:length] for part, length in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter_uneven(rows, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(rows, group, None, use_global_buffer)
        total = rows.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_uneven, reduce_scatter_uneven


def _install_lone_rank() -> None:
    from megatron.core.distributed import param_and_grad_buffer  # gathers and reduces over one rank too, whose shard is the whole buffer

    def unless_alone(collective):
        return lambda output, input, group, **kwargs: collective(output, input, group=group, **kwargs) if group.size() > 1 else None

    # NCCL leaves such a buffer as it is; gloo copies it, every weight and gradient twice a step.
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, unless_alone(getattr(param_and_grad_buffer, name)))


def _install_inference() -> None:
    from megatron.core.inference import communication_utils  # asserts tensor.is_cuda before sends between stages
    from megatron.core.inference.contexts import dynamic_context  # a Triton kernel appends to the cache; Core's torch path is the fallback
    from megatron.core.inference.engines import dynamic_engine  # collects garbage (0.1 s) to free CUDA graphs, of which there are none
    from megatron.core.transformer import attention  # calls flash-attn on the paged cache

    from megapref.mcore import paged_attention

    def check_contiguous(tensor):
        assert tensor.is_contiguous()

    communication_utils._is_cuda = _nothing()
    communication_utils._is_cuda_contiguous = check_contiguous
    dynamic_engine.delete_cuda_graphs = _nothing()
    dynamic_context.triton_append_key_value_cache = None
    attention.flash_attn_varlen_func = paged_attention.flash_attn_varlen_func
    attention.flash_attn_with_kvcache = paged_attention.flash_attn_with_kvcache
    attention.is_fa_min_version = lambda *args, **kwargs: True
