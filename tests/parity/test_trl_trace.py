"""Five training steps against TRL's DPOTrainer (trl/freeze_trace.py): same weights, rows and optimizer, whatever the packing and the layout."""

import json
from pathlib import Path

import pytest
from distributed_run import run_distributed
from parity.trl.freeze_trace import checksum
from tiny_models import make_checkpoint

from megapref.batch import TokenPair

TRACE = json.loads((Path(__file__).parent / "trl" / "trace.json").read_text())
BATCH = len(TRACE["rows"]) // len(TRACE["steps"])
ABSOLUTE, OF_NORM = 5e-5, 5e-5
OF_LOGPS = 1e-5  # relative: sums of many tokens
LAYOUTS = [({}, True), ({}, False), ({"tensor": 2}, True), ({"pipeline": 2}, True), ({"data": 2}, True)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = str(make_checkpoint(tmp_path_factory.mktemp("trace"), TRACE["model"], seed=TRACE["seed"]))
    assert checksum(folder) == pytest.approx(TRACE["checksum"], rel=1e-7), "not the weights that TRL trained: freeze the trace again"
    return folder


def train(folder: str, layout: dict, share_prompt: bool, max_tokens: int = 120) -> list[dict]:
    """The metrics of every step."""
    from functools import partial

    from megapref import losses
    from megapref.config import Optimizer, Parallel, Precision
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.data.packing import pack
    from megapref.mcore import reference, setup
    from megapref.mcore.model import build_model
    from megapref.mcore.optimizer import build_optimizer, wrap_for_training
    from megapref.mcore.step import TrainState, train_step

    parallel = Parallel(**{name: size for name, size in layout.items() if name != "data"})
    setup.start(parallel, 0)
    spec = read_spec(folder)

    def load():
        chunks = build_model(spec, parallel)
        load_hf(chunks, spec, folder)
        return chunks

    policy, frozen = wrap_for_training(load()), reference.resident(load())
    optimizer = Optimizer(**TRACE["optimizer"])
    state = TrainState(policy, build_optimizer(policy, optimizer, Precision()))
    pairs = [TokenPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in TRACE["rows"]]
    metrics = []
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        packs = pack(batch, max_tokens=max_tokens, num_ranks=setup.data_parallel_size(), share_prompt=share_prompt)[setup.data_parallel_rank()]
        packs = reference.fill_reference(frozen, packs)
        metrics.append(train_step(state, packs, partial(losses.dpo, beta=TRACE["beta"]), optimizer.lr))
    return metrics


@pytest.mark.parametrize(("layout", "share_prompt"), LAYOUTS, ids=str)
def test_five_steps_equal_trl(checkpoint, layout, share_prompt):
    world = max(layout.values(), default=1)
    for metrics in run_distributed(train, world, checkpoint, layout, share_prompt):
        for ours, theirs in zip(metrics, TRACE["steps"], strict=True):
            for name, value in theirs.items():
                tolerance = {"rel": OF_NORM} if name == "grad_norm" else {"rel": OF_LOGPS} if name.startswith("logps") else {"abs": ABSOLUTE}
                assert ours[name] == pytest.approx(value, **{"abs": 0, "rel": 0} | tolerance), name
