"""The house: imports point down, few packages, no pickle; and the budgets that keep the code readable.

Budgets hold for the files as shipped (tests/shipped.json has their sha256). A fork's own lines never break one: a file
that differs is skipped, and so is a total that it is part of. After a change to the project itself:

    python tests/test_layout.py --ship
"""

import ast
import hashlib
import io
import json
import keyword
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = Path(__file__).with_name("shipped.json")
FILES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}

# Where each file stands: it may import files of the lines above it, or to its left. Commands never import each other.
HOUSE = """
errors signals watch disk seals locks spool
configs presets checks cli formats spelling delimited dropout
lora peft_format losses metrics tables bootstrap calibrate decide optim ddp checkpoint run_folder parts tracking limits
template_trial answer_numbers answer_parser prompts
latex_syntax latex_values text_bytes pair_formats latex_hidden latex_clean latex audit
files cutting special_tokens labelling strata packed packed_cuda products fused bases numerics nf4 model
estimates data token_store splits faults loop memory
evaluate language document_files corpus holdout
trained lasttoken chains prepare foreign predictions writer chats answers
report_runs report_numbers pictures page report_sections compare_runs
train infer cpt generate folds ensemble slices report
"""
ORDER = HOUSE.split()
COMMANDS = set(HOUSE.strip().splitlines()[-1].split())

RUNTIME = {"torch", "transformers", "safetensors", "numpy", "tqdm", "bitsandbytes"}
OPTIONAL = {
    "files": {"pyarrow"},
    "pictures": {"matplotlib"},
    "report": {"matplotlib"},
    "tracking": {"wandb"},
}  # inside functions only
FORBIDDEN = {"datasets", "tokenizers", "peft", "token", "profile", "utils"}  # would shadow real modules

# The budgets, and every exception with its reason.
# Of all that train, infer and cpt need. 64,000 tokens and 6,000 lines were the aim of the redesign; since then came
# soft targets, train_only rows and attention pooling (460 tokens); then trust in what users bring: LaTeX that is never
# printed, encodings, layouts of pairs (10,200), files, labels and long rows (6,700), saves, locks, signals and ranks
# (6,400), bases, adapters, exports and stated probabilities (3,600), ids, calibration and part files (2,500), what a
# row, a chat or a source says of itself (600).
# Then fused layers, their products and masks from 16 bits (3,300), bf16 on CPUs (400), GPU paths (2,350): attention of
# any lengths, --max_tokens auto, memory that is counted, deterministic kernels; and a million rows: rows on the disk,
# tokens in mapped files, windows of predictions (3,150).
# Rules, fields, presets and LaTeX commands are tables with a row on each line, so that the lines are many.
TOTAL_TOKENS, TOTAL_LINES = 107_550, 10_690
FILE_LINES, FUNCTION_LINES = 450, 80  # all kinds of lines
DENSITY, READ_MOST = 11.5, 10.0  # tokens per code line; in the files that are read most
READ_MOST_FILES = {"train", "cpt", "infer", "loop", "packed", "lora", "losses"}
LIFT_LINES = 160  # what must be copied to use packed attention elsewhere
SAME_LINES = 6  # lines of the same shape in two functions
EXCEPTIONS = {}  # (file or function, "density", "lines" or "same"): reason


# ---- imports --------------------------------------------------------------------------------------------------------


