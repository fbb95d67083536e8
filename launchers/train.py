"""Starts a training run: every launcher (torchrun, srun, mpirun) calls this file once per process.

The config is read and checked before any process group starts. A user's mistake ends every process with exit code 2 and one message.
SIGTERM and SIGUSR1 make the run save after its step and end with exit code 85: resume it.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from megapref import compose, config, launch, signals
from megapref.plan.hardware import Gpu, parse_machine
from megapref.plugins import describe, did_you_mean, show
from megapref.schema import MISSING, options

USAGE = """\
usage: torchrun --nproc-per-node N launchers/train.py --config-name RECIPE [--config-dir DIR] [KEY=VALUE | GROUP=OPTION ...]

  --config-name RECIPE   the recipe to run
  --config-dir DIR       more recipes and groups, your own
  --cfg                  print the resolved config and stop
  --plan[=64xh100]       print predicted memory and step time of this run and of other layouts on so many GPUs, and stop (8xh100)
  --help                 print this text and stop

Overrides: optimizer.lr=1e-5   parallel=tp2   data.train='[{path: a.jsonl}]'   +loss.params.label_smoothing=0.1   ~reward.kindness"""
EXIT_USER_ERROR = 2
# A launcher stops all processes as soon as one has ended: the others leave rank 0 the time to say why.
SECONDS_FOR_RANK_0 = 10.0


@dataclass(frozen=True)
class Arguments:
    """The command line, taken apart."""

    config_name: str | None = None
    config_dir: str | None = None
    show_config: bool = False
    plan_for: str | None = None  # number and kind of GPUs
    show_help: bool = False
    overrides: list[str] = field(default_factory=list)


def parse(argv: list[str]) -> Arguments:
    """Returns the command line taken apart; ValueError names an unknown option or one without its value."""
    values: dict[str, str | bool] = {}
    overrides = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--config-name", "--config-dir"):
            values[name] = value if equals else next(words, "")
            if not values[name]:
                raise ValueError(f"{name} needs a value: {name} {'RECIPE' if name == '--config-name' else 'DIR'}")
        elif word in ("--cfg", "--help", "-h"):
            values[word] = True
        elif name == "--plan":
            values[name] = value or "8xh100"
        elif word.startswith("-"):
            known = ("--config-name", "--config-dir", "--cfg", "--plan", "--help")
            raise ValueError(f"{word}: unknown option{did_you_mean(name, known)}; there are {', '.join(known)}")
        else:
            overrides.append(word)
    return Arguments(
        values.get("--config-name"),
        values.get("--config-dir"),
        "--cfg" in values,
        values.get("--plan"),
        bool(values.keys() & {"--help", "-h"}),
        overrides,
    )


def help_text(directories: list[Path]) -> str:
    """Returns usage, recipes, groups and every key with its default, rule and comment."""
    lines = [USAGE, "", "Recipes"]
    for name, path in compose.recipes(directories).items():
        first = path.read_text().partition("\n")[0]
        lines.append(f"  {name:<14}{first.removeprefix('# ') if first.startswith('#') else ''}".rstrip())
    lines += ["", "Groups (GROUP=OPTION)"]
    lines += [f"  {group:<14}{', '.join(names)}" for group, names in compose.groups(directories, config.Config).items()]
    lines += ["", "Keys (KEY=VALUE), their defaults where the recipe gives no value"]
    for option in options(config.Config):
        default = "" if option.default == MISSING else show(option.default)
        lines.append(f"  {f'{option.key}={default}':<44} {describe(option.hint)}{f' # {option.comment}' if option.comment else ''}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 2 after a user's mistake, 85 after a signal. Other errors are raised as they are."""
    rank = launch.rank_at_a_guess(os.environ)
    try:
        process = launch.detect(os.environ)
        rank = process.rank
        arguments = parse(argv)
        directories = compose.search_path(arguments.config_dir)
        if arguments.show_help:
            say(rank, help_text(directories))
            return 0
        if arguments.config_name is None:
            raise ValueError(f"--config-name is missing; there are {', '.join(sorted(compose.recipes(directories)))} (and --help)")
        machine = parse_machine(arguments.plan_for) if arguments.plan_for else None
        world_size = None if arguments.show_config and process.launcher == "none" else machine[0] if machine else process.world_size
        cfg = config.load(arguments.config_name, arguments.overrides, arguments.config_dir, world_size)
        if arguments.show_config:
            say(rank, config.to_yaml(cfg).rstrip())
            return 0
        from megapref.methods import check_plugins  # brings torch: not for --help, --cfg or a wrong config

        check_plugins(cfg)
        if machine:
            show_plan(rank, cfg, *machine)
            return 0
        launch.connect(process)
    except ValueError as error:
        return fail(rank, str(error))

    from megapref.train import main as train

    try:
        is_stopped = train(cfg)
    except ValueError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return fail(rank, f"{error}\n(raised in {where.name}, {where.filename}:{where.lineno})", every_rank=True)
    launch.leave(process)
    return signals.EXIT_CODE if is_stopped else 0


def show_plan(rank: int, cfg: config.Config, num_gpus: int, gpu: Gpu) -> None:
    """Prints what the run is predicted to need on so many GPUs, on rank 0."""
    if rank == 0:
        from rich.console import Console

        from megapref.plan.tables import report
        from megapref.planning import plan_config

        Console(highlight=False).print(report(plan_config(cfg, num_gpus, gpu), top=8))


def say(rank: int, text: str) -> None:
    """Prints on rank 0."""
    if rank == 0:
        print(text, flush=True)


def fail(rank: int, message: str, every_rank: bool = False) -> int:
    """Prints the message on rank 0, with `every_rank` also where a process is left to itself for a while; returns the exit code."""
    is_ended_by_launcher = rank > 0 and signals.noted_within(SECONDS_FOR_RANK_0)
    if rank == 0 or (every_rank and not is_ended_by_launcher):
        print(f"megapref cannot run this{f' (rank {rank})' if rank else ''}:\n{message}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    with signals.noted(then_ignored=True):
        sys.exit(main(sys.argv[1:]))
