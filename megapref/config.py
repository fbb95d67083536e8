"""Every option there is, as dataclasses, and `load()`, which turns a recipe and overrides into one checked `Config`.

The annotations are the rules for single values, the comments are the help text; `checks.py` has the rules between values and the world.
`compose.py` finds and combines the files: past `load()` there are plain frozen dataclasses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megapref.checks import check, read_hf_config, resolve_path
from megapref.compose import as_yaml, compose_recipe, compose_settings, search_path
from megapref.parallel import Count, Parallel, SamplingParallel
from megapref.precision import Kernels, Precision, Whole
from megapref.schema import MISSING, build

Positive = Annotated[float, "> 0"]
NotNegative = Annotated[float, ">= 0"]
Share = Annotated[float, ">= 0", "<= 1"]
Beta = Annotated[float, ">= 0", "< 1"]


@dataclass(frozen=True)
class Plugin:
    """A function by import path and its keyword arguments; the function's keyword-only parameters are the schema."""

    function: str = MISSING  # module:name
    params: dict[str, Any] = field(default_factory=dict)  # its keyword arguments


@dataclass(frozen=True)
class WeightedPlugin(Plugin):
    weight: float = 1.0  # of this reward in the sum


@dataclass(frozen=True)
class Run:
    dir: str = MISSING  # run directory; default: runs/<recipe>
    seed: Whole = 0  # of everything random
    resume: str | None = None  # null: a fresh run directory; auto: the newest good checkpoint in run.dir, if any; a path: that checkpoint
    stuck_after: str | None = "30m"  # 90s, 10m, 1h in which no process gets on end the run, with a report of who holds it up; null: never
    action: Literal["train", "evaluate"] = "train"  # evaluate: only measure the model, or the checkpoint of run.resume, on data.validation


@dataclass(frozen=True)
class Moe:
    """How the routers of a mixture of experts are trained."""

    # Preference training is short and keeps the balance that pretraining made, and such a loss pulls against the method's own: so it is off, whatever
    # config.json says of pretraining. Watch moe/load_max.
    router_aux_loss_coef: NotNegative = 0.0  # of the load-balancing loss, a mean over rows and layers that is added to the method's; 0: none
    freeze_router: bool = False  # the routers' weights stay as they are


@dataclass(frozen=True)
class Model:
    path: str = MISSING  # Hugging Face folder or hub name
    tokenizer: str | None = None  # folder, hub name or SentencePiece .model file; default: model.path
    chat_template: str | None = None  # Jinja file; default: the tokenizer's own
    moe: Moe = field(default_factory=Moe)


@dataclass(frozen=True)
class Source:
    path: str = MISSING  # local JSONL / JSON / Parquet / CSV / Arrow file, a folder of Parquet files such as RUN_DIR/ledger, or a hub name
    split: str = "train"  # of a hub data set
    take: Count | None = None  # the first n rows only
    weight: Positive | None = None  # share of the rows drawn, relative to the other sources'; null for all sources: each row once an epoch
    columns: dict[str, str] = field(default_factory=dict)  # the file's names of columns: {prompt: question, chosen: best}
    template: dict[str, Any] = field(default_factory=dict)  # columns made from the file's: {prompt: "Question: {question}"}; or messages
    filter_length: bool = False  # leave out rows with a prompt of over 0.9 * generation.max_new_tokens tokens


@dataclass(frozen=True)
class Data:
    train: list[Source] = field(default_factory=list)  # sources, all read before training, but for data.streaming
    validation: dict[str, Source] = field(default_factory=dict)  # named sources; metrics are prefixed validation-<name>_
    max_length: Count | None = None  # prompt + completion tokens; default: pack.max_tokens
    max_prompt_length: Count | None = None  # tokens
    max_completion_length: Count | None = None  # tokens
    truncation: Literal["keep_end", "keep_start", "error"] = "keep_end"  # what stays of a prompt that is too long
    train_on: Literal["final", "all_assistant"] = "final"  # of a completion of several messages: its last, or all of the assistant's
    pairing: Literal["best_worst", "all"] = "best_worst"  # of ranked completions: one pair, or every two
    ties: Literal["error", "skip"] = "error"  # rows that prefer neither completion; skip: counted in the log
    on_bad_row: Literal["error", "skip"] = "error"  # skip: counted in the log
    shuffle: bool = True  # anew every epoch
    streaming: bool = False  # read data.train while training, for sources larger than memory
    shuffle_buffer: Count = 10_000  # rows of each source that are held to be shuffled, with data.streaming


