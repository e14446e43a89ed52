"""Would the tests of the mathematics notice a fault? Small realistic ones are put into it, one at a time.

    python benchmarks/mutation.py [--module NAME ...] [--most N]

A mutant is a module of rlhf_ray/algorithms with one change; it is killed when a test of that module fails or hangs.
Only a copy is ever changed, never the tree that people work in. Exits 1 if fewer than 95% are killed. Those that no
test could tell from the original are not counted: EQUIVALENT names them, each must name one mutant and survive.

Loading torch takes longer than most tests, so this process does it once and forks for each mutant. It must never import
the package itself: a child would inherit the module as it was.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ALGORITHMS = Path("rlhf_ray/algorithms")
TESTS = Path("tests/algorithms")
RESULTS = ROOT / "benchmarks/results/mutation.json"
REQUIRED = 0.95
CPU_SECONDS = 60
"""After which a mutant hangs. Of the processor's time: a busy machine must not kill anybody."""
LOADED_ONCE = ("torch._dynamo", "torch.distributions", "torch.utils.checkpoint", "hypothesis", "pydantic", "pytest")
FURTHER_TESTS = {"vocabulary_kl": ("test_logprobs.py",)}
"""By module, besides the file of its name and the comparison with the oracle."""
OTHER_LIBRARIES = "rllib or trl"
"""Tests left out: they take seconds to import, and the package's own must do without them."""

SQUARED = "the difference is squared"
NO_GRADIENT = "a comparison has no gradient to cut off"
SIDES = "the two sides are exchanged, and their mean is the same"
EQUIVALENT = {
    "advantages.gae: int(lengths.max()) if len(lengths) else 0  ->  int(lengths.max()) if len(lengths) else 1": (
        "a longest sequence of one token needs no pass either"
    ),
    "advantages.gae: step < longest  ->  step <= longest": "the further pass adds what lies past the ends: zeros",
    "advantages.rewards_to_go: "
    "gae(rewards, torch.zeros_like(rewards), offsets, gamma, 1.0, mask)[0]  ->  "
    "gae(rewards, torch.zeros_like(rewards), offsets, gamma, 1.0, mask)[1]": "without values both are the same",
    "advantages._deviations: "
    "returns.new_zeros(len(sizes)).scatter_reduce(0, place, returns, 'amin', include_self=False)  ->  "
    "returns.new_zeros(len(sizes)).scatter_reduce(0, place, returns, 'amax', include_self=False)": (
        "the largest return serves as well as the smallest to count from"
    ),
    "correction.gap: learner - sampler  ->  sampler - learner": "the distance is the same from either side",
    "kl.k2: logp - ref  ->  ref - logp": SQUARED,
    "logprobs.chunked: "
    "hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, temperature: float, chunk: int, calls: int=1, "
    "reference: Reference | None=None  ->  "
    "hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, temperature: float, chunk: int, calls: int=0, "
    "reference: Reference | None=None": "no tokens are one chunk, so head is called once at least",
    "logprobs.in_chunks: zip(*(column.split(chunk) for column in columns), strict=True)  ->  "
    "zip(*(column.split(chunk) for column in columns))": "columns of different lengths have been refused before",
    "logprobs.in_chunks: torch.is_grad_enabled() and len(pieces) > 1  ->  len(pieces) > 1": (
        "without gradients a checkpoint is a plain call"
    ),
    "logprobs.in_chunks: checkpoint(measure, *piece, use_reentrant=False, preserve_rng_state=False)  ->  "
    "checkpoint(measure, *piece, use_reentrant=False)": "head is deterministic: random states only cost time",
    "logprobs.in_chunks: zip(*measured, strict=True)  ->  zip(*measured)": "every chunk has the same measures",
    "policy_loss.clipped: bounded.detach()  ->  bounded": NO_GRADIENT,
    "policy_loss.clipped: log_ratio.detach()  ->  log_ratio  (number 2)": NO_GRADIENT,
    "preference_loss.length_controlled_accuracy: "
    "(lengths[:, 0] - lengths[:, 1]).sign() * (labels - 0.5).sign()  ->  "
    "(lengths[:, 0] - lengths[:, 1]).sign() / (labels - 0.5).sign()": "by a sign, or by zero, which is on neither side",
    "preference_loss.length_controlled_accuracy: "
    "lengths[:, 0] - lengths[:, 1]  ->  lengths[:, 1] - lengths[:, 0]": SIDES,
    "preference_loss.length_controlled_accuracy: labels - 0.5  ->  0.5 - labels": SIDES,
    "preference_loss.length_controlled_accuracy: "
    "accuracy(probabilities[side == sign], labels[side == sign])  ->  "
    "accuracy(labels[side == sign], probabilities[side == sign])": "who agrees with whom is the same from either side",
    "preference_loss.expected_calibration_error: "
    "(found.confidence - found.agreement).abs().nan_to_num(0)  ->  "
    "(found.confidence - found.agreement).abs().nan_to_num(1)": "an empty bin counts nothing, whatever its gap",
    "preference_loss.ipo: h - 0.5 / beta  ->  0.5 / beta - h": SQUARED,
    "preference_loss.brier: probabilities - labels  ->  labels - probabilities": SQUARED,
    "preference_loss.expected_calibration_error: found.confidence - found.agreement  ->  "
    "found.agreement - found.confidence": "a gap counts the same from either side",
    "q_learning.td_target: offsets[1:]  ->  offsets[0:]": "before the first answer is the last token, an end as well",
    "q_learning.td_loss: q - target.detach()  ->  target.detach() - q": SQUARED,
    "q_learning.expectile_loss: tau - (gap < 0).to(gap.dtype)  ->  (gap < 0).to(gap.dtype) - tau": (
        "an absolute value counts the same from either side"
    ),
    "q_learning.expectile_loss: gap < 0  ->  gap <= 0": "where there is no gap, there is neither loss nor gradient",
    "statistics.sequence_sums: torch.repeat_interleave(lengths, output_size=len(x))  ->  "
    "torch.repeat_interleave(lengths)": "the size is known, telling it spares an accelerator a wait",
    "value_loss.clipped: values - returns  ->  returns - values": SQUARED,
    "value_loss.clipped: values.clamp(old_values - clip, old_values + clip) - returns  ->  "
    "returns - values.clamp(old_values - clip, old_values + clip)": SQUARED,
    "value_loss.clipped: (bound > free).detach()  ->  bound > free": NO_GRADIENT,
}
"""From a mutant's name to why no test could tell."""


