"""Core's dynamic inference engine on a model's live weights: token ids in, token ids out.

No KV cache outlives a call: weights may change in between. Core's process-wide inference mode is on during a call only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from megatron.core import fp8_utils, parallel_state
from megatron.core.inference.config import InferenceConfig, KVCacheManagementMode
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling.torch_sampling import TorchSampling
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer import attention
from megatron.core.utils import unwrap_model
from torch import Tensor

from megapref import config, phases
from megapref.mcore import cpu, device, overlap
from megapref.mcore.kernels import machine, no_decoding_attention

# Of a GPU's free memory, what the cache may have, and of each of a rank's weights, what Adam may still take: two moments and a copy in float32.
_SHARE_OF_FREE = 0.8
_ADAM_BYTES = 12
# Rows of a forward matrix product are padded to no more than a multiple of this many; recipes that want more want it for gradients.
_MOST_ROWS = 32

Draw = Callable[[Tensor, np.ndarray, np.ndarray], Tensor]  # (logits [n, V], request numbers [n], positions [n]) -> token ids [n]


Ends = Callable[[list[int]], bool]  # whether the last of a completion's token ids ends it


def _in_one_split() -> None:
    """FlashAttention 4 refuses Core's `num_splits=0` (let the kernel choose) on Hopper: one split instead."""
    if attention.HAVE_FA4 and not isinstance(attention.flash_attn4_varlen_func, _OneSplit):
        attention.flash_attn4_varlen_func = _OneSplit(attention.flash_attn4_varlen_func)


class _OneSplit(partial):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs | {"num_splits": 1})


class _TokenIdsOnly:
    """The tokenizer Core's engine asks for; text is none of its business here."""

    eod = -1

    def detokenize(self, ids) -> str:
        return ""


class _Sampler(TorchSampling):
    """Replaces Core's sampler, whose one generator makes samples depend on what is decoded together, by a function of each request."""

    draw: Draw

    def sample_kernel(self, logits, n, context, *, gather_indices=None, token_to_request_index=None, output=None, **kwargs):
        """Token ids [n] of the active requests, in `output` when it is given."""
        assert token_to_request_index is None, "speculative decoding is not used"
        active = slice(context.paused_request_count, context.total_request_count)
        requests = context.request_ids[active].numpy()
        positions = (context.request_kv_length_offsets[active] + context.request_query_lengths[active]).numpy()
        rows = logits[:n] if gather_indices is None else logits[gather_indices[:n]]
        assert len(requests) == n == len(rows)
        ids = self.draw(rows[:, : self._vocab_size], requests, positions)
        return ids if output is None else output.copy_(ids)


def _ended(controller: TextGenerationController, ends: Ends) -> Callable[[list[int]], set[int]]:
    """A function that names those of the requests that `ends` ends with the token just sampled.

    Core asks it for requests whose stop word was found a step ago; asked with this step's tokens, it saves the step in between.
    """
    completions: dict[int, list[int]] = defaultdict(list)

    def ended(requests: list[int]) -> set[int]:
        for request, token in zip(requests, controller._sampled_tokens_cuda[: len(requests)].tolist(), strict=True):
            completions[request].append(token)
        return {request for request in requests if ends(completions[request])}

    return ended


class _Model(GPTInferenceWrapper):
    """Core's wrapper of a model, computing without the device rewriting that Core's bookkeeping needs on CPU.

    Also without torch's inference mode: what layers make then and keep, such as scales of FP8, could not be changed in training.

    In FP8 the layers pad their rows to what its matrix products take. Core's (0.19) own padding is there in training too, and under sequence
    parallelism gives wrong gradients, and wrong outputs of row-parallel layers, which it sums over the ranks twice.
    """

    def __init__(self, model: torch.nn.Module, context: DynamicInferenceContext):
        super().__init__(model, context)
        self.padding = [module for module in model.modules() if self.config.fp8 and isinstance(module, fp8_utils.TE_LINEAR_TYPES)]
        for module in self.padding:
            vars(module).pop("forward", None)  # Core's

    def _forward(self, inference_input):
        for module in self.padding:
            module.forward = partial(_padded, module, min(self.config.pad_multiple, _MOST_ROWS))
        try:
            with torch.inference_mode(False), torch.no_grad(), cpu.plain_torch():
                return super()._forward(inference_input)
        finally:
            for module in self.padding:
                del module.forward


def _padded(module: torch.nn.Module, multiple: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """A linear layer's output for `rows` [n, 1, width], of which there are a multiple for the layer itself; n may be one rank's share of them."""
    is_split, is_column = module.sequence_parallel, fp8_utils.is_column_parallel_linear(module)
    if is_split and is_column:
        rows = gather_from_sequence_parallel_region(rows, group=module.tp_group)
    module.sequence_parallel = False
    try:
        output, bias = type(module).forward(module, torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, -len(rows) % multiple)))
    finally:
        module.sequence_parallel = is_split
    output = output[: len(rows)]
    return scatter_to_sequence_parallel_region(output, group=module.tp_group) if is_split and not is_column else output, bias


class _Mixture(_Model):
    """Two models over the same requests: their logits are (1 - m) * first + m * second, m the `coefficient`.

    Both write into the same blocks of a cache, each of its own.
    """

    coefficient: float

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module, context: DynamicInferenceContext):
        super().__init__(first, context)
        self.second = _Model(second, context)
        self.second_cache: Tensor | None = None

    def run_one_forward_step(self, inference_input, recv_buffer_seq_len=None):
        first = super().run_one_forward_step(inference_input, recv_buffer_seq_len)
        self._exchange_caches()
        second = self.second.run_one_forward_step(inference_input, recv_buffer_seq_len)
        self._exchange_caches()
        return None if first is None else torch.lerp(first.float(), second.float(), self.coefficient).to(first.dtype)

    def _exchange_caches(self) -> None:
        context = self.inference_context
        context.memory_buffer, self.second_cache = self.second_cache, context.memory_buffer


