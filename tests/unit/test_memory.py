"""Peak memory of phases: whom a peak belongs to, what is logged, what happens where it cannot be reset."""

from contextlib import contextmanager

import pytest
import torch

from megapref.display import peak_memory
from megapref.mcore import device, memory
from megapref.phases import phase

MIB = 2**20


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(memory.setup, "largest", lambda number: number)
    monkeypatch.setattr(memory.setup, "largest_each", list)


@contextmanager
def gpu(monkeypatch, peaks, free):
    """A GPU that has the given peaks at the looks that are taken at it, and so much free memory when asked."""
    peaks, free = iter(peaks), iter(free)
    monkeypatch.setattr(device, "peak_memory_bytes", lambda: next(peaks) * memory.GIB)
    monkeypatch.setattr(device, "forget_peak_memory", lambda: True)
    monkeypatch.setattr(device, "reserved_memory_bytes", lambda: 9 * memory.GIB)
    monkeypatch.setattr(device, "free_memory_bytes", lambda: next(free) * memory.GIB)
    with memory.measured():
        yield
    assert next(peaks, None) is None and next(free, None) is None


def test_a_peak_belongs_to_every_phase_that_is_open(monkeypatch):
    with gpu(monkeypatch, [1, 2, 3, 4, 5, 6, 7, 1], free=[6, 5]):
        with phase("evaluation"):  # a look at the start: 1 is what was before
            with phase("generation"):  # 2
                pass  # 3
            with phase("judging"), phase("a judge's own"):  # 4
                pass  # 5
        # 6
        with phase("generation"):  # 7 between phases
            pass  # 1
        expected = {"memory/evaluate_gib": 6, "memory/generate_gib": 3, "memory/judge_gib": 5}
        assert memory.take() == expected | {"memory/reserved_gib": 9, "memory/free_before_generate_gib": 5}
        assert memory.take() == {}


def test_a_peak_of_one_phase_is_not_that_of_the_next():
    with memory.measured() as by_phase:
        if not by_phase:
            assert memory.take().keys() == {memory.SO_FAR}
            return
        with phase("reference"):
            torch.ones(64 * MIB // 4).sum()
        with phase("training"):
            torch.ones(16 * MIB // 4).sum()
        found = memory.take()
    assert found.keys() == {"memory/score_reference_gib", "memory/train_gib"}
    assert (found["memory/score_reference_gib"] - found["memory/train_gib"]) * 1024 == pytest.approx(48, abs=16)


def test_where_peaks_cannot_be_reset_the_number_has_another_name(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_CLEAR_REFS", tmp_path / "not there" / "clear_refs")
    with memory.measured() as by_phase:
        with phase("training"):
            pass
        found = memory.take()
    assert not by_phase and found.keys() == {memory.SO_FAR}
    assert found[memory.SO_FAR] == pytest.approx(device.peak_memory_bytes() / memory.GIB, rel=0.2)


def test_nothing_is_measured_outside():
    assert memory.take() == {}


def test_summary_has_the_largest_value_and_its_step():
    records = [{"step": 1, "memory/train_gib": 2.0, "memory/free_before_generate_gib": 5.0}, {"step": 2, "memory/train_gib": 3.0, "loss": 1.0}]
    table = peak_memory([*records, {"step": 2, "memory/save_gib": 1.0, "memory/free_before_generate_gib": 4.0}])
    assert [list(column.cells) for column in table.columns] == [
        ["train", "free before generate", "save"],
        ["3.00", "4.00", "1.00"],
        ["2", "2", "2"],
    ]