@dataclass(frozen=True)
class Mutant:
    module: str
    scope: str
    """The function or method, dotted; empty at the top of the module."""
    line: int
    change: str
    source: str

    @property
    def name(self) -> str:
        """Without the line, which moves."""
        return f"{'.'.join(filter(None, (self.module, self.scope)))}: {self.change}"

    @property
    def label(self) -> str:
        return f"{self.module}.py:{self.line}  {self.change}"


# What is changed

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
NAMES = {"min": "max", "minimum": "maximum", "amin": "amax", "sum": "mean", "any": "all"}
NAMES |= {other: name for name, other in NAMES.items()}
DROPPED_METHODS = ("abs", "clamp", "detach", "long", "masked_fill", "masked_scatter", "sign", "sqrt", "square")
SYMMETRIC = ("max", "min", "zip")
NOT_MATHEMATICS = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)
NOT_EXPRESSIONS = ("annotation", "bases", "decorator_list", "returns")
"""Fields of nodes."""
SHOWN = (ast.stmt, ast.arguments, ast.BinOp, ast.BoolOp, ast.Call, ast.Compare, ast.IfExp, ast.Subscript, ast.UnaryOp)
"""What is large enough to be recognised in the report; of smaller nodes, what they are part of is printed."""


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """In the order of the source, each with a name of its own."""
    tree = ast.parse(source)
    names: Counter[str] = Counter()

    def visit(parent: ast.AST, shown: ast.AST, scope: str) -> Iterator[Mutant]:
        for field, place, node in children(parent):
            is_shown = isinstance(node, SHOWN) and not is_number(node)
            whole = node if is_shown else shown
            inner = f"{scope}.{node.name}".strip(".") if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else scope
            for other, what in changes(node):
                before = ast.unparse(whole)
                with standing_in(parent, field, place, other):
                    after = ast.unparse(other if is_shown else whole)
                    line = getattr(node, "lineno", 0)
                    mutant = Mutant(module, inner, line, what or f"{before}  ->  {after}", ast.unparse(tree))
                names[mutant.name] += 1
                again = f"  (number {names[mutant.name]})" if names[mutant.name] > 1 else ""
                yield replace(mutant, change=mutant.change + again)
            if not is_number(node):
                yield from visit(node, whole, inner)

    yield from visit(tree, tree, "")


def children(parent: ast.AST) -> Iterator[tuple[str, int | None, ast.AST]]:
    """Field, place in it where it is a list, and node, of all that computes something."""
    for field, value in ast.iter_fields(parent):
        nodes = enumerate(value) if isinstance(value, list) else [(None, value)]
        for place, node in nodes:
            if isinstance(node, ast.AST) and field not in NOT_EXPRESSIONS and not isinstance(node, NOT_MATHEMATICS):
                yield field, place, node


