"""The project itself: its commands, what an import does, the shape of the package."""

import ast
import graphlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import house

import quintnet_dt

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "quintnet_dt"
FILES = sorted(PACKAGE.rglob("*.py"))

# The one folder whose files may read private names of torch, and those that they may
# read.
PRIVATE_FOLDER = PACKAGE / "private"
PRIVATE = {
    "torch.utils.checkpoint._StopRecomputationError",
    # every shape of a forward with no memory and no arithmetic: no public way
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    # copies of objects that hold tensors, on such tensors
    "torch._subclasses.fake_tensor.FakeCopyMode",
    # the real values behind a fake forward, where they follow from the inputs: as above
    "torch._subclasses.fake_tensor.unset_fake_temporarily",
    # the namespace in which model code looks FakeTensor up
    "torch._subclasses",
    # `x.tolist()` of a fake tensor, which is many calls where that of any other is one
    "torch._subclasses.fake_tensor.FakeTensor.tolist",
    # softmax of rows that are all masked: zeros, as attention has it
    "torch.ops.aten._safe_softmax",
    # what torch.compile does with Python code that it is not to compile by itself, and
    # whether it is about to: for the hooks of the module that it was given
    "torch._C._dynamo",
    "torch._C._dynamo.eval_frame",
    "torch._C._dynamo.eval_frame.get_eval_frame_callback",
    "torch._C._dynamo.eval_frame.set_eval_frame",
    # what model code asks, to take another path when it is compiled
    "torch.compiler._is_compiling_flag",
    # to know when a backward ends, as FSDP2 and DDP do
    "torch.autograd.Variable._execution_engine",
    "torch.autograd.Variable._execution_engine.queue_callback",
    # whether a forward is recomputed in a backward
    "torch._C",
    "torch._C._current_graph_task_id",
    # the stacks of modes that are on, which must not see planning, and of functional
    # transforms: no public way
    "torch.overrides._get_current_function_mode",
    "torch.overrides._len_torch_function_stack",
    "torch.overrides._pop_mode",
    "torch.overrides._push_mode",
    "torch.utils._python_dispatch._len_torch_dispatch_stack",
    "torch.utils._python_dispatch._pop_mode",
    "torch.utils._python_dispatch._push_mode",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._functorch.pop_dynamic_layer_stack",
    "torch._C._functorch.push_dynamic_layer_stack",
    # whether hooks for saved tensors are on, under which functional transforms raise
    "torch._C._autograd",
    # operators that are given functions (torch.cond, flex_attention): known under this
    # name alone
    "torch._ops.HigherOrderOperator",
    # what detect_anomaly asks of gradients, which DTensor has no rule for
    "torch.ops.aten._is_any_true",
    "torch.ops.aten._is_any_true.default",
    # every operator of a forward, as it is dispatched: documented, under this name
    "torch.utils._python_dispatch.TorchDispatchMode",
    # the state of a module that `replicate` manages, which is another than FSDP2's
    "torch.distributed._composable_state",
    # a dim of k fused pieces, each sharded: public nowhere
    "torch.distributed.tensor.placement_types._StridedShard",
}


# ------------------------------------------------------------- the commands


def readme_commands() -> set[str]:
    """The lines of the README's code blocks."""
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return {line.strip() for block in blocks for line in block.splitlines()}


def test_ci_runs_the_readmes_test_command_last():
    script = (ROOT / ".ci" / "run").read_text().strip().splitlines()
    assert script[-1] == 'pip install -e ".[dev]" && pytest -n 2'
    assert script[-1] in readme_commands()


def test_the_readmes_main_job_is_there():
    job = "torchrun --standalone --nproc-per-node 2 examples/train_lm.py"
    assert f'pip install -e ".[demo]" && {job}' in readme_commands()
    assert (ROOT / "examples" / "train_lm.py").is_file()


# --------------------------------------------------------------- the import

WHAT_AN_IMPORT_DOES = """
import json, sys
import torch, torch.distributed.tensor.parallel
started = []
def audit(event, args):
    starts = "_thread.start", "subprocess.", "os.fork", "os.posix_spawn", "socket."
    if event.startswith(starts) and event != "socket.__new__":
        started.append(event)
before = set(sys.modules)
settings = lambda: (
    torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
    torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
    list(torch.get_rng_state()),
)
kept = settings()
sys.addaudithook(audit)
import quintnet_dt
print(json.dumps({
    "imported": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "started": started,
    "settings kept": settings() == kept,
    "distributed": torch.distributed.is_initialized(),
}))
"""


def torch_and_what_it_requires() -> set[str]:
    """Top-level modules of torch's distribution and of those that it requires."""
    dists, queue = set(), ["torch"]
    while queue:
        dist = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if dist in dists:
            continue
        try:
            requires = importlib.metadata.requires(dist) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        dists.add(dist)
        queue += [re.match(r"[\w.-]+", r)[0] for r in requires if "extra ==" not in r]
    dists.add("numpy")  # torch imports it where it is
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & dists
    }


def test_an_import_starts_nothing_and_brings_only_torch():
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", WHAT_AN_IMPORT_DOES],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    known = {"quintnet_dt"} | sys.stdlib_module_names | torch_and_what_it_requires()
    assert set(found["imported"]) <= known
    assert found["started"] == []
    assert found["settings kept"]
    assert not found["distributed"]


# -------------------------------------------------------------- the package


