"""Who holds up a run, as the answers of its ranks tell, and what is said of it."""

import sys
import threading

import pytest

from megapref import phases
from megapref.mcore.watch import Answer, answer_of, at_fault, report


def answer(entered: int, waits: bool) -> Answer:
    return Answer(entered, waits, f"{'waits' if waits else 'works'} in phase {entered}")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({0: answer(5, True), 1: answer(5, True)}, [2]),  # a silent rank, whatever the others do
        ({0: answer(5, False)}, [1, 2]),
        ({0: answer(5, True), 1: answer(5, False), 2: answer(5, True)}, [1]),  # does not wait
        ({0: answer(6, True), 1: answer(7, False), 2: answer(5, False)}, [2]),  # of two that do not, the one behind
        ({0: answer(6, True), 1: answer(5, True), 2: answer(6, True)}, [1]),  # all wait, one is behind
        ({0: answer(5, True), 1: answer(5, True), 2: answer(5, True)}, []),
        ({0: answer(5, False), 1: answer(5, False), 2: answer(5, False)}, []),
    ],
)
def test_at_fault(answers, expected):
    assert at_fault(3, answers) == expected


def test_one_process_is_at_fault_itself():
    assert at_fault(1, {0: answer(5, False)}) == [0]


def test_report_names_the_guilty_first_and_joins_ranks_that_stand_alike():
    answers = {rank: answer(5, True) for rank in (0, 1, 2, 4, 6)} | {5: answer(5, False)}
    assert report(answers, {3: "step 2, saving"}, 7).splitlines() == [
        "rank 3 holds up the run",
        "    ranks 0-2, 4, 6: waits in phase 5",
        ">>> rank 3: does not answer; last seen at step 2, saving",
        "    rank 5: works in phase 5",
    ]
    assert report({0: answer(1, True), 1: answer(1, True)}, {}, 2).startswith("all ranks wait for each other")


def test_answer_of_a_thread_says_where_it_works_or_that_it_waits():
    done, asleep = threading.Event(), {}

    def work():
        asleep["frame"] = sys._getframe()
        done.wait(60)

    def in_torch(function):
        exec(compile("def all_things(function):\n    function()", "/x/torch/distributed/some.py", "exec"), asleep)
        asleep["all_things"](function)

    for target, waits, said in ((work, False, "is in wait ("), (lambda: in_torch(work), True, "waits for other ranks in all_things")):
        done.clear()
        asleep.clear()
        thread = threading.Thread(target=target)
        thread.start()
        while "frame" not in asleep or sys._current_frames()[thread.ident] is asleep["frame"]:
            pass
        found = answer_of(sys._current_frames()[thread.ident], phases.Place(step=3, within=["pairs", "judging"], entered=9))
        done.set()
        thread.join()
        assert (found.entered, found.waits) == (9, waits)
        assert found.text.startswith(f"step 3, pairs > judging, {said}")


def test_phases_nest_and_an_error_notes_where_it_was_raised():
    before = phases.here.entered
    with pytest.raises(KeyError) as caught, phases.phase("pairs", 7), phases.phase("judging"):
        assert str(phases.here) == "step 7, pairs > judging" and phases.here.entered == before + 2
        raise KeyError("x")
    assert caught.value.__notes__ == ["at step 7, pairs > judging"]
    assert phases.here.within == []
