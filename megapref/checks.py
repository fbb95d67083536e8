"""The rules between the values of a config, the files it names and the number of processes: all that can be known before a process group starts.

Each group of rules yields messages `key=value rule; remedy`; `check` raises them together. `config.py` has the rules for single values.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from megapref.parallel import divisors
from megapref.plugins import show
from megapref.precision_checks import precision_rules
from megapref.sampling_checks import sampling_rules
from megapref.signals import seconds

if TYPE_CHECKING:
    from megapref.config import Config

ROOT = Path(__file__).resolve().parents[1]
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
SAVED_DATA_SET = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes into the folder of one split, and of several
NUM_EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


def check(cfg: Config, world_size: int | None, hf_config: dict[str, Any] | None) -> None:
    """Raises ValueError with every rule that the config breaks; what is None (unknown as yet) is left out.

    `hf_config` is the model's config.json; call again once a hub model's is there.
    """
    of_values = [*_layout(cfg, world_size), *_model(cfg, hf_config), *_lengths(cfg), *_method(cfg), *_streaming(cfg), *_action(cfg)]
    of_values += [*sampling_rules(cfg), *_save(cfg), *_optimizer(cfg), *_profile(cfg, world_size), *precision_rules(cfg, hf_config)]
    errors = [*of_values, *_sources(cfg), *_files(cfg)]
    if errors:
        raise ValueError("\n".join(errors))


def resolve_path(path: str) -> str:
    """Returns where a relative path leads: from the current directory, else from the checkout; unchanged where neither exists (a hub name)."""
    here = Path(path).expanduser()
    return str(here) if here.exists() else str(ROOT / path) if (ROOT / path).exists() else path


def read_hf_config(path: str) -> dict[str, Any] | None:
    """Returns config.json of a Hugging Face folder, None where there is none."""
    file = Path(path) / "config.json"
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"model.path={show(path)}: its config.json is not JSON ({error}); export or download the model again") from error


def _layout(cfg: Config, world_size: int | None) -> Iterator[str]:
    p = cfg.parallel
    if p.sequence and p.tensor == 1:
        yield "parallel.sequence=true needs parallel.tensor > 1, it is 1; use parallel.sequence=false or more tensor ranks"
    if p.tensor % p.expert_parts:
        yield f"parallel.expert_tensor={p.expert_tensor} does not divide parallel.tensor={p.tensor}; use {divisors(p.tensor)}"
    if world_size is None or p.tensor % p.expert_parts:
        return
    model_ranks = p.tensor * p.pipeline * p.context
    ranks = f"parallel.tensor={p.tensor} x parallel.pipeline={p.pipeline} x parallel.context={p.context} = {model_ranks}"
    if world_size % model_ranks:
        yield f"{ranks} does not divide the world of {world_size} processes; start a multiple of {model_ranks} processes or use smaller values"
        return
    data_ranks = world_size // model_ranks
    if cfg.train.global_batch_size < data_ranks:
        yield (
            f"train.global_batch_size={cfg.train.global_batch_size} is less than the {data_ranks} data-parallel ranks "
            f"({world_size} processes, {ranks}); use at least {data_ranks}, or fewer processes"
        )
    left = world_size // p.pipeline // p.expert_parts
    if left % p.expert:
        of_stage = world_size // p.pipeline
        whole = f"{of_stage} ranks of a pipeline stage" + (f" / {p.expert_parts} that share each expert = {left}" if p.expert_parts > 1 else "")
        yield f"parallel.expert={p.expert} does not divide the {whole}; use {divisors(left)}"


def _model(cfg: Config, hf_config: dict[str, Any] | None) -> Iterator[str]:
    if hf_config is None:
        return
    tensor, expert = cfg.parallel.tensor, cfg.parallel.expert
    heads = hf_config.get("num_attention_heads")
    kv_heads = hf_config.get("num_key_value_heads") or heads
    divided = [
        ("tensor", tensor, "num_key_value_heads", kv_heads),
        ("tensor", tensor, "num_attention_heads", heads),
        ("tensor", tensor, "intermediate_size", hf_config.get("intermediate_size")),
    ]
    if hf_config.get("num_hidden_layers"):
        try:
            cfg.parallel.stage_layers(hf_config["num_hidden_layers"])
        except ValueError as error:
            yield str(error)
    experts = next((hf_config[key] for key in NUM_EXPERTS_KEYS if hf_config.get(key)), None)
    if experts:
        width = hf_config.get("moe_intermediate_size") or hf_config.get("intermediate_size")
        divided += [("expert", expert, "number of experts", experts), ("expert_tensor", cfg.parallel.expert_parts, "width of an expert", width)]
        if tensor > 1 and not cfg.parallel.sequence:
            yield f"parallel.tensor={tensor} of a mixture of experts needs parallel.sequence=true, which Core asks for"
    for name, unused in (("expert", 1), ("expert_tensor", None)):
        if not experts and (value := getattr(cfg.parallel, name)) != unused:
            yield f"parallel.{name}={value} needs a mixture-of-experts model, {cfg.model.path} is none; use {json.dumps(unused)}"
    moe = cfg.model.moe
    for name, value in vars(moe).items():
        if value and not experts:
            yield f"model.moe.{name}={json.dumps(value)} is about routers, but {cfg.model.path} is no mixture of experts; leave it out"
    if moe.freeze_router and moe.router_aux_loss_coef:
        yield f"model.moe.router_aux_loss_coef={moe.router_aux_loss_coef:g} trains what model.moe.freeze_router=true freezes; use one of them"
    for name, value, of, total in divided:
        if total and total % value:
            yield f"parallel.{name}={value} does not divide the model's {of}={total}; use {divisors(total)}"


def _lengths(cfg: Config) -> Iterator[str]:
    data, pack = cfg.data, cfg.pack
    for name in ("max_length", "max_prompt_length", "max_completion_length"):
        value = getattr(data, name)
        limit_key, limit = (
            ("pack.max_tokens", pack.max_tokens) if name == "max_length" or not data.max_length else ("data.max_length", data.max_length)
        )
        if value and value > limit:
            yield f"data.{name}={value} is more than {limit_key}={limit}; lower the one or raise the other"


def _method(cfg: Config) -> Iterator[str]:
    method, reference = cfg.method, cfg.reference
    has_reference = reference.mode in ("resident", "swapped")
    if not cfg.data.train:
        yield "data.train=[] names no source; give data.train=[{path: FILE}] or choose a group such as data=demo"
    if method.pairs == "online" and not cfg.reward and cfg.judge is None:
        yield (
            'method.pairs="online" needs something to judge the samples, and reward={} and judge=null; '
            "give reward.NAME.function=module:name or judge.function=module:name"
        )
    if reference.mode == "cached" and method.pairs == "online":
        yield (
            'reference.mode="cached" needs completions that are known before training, but method.pairs="online" samples them; '
            "use reference.mode=resident or swapped"
        )
    if reference.cache is not None and reference.mode != "cached":
        yield f'reference.cache={show(reference.cache)} is not read with reference.mode="{reference.mode}"; use reference.mode=cached or leave it out'
    if reference.sync_steps and reference.mode not in ("resident", "swapped"):
        yield (
            f'reference.sync_steps={reference.sync_steps} moves the reference, but reference.mode="{reference.mode}" holds none; '
            "use reference.mode=resident or swapped, or reference.sync_steps=0"
        )
    if (cfg.evaluation.patience or cfg.save.keep_best) and cfg.evaluation.metric is None:
        key = "evaluation.patience" if cfg.evaluation.patience else "save.keep_best"
        yield f"{key} needs to know what is better; set evaluation.metric, such as validation-default_loss, and evaluation.goal=min or max"
    if method.pairs == "offline" and cfg.evaluation.against != "reference":
        yield (
            f'evaluation.against={show(cfg.evaluation.against)} compares samples, but method.pairs="offline" makes none; '
            "its evaluation is the loss on data.validation, so leave it out"
        )
    if not has_reference and method.pairs == "online" and cfg.data.validation and cfg.evaluation.against == "reference":
        yield (
            f'reference.mode="{reference.mode}", but data.validation names prompts on which an online run is compared with its reference; '
            "use reference.mode=resident, evaluation.against=rows or the path of a model, or ~data.validation"
        )


def _action(cfg: Config) -> Iterator[str]:
    if cfg.run.action != "evaluate":
        return
    if not cfg.data.validation:
        yield 'run.action="evaluate" measures the rows of data.validation={}; name a source, such as data.validation.mine.path=FILE'
    resume = cfg.run.resume
    if resume == "auto" or (resume and Path(cfg.run.dir).resolve() in Path(resume).resolve().parents):
        yield (
            f'run.action="evaluate" writes a record of its own, not into that of run.resume={show(resume)}; '
            "give a checkpoint's folder and another run.dir"
        )


def _streaming(cfg: Config) -> Iterator[str]:
    if not cfg.data.streaming:
        return
    if cfg.method.pairs == "online":
        yield 'data.streaming=true reads pairs while training, but method.pairs="online" reads prompts; use data.streaming=false'
    if cfg.reference.mode == "cached":
        yield 'reference.mode="cached" scores all rows before training, but data.streaming=true reads them during it; use resident or swapped'
    if cfg.train.epochs is not None:
        yield f"train.epochs={cfg.train.epochs:g}: how many rows an epoch has is not known with data.streaming=true; use train.steps"


def _save(cfg: Config) -> Iterator[str]:
    for key, value in (("save.before_deadline", cfg.save.before_deadline), ("run.stuck_after", cfg.run.stuck_after)):
        if value is not None and not seconds(value):
            yield f"{key}={show(value)} is not a length of time; write 90s, 10m or 1h"


def _optimizer(cfg: Config) -> Iterator[str]:
    o = cfg.optimizer
    if cfg.train.epochs is None and o.warmup_steps >= cfg.train.steps:
        yield f"optimizer.warmup_steps={o.warmup_steps} leaves none of train.steps={cfg.train.steps}; use at most {cfg.train.steps - 1}"
    if o.min_lr > o.lr:
        yield f"optimizer.min_lr={o.min_lr} is more than optimizer.lr={o.lr}; use at most {o.lr}"


def _profile(cfg: Config, world_size: int | None) -> Iterator[str]:
    p = cfg.profile
    if not p.steps:
        return
    if cfg.train.epochs is None and max(p.steps) > cfg.train.steps:
        yield f"profile.steps={show(p.steps)} names step {max(p.steps)}, but the run ends after train.steps={cfg.train.steps}; name earlier ones"
    if world_size is not None and (not p.ranks or max(p.ranks) >= world_size):
        yield f"profile.ranks={show(p.ranks)}: there are ranks 0 to {world_size - 1}; name those that are to trace"
    if p.tool == "nvtx" and (p.memory or p.stacks):
        yield f"profile.{'memory' if p.memory else 'stacks'}=true is of torch's profiler, but profile.tool=\"nvtx\"; use profile.tool=torch"


def _sources(cfg: Config) -> Iterator[str]:
    weighted = [source.weight is not None for source in cfg.data.train]
    if any(weighted) and not all(weighted):
        yield f"data.train[{weighted.index(False)}].weight=null, but other sources have one; give all of them a weight, or none"
    for name, source in cfg.data.validation.items():
        if source.weight is not None:
            yield f"data.validation.{name}.weight={source.weight:g} has no effect, a validation source is used whole; leave it out"
    for key, source in _all_sources(cfg).items():
        for column, template in source.template.items():
            if error := template_error(template):
                yield f"{key}.template.{column}={show(template)}: {error}; write {{column}} where a column goes and {{{{ or }}}} for a brace"


def template_error(template: Any) -> str | None:
    """Returns why a template, text or messages, is not one that columns could be filled in, None where it is."""
    if isinstance(template, list | dict):
        return next(filter(None, map(template_error, template.values() if isinstance(template, dict) else template)), None)
    if not isinstance(template, str):
        return f"{show(template)} is neither text nor messages with role and content"
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        return str(error)
    return "there is more or less than a name between braces" if any(p[1] == "" or p[2] or p[3] for p in parts) else None


def _all_sources(cfg: Config) -> dict[str, Any]:
    sources = {f"data.train[{i}]": source for i, source in enumerate(cfg.data.train)}
    return sources | {f"data.validation.{name}": source for name, source in cfg.data.validation.items()}


def _files(cfg: Config) -> Iterator[str]:
    folders = {"model.path": cfg.model.path, "model.tokenizer": cfg.model.tokenizer}
    if cfg.run.resume not in (None, "auto"):
        folders["run.resume"] = cfg.run.resume
    if cfg.evaluation.against not in ("reference", "rows"):
        folders["evaluation.against"] = cfg.evaluation.against
    for key, path in folders.items():
        if path is None or Path(path).is_dir() or (key == "model.tokenizer" and Path(path).suffix == ".model" and Path(path).is_file()):
            continue
        remedy = (
            "use null, auto or the folder of a checkpoint"
            if key == "run.resume"
            else "use reference, rows, a Hugging Face folder, a hub name (owner/name) or the folder of a checkpoint"
            if key == "evaluation.against"
            else "give a Hugging Face folder or a hub name (owner/name)"
        )
        if Path(path).exists():
            yield f"{key}={show(path)} is a file, not a folder; {remedy}"
        elif key == "run.resume" or _is_local(path):
            yield f"{key}={show(path)}: there is no such folder in {_searched()}; {remedy}"
    if Path(cfg.model.path).is_dir() and not (Path(cfg.model.path) / "config.json").is_file():
        yield f"model.path={show(cfg.model.path)} has no config.json; give a Hugging Face model folder"
    if cfg.model.chat_template and not Path(cfg.model.chat_template).is_file():
        yield f"model.chat_template={show(cfg.model.chat_template)}: there is no such file in {_searched()}; give a Jinja file"
    for key, source in _all_sources(cfg).items():
        file, value = Path(source.path), f"{key}.path={show(source.path)}"
        if file.is_dir() and not any((file / name).is_file() for name in SAVED_DATA_SET) and not any(file.glob("*.parquet")):
            yield f"{value} is a folder; name the file in it"
        elif file.exists() and not os.access(file, os.R_OK):
            yield f"{value} cannot be read; allow reading it (chmod +r)"
        elif not file.exists() and _is_local(source.path):
            yield f"{value}: there is no such file in {_searched()}; give a file or the hub name of a data set (owner/name)"


def _searched() -> str:
    return " or ".join(dict.fromkeys((str(Path.cwd()), str(ROOT))))


def _is_local(path: str) -> bool:
    """Whether a path that does not exist cannot be meant as a hub name: `name` or `owner/name`, no data file, not beside what exists."""
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) and not path.endswith(DATA_SUFFIXES)
    return not is_hub_name or ("/" in path and Path(path).parent.is_dir())
