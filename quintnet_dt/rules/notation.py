"""Rules of one line, in an einsum-like notation.

Each input's dims are letters. A letter in an input and the output is one axis; one that the output lacks is contracted (summed over, so that a shard
of it gives a Partial); `!` marks what the operator needs whole, `~` what is looked up by index, `+` an addend, to be added once when something is contracted;
`...` is any further dims.
"""

from math import prod

from ..factors import leaves, unify
from .table import RULES, arg, fresh, unknown

NOTATION = {
    "mm": "i k, k j -> i j",
    "bmm": "b i k, b k j -> b i j",
    "mv": "i k, k -> i",
    "dot": "k, k ->",
    "addmm": "+i j, i k, k j -> i j",
    "baddbmm": "+b i j, b i k, b k j -> b i j",
    "addmv": "+i, i k, k -> i",
    "embedding": "v~ d, ... -> ... d",
    "_scaled_dot_product_flash_attention_for_cpu": "b h q d!, b h k! d!, b h k! e, b h q k! -> b h q e",
    "_scaled_dot_product_flash_attention": "b h q d!, b h k! d!, b h k! e -> b h q e",
    "_scaled_dot_product_efficient_attention": "b h q d!, b h k! d!, b h k! e, b h q k! -> b h q e",
    "_scaled_dot_product_cudnn_attention": "b h q d!, b h k! d!, b h k! e, b h q k! -> b h q e",
    "tril": "... i! j! -> ... i j",
    "triu": "... i! j! -> ... i j",
    "view_as_complex": "... c! -> ...",
    "view_as_real": "... -> ... c",
}


def _parse(text):
    left, right = text.split("->")
    return [p.split() for p in left.split(",")], [p.split() for p in right.split(",")]


def from_notation(text):
    """The rule function of one line of notation."""
    patterns, outs = _parse(text)
    named = {t for p in outs for t in p}

    def apply(node, axes):
        letters, contracted, looked_up, rest = {}, set(), set(), []
        arguments = [a for a in node.args if hasattr(a, "shape") or a is None]
        arguments += [a for a in node.kwargs.values() if hasattr(a, "shape")]
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
            if len(tokens) != len(value.shape):
                continue
            axes.set(
                value,
                [
                    (letters[t] if t in letters and prod(f.size for f in leaves(letters[t])) == n else fresh(n))
                    for t, n in zip(tokens, value.shape)
                ],
            )

    return apply


def attention(text):
    """A causal mask counts queries from the first: then they are needed whole; dropout draws one mask for all."""
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
