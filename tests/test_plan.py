"""The plan: a table, JSON, a user's entries, and planning in one process."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from test_axes import IDS, Attention, Block, Decoder
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from quintnet_dt import TensorParallelPlan, apply_tensor_parallel, plan_tensor_parallel
from quintnet_dt.planning import settle


def decoder(layers=3, **kw):
    return Decoder(*[Block(Attention(kv=4), **kw) for _ in range(layers)])


def make(model=None, n=2, **kw):
    return plan_tensor_parallel(model or decoder(), n, example_inputs=(IDS,), **kw)


def test_a_line_for_repeated_layers():
    text = str(make())
    lines = [line for line in text.splitlines() if "a.m0" in line]
    assert len(lines) == 1 and "b.0-2.a.m0" in lines[0]
    head, cost, columns = text.splitlines()[:3]
    assert "2 ranks" in head and "%" in head
    for part in ("2 x 6 int64", "50.0% of the forward's", "MB a step", "on CPU"):
        assert part in cost
    for column in ("module", "parameter", "shape", "placement", "how it runs", "why"):
        assert column in columns
    (line,) = lines
    for part in ("weight", "16 x 16", "Shard(0)", "local", "4 units, 2 a rank"):
        assert part in line


def test_every_parameter_has_a_reason():
    for e in make().entries.values():
        assert e.how and e.why, e


def test_a_layer_that_differs_has_its_own_line():
    plan = make()
    plan["b.1.a.m0.weight"] = Replicate()
    lines = [line for line in str(plan).splitlines() if "a.m0" in line]
    assert len(lines) == 2
    other = next(line for line in lines if "b.1.a.m0" in line)
    assert "Replicate()" in other and "set by the user" in other
    (rest,) = (line for line in lines if line != other)
    assert "b.0-2" not in rest  # layer 1 is not among them


def test_what_runs_locally():
    plan = make()
    for i in range(3):
        for name, placement in {
            "a.m0": 0,
            "a.m1": 0,
            "a.m2": 0,
            "a.m3": 1,
            "f0": 0,
            "f1": 0,
            "f2": 1,
        }.items():
            assert plan.placements[f"b.{i}.{name}.weight"] == Shard(placement)
    assert plan.bytes_per_step > 0


@pytest.mark.parametrize("fused", [False, True])
def test_json_is_exact(fused):
    plan = make(decoder(fused=fused))
    again = TensorParallelPlan.from_json(plan.to_json())
    assert (
        again == plan and again.to_json() == plan.to_json() and str(again) == str(plan)
    )
    assert again.placements == plan.placements
    json.loads(plan.to_json())


@pytest.mark.parametrize("fused", [False, True])
def test_a_plan_given_back_is_the_same_plan(fused):
    model = decoder(fused=fused)
    plan = make(model)
    again = make(model, plan=TensorParallelPlan.from_json(plan.to_json()))
    assert again.placements == plan.placements
    assert {n: e.how for n, e in again.entries.items()} == {
        n: e.how for n, e in plan.entries.items()
    }
    assert again.bytes_per_step == plan.bytes_per_step


GOOD = json.loads(
    plan_tensor_parallel(
        nn.Linear(8, 8), 2, example_inputs=(torch.ones(2, 8),)
    ).to_json()
)


def changed(**changes):
    return json.dumps({**GOOD, **changes})


def entry(**changes):
    return changed(entries={"weight": {**GOOD["entries"]["weight"], **changes}})


@pytest.mark.parametrize(
    "text",
    [
        *("", "no json", "{}", "[]", "3", "null", '"a"', "[1, 2]"),
        *(
            changed(entries=[]),
            changed(entries=None),
            changed(entries={"a": 3}),
            changed(other=1),
        ),
        *(
            entry(shape=3),
            entry(extra=1),
            entry(how="magic"),
            entry(how=[]),
            entry(dim="0"),
            entry(dim=7),
            entry(dim=-1),
        ),
        *(
            entry(pieces=0),
            entry(pieces="a"),
            entry(name=3),
            entry(name="other"),
            entry(shape=["a"]),
        ),
        *(
            changed(tp_size="2"),
            changed(tp_size=0),
            changed(tp_size=None),
            changed(cost="a"),
        ),
    ],
)
def test_from_json_of_what_is_not_a_plan(text):
    with pytest.raises(ValueError, match="TensorParallelPlan|expected"):
        TensorParallelPlan.from_json(text)


def test_a_users_entries_win():
    user = {
        "b.0.a.m0.weight": Shard(1),
        "b.1.f0.weight": Replicate(),
        "n.weight": Shard(0),
    }
    plan = make(plan=user)
    for name, placement in user.items():
        assert plan.placements[name] == placement
        assert plan[name].why == "set by the user"
    assert plan.placements["b.2.f0.weight"] == Shard(0)


def test_wrong_entries_are_all_listed():
    wrong = {
        "b.0.a.m9.weight": Shard(0),
        "b.0.a.m0.weight": Shard(2),
        "b.1.a.m0.weight": Shard(-1),
        "b.0.f0.weight": "columns",
        "b.0.f2.weight": Partial(),
        "b.0.f1.weight": None,
        "n.weight": Shard(1),
    }
    with pytest.raises(ValueError) as e:
        make(plan={**wrong, "e.weight": Shard(0)})
    text = str(e.value)
    assert (
        all(name in text for name in wrong) and "e.weight" not in text and "7" in text
    )


def test_a_plan_for_another_model_or_size():
    plan = make()
    with pytest.raises(ValueError, match="tp_size"):
        plan_tensor_parallel(decoder(), 4, example_inputs=(IDS,), plan=plan)
    with pytest.raises(ValueError, match="no such parameter"):
        plan_tensor_parallel(decoder(2), 2, example_inputs=(IDS,), plan=plan)


@pytest.mark.parametrize("plan", [[], "auto", 3, Shard(0)])
def test_a_plan_that_is_none(plan):
    with pytest.raises(TypeError, match="plan"):
        make(plan=plan)


def test_editing_a_plan():
    model = decoder()
    plan = make(model)
    plan["b.0.f0.weight"] = Shard(1)
    plan["b.1.f0.weight"] = Replicate()
    assert (
        plan["b.0.f0.weight"].placement == Shard(1)
        and plan["b.1.f0.weight"].placement == Replicate()
    )
    for name, placement in {
        "b.0.f0.weight": Shard(2),
        "x": Shard(0),
        "b.0.f1.weight": Partial(),
        "e.weight": 0,
    }.items():
        before = plan.to_json()
        with pytest.raises(ValueError, match=name):
            plan[name] = placement
        assert plan.to_json() == before
    again = make(model, plan=plan)
    assert again.placements == plan.placements


def test_share():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    x = (torch.ones(2, 64),)
    assert plan_tensor_parallel(model, 2, example_inputs=x).share == 0.5
    assert plan_tensor_parallel(model, 4, example_inputs=x).share == 0.25
    plan = plan_tensor_parallel(model, 2, example_inputs=x)
    plan["0.weight"] = Replicate()
    assert plan.share == 0.75
    uneven = plan_tensor_parallel(
        model, 3, example_inputs=x, plan={"0.weight": Shard(0), "1.weight": Replicate()}
    )
    assert uneven.share == (22 + 64) / 128


def test_one_rank():
    plan = make(n=1)
    assert plan.share == 1.0 and plan.bytes_per_step == 0
    str(plan)


@pytest.mark.parametrize("n", [0, -1, 2.0, "2", None, True])
def test_a_wrong_tp_size(n):
    with pytest.raises(ValueError, match="tp_size"):
        plan_tensor_parallel(decoder(), n, example_inputs=(IDS,))


def test_more_ranks_than_anything_has():
    plan = make(n=64)
    assert (
        plan.tp_size == 64
        and plan.entries.keys() == dict(decoder().named_parameters()).keys()
    )


def test_inputs_as_a_tuple_and_as_a_dict():
    a = plan_tensor_parallel(decoder(), 2, example_inputs=(IDS,))
    b = plan_tensor_parallel(decoder(), 2, example_inputs={"x": IDS})
    assert a == b


def test_the_same_plan_each_time():
    model = decoder(fused=True)
    assert (
        make(model).to_json()
        == make(model).to_json()
        == make(decoder(fused=True)).to_json()
    )


def test_planning_leaves_the_model_alone():
    model = decoder()
    before = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    make(model)
    assert all(
        before[n][0] == id(p) and torch.equal(before[n][1], p)
        for n, p in model.named_parameters()
    )
    assert not hasattr(model, "tensor_parallel_plan") and not any(
        m._forward_hooks for m in model.modules()
    )


def test_thirty_gigabytes_on_the_meta_device():
    with torch.device("meta"):
        blocks = [
            Block(Attention(4096, 32, 8, 128), 4096, 4 * 14336) for _ in range(48 // 4)
        ]
        model = Decoder(*blocks, vocab=128256, d=4096)
    assert sum(p.numel() * 4 for p in model.parameters()) > 30e9
    plan = plan_tensor_parallel(
        model, 8, example_inputs=(torch.ones(1, 16, dtype=torch.long),)
    )
    assert all(p.is_meta for p in model.parameters())
    assert plan.share < 0.13
    for i in (0, 11):
        assert [
            plan[f"b.{i}.{n}.weight"].dim for n in ("a.m0", "a.m1", "a.m3", "f0", "f2")
        ] == [
            0,
            0,
            1,
            0,
            1,
        ]
        assert {
            plan[f"b.{i}.{n}.weight"].how for n in ("a.m0", "a.m1", "a.m3", "f0", "f2")
        } == {"local"}


def test_axes_that_cannot_be_shown_are_given_up_together(monkeypatch):
    """Each block's hidden axis fails in the proof, by a scalar or by a shape: one run
    finds them all, another shows the rest."""

    class Scaled(nn.Module):
        def __init__(self, fails):
            super().__init__()
            self.up, self.down, self.fails = nn.Linear(8, 32), nn.Linear(32, 8), fails

        def forward(self, x):
            h = self.up(x)
            if self.fails == "scalar":
                h = h / h.shape[-1]
            if self.fails == "shape":
                h = h + torch.arange(h.shape[-1])
            return x + self.down(h)

    runs = []
    monkeypatch.setattr(
        settle,
        "prove",
        lambda *args, prove=settle.prove: runs.append(1) or prove(*args),
    )
    model = nn.Sequential(
        *[Scaled(f) for f in ("scalar", "", "scalar", "shape", "", "scalar")]
    )
    plan = plan_tensor_parallel(model, 2, example_inputs=(torch.ones(2, 3, 8),))
    entries = [plan[f"{i}.up.weight"] for i in range(6)]
    assert [(e.how, e.dim) == ("local", 0) for e in entries] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ], plan
    assert (
        "its argument 32 becomes 16 on shards: div in 2" in plan["2.up.bias"].why
    ), plan
    assert (
        "expected shapes" in plan["3.up.bias"].why
        and "arange in 3" in plan["3.up.bias"].why
    ), plan
    assert len(runs) == 2


class Experts(nn.Module):
    """`width` hidden units each; `transposed`: as transformers stores them."""

    def __init__(self, width, transposed=False):
        super().__init__()
        up, down = torch.randn(4, 16, width), torch.randn(4, width, 16)
        self.transposed = transposed
        self.up, self.down = (
            nn.Parameter(w.transpose(1, 2).contiguous() if transposed else w)
            for w in (up, down)
        )

    def forward(self, x):
        ends = torch.arange(2, 10, 2, dtype=torch.int32, device=x.device)
        up, down = (
            w.transpose(1, 2) if self.transposed else w for w in (self.up, self.down)
        )
        return torch._grouped_mm(
            torch._grouped_mm(x, up, offs=ends).relu(), down, offs=ends
        )


def test_experts_whose_shards_are_aligned_in_their_own_dtype():
    """A product in groups wants strides of 16 bytes: 4 floats a rank have them, though
    4 of bfloat16, which alone fakes know, have not."""
    plan = plan_tensor_parallel(Experts(8), 2, example_inputs=(torch.randn(8, 16),))
    assert {n: (e.how, e.dim) for n, e in plan.entries.items()} == {
        "up": ("local", 2),
        "down": ("local", 1),
    }, plan
    plan = plan_tensor_parallel(
        Experts(8).bfloat16(), 2, example_inputs=(torch.randn(8, 16).bfloat16(),)
    )
    assert plan["up"].how == "weight gathered", plan


@pytest.mark.parametrize("n, how", [(2, "local"), (3, "weight gathered")])
def test_experts_whose_gradients_are_not_aligned(n, how):
    """Weights stored transposed, as transformers has them, are aligned in the forward;
    what comes back is not: 22 floats a rank of 64."""

    def ranks(rank):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        model = Experts(64, transposed=True)
        whole = copy.deepcopy(model)
        apply_tensor_parallel(model, n, example_inputs=(x,))
        assert model.tensor_parallel_plan["up"].how == how, model.tensor_parallel_plan
        for m in model, whole:
            m(x).square().sum().backward()
        for p, q in zip(model.parameters(), whole.parameters()):
            assert torch.allclose(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-3)

    run_ranks(ranks, n)


class HeadsOfItsOwnSize(nn.Module):
    def __init__(self, computed):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.computed = computed

    def heads(self, y):
        size = y.shape[-1] // 4 if self.computed else 16
        return y.view(*y.shape[:2], 4, size).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.o(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )


def test_heads_are_split_where_their_size_is_computed_from_a_shards():
    x = (torch.randn(2, 16, 64),)
    plans = [
        plan_tensor_parallel(HeadsOfItsOwnSize(computed), 2, example_inputs=x)
        for computed in (True, False)
    ]
    assert (
        plans[0].to_json() == plans[1].to_json() and plans[0]["q.weight"].how == "local"
    ), plans[0]


class CutsAcrossHeads(nn.Module):
    """Its fused weight's features can be split where what reads them needs them whole,
    or its heads."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            y.view(b, t, -1, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)
        )
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_what_is_completed_at_once_is_gathered():
    """It is split along its axis all the same, which another path may go on with; a
    plan read from JSON knows."""
    hows, x = set(), torch.randn(2, 5, 16)
    chosen = plan_tensor_parallel(CutsAcrossHeads(), 2, example_inputs=(x,))
    across = TensorParallelPlan.from_json(chosen.to_json())
    for name in "qkv.weight", "qkv.bias":
        across[name].pieces, across[name].units = 1, 12
    for plan in chosen, across:
        made = plan_tensor_parallel(
            CutsAcrossHeads(), 2, example_inputs=(x,), plan=plan
        )
        qkv = made["qkv.weight"]
        hows.add((qkv.how, qkv.pieces, qkv.units))
        read = TensorParallelPlan.from_json(made.to_json())
        again = plan_tensor_parallel(
            CutsAcrossHeads(), 2, example_inputs=(x,), plan=read
        )
        assert {n: (e.how, e.units) for n, e in again.entries.items()} == {
            n: (e.how, e.units) for n, e in made.entries.items()
        }
    assert hows == {("gathered", 1, 12), ("local", 3, 4)}, hows


def test_a_call_in_inference_mode_computes_on_shards():
    """Its operators are others (linear, matmul, reshape), which are planned as those
    that they are made of."""

    def ranks(rank):
        x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
        model = HeadsOfItsOwnSize(True)
        apply_tensor_parallel(model, 2, example_inputs=(x,))
        sent = []
        for mode in torch.no_grad, torch.inference_mode:
            model.train(mode is torch.no_grad)  # another kind of call
            with mode():
                # what is compared in the first ones is not counted
                model(x), model(x), model(x)
                with CommDebugMode() as counts:
                    model(x)
            sent.append(counts.get_total_counts())
        return sent

    assert run_ranks(ranks, 2)[0] == [1, 1]
