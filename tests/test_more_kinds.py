"""More files as people bring them: what a row says of itself is honoured, refused or named, never taken for text."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_doubtful import read, refusal, table

import bases
import corpus
import files
import labelling
import latex_clean
import pair_formats
import peft_format
import predictions
import prompts
import spelling
import train
from configs import TrainConfig
from errors import UserError
from labelling import Labels

# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other",
    [("R&D", "R&amp;D"), ("Café", "CafÃ©"), ("spam", "'spam'"), ("spam", '"spam"'), ("not spam", "not_spam"),
     ("not spam", "Not-Spam"), ("1", "'1.0'")],
)  # fmt: skip
def test_spellings_by_other_tools_look_alike(tmp_path, one, other):
    _, labels, said = read(tmp_path / "a.jsonl", table([one, other, "third"] * 3, "jsonl"))
    assert set(labels.values) == {one, other, "third"} and sum("look alike" in line for line in said) == 1


@pytest.mark.parametrize(
    "labels", [["C", "C++", "C#"], ["-1", "1"], ["+", "-"], ["a_b", "ab"], ["'", '"'], ["1-2", "12"]]
)
def test_labels_of_other_meaning_do_not(labels):
    assert not spelling.alike(labels)


def test_words_of_truth_from_two_tools_are_named(tmp_path):
    _, _, said = read(tmp_path / "a.csv", table(["True", "yes", "False", "no"] * 3))
    assert len(said) == 1 and "labels that mean the same: 'True' (3 rows: 1, 5, 9) and 'yes'" in said[0]
    assert not read(tmp_path / "b.csv", table(["yes", "no", "true story", "1"] * 3))[2]


@pytest.mark.parametrize("mark", ["N/A", "n/a", "\\N", "#VALUE!", "unlabeled", "nan", "-1"])
def test_more_marks_of_missing_labels_are_named(tmp_path, mark):
    _, labels, said = read(tmp_path / "a.csv", table(["0", "1", "2", mark] * 3))
    assert mark in labels.values and len(said) == 1 and "taken as labels" in said[0] and repr(mark) in said[0]


@pytest.mark.parametrize("labels", [["-1", "1"], ["-1", "0", "1"], ["-2", "-1", "0", "1", "2"]])
def test_honest_numbers_below_zero_are_no_marks(tmp_path, labels):
    assert not read(tmp_path / "a.csv", table(labels * 3))[2]


PRINTED = [
    "{{'a', '{}'}}",
    "('a', '{}')",
    "array(['{}'], dtype=object)",
    "b'{}'",
    'np.str_("{}")',
    '{{"choices": ["{}"]}}',
]


@pytest.mark.parametrize("form", PRINTED)
def test_what_programs_print_is_no_label(tmp_path, form):
    cells = [form.format(letter) for letter in "xyz"]
    _, _, said = read(tmp_path / "a.csv", table(cells * 3))
    assert any("what a program prints" in line for line in said)
    assert "malformed labels" in refusal(tmp_path / "b.csv", table(cells * 3), task="multi_label")


def test_nested_lists_of_as_many_labels_are_lists(tmp_path):
    """a / a, b / a, b, c: as many labels as parts, but two of them begin with one that stands alone."""
    _, _, said = read(tmp_path / "a.csv", table(["a", "a, b", "a, b, c"] * 3), task="multi_label")
    assert len(said) == 1 and "--label_delimiter ','" in said[0]


def test_a_label_column_is_named_once(command, tmp_path):
    with pytest.raises(UserError, match="--label_columns .*each column once"):
        train.main(["--task", "multi_label", "--label_columns", "a,b,a", "--outputs", str(tmp_path)])


def test_an_invisible_label_is_an_empty_one(tmp_path):
    assert "empty label (rows 3)" in refusal(tmp_path / "a.csv", table(["a", "b", "\u200b", "a", "b"]))
    with pytest.raises(UserError, match="empty label"):
        labelling.find_labels(["a", "b", "\u2060"])


# ---- texts and ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_texts_that_are_marks_of_missing_values_are_named(tmp_path, form, capsys):
    """pandas' astype(str) writes nan; Excel's errors and MySQL's \\N likewise."""
    content = table(["a", "b"] * 4, form).replace("text 2", "nan").replace("text 5", "#NAME?")
    path = tmp_path / f"a.{form}"
    path.write_text(content)
    files.need_texts(files.read_rows(str(path), "x"), ["text"], str(path), "x")
    said = capsys.readouterr().out
    assert "column text holds nothing but '#NAME?', 'nan' in 2 rows (3, 6): read as text" in said


