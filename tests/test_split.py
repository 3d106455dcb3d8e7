"""Split: where each rank's part of a dim lies."""

import pytest
from torch.distributed.tensor import Shard

from quintnet_dt.axes.split import Range, Segment, Split, joined
from quintnet_dt.private import _StridedShard


def test_ranges_of_each_block():
    one_block = Split(0, 6, (Segment(1, 2),))
    assert one_block.ranges(1, 3) == [Range(4, 4)]
    qkv = Split(0, 2, (Segment(3, 4),))
    assert qkv.ranges(0, 2) == [(0, 4), (8, 4), (16, 4)]
    unequal = Split(0, 4, (Segment(1, 2), Segment(2, 1)))
    assert unequal.ranges(1, 2) == [(4, 4), (10, 2), (14, 2)]


def test_units_that_the_ranks_do_not_divide():
    five = Split(0, 5, (Segment(2, 3),))
    assert [five.ranges(rank, 3) for rank in range(3)] == [
        [(0, 6), (15, 6)],
        [(6, 6), (21, 6)],
        [(12, 3), (27, 3)],
    ]
    assert Split(0, 2).ranges(2, 3) == [(2, 0)]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "segments",
    [(Segment(),), (Segment(3, 2),), (Segment(2, 3), Segment(1, 4), Segment(5, 1))],
    ids=str,
)
def test_ranks_share_every_element_once(segments, n):
    split = Split(1, 6, segments)
    found = [
        i
        for r in range(n)
        for a, length in split.ranges(r, n)
        for i in range(a, a + length)
    ]
    assert sorted(found) == list(range(split.length))
    shapes = [split.local_shape((2, split.length, 5), rank, n) for rank in range(n)]
    assert [s[::2] for s in shapes] == [(2, 5)] * n
    assert [s[1] for s in shapes] == [
        sum(x.length for x in split.ranges(r, n)) for r in range(n)
    ]


def test_placements():
    assert Split(1, 8, (Segment(1, 4),)).placement() == Shard(1)
    assert Split(0, 8, (Segment(3, 4),)).placement() == _StridedShard(0, split_factor=3)
    with pytest.raises(ValueError, match="equal blocks"):
        Split(0, 8, (Segment(1, 4), Segment(2, 1))).placement()


def test_ranges_that_touch_are_joined():
    assert joined([Range(0, 2), Range(2, 3), Range(6, 1)]) == [Range(0, 5), Range(6, 1)]
    assert joined(Split(0, 3, (Segment(2),)).ranges(0, 1)) == [Range(0, 6)]
