"""Modules written at random (fuzz.py): what they compute over ranks is what they
compute alone; errors say where."""

import pytest
from fuzzing.judge import GOOD, RAISED
from fuzzing.pool import run


def failure(outcome, tp):
    program, verdict = outcome.program, outcome.verdict
    if verdict.word == GOOD or verdict.word == RAISED and verdict.placed:
        return None
    return (
        f"{verdict.word} python tests/fuzz.py --start {program.seed} --seeds 1 --tp"
        f" {tp} --shrink: {verdict.text[:500]}"
    )


CHUNKS = [*((2, start, 20) for start in (0, 1000)), (3, 0, 10), (4, 0, 10)]


@pytest.mark.parametrize("tp, start, seeds", CHUNKS)
def test_random_programs(tp, start, seeds):
    outcomes = list(run(range(start, start + seeds), tp))
    failures = [f for f in (failure(o, tp) for o in outcomes) if f]
    assert len(outcomes) == seeds and not failures, "\n".join(failures)
    raised = [o.program.seed for o in outcomes if o.verdict.word == RAISED]
    assert len(raised) <= seeds // 20, f"raised: {raised}"
