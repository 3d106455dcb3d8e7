"""What stands for a name that this release of torch lacks."""

from typing import Any

import torch


def absent(name: str) -> Any:
    """Tells that it is not there when it is used."""

    class Absent:
        def __init__(self, *args: Any, **kwargs: Any):
            raise RuntimeError(
                f"expected {name}, which torch {torch.__version__} does not have: this"
                " version of quintnet_dt needs another release of torch for what was"
                " asked of it"
            )

    return Absent