class Engine:
    """Continuous batching over one model, or over a mixture with an `opponent`; made once, used for every round of generation."""

    def __init__(
        self,
        chunk: torch.nn.Module,
        generation: config.Generation,
        max_length: int,
        opponent: torch.nn.Module | None = None,
        groups: ProcessGroupCollection | None = None,
    ):
        self.model = unwrap_model(chunk)
        if missing := no_decoding_attention(machine(), "fp32" if self.model.config.params_dtype == torch.float32 else "bf16"):
            raise ValueError(missing)
        self.opponent = opponent and unwrap_model(opponent)
        # Core pads batches to its own multiples and asserts that there is room for them.
        slots = DynamicInferenceContext.round_up_requests(generation.max_requests)
        block = 16 if cpu.ACTIVE else 256  # flash-attn's paged kernels want 256; less is gathered in vain with small ones
        graphs = self.model.config.decoding_graphs
        self.config = InferenceConfig(
            block_size_tokens=block,
            buffer_size_gb=generation.kv_cache_gb or self._cache_bytes(slots, max_length, block) / 2**30,
            num_cuda_graphs=graphs or None,
            use_cuda_graphs_for_non_decode_steps=False,
            max_requests=slots,
            max_tokens=DynamicInferenceContext.round_up_tokens(max(max_length, slots)),
            max_sequence_length=max_length,
            kv_cache_management_mode=KVCacheManagementMode.RECOMPUTE,
            enable_prefix_caching=True,  # of prompts that begin alike, the whole blocks of what they share are computed once
            pg_collection=groups,
        )
        self.engine = None
        self.sampler = _Sampler(torch.Generator(), self.model.true_vocab_size)

    def generate(
        self,
        prompts: list[list[int]],
        draw: Draw,
        max_new_tokens: list[int],
        stop_id: int,
        ends: Ends | None = None,
        coefficient: float | None = None,
    ) -> list[list[int]]:
        """Completion ids of each prompt, at most its `max_new_tokens`; `draw` picks each next token and names prompts by their number.

        A completion ends after a `stop_id`, or where `ends` says so of its ids so far. `coefficient` is the opponent's share in a mixture's logits.
        """
        was_training = self.model.training
        self.model.eval()
        models = [model for model in (self.model, self.opponent) if model]
        for model in models:
            model.set_is_first_microbatch()  # Transformer Engine's layers keep their weights in FP8, as they were at an earlier step
        self.sampler.draw = draw
        completions: list[list[int] | None] = [None] * len(prompts)
        with torch.no_grad(), cpu.core_calls(), overlap.paused(models):
            engine = self._start(coefficient)
            engine.controller.set_stop_word_finished_ids_callback(ends and _ended(engine.controller, ends))
            try:
                for request, (ids, limit) in enumerate(zip(prompts, max_new_tokens, strict=True)):
                    engine.add_request(request, ids, SamplingParams(num_tokens_to_generate=limit, termination_id=stop_id))
                while engine.has_unfinished_requests():
                    phases.moved()
                    for record in engine.step_modern()["finished_request_records"]:
                        completions[record.request_id] = list(record.merge().generated_tokens)
            finally:
                engine.suspend()  # frees the cache and leaves inference mode
                if self.opponent:
                    engine.controller.inference_wrapped_model.second_cache = None
                # Sequence parallelism's shared buffers: made in inference mode they would be refused in training.
                parallel_state.get_global_memory_buffer().buffer.clear()
        self.model.train(was_training)
        assert all(ids is not None for ids in completions)
        return completions

    def _cache_bytes(self, slots: int, max_length: int, block: int) -> int:
        """What all slots need for sequences of `max_length` tokens; on a GPU no more than a share of what is free, Adam's state set aside.

        The cache is there while samples are drawn alone, but Adam's state is not there before the first step.
        """
        config = self.model.config
        width = config.kv_channels * config.num_query_groups // config.tensor_model_parallel_size
        block_bytes = 2 * len(self.model.decoder.layers) * width * config.params_dtype.itemsize * block
        needed = (slots * -(-max_length // block) + 2) * block_bytes
        free = device.free_memory_bytes()
        if free is None:
            return needed
        left = _SHARE_OF_FREE * (free - _ADAM_BYTES * sum(parameter.numel() for parameter in self.model.parameters()))
        return int(min(needed, max(left / (2 if self.opponent else 1), 2 * block_bytes)))

    def _start(self, coefficient: float | None = None) -> DynamicInferenceEngine:
        if self.engine is None:
            _in_one_split()
            context = DynamicInferenceContext(self.model.config, self.config)
            model = _Mixture(self.model, self.opponent, context) if self.opponent else _Model(self.model, context)
            controller = TextGenerationController(model, _TokenIdsOnly())
            controller._sampling = self.sampler
            self.engine = DynamicInferenceEngine(controller, context)
        else:
            self.engine.resume()
        if self.opponent:
            mixture = self.engine.controller.inference_wrapped_model
            mixture.coefficient, mixture.second_cache = coefficient, torch.empty_like(mixture.inference_context.memory_buffer)
        return self.engine
