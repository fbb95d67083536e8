"""What tools/benchmark.py takes time with: seconds and CPU seconds, and a clock that sorts them by the phases of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch

from megapref.mcore import step

TRAIN_PHASES = ("packing", "reference scoring", "forward", "head", "backward", "optimizer")


class Clock:
    """Seconds and CPU seconds by phase; what runs inside a phase belongs to that phase alone."""

    def __init__(self):
        self.spent: dict[str, np.ndarray] = {}
        self._busy = False

    def timed(self, phase: str, function: Callable) -> Callable:
        """`function`, whose calls are counted towards `phase`."""

        def run(*args, **kwargs):
            if self._busy:
                return function(*args, **kwargs)
            self._busy, started = True, now()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[phase] = self.spent.get(phase, 0) + (now() - started)
                self._busy = False

        return run

    @contextmanager
    def inside(self, state: step.TrainState) -> Iterator[None]:
        """Puts the clock into the parts of `step.train_step`."""
        probes = (
            ("forward", step, "forward_pack"),
            ("head", step, "completion_logps"),
            ("backward", torch.autograd, "backward"),
            ("optimizer", state.optimizer, "prepare_grads"),
            ("optimizer", state.optimizer, "get_grad_norm"),
            ("optimizer", step, "apply_gradients"),
        )
        with ExitStack() as stack:
            for phase, owner, name in probes:
                stack.enter_context(patch.object(owner, name, self.timed(phase, getattr(owner, name))))
            yield


def now() -> np.ndarray:
    """(seconds, CPU seconds of all threads), once the accelerator, if any, has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return np.array([time.perf_counter(), time.process_time()])
