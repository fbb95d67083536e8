"""Traces of steps: what is in them, that nothing is entered outside of them, what is refused."""

import gzip
import json
from contextlib import nullcontext

import pytest
import torch
from megatron.core.pipeline_parallel import schedules

from megapref import phases
from megapref.config import Profile
from megapref.mcore import profiling


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(profiling.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(profiling.setup, "on_every_rank", lambda function: function)


def work():
    with phases.phase("training"), phases.pack("forward"):
        torch.ones(64, 64) @ torch.ones(64, 64)


def names_of(path):
    with gzip.open(path) as file:
        return {event.get("name") for event in json.load(file)["traceEvents"]}


@pytest.mark.parametrize("with_more", [False, True])
def test_trace_has_phases_packs_operations_and_what_is_asked_for(tmp_path, with_more):
    with profiling.traced(Profile([2], memory=with_more, stacks=with_more), 2, tmp_path / "profile"):
        work()
    names = names_of(tmp_path / "profile" / "step_000002_rank_0.json.gz")
    assert {"training", "pack: forward", "aten::mm"} <= names
    assert ("[memory]" in names) == with_more
    assert any("test_profiling.py" in name and "work" in name for name in names) == with_more
    table = (tmp_path / "profile" / "step_000002_rank_0.txt").read_text()
    assert "pack: forward" in table and "aten::mm" in table and ("CPU Mem" in table) == with_more


@pytest.mark.parametrize("profile", [Profile(), Profile([1, 3]), Profile([2], ranks=[1])], ids=["off", "other steps", "other ranks"])
def test_nothing_is_entered_or_written_otherwise(tmp_path, profile):
    backward = schedules.backward_step
    with profiling.traced(profile, 2, tmp_path):
        assert not phases.around_phases and not phases.around_packs and schedules.backward_step is backward
        assert isinstance(phases.pack("forward"), nullcontext)
        work()
    assert not list(tmp_path.iterdir())


def test_error_in_a_traced_step_is_the_error_and_leaves_nothing_behind(tmp_path):
    backward = schedules.backward_step
    with pytest.raises(KeyError), profiling.traced(Profile([2]), 2, tmp_path):
        assert len(phases.around_phases) == len(phases.around_packs) == 1 and schedules.backward_step is not backward
        raise KeyError
    assert not phases.around_phases and not phases.around_packs and schedules.backward_step is backward
    assert not list(tmp_path.iterdir())


def test_ranges_for_nsight_need_a_gpu():
    profiling.check(Profile(tool="nvtx"))
    with pytest.raises(ValueError, match=r"profile\.tool=nvtx .* use profile\.tool=torch"):
        profiling.check(Profile([2], tool="nvtx"))