@dataclass(frozen=True)
class Method:
    pairs: Literal["online", "offline"] = "online"  # online: sampled and judged; offline: read from data.train
    # one half of the completions is the policy's, the other the policy's, the reference's or of a mixture of both, token by token
    candidates: Literal["policy_policy", "policy_reference", "policy_mixture"] = "policy_policy"  # who samples
    mixture_coef: Share | list[Share] = 0.5  # of the mixture's logits, the reference's share; a list: in each epoch
    num_candidates: Annotated[int, ">= 2"] = 2  # completions of each prompt
    pairing: Literal["best_worst", "all"] = "best_worst"  # of more than two: one pair, or all (of two models: one of each)
    ties: Literal["first", "skip", "soft"] | None = None  # equal scores, verdicts of 0.5: first wins, no pair, 0.5; null: first; skip for a judge
    soft_preference: bool = False  # of scores: the sigmoid of their difference instead of 1 or 0, ties or not
    missing_eos_penalty: NotNegative = 0.0  # subtracted from the score of a completion that does not end


@dataclass(frozen=True)
class Train:
    steps: Count = 100  # optimizer steps
    epochs: Positive | None = None  # passes over data.train; takes the place of train.steps
    global_batch_size: Count = 32  # pairs, or prompts of an online method
    max_bad_steps: Count = 3  # non-finite loss or gradient norm: the step is skipped; this many in a row stop the run


@dataclass(frozen=True)
class Pack:
    max_tokens: Annotated[int, ">= 64"] = 4096  # tokens of one packed sequence
    share_prompt: bool = True  # a pair's prompt is stored once, both completions attend to it


@dataclass(frozen=True)
class Reference:
    # resident: a frozen second copy; swapped: in CPU memory, takes the policy's place when needed; cached: its log-probabilities are read from
    # reference.cache, and those that it lacks scored before training; free: they are 0; none
    mode: Literal["resident", "swapped", "cached", "free", "none"] = "resident"  # how the reference policy is had
    cache: str | None = None  # folder of cached log-probabilities, may be shared by runs and models; null: run.dir/reference_cache
    sync_steps: Whole = 0  # TR-DPO (TRL's ref_model_sync_steps): every so many steps the reference moves towards the policy; 0: never
    mixup_alpha: Annotated[float, "> 0", "<= 1"] = 0.6  # by this share (ref_model_mixup_alpha)
    fp8_weights: bool = False  # a resident one's weights are kept in FP8 alone, with precision.fp8


@dataclass(frozen=True)
class Optimizer:
    lr: NotNegative = 1e-6  # peak learning rate
    weight_decay: NotNegative = 0.0  # decoupled (AdamW)
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # Adam's decay of the two moments
    eps: Positive = 1e-8  # Adam's
    clip_grad: Positive = 1.0  # largest gradient norm
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warmup, until train.steps
    warmup_steps: Whole = 0  # linear from 0
    min_lr: NotNegative = 0.0  # where linear and cosine end
    offload: Share = 0.0  # of the optimizer's state is held, and its step taken, in CPU memory (needs a GPU)


@dataclass(frozen=True)
class Generation:
    max_new_tokens: Count = 64  # per completion
    temperature: NotNegative = 1.0  # 0: greedy
    top_p: Annotated[float, "> 0", "<= 1"] = 1.0  # 1: off
    top_k: Whole = 0  # 0: off
    stop: list[str] = field(default_factory=list)  # texts that end a completion, which keeps them, as it keeps its end-of-text token
    sync_every: Count = 1  # semi-online: the prompts of so many steps are sampled at once, with the weights before the first of them
    parallel: SamplingParallel = field(default_factory=SamplingParallel)
    max_requests: Count = 256  # slots decoded together
    kv_cache_gb: Positive | None = None  # GiB per rank; null: what max_requests need, on a GPU at most 0.8 of what is free


@dataclass(frozen=True)
class Evaluation:
    every: Whole = 0  # steps; 0: at the start and the end only
    max_prompts: Count | None = None  # of each validation source; null: all
    against: str = "reference"  # whom an online run's policy plays: reference; rows: the rows' own answers; or a Hugging Face model or a checkpoint
    answers: str = "answer"  # the rows' column that has their own answers
    temperature: NotNegative | None = None  # of both players' samples; 0: greedy; null: generation.temperature
    metric: str | None = None  # what tells a better model, such as validation-default_loss or eval/win_rate
    goal: Literal["min", "max"] = "min"  # of that metric
    patience: Whole = 0  # evaluations in a row without a better value that end the run; 0: it always runs to its end


@dataclass(frozen=True)
class Save:
    every: Whole = 0  # steps; 0: at the end only
    keep: Count = 2  # the newest checkpoints
    keep_best: Whole = 0  # those of the best evaluations by evaluation.metric are kept, too; the best is what is exported
    background: bool = False  # files are written while training goes on, from a copy in CPU memory
    on_error: Literal["stop", "continue"] = "stop"  # where something cannot be written (disk full): the end, or on without it
    before_deadline: str | None = None  # 90s, 10m, 1h: how long before the Slurm job's time limit the run saves and stops, to be resumed
    export: bool = True  # write the final (or best) weights as a Hugging Face folder, run.dir/hf


