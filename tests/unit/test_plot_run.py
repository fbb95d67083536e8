"""tools/plot_run.py: which panels, which curves, which errors."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

spec = importlib.util.spec_from_file_location("plot_run", Path(__file__).resolve().parents[2] / "tools" / "plot_run.py")
plot_run = sys.modules["plot_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot_run)

OFFLINE = [
    {"step": step, "loss": 1.0 / step, "grad_norm": 1.0, "rewards/chosen": 0.1 * step, "rewards/rejected": -0.1 * step}
    for step in range(1, 9)
]
EVALUATED = [{"step": step, "eval/win_rate": 0.5 + step / 20, "eval/win_rate_low": 0.3, "eval/win_rate_high": 0.95} for step in (0, 4, 8)]


def save(run_dir, records):
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_dir


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_only_panels_with_data():
    assert titles(plot_run.figure_of({"sft": [{"step": 1, "loss": 1.0}]})) == ["Loss"]
    assert titles(plot_run.figure_of({"dpo": OFFLINE})) == ["Loss", "Implicit reward", "Gradient norm"]
    assert "Win rate" in titles(plot_run.figure_of({"online": EVALUATED + OFFLINE}))
    every = {key: 0.5 for panel in plot_run.PANELS for key, _ in panel.series}
    assert len(plot_run.figure_of({"all": [{"step": 1} | every]}).axes) == len(plot_run.PANELS)


def test_curves_hold_the_numbers_and_the_band_its_borders():
    axes = plot_run.figure_of({"run": EVALUATED}).axes[0]
    curve = next(line for line in axes.lines if line.get_marker() == "o")
    np.testing.assert_allclose(curve.get_xydata(), [[0, 0.5], [4, 0.7], [8, 0.9]])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.3)
    assert band[:, 1].max() == pytest.approx(0.95)


def test_runs_are_overlaid_with_a_colour_and_a_label_each():
    figure = plot_run.figure_of({"one": OFFLINE, "two": OFFLINE, "no rewards": [{"step": 1, "loss": 1.0}]})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two", "no rewards"]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 3


def test_seeds_of_one_recipe_share_a_colour():
    runs = {name: OFFLINE for name in ("xpo_0", "xpo_1", "dpo-7", "3")}
    figure = plot_run.figure_of(runs, seeds=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["xpo", "dpo", "3"]
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert colors[0] == colors[1] and len(colors) == 4 and len(set(colors)) == 3


def test_validation_sets_have_panels_of_their_own_with_every_value_marked():
    records = [{"step": step, "validation-a_b_loss": 1.0, "validation-c_loss": 2.0, "validation-c_rewards/accuracies": 0.1 * step} for step in (0, 5)]
    figure = plot_run.figure_of({"run": records}, smooth=5)
    assert titles(figure) == ["Loss, a_b", "Loss, c", "Accuracy, c"]
    (curve,) = [line for line in figure.axes[2].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(curve.get_xydata(), [[0, 0.0], [5, 0.5]])


def test_an_axis_is_logarithmic_where_outliers_would_flatten_it():
    calm, wild = ([{"step": step, "loss": 900.0 if step == last else 1.0} for step in range(9)] for last in (99, 8))
    assert [plot_run.figure_of({"run": records}).axes[0].get_yscale() for records in (calm, wild)] == ["linear", "log"]


def test_null_is_a_gap():
    figure = plot_run.figure_of({"run": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 3.0}]}, smooth=2)
    smooth_line = figure.axes[0].lines[-1]
    np.testing.assert_array_equal(smooth_line.get_ydata(), [1.0, np.nan, 3.0])


@given(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(float("nan"))), min_size=1, max_size=30), st.integers(1, 10))
def test_smoothing_is_the_mean_of_the_last_known_values(values, window):
    got = plot_run.smoothed(np.array(values), window)
    for index, value in enumerate(values):
        known = [other for other in values[max(index - window + 1, 0) : index + 1] if np.isfinite(other)]
        assert np.isnan(got[index]) if np.isnan(value) else got[index] == pytest.approx(np.mean(known), abs=1e-9)


def test_png_of_one_and_of_several_runs(tmp_path, capsys, monkeypatch):
    first, second = save(tmp_path / "a" / "run", OFFLINE + EVALUATED), save(tmp_path / "b" / "run", OFFLINE)
    plot_run.main([str(first)])
    assert (first / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{first / 'curves.png'}\n"
    plot_run.main([str(first), str(second), "--out", str(tmp_path / "both.png"), "--smooth", "3"])
    assert (tmp_path / "both.png").stat().st_size > 10_000
    assert plot_run.labels_of([first, second]) == [str(first), str(second)]  # "run" twice would say nothing


def test_run_at_work_may_have_half_a_line(tmp_path):
    run_dir = save(tmp_path / "run", OFFLINE)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert plot_run.read_run(run_dir) == OFFLINE


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such directory; name a run directory"),
        ("no metrics", r"holds no metrics\.jsonl"),
        ("", "holds no whole line; wait until"),
        ('{"step": 1}\nbroken\n', r"metrics\.jsonl, line 2: not JSON"),
        ('{"step": 1, "time/train": 2.0}\n', "nothing to plot"),
    ],
)
def test_errors_are_one_line_and_no_png_is_made(tmp_path, content, words):
    run_dir = tmp_path / "run"
    if content is not None:
        run_dir.mkdir()
        (run_dir / ("metrics.jsonl" if content != "no metrics" else "other")).write_text(content)
    with pytest.raises(SystemExit, match=f"plot_run: .*{words}") as stop:
        plot_run.main([str(run_dir)])
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.rglob("*.png"))


def test_bad_smooth_and_unwritable_out(tmp_path):
    run_dir = save(tmp_path / "run", OFFLINE)
    with pytest.raises(SystemExit, match="--smooth 0: needs 1"):
        plot_run.main([str(run_dir), "--smooth", "0"])
    with pytest.raises(SystemExit, match="No such file or directory"):
        plot_run.main([str(run_dir), "--out", str(tmp_path / "missing" / "curves.png")])


def test_help(capsys):
    with pytest.raises(SystemExit):
        plot_run.main(["--help"])
    assert "RUN_DIR" in capsys.readouterr().out
