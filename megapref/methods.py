"""A run's loss, from its config: weighted lists resolved, one loss for each epoch where a parameter changes; and whether plugins are right."""

from __future__ import annotations

from typing import Any

from megapref.batch import Loss, needs
from megapref.config import Config, Plugin, WeightedPlugin
from megapref.losses.combined import is_first_only, is_of_completions, needs_reference
from megapref.plugins import load_plugin, params_by_epoch
from megapref.schema import build


def load_losses(loss: Plugin) -> list[Loss]:
    """The loss of epoch 0, 1, ...; the last one stays. There are several where a parameter that is a number is given as a list of numbers.

    `params.losses` of a weighted list holds {function, params, weight} entries. ValueError names every function or parameter that is wrong.
    """
    return [_load(loss.function, params, "loss") for params in params_by_epoch(loss.function, loss.params, "loss")]


def _load(function: str, params: dict[str, Any], key: str) -> Loss:
    if isinstance(params.get("losses"), list):
        errors: list[str] = []
        entries = [build(WeightedPlugin, entry, errors) for entry in params["losses"]]
        if errors:
            raise ValueError("\n".join(f"{key}.params.losses: {error}" for error in errors))
        loaded = [(_load(entry.function, entry.params, f"{key}.params.losses[{i}]"), entry.weight) for i, entry in enumerate(entries)]
        params = params | {"losses": loaded}
    return load_plugin(function, params, key)


def compares_with_reference(cfg: Config) -> bool:
    """Whether the loss needs log-probabilities of a reference model: neither made without one, nor told to take them as 0."""
    return cfg.reference.mode not in ("free", "none") and needs_reference(load_losses(cfg.loss)[0])


def check_plugins(cfg: Config) -> None:
    """Raises ValueError with everything that is wrong with the functions that the config names; imports them (losses bring torch)."""
    errors = []
    try:
        loss = load_losses(cfg.loss)[0]
        if cfg.reference.mode == "none" and needs_reference(loss):
            errors.append(
                f'reference.mode="none", but loss.function="{cfg.loss.function}" compares with a reference; use reference.mode=resident, '
                "or reference.mode=free to take the reference's log-probabilities as 0"
            )
        errors += _unpaired(cfg, loss) + _first_only(cfg, loss)
        if cfg.data.streaming and len(load_losses(cfg.loss)) > 1:
            errors.append("loss.params has a value for each epoch, but with data.streaming=true no epoch has a known end; give one value")
    except ValueError as error:
        errors.append(str(error))
    plugins = {f"reward.{name}": plugin for name, plugin in cfg.reward.items()} | ({"judge": cfg.judge} if cfg.judge else {})
    for key, plugin in plugins.items():
        try:
            load_plugin(plugin.function, plugin.params, key)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))


def _unpaired(cfg: Config, loss: Loss) -> list[str]:
    """What is wrong with a loss of single completions in this config."""
    name = f'loss.function="{cfg.loss.function}"'
    errors = []
    if is_of_completions(loss):
        if cfg.method.pairs == "online":
            errors.append(f'{name} is of single labelled completions, but method.pairs="online" makes pairs; use method.pairs=offline')
        if cfg.guard.action == "raise_sft_weight":
            errors.append(f'guard.action="raise_sft_weight" adds the likelihood of the chosen side, and {name} has no sides; use warn or stop')
        if "kl" in needs(loss) and cfg.train.global_batch_size < 2:
            errors.append(f"train.global_batch_size=1 leaves {name} no other prompt's completion for its baseline; use at least 2")
        if "kl" in needs(loss) and cfg.reference.mode == "cached":
            errors.append(f'reference.mode="cached" has no log-probabilities of the mismatched completions of {name}; use resident or swapped')
    return errors


def _first_only(cfg: Config, loss: Loss) -> list[str]:
    """What is wrong with a loss that trains on the first completion alone in this config."""
    if is_first_only(loss) and cfg.method.num_candidates > 2 and cfg.method.pairing != "all":
        return [
            f'loss.function="{cfg.loss.function}" trains on the policy\'s sample whatever it is worth, but method.pairing="{cfg.method.pairing}" '
            "would choose among them; use method.pairing=all or method.num_candidates=2"
        ]
    return []
