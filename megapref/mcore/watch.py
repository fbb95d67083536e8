"""Tells a standstill and a failed rank in words, and ends the process, where waiting would be silent and long.

Every process has two threads. One adds its moves to a count of all ranks in torch.distributed's store, and leaves there where it is. The other
never waits for anything: when no rank has moved for `stuck_after`, or another rank has failed and the main thread does not end by itself, it says
so and ends the process. A rank is known to be at fault because it does not answer, or does not wait for others, or is behind them.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from megapref import phases

EXIT_STUCK = 86  # of a run that has stood still
SECONDS_TO_END = 10.0  # that a process has to end by itself when another has failed
_TICK = 5.0  # seconds, at most, between two looks


@dataclass(frozen=True)
class Answer:
    """Where a rank stands: the phases it has entered, whether it waits for other ranks, both in words."""

    entered: int
    waits: bool
    text: str


def at_fault(world_size: int, answers: Mapping[int, Answer]) -> list[int]:
    """Returns the ranks that hold up the others: the silent ones, else the least far that do not wait; none where nothing tells them."""
    silent = [rank for rank in range(world_size) if rank not in answers]
    if silent:
        return silent
    suspects = [rank for rank in answers if not answers[rank].waits] or list(answers)
    least = min(answers[rank].entered for rank in suspects)
    found = sorted(rank for rank in suspects if answers[rank].entered == least)
    return found if len(found) < world_size or world_size == 1 else []


def report(answers: Mapping[int, Answer], last_seen: Mapping[int, str], world_size: int) -> str:
    """Returns who is at fault and where every rank stands, those that stand alike in one line; `last_seen` has the places of silent ranks."""
    guilty = at_fault(world_size, answers)
    lines: dict[str, list[int]] = {}
    for rank in range(world_size):
        silent = f"does not answer; last seen at {last_seen.get(rank, 'the start')}"
        text = answers[rank].text if rank in answers else silent
        lines.setdefault(f"{'>>>' if rank in guilty else '   '}|{text}", []).append(rank)
    told = [f"{key.partition('|')[0]} {_ranks(ranks)}: {key.partition('|')[2]}" for key, ranks in lines.items()]
    who = f"{_ranks(guilty)} {'holds' if len(guilty) == 1 else 'hold'} up the run" if guilty else "all ranks wait for each other: see their stacks"
    return "\n".join([who, *told])


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def answer_of(frame: FrameType, place: phases.Place) -> Answer:
    """Returns where the main thread, whose innermost frame is given, stands."""
    frames = list(traceback.walk_stack(frame))[::-1]
    of_torch = [f.f_code for f, _ in frames if "/torch/distributed/" in f.f_code.co_filename]
    collective = next((code.co_name for code in of_torch if code.co_name != "wrapper"), None)  # what logs each call
    inner, line = frames[-1]
    text = linecache.getline(inner.f_code.co_filename, line)
    if collective is None and ".wait(" in text and ("/torch/" in inner.f_code.co_filename or "/megatron/" in inner.f_code.co_filename):
        collective = inner.f_code.co_name
    doing = f"waits for other ranks in {collective}" if collective else f"is in {inner.f_code.co_name} ({inner.f_code.co_filename}:{line})"
    return Answer(place.entered, collective is not None, f"{place}, {doing}")


class Watch:
    """The two threads of a process, from `start` to `stop`."""

    def __init__(self, store: Any, rank: int, world_size: int, stuck_after: float, stuck_words: str):
        self._store, self._rank, self._world_size = store, rank, world_size
        self._stuck_after, self._words, self._tick = stuck_after, stuck_words, min(_TICK, stuck_after / 10)
        self._main = threading.main_thread().ident
        self._quiet = 0.0  # seconds, as far as this process was running
        self._lost = False
        self._ending: tuple[float, str] | None = None  # the time from which on this process is ended, and with which words
        self._over = {"talking": threading.Event(), "judging": threading.Event()}
        self._threads = {name: threading.Thread(target=getattr(self, f"_{name}"), daemon=True) for name in self._over}
        for thread in self._threads.values():
            thread.start()

    def stop(self, which: str) -> None:
        """Ends the thread that is `talking`, or `judging`."""
        self._over[which].set()
        self._threads[which].join(self._tick)

    def failed(self, error: BaseException) -> str | None:
        """Tells the other ranks of an error of this one; returns what another rank told first, unless it is the same, or None.

        From now on this process is ended if it does not end by itself.
        """
        words = f"{type(error).__name__}: {error}"
        self._ending = self._ending or (time.monotonic() + 3 * SECONDS_TO_END, "".join(traceback.format_exception(error)))
        place = next(iter(getattr(error, "__notes__", ())), f"at {phases.here}")
        mine = json.dumps({"rank": self._rank, "place": place, "words": words, "message": str(error)})
        first = None if self._lost else _within(SECONDS_TO_END, lambda: self._store.compare_set("failed", "", mine))
        told = json.loads(first or mine)
        if told["rank"] == self._rank or told["message"] == str(error):
            return None
        return f"{_told(self._rank, told)}\n(here: {words.partition(chr(10))[0]})"

    def _talking(self) -> None:
        seen, counted = -1, 0
        try:
            while not self._over["talking"].wait(self._tick):
                moves = phases.here.moves
                total, counted = self._store.add("moves", moves - counted), moves
                self._store.set(f"at/{self._rank}", str(phases.here))
                if total != seen:
                    seen, self._quiet = total, 0.0
                if self._ending is None and self._store.check(["failed"]):
                    told = json.loads(self._store.get("failed"))
                    self._ending = (time.monotonic() + SECONDS_TO_END, _told(self._rank, told))
        except RuntimeError as error:  # torch.distributed's are
            self._lost = True
            gone = f"rank {self._rank} ends, as {_holder()} is gone, which the ranks meet at ({str(error).partition(chr(10))[0]})"
            self._ending = self._ending or (time.monotonic() + SECONDS_TO_END, gone)

    def _judging(self) -> None:
        before = time.monotonic()
        while not self._over["judging"].wait(self._tick):
            now = time.monotonic()
            self._quiet += min(now - before, 2 * self._tick)  # a process that was itself suspended has waited for nobody
            before = now
            if self._ending and now >= self._ending[0]:
                _say(self._ending[1])
                os._exit(1)
            if self._quiet >= self._stuck_after and not self._ending:
                self._end_stuck()

    def _end_stuck(self) -> None:
        frame = sys._current_frames()[self._main]
        mine = answer_of(frame, phases.here)
        stack = "".join(traceback.format_stack(frame))
        _say(f"no rank has got on for {self._words} (run.stuck_after). Rank {self._rank}: {mine.text}\nIts stack, the innermost call last:\n{stack}")
        seconds = max(4 * self._tick, 1.0)
        found = _within(seconds + SECONDS_TO_END, lambda: self._exchange(mine, seconds))
        if found is None:
            _say(f"megapref is stuck: {_holder()} does not answer, which the ranks meet at\n>>> {_holder()} holds up the run")
        elif self._rank == min(found[0]):
            _say(f"megapref is stuck: {report(*found, self._world_size)}")
        else:
            time.sleep(1)  # a launcher ends all processes when one has ended
        os._exit(EXIT_STUCK)

    def _exchange(self, mine: Answer, seconds: float) -> tuple[dict[int, Answer], dict[int, str]]:
        """The answers of the ranks that give one within the time, and where the others were seen last."""
        store = self._store.clone()
        store.set(f"answer/{self._rank}", json.dumps(vars(mine)))
        names, end = [f"answer/{rank}" for rank in range(self._world_size)], time.monotonic() + seconds
        while not store.check(names) and time.monotonic() < end:
            time.sleep(self._tick / 2)
        answered = [rank for rank, name in enumerate(names) if store.check([name])]
        answers = {rank: Answer(**json.loads(store.get(names[rank]))) for rank in answered}
        silent = [rank for rank in range(self._world_size) if rank not in answers and store.check([f"at/{rank}"])]
        return answers, {rank: store.get(f"at/{rank}").decode() for rank in silent}


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What `function` returns, None where it takes longer or the store is gone: a store whose process is stopped answers nothing, at no timeout."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except RuntimeError as error:
            _say(f"the store is gone: {str(error).partition(chr(10))[0]}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _told(rank: int, told: dict[str, Any]) -> str:
    return f"rank {rank} ends, as rank {told['rank']} failed first, {told['place']}:\n{told['words']}"


def _holder() -> str:
    return "the torchrun agent of the first machine" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
