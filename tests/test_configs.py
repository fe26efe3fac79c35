"""Configs: help for every field, presets as published, the command line, and what it says about mistakes."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import checks
import cli
import configs
import presets
import train
from configs import CptConfig, InferConfig, TrainConfig
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = [(TrainConfig, presets.TRAIN_PRESETS), (InferConfig, {}), (CptConfig, presets.CPT_PRESETS)]


def names(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def parse(*argv, cls=TrainConfig, named=presets.TRAIN_PRESETS):
    return cli.parse(cls, named, list(argv), "doc")


def refusal(*argv, **kwargs) -> str:
    with pytest.raises(UserError) as e:
        checks.check(parse(*argv, **kwargs)[0])
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [c for c, _ in ENTRIES])
def test_every_field_has_a_comment_that_is_its_help_and_a_topic(cls):
    helps = cli.field_help(cls)
    assert set(helps) == set(names(cls))
    assert all(len(text) > 8 and topic for topic, text in helps.values())
    listed = cli.describe(cls, {}, ["all"])
    for name, (_, text) in helps.items():
        assert f"--{name} " in listed and text in listed


@pytest.mark.parametrize("cls", [c for c, _ in ENTRIES])
def test_the_short_help_describes_the_first_fields_and_names_the_rest(cls):
    first = cls.FIRST.split()
    short = cli.describe(cls, {}, [])
    assert set(first) <= set(names(cls)) and len(first) <= 20
    for name in names(cls):
        assert (f"\n  --{name} " in short) == (name in first)
        assert f"--{name}" in short


def test_help_shows_the_values_of_the_preset():
    text = cli.describe(TrainConfig, presets.TRAIN_PRESETS, ["--cfg", "qwen3b", "--help"])
    assert "[Qwen/Qwen2.5-3B]" in text and "[5e-05]" in text


def test_python_configs_lists_every_field_and_preset():
    done = subprocess.run([sys.executable, "configs.py"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    for cls, named in ENTRIES:
        for name in names(cls):
            assert f"  --{name} " in done.stdout
        for name in named:
            assert f"\n  {name} " in done.stdout


SCRIPTS = "train infer cpt generate folds ensemble slices report".split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_typos_are_answered_without_torch(script):
    """In a fraction of a second: nothing heavy is imported before the command line is known to be fine."""
    code = (
        "import runpy, sys\nsys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit:\n    print('heavy:', {'torch', 'transformers', 'numpy'} & set(sys.modules))\n    raise"
    )
    for flags, status in ((["--help"], 0), (["--help", "all"], 0), (["--no_such_flag", "1"], 2)):
        line = [sys.executable, "-c", code, f"{script}.py", *flags]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and done.stdout.endswith("heavy: set()\n"), done.stderr
    assert done.stderr.startswith("error: unknown flag --no_such_flag") and done.stderr.count("\n") == 1


# ---- what moved to other commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, flag", [(cls, flag) for cls in (TrainConfig, InferConfig) for flag in cli.moved_fields(cls)]
)
def test_a_flag_that_moved_is_named_with_its_new_command(cls, flag):
    with pytest.raises(UserError, match=f"^--{flag} moved: python [a-z_/]+.py "):
        cli.parse(cls, {}, [f"--{flag}", "1"])
    script = re.search(r"python (\S+\.py)", cli.moved_fields(cls)[flag])[1]
    assert (ROOT / script).is_file() and flag not in names(cls)


def test_all_folds_and_several_runs_moved_too():
    with pytest.raises(UserError, match="^--folds moved: python folds.py --folds 5"):
        train.main(["--folds", "5"])
    assert "--runs a,b moved: python ensemble.py" in refusal("--runs", "a", "b", cls=InferConfig, named={})


def test_a_config_from_before_the_move_loads_with_a_note(tmp_path):
    """Fields that moved are left out; those that had an effect are named with what replaces them."""
    old = json.loads(cli.to_json(presets.qwen3b()))
    del old["soft_share"], old["soft_temperature"]
    old |= {"fold": "all", "folds": 3, "seeds": ["1", "2"], "balance": False, "examples": [], "examples_column": "body"}
    old |= {"train_start": 0, "train_stop": 0, "split": "", "pseudo_labels": "", "pseudo_min_confidence": 0.9}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert cli.read_config(TrainConfig, tmp_path) == dataclasses.replace(presets.qwen3b(), folds=3)
    assert cli.moved_note(TrainConfig, tmp_path).endswith('seeds ["1", "2"]: python folds.py --seeds 1,2 ...')
    (tmp_path / "config.json").write_text(json.dumps({**old, "seeds": [], "folds": 3, "fold": "2"}))
    assert cli.read_config(TrainConfig, tmp_path).fold == 2 and cli.moved_note(TrainConfig, tmp_path) == ""


# ---- what a flag needs ----------------------------------------------------------------------------------------------


def given_by_hand(*argv, cls=TrainConfig, named=presets.TRAIN_PRESETS) -> str:
    with pytest.raises(UserError) as e:
        checks.check(*cli.parse(cls, named, list(argv)))
    return str(e.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rank", "0", "--alpha", "8"], "--alpha has no effect: it is used with --rank"),
        (["--fold", "1"], "--fold has no effect: it is used with --folds"),
        (["--val_size", "0.2"], "--val_size has no effect: it is used without --val_data"),
        (["--head_lr", "1", "--head", "label_words"], "--head_lr has no effect: it is used without --head label_words"),
        (["--cfg", "qwen15b_rules", "--text", "Post: {body}"], "--text has no effect: it is used without --prompt"),
    ],
)
def test_a_flag_without_effect_is_refused(flags, words):
    assert words in given_by_hand(*flags)


def test_a_preset_value_can_be_switched_off():
    """What a rule judges is the value, not whether the flag was typed."""
    cfg, by_hand = parse("--cfg", "qwen15b_rules", "--prompt", "", "--text", "Post: {body}")
    checks.check(cfg, by_hand)


@pytest.mark.parametrize("cls", [c for c, _ in ENTRIES])
def test_every_rule_names_fields_that_exist(cls):
    fields = set(names(cls))

    def known(needs: str) -> set[str]:
        return {part.strip("!").partition("=")[0] for need in needs.split() for part in need.split("|")}

    for name, needs in checks.needs_of(cls).items():
        assert name in fields and checks.in_words(needs) and known(needs) <= fields
    for need, message in checks.rows_of(checks.CLASHES, cls):
        assert known(need) | set(re.findall(r"\{(\w+)\}", message)) <= fields
    for message, test in checks.rows_of(checks.PROBLEMS, cls):
        test(cls())
        assert set(re.findall(r"\{(\w+)\}", message)) <= fields | {"problem"}


# ---- presets --------------------------------------------------------------------------------------------------------

RECIPE = {  # the published recipe of the 3B and the choices beside it, as DESIGN's table has them
    "base": "Qwen/Qwen2.5-3B",
    "rank": 16,
    "alpha": 32.0,
    "lora_dropout": 0.1,
    "targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "bias": "all",
    "head_dropout": 0.5,
    "epochs": 5,
    "label_smoothing": 0.1,
    "weight_decay": 0.001,
    "lr": 5e-5,
    "head_lr": 1e-4,
    "batch_size": 16,
    "max_length": 512,
    "schedule": "cosine",
    "grad_checkpoint": False,
    "max_tokens": 1024,
    "micro_batches": 2,
    "train_data": "dataset/train.csv",
    "text": "{Question}",
    "label_column": "label",
    "precision": "auto",
    "head": "linear",
    "pooling": "last",
    "task": "single_label",
    "metric": "micro_f1",
    "quant": "none",
}


def test_qwen3b_is_the_published_recipe():
    cfg = dataclasses.asdict(presets.TRAIN_PRESETS["qwen3b"]())
    assert {name: cfg[name] for name in RECIPE} == RECIPE


@pytest.mark.parametrize(
    "name, base, max_tokens",
    [
        ("qwen05b", "Qwen/Qwen2.5-0.5B", 4096),
        ("qwen15b", "Qwen/Qwen2.5-1.5B", 2048),
        ("llama1b", "meta-llama/Llama-3.2-1B", 2048),
        ("qwen32b", "Qwen/Qwen2.5-32B", 1536),
    ],
)
def test_same_recipe_on_other_bases(name, base, max_tokens):
    changed = {"base": base, "max_tokens": max_tokens}
    if name == "qwen32b":
        changed |= {"quant": "nf4", "grad_checkpoint": True}
    assert presets.TRAIN_PRESETS[name]() == dataclasses.replace(presets.qwen3b(), **changed)


@pytest.mark.parametrize("make", [*presets.TRAIN_PRESETS.values(), *presets.CPT_PRESETS.values()])
def test_presets_take_the_precision_of_the_gpu(make):
    """A T4 has no bf16, and fp16 needs a loss scale that newer ones do without; on a CPU the user decides."""
    assert make().precision == "auto" or make is presets.cpt_tiny


@pytest.mark.parametrize("name", sorted(presets.TRAIN_PRESETS))
def test_presets_are_complete_and_valid(name):
    checks.check(parse("--cfg", name)[0])


def test_cpt_and_infer_defaults_are_valid():
    checks.check(presets.cpt_tiny())
    checks.check(InferConfig())


def test_an_unknown_task_names_the_nearest():
    assert "did you mean multi_label?" in refusal("--task", "multilabel")


def test_a_flag_of_several_values_takes_them_apart_too():
    both = [cli.parse(configs.InferConfig, {}, ["--runs", *way, "--limit", "3"])[0] for way in (["a", "b"], ["a,b"])]
    assert both[0] == both[1] and both[0].runs == ("a", "b") and both[0].limit == 3


def test_the_default_is_tiny():
    assert parse()[0] == presets.tiny()
    assert parse("--cfg", "tiny")[0] == presets.tiny()


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.tiny().lr = 1.0


# ---- the command line -----------------------------------------------------------------------------------------------


def test_flags_of_every_type():
    cfg, given_by_hand = parse(
        "--cfg", "qwen05b", "--lr", "1e-4", "--epochs", "1e1", "--targets", "q_proj, v_proj", "--grad-checkpoint",
        "false", "--rslora", "--text={a}={b}", "--train_layers", "-1",
    )  # fmt: skip
    expected = dataclasses.replace(
        presets.qwen05b(), lr=1e-4, epochs=10, targets=("q_proj", "v_proj"), grad_checkpoint=False, rslora=True,
        text="{a}={b}", train_layers=-1,
    )  # fmt: skip
    assert cfg == expected
    assert given_by_hand == {"lr", "epochs", "targets", "grad_checkpoint", "rslora", "text", "train_layers"}


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        (bool, "true", True), (bool, "True", True), (bool, "1", True), (bool, "yes", True), (bool, True, True),
        (bool, "false", False), (bool, "0", False), (bool, "no", False), (bool, False, False),
        (int, "7", 7), (int, "-1", -1), (int, "1e4", 10000), (int, 3, 3), (int, 3.0, 3),
        (int, str(2**53 + 1), 2**53 + 1), (int, 2**63, 2**63),
        (float, "1e-4", 1e-4), (float, 2, 2.0), (float, "nan", None),
        (str, "007", "007"), (str, "None", "None"), (str, 7, "7"),
        (tuple[str, ...], "a,b", ("a", "b")), (tuple[str, ...], "", ()), (tuple[str, ...], " a , ,b,", ("a", "b")),
    ],
)  # fmt: skip
def test_convert(kind, value, expected):
    got = cli.convert(value, kind)
    assert type(got) is (tuple if kind not in (bool, int, float, str) else kind)
    assert got == expected if expected is not None else got != got


@pytest.mark.parametrize(
    "flag, value, expected",
    [
        ("rslora", "maybe", "true or false"),
        ("epochs", "2.5", "a whole number"),
        ("epochs", "many", "a whole number"),
        ("epochs", "inf", "a whole number"),
        ("epochs", "nan", "a whole number"),
        ("epochs", "true", "a whole number"),
        ("lr", "fast", "a number"),
        ("lr", "1e-4,1e-5", "a number"),
    ],
)
def test_a_value_of_the_wrong_type_names_flag_value_and_expectation(flag, value, expected):
    assert refusal(f"--{flag}", value) == f"--{flag} {value}: expected {expected}"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--learning_rat", "1"], ["unknown flag --learning_rat"]),
        (["--epoch", "1"], ["unknown flag --epoch ", "did you mean --epochs?"]),
        (["--labelcolumn", "x"], ["did you mean --label_column?"]),
        (["--cgf", "tiny"], ["did you mean --cfg?"]),
        (["--cfg", "qwen3B"], ["unknown preset qwen3B", "did you mean qwen3b?", "llama1b"]),
        (["--cfg", "zzz"], ["unknown preset zzz", "tiny", "qwen3b"]),
        (["--lr"], ["--lr has no value"]),
        (["--lr", "--epochs", "2"], ["--lr has no value"]),
        (["--lr", "1", "--lr", "2"], ["--lr is given twice"]),
        (["train.csv"], ["'train.csv' is not a flag"]),
        (["--epoch", "1", "--lrr", "2", "x"], ["--epochs?", "--lr?"]),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv, words):
    message = refusal(*argv)
    assert all(word in message for word in words), message


def test_every_contradiction_comes_in_one_message():
    message = refusal(
        "--rank", "0", "--bias", "all", "--warmup_steps", "5", "--warmup_ratio", "0.1", "--lr", "-1", "--epochs", "0",
        "--max_tokens", "100", "--val_data", "", "--val_size", "0", "--text", "no column", "--metric", "macrof1",
        "--label_names", "a,b,a", "--class_weights", "1,-2", "--label_smoothing", "1", "--train_data", "",
        "--grad_clip", "-1",
    )  # fmt: skip
    assert message.startswith("13 problems in the settings: ") and message.count(" | ") == 12, message
    for words in (
        "--bias all with --rank 0", "--warmup_steps 5 and --warmup_ratio 0.1", "--lr -1.0: expected a number above 0",
        "--epochs 0", "--max_tokens 100 is below --max_length 512",
        "--val_size 0.0: expected a fraction or a count above 0",
        "--text no column: expected",
        "--metric macrof1", "did you mean macro_f1?", "at least 2 names, each once",
        "--class_weights 1,-2", "--label_smoothing 1.0", "--train_data is empty",
        "--grad_clip -1.0: expected 0 or more",
    ):  # fmt: skip
        assert words in message, (words, message)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--train_layers", "2"], "--train_layers 2 with --rank 16"),
        (["--targets", ""], "empty --targets"),
        (["--lr", "nan"], "--lr nan: expected a finite number"),
        (["--lr", "inf"], "--lr inf: expected a finite number"),
        (["--val_size", "10.5"], "expected a whole number of rows"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--label_names", "one"], "at least 2 names"),
        (["--class_weights", "1,inf"], "--class_weights 1,inf"),
        (["--pooling", "lst"], "did you mean last?"),
    ],
)
def test_single_contradictions(flags, words):
    assert words in refusal(*flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--submission", "a,b,c"], "--submission a,b,c: expected two column names"),
        (["--submission", "a"], "expected two column names"),
        (["--output", "out.txt"], "--output out.txt"),
        (["--max_tokens", "0"], "--max_tokens 0"),
    ],
)
def test_infer_contradictions(flags, words):
    assert words in refusal(*flags, cls=InferConfig, named={})


# ---- config.json ----------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = {
    "base": TEXTS,
    "text": TEXTS,
    "label_names": st.lists(TEXTS, max_size=3).map(tuple),
    "lr": st.floats(allow_nan=False, allow_infinity=False),
    "val_size": st.floats(0, 1e9),
    "seed": st.integers(0, 2**64),
    "epochs": st.integers(-5, 10**6),
    "rslora": st.booleans(),
}


@given(st.fixed_dictionaries(VALUES))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_config_survives_its_json(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "config.json"
    cfg = dataclasses.replace(presets.qwen3b(), **values)
    path.write_text(cli.to_json(cfg), encoding="utf-8")
    assert cli.read_config(TrainConfig, path) == cfg


@pytest.mark.parametrize("cls, presets", ENTRIES)
def test_every_preset_survives_its_json(cls, presets, tmp_path):
    for make in [*presets.values(), cls]:
        (tmp_path / "config.json").write_text(cli.to_json(make()))
        again = cli.read_config(cls, tmp_path)  # the run folder will do
        assert again == make()
        assert all(type(getattr(again, n)) is type(getattr(make(), n)) for n in names(cls))


def test_cfg_takes_a_past_run_and_flags_on_top(tmp_path):
    (tmp_path / "config.json").write_text(cli.to_json(presets.qwen3b()))
    for given_as in (tmp_path, tmp_path / "config.json"):
        cfg, by_hand = parse("--cfg", str(given_as), "--lr", "1e-3")
        assert cfg == dataclasses.replace(presets.qwen3b(), lr=1e-3) and by_hand == {"lr"}


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "expected an object of fields, got list"),
        ('{"lrr": 1}', "unknown field lrr (did you mean lr?)"),
        ('{"lr": "fast"}', "lr fast: expected a number"),
        ('{"lr": [1]}', "lr [1]: expected a number"),
        ('{"lr": true}', "expected a number"),
        ('{"epochs": null}', "epochs null: expected a whole number"),
        ('{"epochs": true}', "expected a whole number"),
        ('{"base": null}', "base null: expected a string"),
        ('{"base": ["a"]}', "expected a string"),
        ('{"rslora": 2}', "expected true or false"),
        ('{"label_names": null}', "label_names null"),
        ('{"lrr": 1, "epochs": "x"}', " | "),
    ],
)
def test_a_broken_config_json_names_file_and_field(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError) as e:
        cli.read_config(TrainConfig, path)
    assert str(path) in str(e.value) and words in str(e.value)


@pytest.mark.parametrize("name", ["seed", "split_seed", "batch_size", "rank", "epochs", "max_length", "keep"])
def test_whole_numbers_that_nothing_takes_are_refused(name):
    """torch takes no seed of 2**63; such a number is a slip in every field."""
    largest = 2**63 - 1
    checks.check(TrainConfig(train_data="x.csv", seed=largest, split_seed=largest))
    for value in (largest + 1, 10**30, -(10**30)):
        cfg = dataclasses.replace(TrainConfig(train_data="x.csv"), **{name: value})
        with pytest.raises(UserError, match=f"--{name} {value}: expected at most {largest}"):
            checks.check(cfg)


def test_a_missing_config_json_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read as JSON: .*No such file"):
        cli.read_config(TrainConfig, tmp_path / "none.json")


def test_to_json_holds_every_field():
    assert list(json.loads(cli.to_json(presets.tiny()))) == names(TrainConfig)


# ---- data of the user's own -----------------------------------------------------------------------------------------


def test_own_train_data_drops_the_files_of_the_preset():
    def after(*argv):
        cfg, by_hand = parse(*argv)
        cfg = checks.own_data(cfg, by_hand)
        return cfg.train_data, cfg.val_data, cfg.test_data

    assert after() == ("tiny/data/train.csv", "tiny/data/val.csv", "tiny/data/test.csv")
    assert after("--train_data", "my.csv") == ("my.csv", "", "")
    assert after("--train_data", "my.csv", "--val_data", "v.csv") == ("my.csv", "v.csv", "")
    assert after("--train_data", "my.csv", "--test_data", "t.csv") == ("my.csv", "", "t.csv")
    assert after("--val_data", "v.csv") == ("tiny/data/train.csv", "v.csv", "tiny/data/test.csv")


@pytest.mark.parametrize(
    "path, expected",
    [
        ("math.csv", "math"),
        ("dir/reddit.jsonl.gz", "reddit"),
        ("tiny/data/train.csv", "tiny"),
        ("rules/train.csv", "rules"),
        ("dataset/train.csv", "data"),
        ("train.csv", "data"),
    ],
)
def test_dataset_name(path, expected):
    assert configs.dataset_name(TrainConfig(train_data=path)) == expected
    assert configs.dataset_name(TrainConfig(train_data=path, dataset="mine")) == "mine"


def test_warmup_given_by_hand_takes_the_presets_place():
    """The tiny presets have a warmup_ratio: --warmup_steps alone is no contradiction; both by hand are."""
    for cls, named in ENTRIES[::2]:
        cfg, by_hand = cli.parse(cls, named, ["--warmup_steps", "5"])
        assert (cfg.warmup_steps, cfg.warmup_ratio, by_hand) == (5, 0, {"warmup_steps"})
        checks.check(cfg, by_hand)
        both, _ = cli.parse(cls, named, ["--warmup_steps", "5", "--warmup_ratio", "0.1"])
        with pytest.raises(UserError, match="give one of the two"):
            checks.check(both)


@pytest.mark.parametrize("theirs, ours", [("--lerning_rate", "--lr"), ("--lora_r", "--rank"), ("--epoch", "--epochs")])
def test_flags_of_other_tools_name_ours(theirs, ours):
    with pytest.raises(UserError, match=rf"unknown flag {theirs} \(did you mean {ours}\?\)"):
        cli.parse(configs.TrainConfig, presets.TRAIN_PRESETS, [theirs, "1"])


@pytest.mark.parametrize("cls", [TrainConfig, CptConfig, InferConfig])
def test_every_number_and_choice_has_a_rule(cls):
    """A new field is checked before hours are spent: --rank -3 must not reach the model."""
    free = {"fold", "train_layers", "split_seed"}  # -1 has a meaning of its own; their rules are in checks.PROBLEMS
    numbers = {field.name for field in dataclasses.fields(cls) if field.type in (int, float)}
    lacking = numbers - free - checks.RANGES.keys() - checks.CHOICES.keys()
    assert not lacking, f"checks.py: add a row of RANGES for {lacking}, and of NO_MEANING where a task ignores it"


def test_every_preset_function_is_listed():
    made = {name for name, f in vars(presets).items() if getattr(f, "__module__", "") == "presets"}
    listed = {make.__name__ for make in [*presets.TRAIN_PRESETS.values(), *presets.CPT_PRESETS.values()]}
    assert made <= listed, f"presets.py: list {made - listed} in TRAIN_MAKERS or CPT_PRESETS, or --cfg does not know it"


@pytest.mark.parametrize("name", ["label_names", "label_columns", "kept", "label_words"])
@pytest.mark.parametrize(
    "text, values",
    [
        ('a,"b, c",d', ("a", "b, c", "d")),
        ('"Yes, certainly", No', ("Yes, certainly", "No")),
        ("a, b ,,c", ("a", "b", "c")),
        ('"a ""b"", c"', ('a "b", c',)),
        ("it's|so,b", ("it's|so", "b")),
        ('5" disk,b', ('5" disk', "b")),
        ("", ()),
    ],
)
def test_values_with_commas_stand_in_quotation_marks(name, text, values):
    assert getattr(parse(f"--{name}", text)[0], name) == values
    assert getattr(parse(f"--{name}={text}")[0], name) == values
    with pytest.raises(UserError, match="one that holds a comma in quotation marks"):
        parse(f"--{name}", 'a,"b')