def test_a_text_without_anything_to_see_is_empty():
    texts = ["", " ", "\u200b", "\u3164", "\u00ad \ufeff", "a", "中", "é", "😀", "।", "؟"]
    assert files.empty_rows([{"q": text} for text in texts], ["q"]) == [0, 1, 2, 3, 4]


def test_a_missing_column_of_json_lines_is_not_explained_by_commas(tmp_path):
    rows = [files.Nested("[]"), files.Nested("[]")]
    with pytest.raises(UserError) as e:
        files.need_columns([{"chat": cell} for cell in rows], ["prompt"], "a.jsonl", "input")
    assert "comma" not in str(e.value) and "one object a line" not in str(e.value)
    with pytest.raises(UserError, match="separated by commas"):
        files.need_columns([{"a|b": "1"}], ["a"], "a.csv", "input")


@pytest.mark.parametrize("rows, is_said", [(["a"] * 8, True), (["a"] * 7, False), (["a"] * 8 + ["b"], False)])
def test_one_label_for_all_rows_may_stand_for_none(rows, is_said):
    said = []
    rows = [{"label": label} for label in rows]
    predictions.known_labels(rows, TrainConfig(), Labels(("a", "b"), ("a", "b")), said.append)
    assert any("stands for labels to come" in line for line in said) == is_said


@pytest.mark.parametrize(
    "ids, is_said", [(["1.0", "2.0"], True), (["1.23E+15", "1.24E+15"], True), (["1", "2.0"], False)]
)
def test_ids_that_became_decimals_are_named_and_kept(ids, is_said):
    said = []
    cfg = SimpleNamespace(submission="id,label", id_column="")
    got = predictions.ids_of(cfg, "id", [{"id": value} for value in ids], "x.csv", (), said.append)
    assert got.values == ids and any("as decimals" in line for line in said) == is_said


# ---- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_system_texts_of_a_column_are_read_by_its_usual_names(name):
    pair, _ = pair_formats.renamed({name: "S", "question": "q", "response": "r"}, ["text"])
    assert pair["system"] == "S"
    chat, _ = pair_formats.renamed({name: "S", "conversations": "[]"}, ["text"])
    assert chat["system"] == "S"


@pytest.mark.parametrize(
    "name, value", [("is_correct", "False"), ("correct", "0"), ("accepted", "false"), ("label", "False")]
)
def test_pairs_that_are_graded_as_bad_are_refused(name, value):
    row = {"prompt": "q", "response": "r", name: value}
    assert f"{name} {value.lower()} marks a response as a bad one" in pair_formats.problem(row)
    assert not pair_formats.problem({**row, name: "1"})
    assert not pair_formats.problem({"prompt": "q", "response": "r", "label": "0"})  # a class


@pytest.mark.parametrize("key, value", [("training", False), ("weight", 0.5), ("weight", "0"), ("train", 0)])
def test_turns_that_are_not_wholly_learned_are_refused(key, value):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: value}]
    with pytest.raises(ValueError, match=f"not to be learned \\({key} {value}"):
        pair_formats.read_turns(json.dumps(turns))
    for whole in (1, 1.0, None, True):
        turns[1][key] = whole
        assert pair_formats.read_turns(json.dumps(turns))


CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def rendered(row, chat=CHAT):
    """The text of a pair as a chat template renders it."""
    tokenizer = bases.load_tokenizer(str(ROOT / "tiny/base"))
    tokenizer.chat_template = chat
    row = pair_formats.renamed({key: files.cell(value) for key, value in row.items()}, ["text"])[0]
    pieces, _ = corpus.pair_pieces([row], ["row 1"], "FILE", tokenizer, "{prompt}", True, "")
    return prompts.plain(pieces[0])


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_the_system_text_beside_a_chat_is_its_first_turn(name):
    """LLaMA-Factory keeps it in a column of its own; a system turn in the chat itself counts more."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert rendered({name: "S", "conversations": turns}) == "system: S\nuser: q\nassistant: a\n"
    own = [{"from": "system", "value": "own"}, *turns]
    assert rendered({name: "S", "conversations": own}) == "system: own\nuser: q\nassistant: a\n"
    assert rendered({name: "S", "question": "q", "answer": "a"}) == "system: S\nuser: q\nassistant: a\n"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_that_a_template_leaves_out_are_refused(key):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: "because"}]}
    with pytest.raises(UserError, match=f"row 1: the chat template leaves out {key} of the answer"):
        rendered(row)
    with_thoughts = CHAT.replace("{{ m['content'] }}", "{{ m.%s }} {{ m['content'] }}".replace("%s", key))
    assert "because a" in rendered(row, with_thoughts)
    row["messages"][1][key] = None
    assert rendered(row) == "user: q\nassistant: a\n"


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "sft", "adapter_1"])
def test_an_adapters_own_name_is_left_out_of_its_keys(name):
    plain = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    table_key = "base_model.model.model.embed_tokens.lora_embedding_A"
    keys = {plain.replace(".weight", f".{name}.weight"): 1, f"{table_key}.{name}": 2}
    assert peft_format.plain_keys(keys) == {plain: 1, table_key: 2}
    assert peft_format.plain_keys({plain: 1, table_key: 2}) == {plain: 1, table_key: 2}
    with pytest.raises(ValueError, match="name the same tensor"):
        peft_format.plain_keys({**keys, plain.replace(".weight", ".other.weight"): 3})


# ---- LaTeX ----------------------------------------------------------------------------------------------------------


def cleaned(body, preamble=""):
    source = f"\\documentclass{{article}}\n{preamble}\n\\begin{{document}}\nFirst.\n{body}\nLast.\n\\end{{document}}\n"
    return latex_clean.clean(source, Counter())


@pytest.mark.parametrize(
    "declaration, name",
    [("\\DefineVerbatimEnvironment{code}{Verbatim}{}", "code"), ("\\lstnewenvironment{code}{}{}", "code"),
     ("\\newtcblisting{code}{}", "code"), ("", "tcblisting")],
)  # fmt: skip
def test_verbatim_environments_of_its_own_stay_whole(declaration, name):
    part = f"\\begin{{{name}}}\n% a comment of the code\n\\iffalse\n\\end{{{name}}}"
    assert part in cleaned(part + "\nAfter % UNPRINTED\n", declaration) and "UNPRINTED" not in cleaned(
        part, declaration
    )


@pytest.mark.parametrize("declaration", ["\\MakeShortVerb{\\|}", "\\MakeShortVerb*{|}", "\\lstMakeShortInline[x]|"])
def test_short_verbatim_stays_whole(declaration):
    text = cleaned("Use |%d| here, $\\|x\\| % UNPRINTED\n\\|$ kept.", declaration)
    assert "Use |%d| here" in text and "kept" in text and "UNPRINTED" not in text


@pytest.mark.parametrize(
    "body, preamble",
    [("\\section{\\texorpdfstring{PRINTED $x$}{UNPRINTED x}}", ""),
     ("\\hide[a]{UNPRINTED}PRINTED", "\\NewDocumentCommand{\\hide}{O{b} +m}{\\ignorespaces}"),
     ("\\hide{UNPRINTED}PRINTED", "\\NewDocumentCommand\\hide{s o m}{}"),
     ("\\deleted{UNPRINTED}PRINTED", "\\usepackage[final]{changes}")],
)  # fmt: skip
def test_more_that_is_never_printed_goes(body, preamble):
    text = cleaned(body, preamble)
    assert "UNPRINTED" not in text and "PRINTED" in text and text.count("{") == text.count("}")


def test_notes_of_slides_go_unless_they_are_shown():
    source = "\\documentclass[10pt]{beamer}\n%s\\begin{document}\nFirst.\\note{a hint} Last.\n\\end{document}"
    assert "hint" not in latex_clean.clean(source % "", Counter())
    assert "hint" in latex_clean.clean(source % "\\setbeameroption{show notes}\n", Counter())
    assert "hint" in cleaned("\\note{a hint}")


# ---- bases ----------------------------------------------------------------------------------------------------------


def test_a_config_of_another_family_is_refused_by_what_is_left_over(command, tmp_path, small_base):
    """Qwen2's weights with Llama's config lose the biases of their projections."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    status, _, err = command("train.py", "--base", base, "--train_data", ROOT / "tiny/data/val.csv", "--max_steps", 1)
    assert status == 2 and "weights and config.json do not belong together" in err and "q_proj.bias" in err
