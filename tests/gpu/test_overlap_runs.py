"""Messages of tensor parallelism beside matrix products, or not: the same run. It needs two GPUs; it has not run on any yet."""

import pytest
import torch
from distributed_run import run_distributed
from tiny_runs import make_inputs, numbers, options, run_training

from megapref.mcore.kernels import machine

MISSING = machine().lacks("Transformer Engine") or ("there is one GPU" if torch.cuda.device_count() < 2 else None)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
WIDE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)


@pytest.mark.parametrize("fp8, bound", [(None, 0.02), ("current", 0.05)])
def test_a_run_is_the_same_with_overlap(tmp_path, fp8, bound):
    inputs, runs = make_inputs(tmp_path / "inputs", "qwen3", **WIDE), {}
    for is_on in (False, True):
        tree = options(
            inputs,
            tmp_path / str(is_on),
            "offline",
            parallel={"tensor": 2, "sequence": True, "tp_comm_overlap": is_on},
            pack={"max_tokens": 256},
            precision={"dtype": "bf16", "fp8": fp8},
        )
        assert run_distributed(run_training, 2, tree) == ["", ""]
        runs[is_on] = [record for record in numbers(tmp_path / str(is_on)) if "loss" in record]  # the first is an evaluation
    for plain, overlapped in zip(runs[False], runs[True], strict=True):
        assert overlapped["loss"] == pytest.approx(plain["loss"], abs=bound)
        assert overlapped["grad_norm"] == pytest.approx(plain["grad_norm"], rel=10 * bound)
