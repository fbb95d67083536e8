"""Recipes and overrides become one checked config; what is wrong is named with key, value and remedy before anything starts."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megapref.checks import ROOT, check, resolve_path
from megapref.compose import RECIPES, groups, recipes, search_path
from megapref.config import Config, Data, Moe, Parallel, Source, WeightedPlugin, load, to_yaml
from megapref.launch import TORCHRUN
from megapref.methods import check_plugins, load_losses
from megapref.schema import MISSING, options

LAUNCHER = ROOT / "launchers" / "train.py"
HF_CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 6, "intermediate_size": 96}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A current directory with a model, data and a recipe of the user's."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(HF_CONFIG))
    (tmp_path / "bare").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "mine" / "optimizer").mkdir(parents=True)
    (tmp_path / "mine" / "optimizer" / "fast.yaml").write_text("lr: 0.5\n")
    (tmp_path / "mine" / "small.yaml").write_text(
        "# A small recipe.\n"
        "defaults: [{optimizer: fast}, {loss: dpo}, {parallel: single}, {reward: sentiment}, _self_]\n"
        "model: {path: model}\ndata: {train: [{path: rows.jsonl}]}\n"
    )
    (tmp_path / "mine" / "plain.yaml").write_text(  # the same without groups, which take Hydra the most time
        "optimizer: {lr: 0.5}\nloss: {function: losses:dpo, params: {beta: 0.1}}\nreward: {kindness: {function: online.rewards:sentiment}}\n"
        "model: {path: model}\ndata: {train: [{path: rows.jsonl}]}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(*overrides, world_size=1):
    return load("small", list(overrides), "mine", world_size)


def test_recipe_group_and_defaults():
    cfg = small()
    assert cfg.optimizer.lr == 0.5 and cfg.loss.function == "losses:dpo" and cfg.loss.params == {"beta": 0.1}
    assert cfg.reward == {"kindness": WeightedPlugin("online.rewards:sentiment")}
    assert cfg.data.train == [Source("rows.jsonl")] and cfg.run.dir == "runs/small" and cfg.optimizer.betas == (0.9, 0.999)


@pytest.mark.parametrize("name", sorted(recipes([RECIPES])))
def test_shipped_recipes(name):
    cfg = load(name, ["model.path=model", "data.train=[{path: rows.jsonl}]", "~data.validation.demo"])
    assert cfg.run.dir == f"runs/{name}" and (name == "sft") == (cfg.loss.function == "losses:sft")
    assert (cfg.method.pairs == "online") == name.startswith(("online", "xpo", "nash"))
    check_plugins(cfg)


@pytest.mark.parametrize("group", sorted(groups([RECIPES], Config)))
def test_every_shipped_option_of_a_group_loads(group):
    for option in groups([RECIPES], Config)[group]:
        any_model = ["model.path=owner/experts"] if group == "parallel" else []  # a layout of experts does not fit the demo's model
        cfg = load("online_dpo", [f"{group}={option}", *any_model], world_size=None)
        given = yaml.safe_load((RECIPES / group / f"{option}.yaml").read_text())
        built = dataclasses.asdict(cfg)[group]
        for key, value in given.items():
            if isinstance(value, str) and "assets" not in value:
                assert built[key] == value
            assert key in built


def test_override_grammar():
    cfg = small(
        "train.steps=7",
        "optimizer.lr=1e-4",
        "optimizer.betas=[0.8,0.95]",
        "+loss.params.label_smoothing=0.2",
        "~reward.kindness",
        "+judge.function=mine:judge",
        "judge.params.size=3",
        "data.train=[{path: rows.jsonl, take: 3}, {path: owner/name, split: test}]",
        "data.validation.extra.path=rows.jsonl",
        "run.dir='a, b'",
        "run.resume=auto",
    )
    assert cfg.train.steps == 7 and cfg.optimizer.lr == 1e-4 and cfg.optimizer.betas == (0.8, 0.95)
    assert cfg.loss.params == {"beta": 0.1, "label_smoothing": 0.2} and cfg.reward == {}
    assert cfg.judge.function == "mine:judge" and cfg.judge.params == {"size": 3}
    assert cfg.data.train == [Source("rows.jsonl", take=3), Source("owner/name", "test")]
    assert cfg.data.validation == {"extra": Source("rows.jsonl")} and cfg.run.dir == "a, b" and cfg.run.resume == "auto"


def test_one_entry_of_a_list():
    assert small("data.train.0.take=5").data.train == [Source("rows.jsonl", take=5)]


def test_group_choice_replaces_the_whole_group():
    assert small("parallel=tp2", world_size=4).parallel == Parallel(tensor=2)
    assert small("parallel=tp2", "parallel.sequence=true", world_size=2).parallel == Parallel(tensor=2, sequence=True)
    assert small("loss=ipo").loss.function == "losses:ipo"
    assert small("reward=null", "judge.function=a:b").reward == {}
    assert small("+precision=bf16").precision.dtype == "bf16"


def test_interpolation():
    assert small("data.max_length=${pack.max_tokens}", "pack.max_tokens=128", "generation.max_new_tokens=8").data.max_length == 128
    of = lambda *overrides: load("online_dpo", ["judge=http", *overrides], world_size=None).judge.params["cache"]  # noqa: E731
    assert of() == "runs/online_dpo/judge_cache" and of("run.dir=here") == "here/judge_cache"  # run.dir is known, given or not


def test_round_trip(tmp_path):
    cfg = small("optimizer.betas=[0.8,0.95]", "judge.function=a:b", "data.max_length=99", "run.dir=elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(cfg))
    assert load("config", [], "run") == cfg
    assert yaml.safe_load(to_yaml(cfg))["data"]["train"][0]["path"] == "rows.jsonl"


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().train.steps = 3


def test_users_recipe_comes_before_a_shipped_one(place):
    (place / "mine" / "online_dpo.yaml").write_text((place / "mine" / "small.yaml").read_text() + "train: {steps: 3}\n")
    assert load("online_dpo", [], "mine").train.steps == 3
    assert "small" in recipes(search_path("mine")) and "sft" in recipes(search_path("mine"))


def test_users_groups_serve_a_shipped_recipe(place):
    overrides = ["model.path=model", "data.train=[{path: rows.jsonl}]", "~data.validation.demo", "+optimizer=fast"]
    assert load("dpo", overrides, "mine").optimizer.lr == 0.5  # a group that is added comes after the recipe
    (place / "mine" / "precision").mkdir()
    (place / "mine" / "precision" / "mixed.yaml").write_text("dtype: bf16\n")
    assert load("dpo", [*overrides, "precision=mixed"], "mine").precision.dtype == "bf16"
    (place / "mine" / "precision" / "fp32.yaml").write_text("dtype: bf16\n")
    with pytest.raises(ValueError, match=r"mine/precision/fp32.yaml: the shipped recipe dpo would use the shipped option .*; rename"):
        load("dpo", overrides, "mine")


def test_path_from_here_before_the_checkout(place):
    assert resolve_path("configs") == str(ROOT / "configs") and resolve_path("owner/name") == "owner/name"
    (place / "configs").mkdir()
    assert resolve_path("configs") == "configs"


BAD_OVERRIDES = [
    # keys
    ("parallel.tensr=2", ["parallel.tensr: unknown key; did you mean parallel.tensor?"]),
    ("+optimizer.momentum=1", ["optimizer.momentum: unknown key", "optimizer.betas"]),
    ("lr=1e-4", ["lr: unknown key; did you mean optimizer.lr?"]),
    ("paralel=tp2", ["paralel: unknown key; did you mean parallel?"]),
    ("data.train=[{file: rows.jsonl}]", ["data.train[0].file: unknown key", "data.train[0].path: missing; give data.train[0].path=..."]),
    ("judge={}", ["judge.function: missing; give judge.function=... (module:name)"]),
    ("reward.new.weight=2", ["reward.new.function: missing; give reward.new.function=..."]),
    ("model.path=???", ["model.path: missing; give model.path=... (Hugging Face folder or hub name)"]),
    ("~optimizer.momentum", ["optimizer.momentum", "does not exist"]),
    ("+train.steps", ["+train.steps: not KEY=VALUE", "quote"]),
    ("optimizer.lr=1,2", ["optimizer.lr=1,2: several values for one run; write a list as optimizer.lr=[a,b]"]),
    ("hydra.run.dir=x", ["hydra.run.dir=x: Hydra's own settings have no effect here; leave it out"]),
    ("run.dir=${nowhere}", ["run.dir", "nowhere", "not found"]),
    # groups
    ("parallel=tp3", ["parallel=tp3: no such option of parallel; did you mean tp2?", "pp2, single, tp2", "parallel.KEY=VALUE"]),
    ("+precision=fp8", ["precision=fp8: no such option", "bf16, fp32"]),
    # types
    ("train.steps=abc", ['train.steps="abc" must be int >= 1']),
    ("train.steps=1.5", ["train.steps=1.5 must be int >= 1"]),
    ("train=3", ["train=3 must be a mapping with steps, epochs, global_batch_size", "give train.steps=..."]),
    ("data.train=rows.jsonl", ['data.train="rows.jsonl" must be list of Source']),
    ("data.shuffle=1", ["data.shuffle=1 must be true or false"]),
    ("run.dir=7", ["run.dir=7 must be str"]),
    ("optimizer.betas=0.9", ["optimizer.betas=0.9 must be list [float >= 0 and < 1, float >= 0 and < 1]"]),
    ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9] must be list"]),
    ("loss.params=0.1", ["loss.params=0.1 must be mapping"]),
    # lists of allowed values
    ("method.pairs=onlin", ['method.pairs="onlin" must be one of online, offline; did you mean online?']),
    ("method.candidates=mixture", ['method.candidates="mixture" must be one of policy_policy, policy_reference']),
    ("method.ties=random", ['method.ties="random" must be one of first, skip, soft']),
    ("optimizer.schedule=cosin", ['optimizer.schedule="cosin" must be one of constant, linear, cosine; did you mean cosine?']),
    ("precision.dtype=fp16", ['precision.dtype="fp16" must be one of fp32, bf16']),
    ("reference.mode=frozen", ['reference.mode="frozen" must be one of resident, swapped, cached, free, none']),
    ("data.truncation=left", ['data.truncation="left" must be one of keep_end, keep_start, error']),
    ("data.on_bad_row=drop", ['data.on_bad_row="drop" must be one of error, skip']),
    # ranges
    ("optimizer.lr=-1", ["optimizer.lr=-1 must be float >= 0"]),
    ("optimizer.lr=nan", ["optimizer.lr=NaN must be float >= 0"]),
    ("optimizer.betas=[0.9,1.0]", ["optimizer.betas=[0.9, 1.0] must be list"]),
    ("optimizer.eps=0", ["optimizer.eps=0 must be float > 0"]),
    ("optimizer.clip_grad=0", ["optimizer.clip_grad=0 must be float > 0"]),
    ("optimizer.warmup_steps=-1", ["optimizer.warmup_steps=-1 must be int >= 0"]),
    ("train.steps=0", ["train.steps=0 must be int >= 1"]),
    ("train.global_batch_size=0", ["train.global_batch_size=0 must be int >= 1"]),
    ("pack.max_tokens=32", ["pack.max_tokens=32 must be int >= 64"]),
    ("generation.temperature=-0.1", ["generation.temperature=-0.1 must be float >= 0"]),
    ("generation.top_p=0", ["generation.top_p=0 must be float > 0 and <= 1"]),
    ("generation.top_p=1.1", ["generation.top_p=1.1 must be float > 0 and <= 1"]),
    ("parallel.tensor=0", ["parallel.tensor=0 must be int >= 1"]),
    ("save.keep=0", ["save.keep=0 must be int >= 1"]),
    # what does not go together
    ("parallel.tensor=3", ["parallel.tensor=3 does not divide the model's num_attention_heads=8; use 1, 2, 4 or 8"]),
    ("parallel.tensor=5", ["parallel.tensor=5 does not divide the model's num_key_value_heads=2; use 1 or 2"]),
    ("parallel.tensor=64", ["parallel.tensor=64 does not divide the model's intermediate_size=96"]),
    ("parallel.pipeline=4", ["parallel.pipeline=4 does not divide the model's num_hidden_layers=6; use 1, 2, 3 or 6"]),
    ("parallel.sequence=true", ["parallel.sequence=true needs parallel.tensor > 1", "use parallel.sequence=false"]),
    ("parallel.virtual_pipeline=2", ["parallel.virtual_pipeline=2 is about stages of a pipeline, but parallel.pipeline=1", "more stages"]),
    ("generation.parallel.tensor=2", ["generation.parallel.tensor=2 does not divide parallel.tensor=1, whose parts are joined; use 1"]),
    ("parallel.expert=2", ["parallel.expert=2 needs a mixture-of-experts model", "use 1"]),
    ("optimizer.warmup_steps=100", ["optimizer.warmup_steps=100 leaves none of train.steps=100; use at most 99"]),
    ("optimizer.min_lr=0.6", ["optimizer.min_lr=0.6 is more than optimizer.lr=0.5; use at most 0.5"]),
    ("data.max_length=5000", ["data.max_length=5000 is more than pack.max_tokens=4096"]),
    ("generation.max_new_tokens=2048", ["pack.max_tokens=4096 is too small", "generation.max_new_tokens=2048; use at least 4097"]),
    ("data.max_prompt_length=4000", ["pack.max_tokens=4096", "prompt of 4000 tokens (data.max_prompt_length)", "use at least 4128"]),
    ("data.max_length=50", ["data.max_length=50 is less than", "generation.max_new_tokens=64; use at least 65"]),
    ("generation.stop=[END,'']", ["generation.stop has an empty text", "leave it out"]),
    ("save.before_deadline=soon", ['save.before_deadline="soon" is not a length of time']),
    ("data.train=[]", ["data.train=[] names no source; give data.train=[{path: FILE}]"]),
    ("~reward.kindness", ["reward={} and judge=null; give reward.NAME.function"]),
    ("reference.mode=cached", ['reference.mode="cached" needs completions that are known before training', "use reference.mode=resident or swapped"]),
    ("reference.cache=here", ['reference.cache="here" is not read with reference.mode="resident"', "use reference.mode=cached"]),
    ("save.keep_best=1", ["save.keep_best needs to know what is better; set evaluation.metric"]),
    ("evaluation.patience=1", ["evaluation.patience needs to know what is better; set evaluation.metric"]),
    ("data.streaming=true", ['data.streaming=true reads pairs while training, but method.pairs="online" reads prompts']),
    ("run.action=evaluate", ['run.action="evaluate" measures the rows of data.validation={}; name a source']),
    # files
    ("model.path=no/such/folder", ['model.path="no/such/folder": there is no such folder', "give a Hugging Face folder"]),
    ("model.path=mine/none", ['model.path="mine/none": there is no such folder']),
    ("model.path=rows.jsonl", ['model.path="rows.jsonl" is a file, not a folder; give']),
    ("model.path=bare", ['model.path="bare" has no config.json; give a Hugging Face model folder']),
    ("model.tokenizer=./none", ['model.tokenizer="./none": there is no such folder', "give"]),
    ("run.resume=yesterday", ['run.resume="yesterday": there is no such folder', "use null, auto or"]),
    ("data.train=[{path: none.jsonl}]", ['data.train[0].path="none.jsonl": there is no such file', "give a file"]),
    ("data.validation={a: {path: bare}}", ['data.validation.a.path="bare" is a folder; name the file in it']),
]


@pytest.mark.parametrize(("override", "parts"), BAD_OVERRIDES, ids=[override for override, _ in BAD_OVERRIDES])
def test_bad_input_names_key_value_and_remedy(override, parts):
    with pytest.raises(ValueError) as error:
        load("plain", [override], "mine", world_size=None)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 3, message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data.streaming=true", "reference.mode=cached"], "scores all rows before training, but data.streaming=true reads them during it"),
        (["data.streaming=true", "train.epochs=2"], "train.epochs=2: how many rows an epoch has is not known with data.streaming=true"),
        (["reference.mode=cached", "reference.sync_steps=5"], 'reference.sync_steps=5 moves the reference, but reference.mode="cached" holds none'),
        (["run.action=evaluate", "run.resume=auto", "+data.validation.a.path=rows.jsonl"], "give a checkpoint's folder and another run.dir"),
        (["run.action=evaluate", "run.resume=model", "run.dir=.", "+data.validation.a.path=rows.jsonl"], 'not into that of run.resume="model"'),
    ],
)
def test_offline_options_that_do_not_go_together(overrides, part):
    with pytest.raises(ValueError) as error:
        load("plain", ["method.pairs=offline", *overrides], "mine", world_size=None)
    assert part in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_stream_has_one_loss_and_kto_needs_others():
    with pytest.raises(ValueError, match=r"with data.streaming=true no epoch has a known end"):
        check_plugins(small("method.pairs=offline", "data.streaming=true", "loss.params.beta=[0.5,0.1]"))
    for overrides, words in (
        (["train.global_batch_size=1"], r"train.global_batch_size=1 leaves .*no other prompt's completion"),
        (["reference.mode=cached"], r'reference.mode="cached" has no log-probabilities of the mismatched completions'),
        (["guard.action=raise_sft_weight"], r"has no sides; use warn or stop"),
    ):
        with pytest.raises(ValueError, match=words):
            check_plugins(small("method.pairs=offline", "loss=kto", *overrides))


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["save.every=6"], "save.every=6 saves within a round of generation.sync_every=4 steps, from where a run cannot be resumed exactly; use"),
        (["save.keep_best=1", "evaluation.every=2", "evaluation.metric=a"], "evaluation.every=2 saves with save.keep_best within a round"),
    ],
)
def test_saves_are_between_rounds_of_generation(overrides, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        load("plain", ["generation.sync_every=4", *overrides], "mine", world_size=None)
    load("plain", ["generation.sync_every=4", "save.every=8", "evaluation.every=2"], "mine", world_size=None)


def test_several_mistakes_are_listed_together():
    with pytest.raises(ValueError) as error:
        small("parallel.tensr=2", "train.steps=abc", "loss=dpoo", "data.shuffle=7", "optimizer.lr=1,2")
    assert [line.split(" ")[0] for line in sorted(str(error.value).splitlines())] == [
        "data.shuffle=7",
        "loss=dpoo:",
        "optimizer.lr=1,2:",
        "parallel.tensr:",
        'train.steps="abc"',
    ]
    with pytest.raises(ValueError) as error:
        small("parallel.pipeline=4", "data.train=[]", world_size=4)
    assert len(str(error.value).splitlines()) == 2


JUDGE = ["judge={function: 'my:judge'}"]


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts"),
    [
        (["parallel=tp2"], 1, ["parallel.tensor=2", "does not divide the world of 1 processes", "start a multiple of 2"]),
        (["parallel=tp2pp2"], 6, ["= 4 does not divide the world of 6 processes"]),
        (["train.global_batch_size=3"], 4, ["train.global_batch_size=3 is less than the 4 data-parallel ranks", "use at least 4"]),
        (["profile.steps=[5,8]", "train.steps=7"], 1, ["profile.steps=[5, 8] names step 8, but the run ends after train.steps=7"]),
        (["profile.steps=[5]", "profile.ranks=[0,2]"], 2, ["profile.ranks=[0, 2]: there are ranks 0 to 1"]),
        (["profile.steps=[5]", "profile.tool=nvtx", "profile.stacks=true"], 1, ['=true is of torch\'s profiler, but profile.tool="nvtx"']),
        (["pack.share_prompt=false", "data.max_prompt_length=2000"], 1, ["pack.max_tokens=4096 is too small", "use at least 4128"]),
        (
            ["loss=sft", "reference.mode=none", "method.candidates=policy_reference"],
            1,
            ['method.candidates="policy_reference" samples from the reference, with reference.mode="none"', "use reference.mode=resident or swapped"],
        ),
        (
            ["reference.mode=swapped", "method.candidates=policy_mixture", "method.mixture_coef=[]", "method.soft_preference=true", *JUDGE],
            1,
            ["use reference.mode=resident, or", "method.mixture_coef=[] has no value", "method.soft_preference=true is about scores"],
        ),
        (
            ["reference.mode=free", "data.validation={held_out: {path: rows.jsonl}}"],
            1,
            ['reference.mode="free", but data.validation names prompts', "use reference.mode=resident, evaluation.against=rows"],
        ),
    ],
)
def test_bad_combinations(overrides, world_size, parts):
    with pytest.raises(ValueError) as error:
        small(*overrides, world_size=world_size)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_good_combinations():
    small("parallel.tensor=2", world_size=8)
    small("parallel.tensor=2", "parallel.pipeline=3", world_size=12)
    small("generation.top_k=5")
    small("loss=sft", "reference.mode=none")
    small("data.max_prompt_length=3968", "generation.max_new_tokens=64")  # fills the pack to the last token
    small("model.path=owner/name", "parallel.tensor=3", world_size=3)  # a hub model: its config is not known yet


def test_experts():
    cfg = dataclasses.replace(small(), parallel=Parallel(expert=3))
    with pytest.raises(ValueError, match=r"parallel.expert=3 does not divide the model's number of experts=8; use 1, 2, 4 or 8"):
        check(cfg, 3, HF_CONFIG | {"num_experts": 8})
    with pytest.raises(ValueError, match=r"parallel.expert=3 does not divide the 4 ranks of a pipeline stage; use 1, 2 or 4"):
        check(cfg, 4, HF_CONFIG | {"num_experts": 9})
    check(cfg, 3, HF_CONFIG | {"num_experts": 9})


def test_experts_under_tensor_parallelism():
    def fails(message: str, world_size: int = 4, **layout):
        with pytest.raises(ValueError, match=message):
            check(dataclasses.replace(small(), parallel=Parallel(**layout)), world_size, HF_CONFIG | {"num_experts": 8, "moe_intermediate_size": 5})

    fails(r"parallel.expert=4 does not divide the 4 ranks of a pipeline stage / 2 that share each expert = 2; use 1 or 2", tensor=2, expert=4)
    fails(r"parallel.expert_tensor=4 does not divide parallel.tensor=2; use 1 or 2", tensor=2, expert_tensor=4)
    fails(r"parallel.tensor=2 of a mixture of experts needs parallel.sequence=true", tensor=2, expert_tensor=1)
    fails(r"parallel.expert_tensor=2 does not divide the model's width of an expert=5; use 1 or 5", tensor=2, sequence=True)
    layout = Parallel(tensor=2, sequence=True, expert=4, expert_tensor=1)
    check(dataclasses.replace(small(), parallel=layout), 4, HF_CONFIG | {"num_experts": 8, "moe_intermediate_size": 5})


def test_routers():
    def fails(message: str, hf_config: dict, **moe):
        cfg = small()
        with pytest.raises(ValueError, match=message):
            check(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=Moe(**moe))), 1, hf_config)

    fails(r"model.moe.router_aux_loss_coef=0.1 is about routers, but .* is no mixture of experts", HF_CONFIG, router_aux_loss_coef=0.1)
    fails(r"model.moe.freeze_router=true is about routers", HF_CONFIG, freeze_router=True)
    both = {"router_aux_loss_coef": 0.1, "freeze_router": True}
    fails(r"router_aux_loss_coef=0.1 trains what model.moe.freeze_router=true freezes", HF_CONFIG | {"num_experts": 8}, **both)


def test_broken_files(place):
    (place / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r'model.path="model": its config.json is not JSON .* again'):
        small()
    (place / "mine" / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"--config-name broken: .*expected"):
        load("broken", [], "mine")
    with pytest.raises(ValueError, match=r"--config-name smal: no such recipe; did you mean small\?; there are .*dpo.*small"):
        load("smal", [], "mine")
    with pytest.raises(ValueError, match="--config-dir nowhere: there is no such directory; give"):
        load("small", [], "nowhere")
    (place / "mine" / "elsewhere.yaml").write_text("defaults: [{parallel: tp9}]\n")
    with pytest.raises(ValueError, match=r"--config-name elsewhere: .*parallel/tp9.*tp2pp2"):
        load("elsewhere", [], "mine")


def test_plugins_are_checked_together():
    cfg = small("loss.params.betta=1", "judge.function=nowhere:judge", "reward.kindness.params.min_sentences=x")
    with pytest.raises(ValueError) as error:
        check_plugins(cfg)
    for part in ("loss.params.betta=1", 'judge.function="nowhere:judge"', 'reward.kindness.params.min_sentences="x" must be int'):
        assert part in str(error.value)


def test_a_loss_that_compares_needs_a_reference_or_to_be_told_that_it_is_free():
    with pytest.raises(ValueError, match=r'reference.mode="none", but .*"losses:dpo".*use reference.mode=resident, or reference.mode=free'):
        check_plugins(small("reference.mode=none"))
    check_plugins(small("reference.mode=free"))
    check_plugins(small("loss=simpo", "reference.mode=none"))


def test_a_list_of_numbers_gives_a_parameter_in_each_epoch():
    losses = load_losses(small("loss.params.beta=[0.5,0.1]", "loss.params.label_smoothing=0.2").loss)
    assert [loss.keywords for loss in losses] == [{"beta": 0.5, "label_smoothing": 0.2}, {"beta": 0.1, "label_smoothing": 0.2}]
    with pytest.raises(ValueError, match=r"loss.params.beta=0 must be float > 0"):
        load_losses(small("loss.params.beta=[0.5,0]").loss)


def test_a_loss_of_single_completions_is_refused():
    with pytest.raises(ValueError, match=r'loss.function="losses:kto" is of single labelled completions'):
        check_plugins(small("loss.function=losses:kto", "~loss.params"))


def test_a_weighted_list_of_losses_is_checked_entry_by_entry():
    (loss,) = load_losses(small("loss=mpo").loss)
    assert [(part.func.__name__, weight) for part, weight in loss.keywords["losses"]] == [("dpo", 0.8), ("bco_pair", 0.2), ("sft", 1.0)]
    with pytest.raises(ValueError, match=r"loss.params.losses\[0\].*no such parameter"):
        load_losses(small("loss=mpo", "loss.params.losses=[{function: losses:dpo, params: {betta: 1}}]").loss)


def test_options_have_a_comment_and_describe_the_defaults():
    described = {option.key: option for option in options(Config)}
    assert [key for key, option in described.items() if not option.comment] == []
    assert described["data.train[].path"].default == MISSING and described["reward.<name>.weight"].default == 1.0
    for section in dataclasses.fields(Config):
        for key in getattr(getattr(Config(), section.name), "__dataclass_fields__", ()):
            assert any(name == f"{section.name}.{key}" or name.startswith(f"{section.name}.{key}.") for name in described)
    assert {f.name for f in dataclasses.fields(Data)} <= {
        key.split(".")[1].removesuffix("[]") for key in described if key.startswith("data.")
    }


def of_torchrun(rank: int, world_size: int) -> dict[str, str]:
    return dict(zip(TORCHRUN, map(str, (rank, world_size, rank, "127.0.0.1", 29500)), strict=True))


def launch(*arguments, **environment):
    command = [sys.executable, "-X", "importtime", str(LAUNCHER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    imports = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    errors = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    return done.returncode, done.stdout, errors, imports


def test_launcher_help_has_every_key_recipe_and_group():
    code, out, _, imports = launch("--help", "--config-dir", "mine")
    assert code == 0 and "torch" not in imports
    for option in options(Config):
        assert f"  {option.key}=" in out and option.comment in out
    assert "A small recipe." in out and "online_dpo" in out and "pp2, single, tp2, tp2pp2" in out and "fast" in out


def test_launcher_prints_the_config():
    code, out, _, imports = launch("--config-name=small", "--config-dir=mine", "--cfg", "parallel=tp2", "train.steps=3")
    assert code == 0 and "torch" not in imports
    assert yaml.safe_load(out)["train"]["steps"] == 3 and yaml.safe_load(out)["parallel"]["tensor"] == 2


def test_launcher_ends_with_code_2_and_one_message():
    code, out, errors, imports = launch("--config-name", "small", "--config-dir", "mine", "parallel=tp2", **of_torchrun(rank=0, world_size=3))
    assert code == 2 and out == "" and "torch" not in imports
    assert "Traceback" not in errors and "does not divide the world of 3 processes" in errors and len(errors.splitlines()) == 2


@pytest.fixture
def launcher(monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCHER.parent))
    monkeypatch.delitem(sys.modules, "train", raising=False)
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    import train

    monkeypatch.setattr(train, "SECONDS_FOR_RANK_0", 0)
    yield train
    sys.modules.pop("train", None)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--config-name is missing; there are dpo, nash_md, online_dpo"]),
        (["--config-name"], ["--config-name needs a value"]),
        (["--config-nam", "small"], ["--config-nam: unknown option; did you mean --config-name?"]),
        (["--config-name", "small"], ["--config-name small: no such recipe"]),
    ],
)
def test_launcher_arguments(launcher, capsys, arguments, parts):
    assert launcher.main(arguments) == 2
    assert all(part in capsys.readouterr().err for part in parts)


def test_launcher_is_quiet_on_other_ranks(launcher, capsys, monkeypatch):
    for name, value in of_torchrun(rank=1, world_size=2).items():
        monkeypatch.setenv(name, value)
    assert launcher.main(["--config-name", "none"]) == 2 and launcher.main(["--help"]) == 0
    assert capsys.readouterr() == ("", "")


def test_launcher_reports_what_training_refuses(launcher, capsys, monkeypatch, place):
    seen = []

    def refuse(cfg):
        seen.append(cfg)
        raise ValueError("rows.jsonl row 1: no prompt")

    module = type(sys)("megapref.train")
    module.main = refuse
    monkeypatch.setitem(sys.modules, "megapref.train", module)
    for name, value in of_torchrun(rank=1, world_size=2).items():
        monkeypatch.setenv(name, value)
    assert launcher.main(["--config-name", "small", "--config-dir", str(Path("mine").resolve())]) == 2
    error = capsys.readouterr().err
    assert "(rank 1):\nrows.jsonl row 1: no prompt\n(raised in refuse," in error and "Traceback" not in error
    assert seen == [small(world_size=2)]
    module.main = seen.append
    assert launcher.main(["--config-name", "small", "--config-dir", "mine"]) == 0
    assert len(seen) == 2