@contextlib.contextmanager
def standing_in(parent: ast.AST, field: str, place: int | None, other: ast.AST) -> Iterator[None]:
    holder: Any = vars(parent) if place is None else getattr(parent, field)
    key = field if place is None else place
    kept, holder[key] = holder[key], other
    try:
        yield
    finally:
        holder[key] = kept


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every fault that fits in this node's place, and what to call it where code before and after is not enough."""
    match node:
        case ast.With(items=[item]) if "no_grad" in ast.unparse(item):
            yield ast.If(ast.Constant(True), node.body, []), "with torch.no_grad() dropped"
        case ast.FunctionDef(decorator_list=[decorator]) if "no_grad" in ast.unparse(decorator):
            yield replaced(node, decorator_list=[]), "@torch.no_grad() dropped"
        case ast.If(test=test) if ast.unparse(test) != "TYPE_CHECKING":
            yield replaced(node, test=ast.Constant(False)), f"if {ast.unparse(test)}  ->  if False"
        case ast.Expr(value=ast.Call()):
            yield ast.Pass(), f"{ast.unparse(node)} dropped"
        case ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield replaced(node, op=OPERATORS[type(op)]()), ""
        case _:
            yield from ((other, "") for other in other_expressions(node))


def other_expressions(node: ast.AST) -> Iterator[ast.AST]:
    if is_number(node):
        yield from map(ast.Constant, other_numbers(ast.literal_eval(node)))
    match node:
        case ast.Constant(value=str(name)) if name in NAMES:
            yield ast.Constant(NAMES[name])
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand) if not is_number(node):
            yield operand
        case ast.BinOp(left=left, op=op, right=right):
            if type(op) in OPERATORS:
                yield replaced(node, op=OPERATORS[type(op)]())
            if isinstance(op, ast.Add | ast.Sub) and not is_one(right):
                yield left
            if isinstance(op, ast.Add) and not is_one(left):
                yield right
            if isinstance(op, ast.Sub):
                yield ast.BinOp(right, op, left)
            if isinstance(op, ast.BitAnd | ast.BitOr):
                yield from (left, right)
        case ast.Compare(ops=[op]):
            yield from (replaced(node, ops=[other()]) for other in COMPARISONS.get(type(op), ()))
        case ast.BoolOp(values=values):
            yield from values
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)
        case ast.Subscript(value=value, slice=ast.Name()):
            yield value
        case ast.Call():
            yield from other_calls(node)
            yield from other_keywords(node)


