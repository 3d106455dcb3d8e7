"""Modules written at random (fuzz.py): what they compute over ranks is what they compute alone; errors say where."""

import pytest
from fuzzing.judge import GOOD, RAISED
from fuzzing.pool import Ranks, run
from fuzzing.programs import Call, Input, Program
from fuzzing.shrink import shrink


def failure(outcome, tp):
    program, verdict = outcome.program, outcome.verdict
    if verdict.word == GOOD or verdict.word == RAISED and verdict.placed:
        return None
    return (
        f"{verdict.word} python tests/fuzz.py --start {program.seed} --seeds 1 --tp {tp} --shrink: {verdict.text[:500]}"
    )


@pytest.mark.parametrize(
    "tp, start, seeds", [(2, 0, 60), (2, 1000, 60), (2, 2000, 60), (2, 3000, 60), (3, 0, 25), (4, 0, 20)]
)
def test_random_programs(tp, start, seeds):
    outcomes = list(run(range(start, start + seeds), tp))
    failures = [f for f in (failure(o, tp) for o in outcomes) if f]
    assert len(outcomes) == seeds and not failures, "\n".join(failures)
    raised = [o.program.seed for o in outcomes if o.verdict.word == RAISED]
    assert len(raised) <= seeds // 20, f"raised: {raised}"
