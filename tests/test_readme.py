"""What the README says exists, parses and is complete."""

import re
import shlex

import pytest
from conftest import ROOT

import checks
import cli
import configs

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    c for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for c in re.split(r"&&|\n", block) if c.strip()
]
ENTRY = {
    "train.py": (configs.TrainConfig, configs.TRAIN_PRESETS),
    "infer.py": (configs.InferConfig, {}),
    "cpt.py": (configs.CptConfig, configs.CPT_PRESETS),
    "report.py": (configs.ReportConfig, {}),
}


@pytest.mark.parametrize("command", [c.strip() for c in COMMANDS if ".py" in c])
def test_commands_parse(command):
    words = shlex.split(command, comments=True)
    script = next(w for w in words if w.endswith(".py"))
    words = words[words.index(script) + 1 :]
    cfg, given = cli.parse(*ENTRY[script], ["--runs", *words] if script == "report.py" else words)
    checks.check(cfg, given)


def test_every_file_and_preset_is_named():
    code = {p.name for p in ROOT.glob("*.py")}
    assert code <= set(re.findall(r"\w+\.py", README))
    named = set(re.findall(r"(?:(?:runs|bench|tests)/)?\b\w+\.(?:py|sh)\b", README))
    assert all((ROOT / n).exists() for n in named), named
    assert all(f"`{name}`" in README for name in configs.TRAIN_PRESETS)


def test_a_result_stands_by_line_30():
    lines = README.splitlines()[:30]
    assert any("pip install -r requirements.txt && python train.py" in line for line in lines)
    assert any("micro_f1" in line for line in lines)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