def imports(source: str) -> list[tuple[str, bool]]:
    """(top-level package, is it imported inside a function?) of every import statement."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name.split(".")[0], id(node) in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import in a flat house"
            names.append((node.module.split(".")[0], id(node) in inner))
    return names


def siblings(name: str) -> set[str]:
    source = FILES[name].read_text(encoding="utf-8")
    if name == "configs":  # lists all settings when it is run as a script
        source = source.partition('if __name__ == "__main__":')[0]
    return {module for module, _ in imports(source) if module in FILES}


def wrong_imports(name: str, imported: set[str]) -> set[str]:
    """Those that do not point down; a file of a fork that has no place in HOUSE yet is a command."""
    place = {file: number for number, file in enumerate(ORDER)}
    commands = COMMANDS | (set(FILES) - set(ORDER))
    if name in commands:
        return imported & commands
    return {other for other in imported if other in commands or place[other] >= place[name]}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down_only(name):
    wrong = wrong_imports(name, siblings(name))
    assert not wrong, f"{name}.py imports {sorted(wrong)}, which stand after it in HOUSE (tests/test_layout.py)"


def test_the_rule_itself_refuses():
    assert wrong_imports("train", {"infer"}) and wrong_imports("train", {"cpt"}), "commands never import each other"
    assert wrong_imports("lora", {"model"}) and wrong_imports("data", {"evaluate"}) and wrong_imports("errors", {"cli"})
    assert not wrong_imports("train", {"evaluate", "data", "configs"})


@pytest.mark.parametrize("name", FILES)
def test_third_party_imports_are_the_runtime_packages(name):
    for package, inside in imports(FILES[name].read_text(encoding="utf-8")):
        if package in FILES or package in sys.stdlib_module_names:
            continue
        if package in OPTIONAL.get(name, ()) or package == "bitsandbytes":
            assert inside, f"{name}.py imports {package} at its top: only inside a function"
        else:
            assert package in RUNTIME, f"{name}.py imports {package}, which is no runtime package"


def test_requirements_are_the_runtime_packages():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert {line.split(">")[0].split("=")[0] for line in lines} == RUNTIME


def test_no_forbidden_or_shadowing_file_names():
    assert not FORBIDDEN & set(FILES)
    assert not set(FILES) & (set(sys.stdlib_module_names) | RUNTIME)


def test_no_package_folder_at_the_top():
    assert not [path for path in ROOT.glob("*/__init__.py")]


RUNTIME_CODE = sorted([*ROOT.glob("*.py"), *(ROOT / "runs").rglob("*.py")])
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Calls that run what a file or a text says: names, and attributes of modules.
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
RUNS_CODE_OF = {("torch", "load"), ("torch", "save"), ("os", "system"), ("os", "popen"), ("yaml", "load")}
RUNS_CODE_OF |= {(module, call) for module in ("np", "numpy") for call in ("load", "save")}
NEVER_TRUE = {"shell", "allow_pickle", "trust_remote_code"}


def what_runs_code(source: str) -> list[str]:
    """Where a source unpickles or evaluates what it is given, or allows others to: "line 7: eval"."""
    bad = [f"import of {module}" for module, _ in imports(source) if module in PICKLES]
    for node in ast.walk(ast.parse(source)):
        name = ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNS_CODE:
            name = node.func.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}" if (node.value.id, node.attr) in RUNS_CODE_OF else ""
        elif isinstance(node, ast.keyword) and node.arg in NEVER_TRUE:
            name = "" if is_false_constant(node.value) else node.arg
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            keys = [key.value for key, value in pairs if isinstance(key, ast.Constant) and not is_false_constant(value)]
            name = ", ".join(key for key in keys if key in NEVER_TRUE)
        if name:
            bad.append(f"line {node.lineno}: {name}")
    return bad


def is_false_constant(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", RUNTIME_CODE, ids=lambda path: path.stem)
def test_no_pickle_and_nothing_that_runs_what_a_file_says(path):
    assert not what_runs_code(path.read_text(encoding="utf-8"))


def test_the_rule_itself_finds_what_runs_code():
    for line in (
        "import pickle", "from torch import nn, load\ntorch.load(x)", "eval(x)", "exec(x)", "run(x, shell=True)",
        "np.load(x, allow_pickle=True)", "f(trust_remote_code=True)", "f(trust_remote_code=flag)", "os.system(x)",
        "options = {'trust_remote_code': True}", "def f():\n    import dill",
    ):  # fmt: skip
        assert what_runs_code(line), line
    assert not what_runs_code(
        "model.eval()\nre.compile(x)\nf(trust_remote_code=False)\no = {'trust_remote_code': False}"
    )


@pytest.mark.parametrize("name", FILES)
def test_a_warning_says_what_to_do(name):
    """Warnings are written by errors.warning, which takes the advice too; other packages' are not ours to repeat."""
    strings = (
        node.value
        for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
    )
    assert name == "errors" or not [text for text in strings if isinstance(text, str) and "warning: " in text]


# ---- budgets --------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_shipped(*names: str) -> None:
    """Skip the test where one of the files is not the project's own any more."""
    shipped = json.loads(SHIPPED.read_text())
    changed = [f"{name}.py" for name in names if sha256(FILES[name]) != shipped.get(f"{name}.py")]
    if changed:
        pytest.skip(f"budgets hold for the files as shipped; changed here: {', '.join(changed)}")


def code_tokens(source: str) -> tuple[int, int]:
    """(Python tokens, lines that hold one): comments, docstrings and blank lines aside. An f-string is one token."""
    documented = ast.Module | ast.FunctionDef | ast.ClassDef
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    count, lines, depth = 0, set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in skipped or token.start[0] in docstrings:
            continue
        kind = tokenize.tok_name[token.type]
        depth -= kind == "FSTRING_END"  # from Python 3.12 on an f-string comes in parts
        if depth == 0 and kind != "FSTRING_START":
            count += 1
        depth += kind == "FSTRING_START"
        lines.update(range(token.start[0], token.end[0] + 1))
    return count, len(lines)


def needed() -> list[str]:
    """The files that train, infer and cpt import, themselves included."""
    names, todo = set(), ["train", "infer", "cpt"]
    while todo:
        name = todo.pop()
        if name not in names:
            names.add(name)
            todo += siblings(name)
    return sorted(names)


