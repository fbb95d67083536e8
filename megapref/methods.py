"""A run's loss, from its config: weighted lists resolved, one loss for each epoch where a parameter changes; and whether plugins are right."""

from __future__ import annotations

from typing import Any

from megapref.batch import Loss
from megapref.config import Config, Plugin, WeightedPlugin
from megapref.losses.combined import needs_reference, parts
from megapref.plugins import load_plugin, params_by_epoch
from megapref.schema import build


def load_losses(loss: Plugin) -> list[Loss]:
    """The loss of epoch 0, 1, ...; the last one stays. There are several where a parameter that is a number is given as a list of numbers.

    `params.losses` of a weighted list holds {function, params, weight} entries. ValueError names every function or parameter that is wrong.
    """
    losses = [_load(loss.function, params, "loss") for params in params_by_epoch(loss.function, loss.params, "loss")]
    for part in parts(losses[0]):
        if part.__module__ == "megapref.losses.unpaired":
            raise ValueError(f'loss.function="{loss.function}" is of single labelled completions, which no source yields yet; use a loss of pairs')
    return losses


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
    return cfg.reference.mode == "resident" and needs_reference(load_losses(cfg.loss)[0])


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
