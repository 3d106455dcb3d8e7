"""The command line: `quintnet-dt`, or `python -m quintnet_dt`. Exit codes: 0 fine, 1
wrong, 2 not understood."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from . import __version__
from .compare import compare_tp_sizes
from .devices import DEVICES
from .estimate import OPTIMIZERS, size
from .plan import TensorParallelPlan
from .rewrite import plan_tensor_parallel
from .state.saved import export_checkpoint, read_saved
from .targets import Target, Unusable, dtype_of, example_inputs
from .verification import verify_tensor_parallel

_TARGET = (
    "package.module:factory or file.py:factory (a function without arguments that"
    " returns the model, or the model), or a Hugging Face folder or config.json"
)
_EXAMPLES = """examples:
  quintnet-dt plan my_model.py:make --tp 8 --input 4,128:int64
  quintnet-dt plan config.json --tp 8 --compare 1,2,4,8 --device H100 --dtype bfloat16
  quintnet-dt plan config.json --tp 8 --json > plan.json
  quintnet-dt verify my_model.py:make --tp 2 --input 4,128:int64
  quintnet-dt inspect runs/checkpoint
  quintnet-dt export runs/checkpoint weights

exit codes: 0 fine, 1 wrong (one line on stderr says what), 2 not understood"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = _parser().parse_args(arguments)
    if options.verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("quintnet_dt").setLevel(logging.INFO)
    try:
        return options.command(options)
    except Exception as e:  # the user's model may raise anything
        if options.verbose:
            raise
        kind = "" if isinstance(e, Unusable) else f"{type(e).__name__}: "
        print(f"quintnet-dt: {kind}{' '.join(str(e).split())}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quintnet-dt",
        description="Tensor parallelism, seen before it is run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="log what is done; tracebacks"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_verify(commands)
    _add_checkpoints(commands)
    return parser


def _add(commands: Any, run: Callable, name: str, what: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what, epilog=_EXAMPLES)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(command=run)
    return parser


def _add_plan(commands: Any) -> None:
    parser = _add(
        commands,
        _plan,
        "plan",
        "print what would be sharded, and what a step takes; nothing is allocated",
    )
    _add_model(parser)
    parser.add_argument(
        "--compare",
        type=_sizes,
        metavar="1,2,4,8",
        help="numbers of ranks side by side",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="what its time is counted for (default: H100)",
    )
    parser.add_argument(
        "--dtype",
        help="cast the model, such as bfloat16 (default: as it is made)",
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="whose state is counted (default: adamw)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    if hasattr(TensorParallelPlan, "to_html"):
        parser.add_argument("--html", metavar="FILE", help="draw the plan of --tp")


def _add_verify(commands: Any) -> None:
    parser = _add(
        commands,
        _verify,
        "verify",
        "run one step of the split model beside the whole one, on processes of this"
        " machine, and compare",
    )
    _add_model(parser, tp_required=True)


def _add_model(parser: argparse.ArgumentParser, tp_required: bool = False) -> None:
    parser.add_argument("target", metavar="TARGET", help=_TARGET)
    parser.add_argument(
        "--tp", type=int, metavar="N", required=tp_required, help="number of ranks"
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="2,16,48:float32",
        help="an input's shape and dtype, or name=2,16:int64; may be repeated (default:"
        " made up from the model's first layer)",
    )


def _add_checkpoints(commands: Any) -> None:
    inspect = _add(
        commands, _inspect, "inspect", "print what a checkpoint of a run holds"
    )
    export = _add(
        commands,
        _export,
        "export",
        "write the model of a checkpoint as whole safetensors files",
    )
    for parser in (inspect, export):
        parser.add_argument("checkpoint", metavar="CHECKPOINT", help="its folder")
    export.add_argument("out", metavar="OUT", help="the folder to write to")


def _sizes(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _plan(options: argparse.Namespace) -> int:
    if options.tp is None and not options.compare:
        print("quintnet-dt plan: give --tp N, or --compare 1,2,4,8", file=sys.stderr)
        return 2
    inputs = example_inputs(options.input)
    model = Target(options.target).on_meta()
    if options.dtype:
        model = model.to(dtype_of(options.dtype, "--dtype"))
    shown: dict[str, Any] = {}
    if options.tp is not None:
        plan = _planned(model, options, inputs)
        estimate = plan.estimate(options.optimizer)
        shown |= {"plan": plan, "estimate": estimate}
        if getattr(options, "html", None):
            Path(options.html).write_text(getattr(plan, "to_html")())
    if options.compare:
        shown["comparison"] = compare_tp_sizes(
            model,
            options.compare,
            example_inputs=inputs,
            optimizer=options.optimizer,
            device=options.device,
        )
    if options.json:
        print(json.dumps({name: asdict(x) for name, x in shown.items()}, indent=1))
    else:
        print("\n\n".join(map(str, shown.values())))
    return 0


def _planned(
    model: nn.Module, options: argparse.Namespace, inputs: Any
) -> TensorParallelPlan:
    return plan_tensor_parallel(
        model,
        options.tp,
        example_inputs=inputs,
        device=options.device,
    )


def _verify(options: argparse.Namespace) -> int:
    target = Target(options.target)
    inputs = example_inputs(options.input)
    target.on_meta()  # what is wrong with it is told here, and by no other process
    report = verify_tensor_parallel(target, options.tp, example_inputs=inputs)
    print(report)
    return 0 if report.ok else 1


def _inspect(options: argparse.Namespace) -> int:
    saved = read_saved(options.checkpoint)
    total = 0
    for name, t in sorted(saved.tensors.items()):
        dtype = t.properties.dtype
        total += t.size.numel() * dtype.itemsize
        shape = " x ".join(map(str, t.size)) or "scalar"
        print(f"{name}  {shape}  {str(dtype).removeprefix('torch.')}")
    print(f"{len(saved.tensors)} tensors, {size(total)}; extra: {saved.extra}")
    return 0


def _export(options: argparse.Namespace) -> int:
    export_checkpoint(options.checkpoint, options.out)
    return 0