def functions(name: str) -> list[ast.FunctionDef]:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_shipped_files_are_those_of_the_house():
    assert {f"{name}.py" for name in ORDER} == set(json.loads(SHIPPED.read_text())), (
        "python tests/test_layout.py --ship"
    )


def test_what_train_infer_and_cpt_need_stays_readable():
    names = needed()
    as_shipped(*names)
    counts = {name: code_tokens(FILES[name].read_text(encoding="utf-8")) for name in names}
    tokens, lines = (sum(column) for column in zip(*counts.values(), strict=True))
    assert tokens <= TOTAL_TOKENS and lines <= TOTAL_LINES, f"{tokens} tokens, {lines} lines: {counts}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_keeps_its_budget(name):
    as_shipped(name)
    source = FILES[name].read_text(encoding="utf-8")
    tokens, lines = code_tokens(source)
    density = READ_MOST if name in READ_MOST_FILES else DENSITY
    if (name, "density") not in EXCEPTIONS:
        assert tokens <= density * lines, f"{name}.py: {tokens / lines:.2f} tokens per code line, at most {density}"
    if (name, "lines") not in EXCEPTIONS:
        assert len(source.splitlines()) <= FILE_LINES, f"{name}.py: {len(source.splitlines())} lines"
    for function in functions(name):
        size = function.end_lineno - function.lineno + 1
        if (f"{name}.{function.name}", "lines") not in EXCEPTIONS:
            assert size <= FUNCTION_LINES, f"{name}.py: {function.name} has {size} lines, at most {FUNCTION_LINES}"


def shapes(name: str, function: ast.FunctionDef) -> list[str]:
    """The function's lines of code without its docstring; names, strings and numbers replaced by their kind."""
    lines = FILES[name].read_text(encoding="utf-8").splitlines(keepends=True)[function.lineno - 1 : function.end_lineno]
    documented = ast.get_docstring(function) is not None
    body = range(0)
    if documented:
        body = range(function.body[0].lineno - function.lineno + 1, function.body[0].end_lineno - function.lineno + 2)
    rows: dict[int, list[str]] = {}
    try:
        for token in tokenize.generate_tokens(iter(lines).__next__):
            if token.start[0] in body or token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE):
                continue
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                text = "NAME"
            elif token.type in (tokenize.STRING, tokenize.NUMBER):
                text = tokenize.tok_name[token.type]
            else:
                text = token.string.strip()
            rows.setdefault(token.start[0], []).append(text)
    except (tokenize.TokenError, IndentationError):  # a method's body ends indented
        pass
    texts = [" ".join(part for part in rows[number] if part) for number in sorted(rows)]
    return [text for text in texts if "NAME" in text]  # not lone brackets


def same_shapes(names: list[str]) -> list[str]:
    """Pairs of functions that share SAME_LINES consecutive lines of the same shape."""
    seen, pairs = {}, set()
    for name in names:
        for function in functions(name):
            place, rows = f"{name}.{function.name}", shapes(name, function)
            for i in range(len(rows) - SAME_LINES + 1):
                window = tuple(rows[i : i + SAME_LINES])
                first = seen.setdefault(window, (place, function.lineno))
                inside = first[0].split(".")[0] == name and first[1] <= function.lineno <= first[1] + 200
                if first[0] != place and not (inside and nested(name, first[0], function)):
                    pairs.add(f"{first[0]} and {place}")
    return sorted(pair for pair in pairs if (pair, "same") not in EXCEPTIONS)


def nested(name: str, outer: str, function: ast.FunctionDef) -> bool:
    """Whether a function lies within another one: its lines are that one's too."""
    return any(
        f"{name}.{other.name}" == outer and other.lineno <= function.lineno and function.end_lineno <= other.end_lineno
        for other in functions(name)
    )


def test_no_two_functions_share_six_lines_of_the_same_shape():
    """Presets are data, alike on purpose."""
    shipped = json.loads(SHIPPED.read_text())
    names = [name for name in FILES if name != "presets" and sha256(FILES[name]) == shipped.get(f"{name}.py")]
    assert not same_shapes(names)


def test_packed_attention_can_be_lifted(tmp_path):
    """One file, torch and numpy: nothing else is needed to use it elsewhere."""
    source = FILES["packed"].read_text(encoding="utf-8")
    as_shipped("packed")
    packages = {package for package, _ in imports(source)} - set(sys.stdlib_module_names)
    assert packages <= {"torch", "numpy"} and len(source.splitlines()) <= LIFT_LINES
    shutil.copy(FILES["packed"], tmp_path)
    done = subprocess.run([sys.executable, "-c", "import packed"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    hashes = {f"{name}.py": sha256(FILES[name]) for name in ORDER}
    if sys.argv[1:] == ["--ship"]:
        SHIPPED.write_text(json.dumps(hashes, indent=1) + "\n")
    elif hashes != json.loads(SHIPPED.read_text()):
        sys.exit("tests/shipped.json is older than the files: python tests/test_layout.py --ship")
