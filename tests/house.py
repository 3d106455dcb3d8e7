"""How dense a package's code is: what is measured of each function, file and folder."""

import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

BRANCHES = (
    ast.If,
    ast.For,
    ast.While,
    ast.ExceptHandler,
    ast.IfExp,
    ast.Assert,
    ast.comprehension,
)
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Function:
    name: str
    complexity: int  # cyclomatic (McCabe 1976), with what is nested in it
    lines: int  # less its docstring's


@dataclass(frozen=True)
class Text:
    """What is measured of one file."""

    functions: list
    statements: int
    tokens: int
    code_lines: int  # docstrings, comments and blank lines not counted


def complexity(function: ast.AST) -> int:
    total = 1
    for node in ast.walk(function):
        if isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
        elif isinstance(node, BRANCHES + (ast.match_case,)):
            total += 1
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
    return total


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def docstring_lines(tree: ast.AST) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def measure(code: str) -> Text:
    tree = ast.parse(code)
    functions = [
        Function(node.name, complexity(node), length(node))
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    prose = docstring_lines(tree)
    tokens, lines = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type not in NOT_CODE and token.start[0] not in prose:
            tokens += 1
            lines.update(range(token.start[0], token.end[0] + 1))
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
    return Text(functions, statements, tokens, len(lines))


def measure_folder(folder: Path) -> dict[str, Text]:
    """{file, as the folder sees it: Text}"""
    files = sorted(folder.rglob("*.py"))
    return {str(file.relative_to(folder)): measure(file.read_text()) for file in files}
