"""Rules of one line, in an einsum-like notation.

Each input's dims are letters. A letter in an input and the output is one axis; one that the output
lacks is contracted (summed over, so that a shard of it gives a Partial); `!` marks what the
operator needs whole, `~` what is looked up by index, `+` an addend, to be added once when something
is contracted; `...` is any further dims.
"""

import re
from math import prod

from ..factors import leaves, unify
from .table import RULES, arg, fresh, signature, unknown

NOTATION = {
    "mm": "i k, k j -> i j",
    "bmm": "b i k, b k j -> b i j",
    "mv": "i k, k -> i",
    "dot": "k, k ->",
    "addmm": "+i j, i k, k j -> i j",
    "baddbmm": "+b i j, b i k, b k j -> b i j",
    "addmv": "+i, i k, k -> i",
    "embedding": "v~ d, ... -> ... d",
    "_scaled_dot_product_flash_attention_for_cpu": (
        "b h q d!, b h k! d!, b h k! e, b h q k! -> b h q e"
    ),
    "_scaled_dot_product_flash_attention": "b h q d!, b h k! d!, b h k! e -> b h q e",
    "_scaled_dot_product_efficient_attention": "b h q d!, b h k! d!, b h k! e, b h q k! -> b h q e",
    "_scaled_dot_product_cudnn_attention": "b h q d!, b h k! d!, b h k! e, b h q k! -> b h q e",
    "_trilinear": "n i, o i j, n j -> n o",
    "_embedding_bag": "v! d, i!, o!, p! -> n d",
    "_embedding_bag_forward_only": "v! d, i!, o!, p! -> n d",
    "grid_sampler_2d": "b c h! w!, b p q t! -> b c p q",
    "grid_sampler_3d": "b c h! w! l!, b p q r t! -> b c p q r",
    "tril": "... i! j! -> ... i j",
    "triu": "... i! j! -> ... i j",
    "view_as_complex": "... c! -> ...",
    "view_as_real": "... -> ... c",
}


def _parse(text):
    left, right = text.split("->")
    return [p.split() for p in left.split(",")], [p.split() for p in right.split(",")]


def faults(text, schema):
    """What is wrong with a user's line for an operator of that schema: a list of messages."""
    if text.count("->") != 1:
        return ["expected patterns of the inputs, one '->', patterns of the outputs"]
    ins, outs = _parse(text)
    letters = {t.strip("+!") for p in ins for t in p}
    tensors = [a for a in schema.arguments if "Tensor" in str(a.type)]
    given = [a.name for a in tensors if "List" not in str(a.type)]
    made = [r for r in schema.returns if str(r.type) == "Tensor"]
    odd = [t for p in ins for t in p if not re.fullmatch(r"\+?\w+!?|\.\.\.", t)]
    odd += [t for p in ins for t in p[1:] if t.startswith("+")]
    new = [t for p in outs for t in p if t not in letters]
    found = (
        [f"expected letters, '+' before a first one or '!' after one, or '...', found {odd[0]!r}"]
        if odd
        else []
    )
    found += (
        ["expected at most one '...' a tensor"]
        if any(p.count("...") > 1 for p in ins + outs)
        else []
    )
    found += (
        ["expected '...' after '->' too"]
        if "..." in letters and not any("..." in p for p in outs)
        else []
    )
    found += (
        [f"expected letters of the inputs, unmarked, after '->', found {new[0]!r}"] if new else []
    )
    if len(given) != len(tensors) or len(made) != len(schema.returns) or schema.is_mutable:
        found.append(
            "expected an operator that takes and returns single tensors, and writes to none; give a"
            " function"
        )
    elif (len(ins), len(outs)) != (len(given), len(made)):
        wanted = (
            f"of its {len(given)} tensor arguments ({', '.join(given)}) and {len(made)} results"
        )
        found.append(f"expected a pattern for each {wanted}, found {len(ins)} and {len(outs)}")
    return found


def from_notation(text, user=None):
    """The rule function of one line of notation. One of a `user`, named so in errors, must fit the
    shapes it meets."""
    patterns, outs = _parse(text)
    named = {t for p in outs for t in p}

    def apply(node, axes):
        letters, contracted, looked_up, rest = {}, set(), set(), []
        arguments = [
            arg(node, name) for name, (_, _, tensor) in signature(node.op).items() if tensor
        ]
        effect = axes.effects[id(node)]
        for value, pattern in zip(arguments, patterns):
            if value is None:
                continue
            dims = axes.dims(value)
            tokens = list(pattern)
            if tokens and tokens[0].startswith("+"):
                effect.bias = value.id
                tokens[0] = tokens[0][1:]
            if "..." in tokens:
                at = tokens.index("...")
                n = len(dims) - len(tokens) + 1
                tokens[at : at + 1] = [("...", k - n) for k in range(n)]
                if n > len(rest):
                    rest = [("...", k - n) for k in range(n)]
            if user and len(tokens) != len(dims):
                raise ValueError(
                    f"{user}: expected a tensor of dims {' '.join(pattern)!r}, found shape"
                    f" {value.shape}"
                )
            tokens = tokens[len(tokens) - len(dims) :]  # a bias broadcasts from the right
            for token, dim, size in zip(tokens, dims, value.shape):
                letter = token if isinstance(token, tuple) else token.rstrip("!~")
                if token != letter and token.endswith("!"):
                    axes.whole(node, value, dim)
                    continue
                if letter in letters:
                    if size != 1 and letters[letter]:
                        unify(letters[letter], dim)
                    elif size != 1:
                        letters[letter] = dim
                else:
                    letters[letter] = dim
                if token != letter:
                    looked_up.add(letter)
                if letter not in named and not isinstance(letter, tuple):
                    contracted.add(letter)
        for letter in contracted:
            axes.contract(node, letters[letter])
        effect.lookup = bool(looked_up)
        for value, pattern in zip(node.outputs, outs):
            tokens = []
            for t in pattern:
                tokens += rest if t == "..." else [t]
            if user and len(tokens) != len(value.shape):
                raise ValueError(
                    f"{user}: expected a result of dims {' '.join(pattern)!r}, found shape"
                    f" {value.shape}"
                )
            if len(tokens) == len(value.shape):
                dims = [letters.get(t, []) for t in tokens]
                same = [prod(f.size for f in leaves(d)) == n for d, n in zip(dims, value.shape)]
                axes.set(value, [d if s else fresh(n) for d, s, n in zip(dims, same, value.shape)])

    return apply


def attention(text):
    """A causal mask counts queries from the first: then they are needed whole; dropout draws one
    mask for all."""
    passes = from_notation(text)

    def apply(node, axes):
        if arg(node, "dropout_p"):
            return unknown(node, axes)
        if arg(node, "is_causal"):
            axes.whole(node, node.inputs[0], axes.dims(node.inputs[0])[2])
        passes(node, axes)

    return apply


for _name, _text in NOTATION.items():
    RULES[_name] = attention(_text) if "attention" in _name else from_notation(_text)