def is_number(node: ast.AST) -> bool:
    """-1 is one number, not the negative of one."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def is_one(node: ast.AST) -> bool:
    """As a term it is dropped where it becomes zero."""
    return is_number(node) and ast.literal_eval(node) == 1


def other_numbers(number: float) -> tuple[float, ...]:
    """The neighbours of a whole number, or twice the number. Not -1 for 0: the last axis of one is the first."""
    if isinstance(number, float):
        return (2 * number or 1.0,)
    return (number + 1, number - 1) if number > 0 else (number + 1,)


def other_calls(node: ast.Call) -> Iterator[ast.AST]:
    match node:
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, chosen, other]):
            yield from (chosen, other, replaced(node, args=[condition, other, chosen]))
        case ast.Call(func=ast.Attribute(attr="clamp"), args=[low, high]):
            yield replaced(node, args=[high, low])
        case ast.Call(func=ast.Name(id=name), args=[one, two, *others]) if name.islower() and name not in SYMMETRIC:
            yield replaced(node, args=[two, one, *others])
    match node.func:
        case ast.Name(id=name) if name in NAMES:
            yield replaced(node, func=ast.Name(NAMES[name]))
        case ast.Attribute(attr=name) if name in NAMES:
            yield replaced(node, func=replaced(node.func, attr=NAMES[name]))
        case ast.Attribute(value=value, attr=name) if name in DROPPED_METHODS:
            yield value


def other_keywords(node: ast.Call) -> Iterator[ast.AST]:
    """Each one renamed where it has an opposite, or else dropped; the fields of a class of ours are all needed."""
    if isinstance(node.func, ast.Name) and node.func.id[0].isupper():
        return
    for place, keyword in enumerate(node.keywords):
        opposite = [ast.keyword(NAMES[keyword.arg], keyword.value)] if keyword.arg in NAMES else []
        yield replaced(node, keywords=[*node.keywords[:place], *opposite, *node.keywords[place + 1 :]])


def replaced(node: Any, **fields: Any) -> Any:
    """A copy of the node, its children shared, with other fields."""
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


# Who notices

VERDICTS = (("survived", "killed"), ("equivalent", "wrongly called equivalent"))
"""By whether a mutant is called equivalent, then by whether a test fails."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in (ROOT / ALGORITHMS).glob("[!_]*.py"))
    parser.add_argument("--module", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--most", type=int, help="mutants a module, evenly over it, for a first look")
    chosen = parser.parse_args()
    for name in LOADED_ONCE:
        importlib.import_module(name)
    found = {name: list(mutants(name, (ROOT / ALGORITHMS / f"{name}.py").read_text())) for name in chosen.module}
    refuse_stale_equivalents(found)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for tree in ("rlhf_ray", str(TESTS)):
            shutil.copytree(ROOT / tree, Path(folder, tree), ignore=shutil.ignore_patterns("__pycache__"))
        for name, every in found.items():
            rows[name] = check(Path(folder), name, spread(every, chosen.most))
            if not chosen.most:
                keep(name, rows[name])
    everything = [row for module in rows.values() for row in module]
    print(f"\n{table(rows)}\n")
    for verdict in ("survived", "wrongly called equivalent"):
        for row in everything:
            if row["verdict"] == verdict:
                print(f"{verdict}: {row['mutant']}  {row['by']}")
    wrong = counts(everything)["wrongly called equivalent"]
    sys.exit(bool(wrong) or killed_share(everything) < REQUIRED)


def refuse_stale_equivalents(found: dict[str, list[Mutant]]) -> None:
    names = {mutant.name for every in found.values() for mutant in every}
    stale = [name for name in EQUIVALENT if name.partition(".")[0] in found and name not in names]
    if stale:
        raise SystemExit("\n".join(("EQUIVALENT names mutants that there are not:", *stale)))


def spread(every: list[Mutant], most: int | None) -> list[Mutant]:
    return every[:: max(1, -(-len(every) // most))] if most else every


def check(folder: Path, module: str, every: list[Mutant]) -> list[dict[str, str]]:
    """A row a mutant. Raises SystemExit if the tests fail on the original."""
    path = folder / ALGORITHMS / f"{module}.py"
    original = path.read_text()
    if killer := killed_by(folder, module):
        raise SystemExit(f"{killer} fails without a mutant:\n{(folder / 'log').read_text()}")
    rows = []
    for mutant in every:
        put(path, mutant.source)
        killer = killed_by(folder, module)
        verdict = VERDICTS[mutant.name in EQUIVALENT][bool(killer)]
        print(f"{verdict:10}  {mutant.label}", flush=True)
        rows.append({"mutant": mutant.label, "verdict": verdict, "by": killer})
    put(path, original)
    return rows


def put(path: Path, source: str) -> None:
    """Without the bytecode of what stood there: Python tells sources apart by second and size, often the same here."""
    path.write_text(source)
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def killed_by(folder: Path, module: str) -> str:
    """The first test that fails, or else nothing."""
    child = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, module))
    child.start()
    child.join()
    code = child.exitcode
    if code in (0, 1, 2):
        failed = re.search(r"^(?:FAILED|ERROR) (?:\S*/)?(.*?)(?: - |$)", (folder / "log").read_text(), re.MULTILINE)
        return failed[1] if failed and code else "an error while tests are collected" if code else ""
    if code is not None and code < 0:
        return "the limit of time"
    raise SystemExit(f"pytest ended with {code}:\n{(folder / 'log').read_text()}")


def run_tests(folder: Path, module: str) -> None:
    """In the child, which ends with pytest's exit status."""
    import pytest
    from hypothesis import Phase, settings

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    log = os.open("log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    # The same examples for every mutant, and none made smaller: that it fails is all there is to know.
    settings.register_profile("mutation", derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    settings.load_profile("mutation")
    files = [str(TESTS / name) for name in (f"test_{module}.py", *FURTHER_TESTS.get(module, ()), "test_oracle.py")]
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", f"not ({OTHER_LIBRARIES})"]
    sys.exit(int(pytest.main([*files, *options])))


# What came of it


def counts(rows: list[dict[str, str]]) -> dict[str, int]:
    verdicts = Counter(row["verdict"] for row in rows)
    return {"mutants": len(rows)} | {verdict: verdicts[verdict] for pair in VERDICTS for verdict in reversed(pair)}


def killed_share(rows: list[dict[str, str]]) -> float:
    """Of the mutants that a test could kill."""
    total = counts(rows)
    return total["killed"] / max(1, total["killed"] + total["survived"])


def table(rows: dict[str, list[dict[str, str]]]) -> str:
    lines = ["| module | mutants | killed | survived | equivalent |", "|---|---|---|---|---|"]
    everything = [row for module in rows.values() for row in module]
    for name, module in (*rows.items(), ("all", everything)):
        total = counts(module)
        numbers = " | ".join(str(total[key]) for key in ("mutants", "killed", "survived", "equivalent"))
        lines.append(f"| {name} | {numbers} |")
    return "\n".join([*lines, "", f"{killed_share(everything):.1%} of those that are not equivalent are killed."])


def keep(module: str, rows: list[dict[str, str]]) -> None:
    """Beside the last results of the other modules."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(dict(sorted((before | {module: rows}).items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
