"""Every axis rule against arithmetic: what a rule claims of a sharded operator is
computed on both shards, and compared with the whole (oracle.py), for the cases in
rule_cases/."""

import pytest
import torch
import torch.nn.functional as F
from oracle import check, factored, trace_function
from rule_cases import CASES, UNREACHED
from rule_cases.inputs import r

from quintnet_dt.axes import rules
from quintnet_dt.axes.axes import Axes


@pytest.mark.parametrize("name", CASES)
def test_what_a_rule_claims_is_what_two_shards_give(name):
    f, *inputs = CASES[name]
    check(f, inputs)
    check(*factored(f, inputs))


def test_every_rule_has_a_case_and_claims_something_that_holds():
    held = {}
    for f, *inputs in CASES.values():
        try:
            found = check(f, inputs)
        except Exception:  # the case's own test reports it
            found = {
                n.op._schema.name.removeprefix("aten::"): 1
                for c in trace_function(f, inputs).calls
                for n in c.nodes
            }
        for name, claims in found.items():
            held[name] = held.get(name, 0) + claims
    registered = rules.table.RULES.keys()
    assert (
        sorted(registered - held.keys() - UNREACHED.keys()) == []
    ), "no case reaches these"
    assert (
        sorted(n for n in registered & held.keys() - UNREACHED.keys() if not held[n])
        == []
    ), "nothing is claimed of these"


@pytest.mark.parametrize(
    "noise",
    [
        torch.rand_like,
        torch.randn_like,
        lambda x: torch.empty_like(x).uniform_(),
        lambda x: torch.empty_like(x).normal_(),
        lambda x: torch.empty_like(x).exponential_(),
        lambda x: torch.empty_like(x).bernoulli_(0.5),
        lambda x: F.alpha_dropout(x, 0.5, True),
        lambda x: F.feature_alpha_dropout(x, 0.5, True),
        lambda x: F.dropout2d(x, 0.5, True),
        lambda x: F.gumbel_softmax(x),
        lambda x: F.rrelu(x, training=True),
    ],
)
def test_noise_is_never_drawn_a_shard_at_a_time(noise):
    """Ranks with one seed would draw the same noise for each shard: not what the whole
    model draws."""
    graph = trace_function(noise, [r(2, 4, 8, 6)])
    axes = Axes(graph)
    nodes = [
        n
        for call in graph.calls
        for n in call.nodes
        if torch.Tag.nondeterministic_seeded in n.op.tags
    ]
    for node in nodes:
        for v in node.inputs:
            assert axes.effect(node).unsharded.get(v.id, set()) >= {
                f for d in axes.final(v) for f in d
            }, node.op
    assert nodes
