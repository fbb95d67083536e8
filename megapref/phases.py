"""Where this process is: step and phase, and a count of its moves. Noted by the thread that trains, read by the one that watches for a standstill.

Every process enters the same phases in the same order. Moves are counted inside them too, wherever something may take long and still get on:
a token round, a pack, a judge's answer, a tensor read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Place:
    step: int = 0
    within: list[str] = field(default_factory=list)  # phases, the inner one last
    entered: int = 0  # phases so far
    moves: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, {' > '.join(self.within) or 'between phases'}"


here = Place()


@contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """Inside, this process is in the phase, of the given step or the one before; also a decorator. An error gets a note of where it was raised."""
    here.step = here.step if step is None else step
    here.within.append(name)
    here.entered += 1
    moved()
    try:
        yield
    except Exception as error:
        if not hasattr(error, "__notes__"):
            error.add_note(f"at {here}")
        raise
    finally:
        here.within.pop()
        moved()


def moved() -> None:
    """Notes that this process gets on."""
    here.moves += 1
