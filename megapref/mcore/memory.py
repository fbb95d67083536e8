"""Peak memory of each phase of a step: of the GPU, or resident in the process on CPU. Of the rank that needs most.

A phase's peak includes what was there before, such as weights and optimizer, and what the phases within it need. Where the system does not let a
process reset its peak (`device.forget_peak_memory`), phases cannot be told apart: the peak since the start is logged, under a name of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megapref import phases
from megapref.mcore import device, setup

GIB = 2**30
# The phases that are measured, and their names in metrics, which are those of time/*.
PHASES = {
    "generation": "generate",
    "judging": "judge",
    "reference": "score_reference",
    "training": "train",
    "evaluation": "evaluate",
    "saving": "save",
}
SO_FAR = "memory/so_far_gib"  # where phases cannot be told apart


@dataclass
class _Peaks:
    """Bytes since the last `take`: the peak of each phase, most memory that torch held, least that was free before generation."""

    by_phase: bool
    within: list[str] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    reserved: int = 0
    free: int | None = None

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Measures a phase that is named in PHASES."""
        if name not in PHASES or not self.by_phase:
            yield
            return
        self.look()
        if name == "generation" and (free := device.free_memory_bytes()) is not None:
            self.free = free if self.free is None else min(free, self.free)
        self.within.append(name)
        try:
            yield
        finally:
            self.look()
            self.within.pop()

    def look(self) -> None:
        """Every phase that is open has had what was in use since the last look."""
        peak = device.peak_memory_bytes()
        for name in self.within:
            self.peaks[name] = max(peak, self.peaks.get(name, 0))
        self.reserved = max(device.reserved_memory_bytes() or 0, self.reserved)
        device.forget_peak_memory()


_measuring: list[_Peaks] = []


@contextmanager
def measured() -> Iterator[bool]:
    """Measures the phases inside; a collective of all ranks. Yields whether they can be told apart, which they are on all ranks or on none."""
    peaks = _Peaks(by_phase=not setup.largest(int(not device.forget_peak_memory())))
    _measuring.append(peaks)
    phases.around_phases.append(peaks.around)
    try:
        yield peaks.by_phase
    finally:
        phases.around_phases.remove(peaks.around)
        _measuring.remove(peaks)


def take() -> dict[str, float]:
    """Metrics in GiB of the phases since the last call, of the rank with the most; a collective of all ranks. Nothing where none is measured.

    `memory/<phase>_gib`; on a GPU also `memory/reserved_gib`, the most that torch held, and `memory/free_before_generate_gib`, the least of any rank.
    """
    if not _measuring:
        return {}
    peaks = _measuring[-1]
    if not peaks.by_phase:
        return {SO_FAR: setup.largest(device.peak_memory_bytes()) / GIB}
    found = {f"memory/{metric}_gib": peaks.peaks[name] for name, metric in PHASES.items() if name in peaks.peaks}
    found |= {"memory/reserved_gib": peaks.reserved} if peaks.reserved else {}
    found |= {"memory/free_before_generate_gib": -peaks.free} if peaks.free is not None else {}
    peaks.peaks, peaks.reserved, peaks.free = {}, 0, None
    return {name: abs(most) / GIB for name, most in zip(found, setup.largest_each(list(found.values())), strict=True)}
