"""The house of DESIGN.md: imports point down a floor only, few third-party packages, no forbidden names, no pickle."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    3: {"train", "infer", "cpt", "report"},
    2: {"evaluate", "corpus", "splits"},
    1: {"model", "data", "resume"},
    0: {
        "configs",
        "lora",
        "ddp",
        "optim",
        "checkpoint",
        "losses",
        "metrics",
        "decide",
        "prompts",
        "latex",
        "audit",
        "tracking",
    },
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
RUNTIME = {"torch", "transformers", "safetensors", "numpy", "tqdm", "bitsandbytes"}
OPTIONAL = {"data": {"pyarrow"}, "report": {"matplotlib"}, "tracking": {"wandb"}}  # allowed inside a function only
FORBIDDEN = {"datasets", "tokenizers", "peft", "token", "profile", "utils"}
FILES = {path.stem: path for path in ROOT.glob("*.py")}


def imports(source: str) -> list[tuple[str, bool]]:
    """(top-level package, is it imported inside a function?) of every import statement."""
    tree = ast.parse(source)
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], id(node) in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import in a flat house"
            found.append((node.module.split(".")[0], id(node) in inner))
    return found


def siblings(name: str) -> set[str]:
    return {module for module, _ in imports(FILES[name].read_text(encoding="utf-8")) if module in FLOOR}


def wrong_imports(name: str, imported: set[str]) -> set[str]:
    """Those that do not point down a floor; on the ground, and among entry points, that is every sibling."""
    return {other for other in imported if FLOOR[other] >= FLOOR[name]}


def test_every_top_level_file_has_a_floor():
    assert set(FILES) <= set(FLOOR), "a new top-level file needs a floor in DESIGN.md and here"


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_down_a_floor_only(name):
    wrong = wrong_imports(name, siblings(name))
    assert not wrong, f"{name}.py (floor {FLOOR[name]}) imports {wrong}"


def test_the_floor_rule_itself_refuses():
    assert wrong_imports("train", {"infer"}) and wrong_imports("train", {"cpt"}), "entry points never import each other"
    assert wrong_imports("lora", {"configs"}), "ground files import no sibling"
    assert wrong_imports("data", {"model"}) and wrong_imports("data", {"evaluate"})
    assert not wrong_imports("train", {"evaluate", "data", "configs"})


@pytest.mark.parametrize("name", sorted(FILES))
def test_third_party_imports_are_the_runtime_packages(name):
    for package, inside in imports(FILES[name].read_text(encoding="utf-8")):
        if package in FLOOR or package in sys.stdlib_module_names:
            continue
        if package in OPTIONAL.get(name, ()) or package == "bitsandbytes":
            assert inside, f"{name}.py imports {package} at its top: only inside a function"
        else:
            assert package in RUNTIME, f"{name}.py imports {package}"


def test_requirements_are_the_runtime_packages():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert {line.split(">")[0].split("=")[0] for line in lines} == RUNTIME


def test_configs_imports_no_torch():
    code = "import sys, configs; print(sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(RUNTIME)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_no_forbidden_or_shadowing_file_names():
    assert not FORBIDDEN & set(FILES)
    assert not set(FILES) & (set(sys.stdlib_module_names) | RUNTIME)


def test_no_package_folder_at_the_top():
    assert not [p for p in ROOT.glob("*/__init__.py")]


def test_runtime_lines_stay_readable():
    needed, todo = set(), ["train", "infer", "cpt"]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += siblings(name)
    assert {"train", "infer", "cpt", "evaluate", "model", "data", "configs", "lora", "ddp"} <= needed
    lines = {name: code_lines(FILES[name].read_text(encoding="utf-8")) for name in needed}
    assert sum(lines.values()) <= 7100, lines


def code_lines(source: str) -> int:
    """Lines that hold code: blank lines, comments and docstrings aside."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(found)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_pickle(name):
    source = FILES[name].read_text(encoding="utf-8")
    assert not {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"} & {m for m, _ in imports(source)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, f"line {node.lineno}"
            assert not (node.value.id in ("np", "numpy") and node.attr in ("load", "save")), f"line {node.lineno}"