def test_the_code_is_not_packed():
    """What a reader has to hold in mind at once: see house.py. The bounds only fall."""
    texts = house.measure_folder(PACKAGE)
    assert texts, "no package"
    functions = [(name, f) for name, text in texts.items() for f in text.functions]
    assert [
        (name, f.name, f.complexity) for name, f in functions if f.complexity > 15
    ] == []
    assert [(name, f.name, f.lines) for name, f in functions if f.lines > 60] == []
    tokens = sum(text.tokens for text in texts.values())
    assert tokens / sum(text.code_lines for text in texts.values()) <= 8.5
    # Annotations, imports and docstrings are statements too: to fall, the aim is 5,500.
    assert sum(text.statements for text in texts.values()) < 12_190


def test_files_are_short():
    texts = {module_name(f): f.read_text().splitlines() for f in FILES}
    assert {name: len(lines) for name, lines in texts.items() if len(lines) > 300} == {}
    assert [
        name for name, lines in texts.items() if any(len(line) > 100 for line in lines)
    ] == []


def test_the_tour_names_every_file():
    """quintnet_dt/README.md: a new file is named there, at the place where it acts."""
    page = (PACKAGE / "README.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", page))
    files = {file.relative_to(PACKAGE).as_posix() for file in FILES}
    assert named - files == set(), "not there"
    assert {
        f for f in files - named if not f.endswith("__init__.py")
    } == set(), "not named"
    words = re.findall(r"^\| ([^|]+) \|", page.partition("## Words")[2], re.M)[1:]
    assert len(words) == len(set(words)) <= 60


def test_types():
    """Annotations are checked; torch's types are taken as they come
    (pyproject.toml)."""
    mypy = subprocess.run(
        [sys.executable, "-m", "mypy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert mypy.returncode == 0, mypy.stdout + mypy.stderr


def public_functions():
    """The public functions, and the methods of the public classes."""
    for name in quintnet_dt.__all__:
        public = getattr(quintnet_dt, name)
        members = vars(public) if inspect.isclass(public) else {name: public}
        for member, x in members.items():
            function = x.fget if isinstance(x, property) else getattr(x, "__func__", x)
            if inspect.isfunction(function) and (
                member[0] != "_" or member == "__init__"
            ):
                yield f"{name}.{member}", inspect.unwrap(function)


def test_public_names_are_annotated():
    missing = []
    for name, function in public_functions():
        annotated = {"self", "cls", *function.__annotations__}
        result = [] if function.__name__ == "__init__" else ["return"]
        needed = [*inspect.signature(function).parameters, *result]
        missing += [(name, x) for x in needed if x not in annotated]
    assert missing == []


def test_the_package_lists_its_public_names():
    assert {*quintnet_dt.__all__, "__version__"} <= set(dir(quintnet_dt))
    assert (
        f'version = "{quintnet_dt.__version__}"'
        in (ROOT / "pyproject.toml").read_text()
    )


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(code: str, file: Path):
    """(name bound, what it stands for) of every import, wherever it is in a file."""
    package = module_name(file)
    if file.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                yield bound, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            source = importlib.util.resolve_name(source, package)
            for alias in node.names:
                yield alias.asname or alias.name, f"{source}.{alias.name}"


def test_imports_run_one_way():
    modules = {module_name(f) for f in FILES}
    needs = {}
    for file in FILES:
        # from .a import b: the module a.b where there is one, else a
        targets = {
            name if name in modules else name.rpartition(".")[0]
            for _, name in imports(file.read_text(), file)
        }
        needs[module_name(file)] = targets & modules
    graphlib.TopologicalSorter(needs).prepare()  # CycleError names the cycle


def test_no_public_name_is_a_files():
    """Once such a file is imported, `from quintnet_dt import name` would give the
    module."""
    assert not set(quintnet_dt.__all__) & {
        name for f in FILES for name in f.relative_to(ROOT).with_suffix("").parts
    }


def dotted(node: ast.AST) -> str | None:
    """a.b.c of an expression that is just that."""
    if isinstance(node, ast.Attribute):
        value = dotted(node.value)
        return value and f"{value}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def private_torch_names(code: str, file: Path) -> set[str]:
    """torch._x, torch.a._x.y, from torch.a import _x, and the same by an alias."""
    stands_for, names = {}, set()
    for bound, name in imports(code, file):
        names.add(name)
        # import torch.a binds torch, import torch.a as a binds torch.a
        stands_for[bound] = bound if name.startswith(f"{bound}.") else name
    for node in ast.walk(ast.parse(code)):
        head, _, rest = (dotted(node) or "").partition(".")
        if head in stands_for and rest:
            names.add(f"{stands_for[head]}.{rest}")
    return {
        name
        for name in names
        if name.startswith("torch.") and re.search(r"\._(?!_\w+__(\.|$))", name)
    }


def test_private_torch_names_are_few_and_in_one_folder():
    found = {file: private_torch_names(file.read_text(), file) for file in FILES}
    read = {file: names for file, names in found.items() if names}
    assert set().union(*read.values()) == PRIVATE
    assert [file for file in read if PRIVATE_FOLDER not in file.parents] == []


def test_a_private_torch_name_is_found_however_it_is_read():
    code = """
        import torch, torch.distributed as dist, torch._e.f as g
        from torch.a import _b
        from torch._c import D
        from torch.h import I
        torch._j(1), dist._l, I._m, g
        torch.nn.Linear.__init__, torch.k.o, x._y, x.torch._z
    """
    file = PACKAGE / "example.py"
    assert private_torch_names(textwrap.dedent(code), file) == {
        "torch._e.f",
        "torch.a._b",
        "torch._c.D",
        "torch._j",
        "torch.distributed._l",
        "torch.h.I._m",
    }
