"""Where this process is: step and phase, and a count of its moves. Noted by the thread that trains, read by the one that watches for a standstill.

Every process enters the same phases in the same order. Moves are counted inside them too, wherever something may take long and still get on:
a token round, a pack, a judge's answer, a tensor read. What else wants to know of phases and packs (memory, a trace) puts itself around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field


@dataclass
class Place:
    step: int = 0
    within: list[str] = field(default_factory=list)  # phases, the inner one last
    entered: int = 0  # phases so far
    moves: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, {' > '.join(self.within) or 'between phases'}"


Around = Callable[[str], AbstractContextManager]  # of the name of a phase, or of what is done with a pack

here = Place()
around_phases: list[Around] = []  # entered with every phase
around_packs: list[Around] = []  # entered with every part of the work on a pack


@contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """Inside, this process is in the phase, of the given step or the one before; also a decorator. An error gets a note of where it was raised."""
    here.step = here.step if step is None else step
    here.within.append(name)
    here.entered += 1
    moved()
    try:
        with _all(around_phases, name):
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


def pack(name: str) -> AbstractContextManager:
    """Around a part of the work on one pack."""
    return _all(around_packs, name)


def _all(arounds: list[Around], name: str) -> AbstractContextManager:
    if not arounds:
        return nullcontext()
    with ExitStack() as stack:
        for around in arounds:
            stack.enter_context(around(name))
        return stack.pop_all()
