"""A run that is saved at one layout and goes on at another takes the steps of the run that was never stopped."""

import pytest
from distributed_run import run_distributed
from tiny_runs import make_inputs, metrics_of, options, run_training

LAYOUTS = {
    "one process": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2 uneven": (2, {"pipeline": 2, "last_stage_layers": 1}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
    # Of a mixture of experts.
    "experts one process": (1, {}),
    "experts tp2": (2, {"tensor": 2, "sequence": True}),
    "experts dp2 ep2": (2, {"expert": 2}),
}
# Each is saved at once and resumed at once.
MOVES = [("one process", "cp2"), ("cp2", "pp2 vpp2"), ("pp2 vpp2", "tp2"), ("tp2", "pp2 uneven"), ("pp2 uneven", "dp2"), ("pp2 vpp2", "one process")]
MOVES += [("experts tp2", "experts dp2 ep2"), ("experts dp2 ep2", "experts tp2")]
STEPS = {"train": {"steps": 4}, "save": {"every": 2, "export": False}, "evaluation": {"every": 0}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    models = {False: ("qwen2_tied", 4), True: ("mixtral", 2)}
    return {experts: make_inputs(folder / name, name, num_hidden_layers=layers) for experts, (name, layers) in models.items()}


@pytest.fixture(scope="module")
def saved(inputs, tmp_path_factory):
    """`saved(layout)`: the directory of a whole run of four steps, made once, with its checkpoint of the second."""
    folder, made = tmp_path_factory.mktemp("saved"), {}

    def run(layout: str):
        if layout not in made:
            world, parallel = LAYOUTS[layout]
            tree = options(inputs["experts" in layout], folder / layout, "offline", parallel=parallel, **STEPS)
            assert run_distributed(run_training, world, tree) == [""] * world
            made[layout] = folder / layout
        return made[layout]

    return run


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_saved_at_one_layout_resumed_at_another(inputs, saved, tmp_path, before, after):
    world, parallel = LAYOUTS[after]
    start = {"run": {"resume": str(saved(before) / "checkpoints" / "step_000002")}}
    tree = options(inputs["experts" in after], tmp_path / "run", "offline", parallel=parallel, **STEPS, **start)
    tree["run"] = {"dir": str(tmp_path / "run"), "seed": 3, **start["run"]}
    assert run_distributed(run_training, world, tree) == [""] * world
    expected = {record["step"]: record for record in metrics_of(saved("experts one process" if "experts" in after else "one process"))}
    resumed = [record for record in metrics_of(tmp_path / "run") if record["step"] > 2]
    assert [record["step"] for record in resumed] == [3, 4]
    for record in resumed:
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert record[name] == pytest.approx(expected[record["step"]][name], rel=1e-5), (record["step"], name)
