"""Small functions with inputs, for every axis rule: a file a family, as the rules have."""

from .indexing import INDEXING
from .norms import NORMS
from .pointwise import POINTWISE
from .products import PRODUCTS
from .reductions import REDUCTIONS
from .spatial import SPATIAL
from .views import VIEWS

CASES = {**PRODUCTS, **VIEWS, **INDEXING, **REDUCTIONS, **NORMS, **SPATIAL, **POINTWISE}

# Registered operators that no case can reach, and why.
UNREACHED = {
    "higher_order::flex_attention": (
        "an operator that is given functions: tests/test_transforms.py"
    ),
    **dict.fromkeys(
        "reshape contiguous chunk tensor_split unsafe_chunk argsort norm rms_norm".split(),
        "decomposed",
    ),
    **dict.fromkeys(
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention"
        " cudnn_batch_norm _scaled_dot_product_cudnn_attention miopen_batch_norm".split(),
        "no CPU kernel",
    ),
    **dict.fromkeys(
        "bernoulli_ native_dropout dropout".split(), "random: placed by the layout"
    ),
    **dict.fromkeys(
        "uniform_ normal_ exponential_ rand_like randn_like".split(),
        "random: see the test of them",
    ),
    "_fused_rms_norm": "decomposed on the CPU",
    **dict.fromkeys(["empty_like", "new_empty"], "its values are anything"),
    "_embedding_bag": "_embedding_bag_forward_only where no gradients are wanted",
}
