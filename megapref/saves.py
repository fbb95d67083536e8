"""When a run's checkpoints are begun and finished, and what follows where one cannot be written."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megapref.config import Save
from megapref.mcore import setup
from megapref.mcore.saving import SaveError, Saving, begin_save, finish_save
from megapref.mcore.step import TrainState
from megapref.phases import phase


@dataclass
class Saves:
    """The checkpoints of a run in `folder`, of which at most one is under way; `say` tells the user. All methods are collective."""

    options: Save
    folder: Path
    say: Callable[[str], None]
    under_way: Saving | None = None

    def save(self, state: TrainState, extra: dict, protected: Collection[int], is_end: bool, must: bool) -> None:
        """Saves the state, in the background if that is wanted and this is not the end.

        One still under way is waited for. SaveError where it `must` be written, or save.on_error=stop.
        """
        self._finish(protected, must=False)
        self._attempt(partial(self._begin, state, extra, in_background=self.options.background and not is_end), must)
        if is_end or not self.options.background:
            self._finish(protected, must)

    def look(self, protected: Collection[int]) -> None:
        """Finishes the one under way if all processes' files are written. SaveError as of `save`."""
        if self.under_way and not setup.largest(int(not self.under_way.is_written())):
            self._finish(protected, must=False)

    def _begin(self, state: TrainState, extra: dict, in_background: bool) -> None:
        self.under_way = begin_save(state, self.folder, extra, in_background)

    def _finish(self, protected: Collection[int], must: bool) -> None:
        saving, self.under_way = self.under_way, None
        if saving:
            self._attempt(partial(finish_save, saving, self.options.keep, protected), must)

    def _attempt(self, function: Callable[[], object], must: bool) -> None:
        try:
            with phase("saving"):
                function()
        except SaveError as error:
            if must or self.options.on_error == "stop":
                raise
            self.say(f"{error}; training goes on, as save.on_error=continue")
