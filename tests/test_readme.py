"""What the README says exists, parses and is complete."""

import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT

import checks
import cli
import configs
import presets

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [part.strip() for block in BLOCKS for part in re.split(r"&&|\n", block) if ".py" in part]
NAMED = {
    "train": (configs.TrainConfig, presets.TRAIN_PRESETS),
    "cpt": (configs.CptConfig, presets.CPT_PRESETS),
    "infer": (configs.InferConfig, {}),
    "folds": ("FoldsConfig", presets.TRAIN_PRESETS),
    "generate": ("GenerateConfig", {}),
    "ensemble": ("EnsembleConfig", {}),
    "slices": ("SlicesConfig", {}),
    "report": ("ReportConfig", {}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    words = words[words.index(script) + 1 :]
    assert (ROOT / script).is_file()
    name = script.removesuffix(".py")
    if name not in NAMED:  # a script with argparse: latex.py, those of runs/
        return
    cls, known = NAMED[name]
    cls = getattr(importlib.import_module(name), cls) if isinstance(cls, str) else cls
    cfg, given = cli.parse(cls, known, ["--runs", *words] if name == "report" else words)
    checks.check(cfg, given)


def test_every_file_is_on_the_map():
    code = {path.name for path in ROOT.glob("*.py")}
    missing = sorted(code - set(re.findall(r"\w+\.py", README)))
    shipped = json.loads((ROOT / "tests/shipped.json").read_text())
    if missing and not set(missing) & set(shipped):
        pytest.skip(f"files of a fork, not named in README.md: {', '.join(missing)}")
    assert not missing, f"README.md does not name {', '.join(missing)}: add a row to its map"


def test_every_file_that_the_readme_names_exists():
    named = set(re.findall(r"(?:(?:runs|bench|tests)/)?\b\w+\.(?:py|sh)\b", README))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"README.md names {', '.join(missing)}, which do not exist"


def test_every_preset_is_in_the_table():
    names = [*presets.TRAIN_PRESETS, *(name for name in presets.CPT_PRESETS if name != "tiny")]
    missing = [name for name in names if f"`{name}`" not in README]
    assert not missing, f"README.md's table of presets lacks {', '.join(missing)}: add a row"


def test_a_result_stands_by_line_30():
    lines = README.splitlines()[:30]
    assert any("pip install -r requirements.txt && python train.py" in line for line in lines)
    assert any("micro_f1" in line for line in lines)


def test_nothing_cites_pages_that_are_not_in_the_repository():
    """DESIGN.md, PITFALLS.md and the like lie beside the project, not in it: a reader could not follow."""
    texts = [path for pattern in ("*.py", "tests/*.py", "bench/*.py", "*.md", "*/*.md") for path in ROOT.glob(pattern)]
    pages = {path.name for path in ROOT.rglob("*.md")}
    for path in texts:
        cited = set(re.findall(r"\b[A-Z_]+\.md\b", path.read_text(encoding="utf-8")))
        assert cited <= pages or path.name == "test_readme.py", f"{path}: {cited - pages}"


def test_the_fork_table_names_what_exists():
    """The places that "Fork it" sends a reader to."""
    for name, module in re.findall(r"`(\w+)` in (\w+)\.py", README) + [("truncate", "data"), ("restore", "loop")]:
        assert hasattr(importlib.import_module(module), name), f"{module}.py has no {name}"
    assert presets.TRAIN_PRESETS
