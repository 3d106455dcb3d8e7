"""Modules that keep something from one call to the next, and loops whose length follows
from the inputs."""

import torch
import torch.nn.functional as F
from helpers import check
from torch import nn


class Prefix(nn.Module):
    """Caches at its first call, as litgpt's adapters do."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.prefix = (
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Embedding(3, 16),
        )
        self.cache = None

    def heads(self, x):
        return (
            y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).split(16, -1)
        )

    def forward(self, x):
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.cache is None:
            _, *kept = self.heads(self.prefix.weight[None])
            self.cache = tuple(z.detach() for z in kept)
        k, v = (z.expand(len(x), -1, -1, -1) for z in self.cache)
        return self.out(
            (y + F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2)
        )


class Inner(nn.Module):
    """Counts its calls, grows a list, and takes another way after its first call."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 64)
        self.started, self.calls, self.seen = False, 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        first, self.started = not self.started, True
        h = self.a(x) if first else self.c(x).chunk(2, -1)[0].repeat(1, 1, 2)
        return self.b(h.relu())


class Recurrent(nn.Module):
    """A loop over the sequence, written in Python."""

    def __init__(self):
        super().__init__()
        self.x, self.h, self.out = (
            nn.Linear(16, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 16),
        )

    def forward(self, x):
        h, states = x.new_zeros(len(x), 64), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.x(x[:, t]) + self.h(h))
            states.append(self.out(h))
        return torch.stack(states, 1)


def given(length=5):
    return lambda: (torch.randn(2, length, 16),)


def test_what_is_kept_at_the_first_call():
    check(Prefix, given(), calls=[given(), given(3), given()], grad=False)


def test_what_a_first_call_changes():
    def build():
        return nn.Sequential(nn.Linear(16, 16), Inner())

    check(build, given(), calls=[given(), given(3), given(), given()])


def test_a_loop_of_another_length():
    check(Recurrent, given(3), calls=[given(5), given(2), given(3), given(5)])