@dataclass(frozen=True)
class Guard:
    """Watches whether the chosen completions become unlikely (likelihood displacement), or samples much longer or shorter."""

    action: Literal["warn", "stop", "raise_sft_weight"] = "warn"  # what follows: words; the end; the chosen side's likelihood joins the loss
    window: Count = 10  # steps that are averaged
    max_drop: Positive = 0.1  # of the chosen side's log-probability per token, below the reference's or that of the first steps
    max_length_ratio: Annotated[float, "> 1"] = 2.0  # of samples, against those of the first steps, either way
    sft_weight: Positive = 0.1  # that raise_sft_weight adds each time


@dataclass(frozen=True)
class Log:
    samples_every: Whole = 10  # steps between tables of sample completions; 0: never
    samples: Count = 4  # rows of such a table
    ledger: bool = True  # of an online run: every comparison of samples, with its verdict, goes to run.dir/ledger
    tensorboard: bool = True  # events in run.dir
    wandb: str | None = None  # project; null: off


@dataclass(frozen=True)
class Profile:
    """Traces of single steps, in run.dir/profile."""

    steps: list[Count] = field(default_factory=list)  # numbers, from 1, of the steps that are traced, each by itself; empty: none
    ranks: list[Whole] = field(default_factory=lambda: [0])  # processes that trace
    tool: Literal["torch", "nvtx"] = "torch"  # torch: its profiler; nvtx: named ranges only, for a run under NVIDIA's Nsight Systems
    memory: bool = False  # also what each operation allocates (torch)
    stacks: bool = False  # also the Python functions that operations come from (torch)


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    method: Method = field(default_factory=Method)
    train: Train = field(default_factory=Train)
    pack: Pack = field(default_factory=Pack)
    loss: Plugin = field(default_factory=Plugin)
    reference: Reference = field(default_factory=Reference)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    kernels: Kernels = field(default_factory=Kernels)
    optimizer: Optimizer = field(default_factory=Optimizer)
    generation: Generation = field(default_factory=Generation)
    reward: dict[str, WeightedPlugin] = field(default_factory=dict)  # functions by name; the score is their weighted sum
    judge: Plugin | None = None  # default: judges by the weighted sum of the rewards
    evaluation: Evaluation = field(default_factory=Evaluation)
    guard: Guard = field(default_factory=Guard)
    save: Save = field(default_factory=Save)
    log: Log = field(default_factory=Log)
    profile: Profile = field(default_factory=Profile)

    @property
    def pad_multiple(self) -> int:
        """What the rows of a pack are padded to a multiple of, so that every rank's part suits the layout and the matrix products."""
        return self.parallel.pad_multiple * self.precision.pad_multiple

    @property
    def pack_tokens(self) -> int:
        """The most tokens that a pack has, padding included."""
        return self.pack.max_tokens // self.pad_multiple * self.pad_multiple


def load(config_name: str, overrides: list[str], config_dir: str | None = None, world_size: int | None = 1) -> Config:
    """Returns the recipe `config_name` with the overrides, checked; `world_size=None` leaves the number of processes out of the check.

    `config_dir` adds recipes and groups to the shipped ones. ValueError lists everything that is wrong.
    """
    errors: list[str] = []
    tree = compose_recipe(Config, config_name, overrides, search_path(config_dir), errors)
    cfg = build(Config, tree, errors)
    if errors:
        raise ValueError("\n".join(errors))
    cfg = _resolve_paths(cfg)
    check(cfg, world_size, read_hf_config(cfg.model.path))
    return cfg


def load_settings[T](cls: type[T], tree: dict[str, Any], overrides: list[str], config_dir: str | None = None) -> T:
    """Returns settings that belong to no recipe, such as those of a cluster, from the overrides' groups and keys and the plain values of `tree`.

    ValueError lists everything that is wrong.
    """
    errors: list[str] = []
    built = build(cls, compose_settings(cls, overrides, search_path(config_dir), errors) | tree, errors)
    if errors:
        raise ValueError("\n".join(errors))
    return built


def to_yaml(cfg: Config) -> str:
    """Returns the whole config as YAML; saved as `x.yaml` it is a recipe that loads to an equal config."""
    return as_yaml(dataclasses.asdict(cfg))


def _resolve_paths(cfg: Config) -> Config:
    def of(source: Source) -> Source:
        return dataclasses.replace(source, path=resolve_path(source.path))

    paths = {name: path and resolve_path(path) for name, path in vars(cfg.model).items() if name in ("path", "tokenizer", "chat_template")}
    train, validation = [of(s) for s in cfg.data.train], {name: of(s) for name, s in cfg.data.validation.items()}
    model = dataclasses.replace(cfg.model, **paths)
    evaluation = dataclasses.replace(cfg.evaluation, against=resolve_path(cfg.evaluation.against))
    return dataclasses.replace(cfg, model=model, evaluation=evaluation, data=dataclasses.replace(cfg.data, train=train, validation=validation))
