"""The planner's memory model against bytes of real tensors: what stays exactly, activations as autograd saves them, in float32 on CPU."""

import weakref
from collections import Counter

import pytest
import torch
from distributed_run import run_distributed
from tiny_models import make_checkpoint

from megapref.batch import TokenPair
from megapref.convert.families import read_spec
from megapref.plan.memory import stage_activations, stage_memory
from megapref.plan.shapes import Layout, Sizes, num_parameters
from megapref.plan.workload import Job, PairLengths, rank_packs

# Sizes that are no multiples of 64 make Core pad its buffers; long completions make attention masks matter.
SHAPE = dict(hidden_size=72, intermediate_size=160, num_hidden_layers=4, vocab_size=515, max_position_embeddings=1024)
MANY = ((9, 12, 5), (30, 140, 133), (300, 80, 91), (15, 6, 6), (1, 1, 30), (125, 260, 200))
LONG = ((300, 200, 220), (310, 190, 200), (290, 205, 210))
LAYOUTS = [
    Layout(data=2),
    Layout(data=3),
    Layout(tensor=2),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(tensor=2, pipeline=2),
    Layout(pipeline=2, data=2),
]


class Kept:
    """Bytes that autograd keeps, each storage once; `hold` is what it gets for a tensor, and what it lets go of is not counted any more."""

    def __init__(self, ignored: set[int]):
        self.ignored = ignored
        self.counts: Counter = Counter()
        self.now = self.peak = 0

    def hold(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        storage = tensor.untyped_storage()
        key, size, held = storage.data_ptr(), storage.nbytes(), Held([tensor])
        if key not in self.ignored:
            self.counts[key] += 1
            self.now += size if self.counts[key] == 1 else 0
            self.peak = max(self.peak, self.now)
            weakref.finalize(held, self.release, key, size)
        return held

    def release(self, key: int, size: int) -> None:
        self.counts[key] -= 1
        self.now -= 0 if self.counts[key] else size


class Held(list):
    """A list that can be watched."""


def measure(folder: str, layout: dict, lengths: tuple, max_tokens: int) -> dict[str, int]:
    """Bytes on this rank: weights, gradients, optimizer state after a step, a resident reference, rotary tables, most that autograd kept."""
    from functools import partial

    from megapref import losses
    from megapref.config import Optimizer, Parallel, Precision
    from megapref.convert.hf import load_hf
    from megapref.data.packing import pack
    from megapref.mcore import reference, setup
    from megapref.mcore.model import build_model
    from megapref.mcore.optimizer import build_optimizer, wrap_for_training
    from megapref.mcore.step import TrainState, train_step

    parallel = Parallel(**layout)
    setup.start(parallel, 0)
    spec = read_spec(folder)
    loaded = []
    for _ in range(2):
        loaded.append(build_model(spec, parallel))
        load_hf(loaded[-1], spec, folder)
    policy, ref = loaded[0], reference.resident(loaded[1])
    chunks = wrap_for_training(policy)
    state = TrainState(chunks, build_optimizer(chunks, Optimizer(), Precision()))
    rows = [TokenPair([3] * a, [4] * b, [5] * c) for a, b, c in lengths]
    multiple = parallel.tensor if parallel.sequence else 1
    packs = pack(rows, max_tokens=max_tokens, num_ranks=setup.data_parallel_size(), pad_multiple=multiple)[setup.data_parallel_rank()]
    kept = Kept({parameter.untyped_storage().data_ptr() for parameter in policy[0].parameters()})
    with torch.autograd.graph.saved_tensors_hooks(kept.hold, lambda held: held[0]):
        train_step(state, packs, partial(losses.dpo, beta=0.1), lr=1e-4)
    moments = [
        value
        for part in state.optimizer.chained_optimizers
        for entry in part.optimizer.state.values()
        for name, value in entry.items()
        if name != "step"
    ]
    return {
        "weights": _storages(policy[0].parameters()),
        "gradients": _storages(parameter.main_grad for parameter in policy[0].parameters()),
        "optimizer": sum(moment.numel() * moment.element_size() for moment in moments),
        "reference": _storages(ref.chunks[0].parameters()),
        "tables": _storages(chunk.rotary_pos_emb.table for chunk in (policy[0], ref.chunks[0])),
        "activations": kept.peak,
        "stage": torch.distributed.get_rank() // (torch.distributed.get_world_size() // parallel.pipeline),
    }


def _storages(tensors) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: str(make_checkpoint(tmp_path_factory.mktemp(name), name, **SHAPE)) for name in ("llama_tied", "qwen3", "qwen2")}


def run(folder: str, layout: Layout, lengths: tuple, max_tokens: int) -> list[dict[str, int]]:
    of_config = {name: getattr(layout, name) for name in ("tensor", "pipeline", "sequence")}
    return run_distributed(measure, layout.num_gpus, folder, of_config, lengths, max_tokens)


def job_of(lengths: tuple, max_tokens: int) -> Job:
    return Job(tuple(PairLengths(*each) for each in lengths), max_tokens=max_tokens, dtype="fp32")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["llama_tied", "qwen2"])
def test_what_stays_is_exact(folders, name, layout):
    spec, job = read_spec(folders[name]), job_of(MANY, 800)
    packs = rank_packs(job, layout.data, layout.tensor if layout.sequence else 1)
    ranks = run(folders[name], layout, MANY, 800)
    for stage in range(layout.pipeline):
        predicted = stage_memory(spec, job, layout, packs, "torch", stage)
        measured = [rank for rank in ranks if rank["stage"] == stage]
        for part in ("weights", "gradients", "reference", "tables"):
            assert {rank[part] for rank in measured} == {getattr(predicted, part)}, part
        # Ranks share the optimizer's state: all of it is there once for each tensor-parallel rank, and none holds more than its share.
        assert sum(rank["optimizer"] for rank in measured) == job.optimizer_bytes * num_parameters(spec, layout, stage) * layout.tensor
        assert max(rank["optimizer"] for rank in measured) <= predicted.optimizer
        assert predicted.optimizer * layout.data == job.optimizer_bytes * predicted.gradients // 4


@pytest.mark.parametrize("lengths", [MANY, LONG], ids=["many", "long"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(tensor=2, sequence=True), Layout(pipeline=2)], ids=str)
@pytest.mark.parametrize("name", ["llama_tied", "qwen3"])
def test_activations_are_as_predicted(folders, name, layout, lengths):
    spec, job = read_spec(folders[name]), job_of(lengths, 800)
    packs = rank_packs(job, 1, layout.tensor if layout.sequence else 1)
    assert len(packs) > 1
    largest = max(packs, key=lambda pack: pack.tokens)
    for rank in run(folders[name], layout, lengths, 800):
        predicted = stage_activations(Sizes.of(spec), job, layout, largest, len(packs), "torch", rank["stage"])
        assert rank["activations"] == pytest.approx(predicted, rel=0.1), (rank["stage"], predicted / rank["activations"])
