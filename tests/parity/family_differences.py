"""How far a family's logits are from those of transformers. `python tests/parity/family_differences.py` prints the table of docs/numerics.md."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

LENGTH = 300


def differences(folder: Path) -> dict[str, float]:
    """Of the model of a folder, in this process alone: `largest` logit of transformers in float32, largest `difference` from it in float32, and of
    bfloat16 logits the root mean square distance from transformers' in float32, as a share of theirs: `ours` and of `transformers`."""
    from transformers import AutoModelForCausalLM

    from megapref.config import Parallel, Precision
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.mcore import setup
    from megapref.mcore.model import build_model

    setup.start(Parallel(), 0)
    spec = read_spec(folder)
    ids = torch.randint(0, spec.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ours, theirs = {}, {}
    with torch.no_grad():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            (chunk,) = build_model(spec, Parallel(), Precision(dtype=name))
            load_hf([chunk], spec, folder)
            ours[dtype] = chunk.eval()(ids, torch.arange(LENGTH).expand(2, -1), None)[..., : spec.vocab_size].float()
            theirs[dtype] = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(ids).logits.float()
    setup.stop()
    exact = theirs[torch.float32]
    distance = lambda logits: ((logits - exact).square().mean() / exact.square().mean()).sqrt().item()  # noqa: E731
    return {
        "largest": exact.abs().max().item(),
        "difference": (ours[torch.float32] - exact).abs().max().item(),
        "ours": distance(ours[torch.bfloat16]),
        "transformers": distance(theirs[torch.bfloat16]),
    }


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tiny_models

    print("| model | largest logit | difference, float32 | bfloat16 | transformers' bfloat16 |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for name in tiny_models.CONFIGS:
            found = differences(tiny_models.make_checkpoint(Path(root) / name, name))
            print(f"| {name} | {found['largest']:.1f} | {found['difference']:.1e} | {found['ours']:.4f} | {found['transformers']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
