"""torch.compile of a sharded model: block by block and whole, with no graph break,
shared by blocks that are alike; right at any length."""

import pytest
import torch

# The compiler is imported once, and not by each rank of each test.
import torch._inductor.compile_fx  # noqa: F401
from helpers import same_grads
from models import hf
from ranks import run_ranks
from torch._dynamo.backends.registry import lookup_backend

from quintnet_dt import apply_tensor_parallel

VARIANTS = 5  # of one function that torch compiles, here; of its own accord 8
LAYERS = VARIANTS + 1


def llama(layers=LAYERS, dropout=0.0):
    tokens = dict(vocab_size=64, bos_token_id=0, eos_token_id=1)
    return hf.llama(
        num_hidden_layers=layers, attention_dropout=dropout, **tokens
    ).double()


def gpt2(layers=LAYERS, dropout=0.0):
    tokens = dict(vocab_size=64, bos_token_id=0, eos_token_id=1)
    return hf.gpt2(dropout, n_layer=layers, **tokens).double()


def blocks(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def given(length, labels=False):
    ids = torch.randint(
        0, 64, (2, length), generator=torch.Generator().manual_seed(length)
    )
    return {"input_ids": ids, "use_cache": False, **({"labels": ids} if labels else {})}


class Counted:
    """A backend that counts the graphs that it is given."""

    def __init__(self, name):
        self.backend, self.graphs = lookup_backend(name), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


def pair(build, *, labels=False, **options):
    """(sharded, whole) in training."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(build(**options).train())
    apply_tensor_parallel(made[0], 2, example_inputs=given(8, labels))
    torch._dynamo.reset()
    return made


def compare(compiled, sharded, whole, inputs, tol=1e-9):
    sharded.zero_grad(), whole.zero_grad()
    found, expected = [], []
    for model, out in ((compiled, found), (whole, expected)):
        torch.manual_seed(1)
        y = model(**inputs)
        out.append(y.logits if y.loss is None else y.loss)
        out[0].square().sum().backward()
    assert torch.allclose(found[0], expected[0], rtol=tol, atol=tol)
    same_grads(sharded, whole, tol)


@pytest.mark.parametrize("build, labels", [(llama, True), (gpt2, False)])
def test_blocks_share_one_graph_each(build, labels):
    """Compiled one by one, as torchtitan does: the number of graphs does not grow with
    the layers nor with the lengths."""

    def ranks(rank):
        torch._dynamo.config.recompile_limit = VARIANTS
        sharded, whole = pair(build, labels=labels)
        backend = Counted("aot_eager")
        for block in blocks(sharded):
            block.compile(fullgraph=True, backend=backend)
        # transformers' own loss is in float32, here of classes on both ranks
        tol = 1e-6 if labels else 1e-9
        for length in (8, 12, 15, 8):
            compare(sharded, sharded, whole, given(length, labels), tol=tol)
        assert (
            backend.graphs <= 4
        ), (
            backend.graphs
        )  # two lengths (then any), and perhaps a first layer that differs
        sharded.eval(), whole.eval()
        with torch.no_grad():
            assert torch.allclose(sharded(**given(9)).logits, whole(**given(9)).logits)

    run_ranks(ranks, 2, timeout=200)


def test_a_whole_model():
    def ranks(rank):
        sharded, whole = pair(llama, layers=1)
        backend = Counted("aot_eager")
        compiled = torch.compile(sharded, backend=backend, fullgraph=True)
        for length in (8, 12, 15):
            compare(compiled, sharded, whole, given(length))
        assert backend.graphs <= 3, backend.graphs

    run_ranks(ranks, 2, timeout=200)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_attention_dropout(build):
    """In the attention kernel and, of GPT-2, elsewhere: this rank's part of the mask of
    the whole model."""

    def ranks(rank):
        sharded, whole = pair(build, layers=1, dropout=0.1)
        for block in blocks(sharded):
            block.compile(fullgraph=True, backend="aot_eager")
        compare(sharded, sharded, whole, given(8))

    run_ranks(ranks, 2, timeout=200)


@pytest.mark.parametrize(
    "build, how",
    [(llama, "eager"), (gpt2, "eager"), (llama, "blocks"), (gpt2, "whole")],
)
def test_checkpoints(build, how):
    def ranks(rank):
        for reentrant in (False, True) if how == "eager" else (False,):
            sharded, whole = pair(build, layers=1)
            sharded.gradient_checkpointing_enable({"use_reentrant": reentrant})
            for block in blocks(sharded) if how == "blocks" else ():
                block.compile(backend="aot_eager")
            compiled = (
                torch.compile(sharded, backend="aot_eager")
                if how == "whole"
                else sharded
            )
            for length in (8, 12):
                compare(compiled, sharded, whole, given(length))

    run_ranks(ranks, 2, timeout=200)


def test_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def ranks(rank):
        torch._inductor.config.compile_threads = 1
        sharded, whole = pair(gpt2, layers=1)
        blocks(sharded)[0].compile(fullgraph=True)
        compare(sharded, sharded, whole, given(8), tol=1e-5)

    run_ranks(ranks, 2, timeout=200)


def test_a_path_that_only_compiled_code_takes():
    """A block that asks whether it is compiled, while the model around it is not: it is
    not silently another."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

        def forward(self, x):
            y = self.up(x)
            return self.down(
                y * y.shape[-1] if torch.compiler.is_compiling() else y.relu()
            )

    def ranks(rank):
        whole = torch.nn.Sequential(Block(), Block()).double()
        sharded = torch.nn.Sequential(Block(), Block()).double()
        x = torch.randn(
            2, 16, dtype=torch.double, generator=torch.Generator().manual_seed(2)
        )
        apply_tensor_parallel(sharded, 2, example_inputs=(x,))
        sharded[0].compile(fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="another path"):
            sharded(x)
        del whole

    run_ranks(ranks, 2, timeout=60)
