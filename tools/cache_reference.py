"""Scores the rows of a preference run with its reference model ahead of training, into a folder that runs with reference.mode=cached read.

    torchrun --nproc-per-node 2 tools/cache_reference.py --config-name dpo reference.cache=cache
    torchrun --nproc-per-node 4 launchers/train.py --config-name dpo reference.mode=cached reference.cache=cache parallel=tp2

Takes the recipe and overrides that training takes. What the folder has already is kept, a part of it scored again and compared; what is missing is
scored and written shard by shard, so a run that is stopped goes on where it was. Another layout may fill or read the folder, and several
models share one: entries are found by the content of the weights and of the tokens. Without reference.cache it is the run directory's.
"""

from __future__ import annotations

import argparse
import os
import sys

from megapref.build import fill_cache
from megapref.config import load
from megapref.mcore import setup


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", required=True, metavar="RECIPE", help="the recipe that the run will have")
    parser.add_argument("--config-dir", metavar="DIR", help="more recipes and groups, your own")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for training")
    options = parser.parse_args(arguments)
    overrides = [*options.overrides, "reference.mode=cached"]
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        cfg = load(options.config_name, overrides, options.config_dir, int(os.environ.get("WORLD_SIZE", "1")))
        setup.start(cfg.parallel, cfg.run.seed)
        try:
            fill_cache(cfg)
        finally:
            setup.stop()
    except ValueError as error:
        if is_first:
            print(f"cache_reference: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
