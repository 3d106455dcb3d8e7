"""A step that fails on one rank raises on all."""

import pytest
import torch.distributed as dist
from ranks import run_ranks

from quintnet_dt.together import together


def test_alone():
    with together():
        pass
    with pytest.raises(KeyError, match="mine"), together():
        raise KeyError("mine")


def test_the_failing_rank_raises_its_own_and_the_others_tell_which():
    def ranks(rank):
        with together():
            pass
        what = (
            (BaseException, "mine")
            if rank == 1
            else (RuntimeError, "another rank: rank 1: BaseException: mine")
        )
        with pytest.raises(what[0], match=f"^(failed on )?{what[1]}$"), together():
            if rank == 1:
                raise BaseException("mine")
        with (
            pytest.raises(KeyError if rank == 2 else RuntimeError, match="mine"),
            together(),
        ):
            if rank == 2:
                raise KeyError("mine")
            with together():
                pass
            raise AssertionError("went on")
        with (
            pytest.raises(KeyError if rank == 2 else RuntimeError, match="mine"),
            together(),
            together(),
        ):
            if rank == 2:
                raise KeyError("mine")
        pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
        what = (
            (ValueError, "no")
            if rank == 3
            else (RuntimeError, "rank 3: ValueError: no")
        )
        if rank > 1:
            with pytest.raises(what[0], match=what[1]), together(pair):
                if rank == 3:
                    raise ValueError("no")
        with together():
            pass

    run_ranks(ranks, 4)
