"""The learning rate as a function of the step."""

import pytest

from megapref.config import Optimizer
from megapref.mcore.optimizer import learning_rate


def rates(total: int, **options) -> list[float]:
    return [learning_rate(step, total, Optimizer(lr=1.0, **options)) for step in range(1, total + 1)]


def test_warmup_then_constant():
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_starts_at_the_peak_and_wastes_no_step():
    assert rates(6, schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert rates(4, schedule="linear", min_lr=0.5) == pytest.approx([1.0, 0.875, 0.75, 0.625])


def test_cosine_decay_is_at_half_in_the_middle():
    values = rates(4, schedule="cosine")
    assert values[0] == 1.0 and values[2] == pytest.approx(0.5) and values[3] > 0
