"""The report of a run and the comparison of two: every number against an independent one, and pages that hold still."""

import base64
import csv
import dataclasses
import json
import math
import re
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import last_json, unsealed
from test_ddp import forks, toy_flags
from test_folds import fork_of
from test_multilabel import flags_of, write_rows

pytest.importorskip("matplotlib", reason="reports are drawn with matplotlib: pip install matplotlib")

import bootstrap  # noqa: E402
import checks  # noqa: E402
import cli  # noqa: E402
import compare_runs  # noqa: E402
import ddp  # noqa: E402
import decide  # noqa: E402
import disk  # noqa: E402
import folds  # noqa: E402
import labelling  # noqa: E402
import metrics  # noqa: E402
import pictures  # noqa: E402
import predictions  # noqa: E402
import report  # noqa: E402
import report_numbers  # noqa: E402
import report_runs  # noqa: E402
import train  # noqa: E402
import trained  # noqa: E402
from configs import TrainConfig  # noqa: E402
from errors import Untrusted, UserError  # noqa: E402
from splits import Split  # noqa: E402

pytestmark = forks
HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</div></article></body>", "$x_1^2$ & \\frac{1}{2}",
    "two\n  lines", "\u202eright to left", "数学與代數 😀", "long " * 900,
)  # fmt: skip
LABELS = ("<b>bold</b>", "$x_1^2$")
QUICK = {"batch_size": 8, "epochs": 2, "eval_every": 4, "audit": "none", "lora_dropout": 0, "micro_batches": 1}
PICTURES = {
    "single_label": "loss confusion f1 reliability coverage scores length",
    "two": "loss confusion f1 reliability thresholds scores length",
    "multi_label": "loss f1 reliability thresholds scores length",
    "regression": "loss scores length",
}


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Pictures of few dots: drawn sooner."""
    monkeypatch.setitem(pictures.STYLE, "savefig.dpi", 60)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def runs(tmp_path_factory, small_base) -> dict[str, Path]:
    """A run of each task, and a family, trained on the spot."""
    trained_runs = {}
    for name in ("single_label", "two", "multi_label", "regression", "family"):
        folder = tmp_path_factory.mktemp(name)
        if name == "multi_label":
            flags = flags_of(folder, small_base, write_rows(folder / "a.jsonl"), **QUICK)
        elif name in ("two", "regression"):
            path = folder / "rows.csv"
            with open(path, "w", encoding="utf-8", newline="") as f:
                labels = LABELS if name == "two" else ("0.5", "2.25")
                rows = [[f"r{i}", HOSTILE[i % 8], labels[i % 3 == 0], "ab"[i % 2]] for i in range(64)]
                csv.writer(f).writerows([["id", "Question", "label", "group"], *rows])
            own = {"train_data": path, "val_data": path, "thresholds": "global", "by_column": "group"}
            own |= {"label_names": ",".join(LABELS)} if name == "two" else {"thresholds": None, "task": "regression"}
            flags = toy_flags(folder, small_base, **QUICK, **own)
        else:
            more = {"folds": 2, "seeds": "1,2", "val_data": None} if name == "family" else {}
            flags = toy_flags(folder, small_base, **QUICK, **more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folds, "started", fork_of(tmp_path_factory.mktemp("members")))
            command = folds if name == "family" else train
            trained_runs[name] = Path(command.main(flags)["run"])
    return trained_runs


def finished_run(folder: Path, task: str, targets, logits, values=(), texts=None, decision=False, **changes) -> Path:
    """A finished run of given targets and logits, with the files that train.py leaves."""
    folder.mkdir(parents=True)
    labels = labelling.Labels(tuple(values), tuple(values)) if values else labelling.Labels((), ("label",))
    texts = texts or [f"text {i}" + "!" * (i % 40) for i in range(len(targets))]
    ids = changes.pop("ids", [f"r{i}" for i in range(len(targets))])
    answers = [json.dumps(a) if isinstance(a, list) else a for a in labelling.answers(task, targets, labels)]
    with open(folder / "rows.csv", "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([["id", "Question", "label"], *zip(ids, texts, answers, strict=True)])
    path = str(folder / "rows.csv")
    own = {"train_data": path, "val_data": path, "task": task, "label_names": tuple(values)}
    cfg = TrainConfig(**{**own, "metric": checks.METRICS[task][0], **changes})
    (folder / "config.json").write_text(cli.to_json(cfg), encoding="utf-8")
    (folder / "labels.json").write_text(json.dumps({"values": labels.values, "names": labels.names}))
    predictions.write_predictions(folder / "val_predictions.csv", Split([], ids, targets), task, logits, labels)
    if decision:
        fitted = decide.fit_decision(task, logits, targets, trained.threshold_kind(cfg))
        (folder / "decision.json").write_text(fitted.to_json())
    (folder / "result.json").write_text("{}")
    return folder


def simulated(task: str, rows: int, classes: int, seed: int, skill: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """(targets, logits) of a model of some skill; targets do not depend on its seed."""
    rng, own = np.random.default_rng(7), np.random.default_rng([seed, rows])
    noise = own.normal(size=(rows, classes))
    if task == "regression":
        targets = rng.gamma(2, 2, rows)
        return targets, (skill * targets + noise[:, 0])[:, None]
    targets = rng.choice(classes, rows) if task == "single_label" else (rng.random((rows, classes)) < 0.3).astype(int)
    logits = noise + skill * (np.eye(classes)[targets] if task == "single_label" else 2 * targets - 1)
    return targets, logits.astype(np.float32)


def names(classes: int) -> list[str]:
    return [f"class {k}" for k in range(classes)]


def two_runs(folder: Path, task: str = "single_label", classes: int = 4, rows: int = 120, **changes):
    values = names(classes) if task != "regression" else ()
    pair = [simulated(task, rows, classes, seed, skill) for seed, skill in ((1, 1.2), (2, 1.5))]
    return [finished_run(folder / n, task, *drawn, values, **changes) for n, drawn in zip("ab", pair, strict=True)]


def reported(*flags) -> dict:
    """What a report of quick settings says; it is strict JSON."""
    result = report.main([*map(str, flags), *([] if "--samples" in flags else ["--samples", "100"])])
    return json.loads(json.dumps(result, allow_nan=False))


class Read(HTMLParser):
    """Elements, attributes and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.attributes, self.words = [], [], []
        self.feed(page)
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, text):
        self.words.append(text)


def check_page(path: str, pictures: list[str]) -> Read:
    """A whole page: well formed, its pictures inside as they are beside it, no script and no request."""
    source = Path(path).read_text(encoding="utf-8")
    page = Read(source)
    inside = [value for tag, key, value in page.attributes if tag == "img" and key == "src"]
    beside = [Path(path).with_name(name).read_bytes() for name in pictures]
    assert [base64.b64decode(value.removeprefix("data:image/png;base64,")) for value in inside] == beside
    assert all(png.startswith(b"\x89PNG") and png.endswith(b"IEND\xaeB`\x82") for png in beside)
    assert not {"script", "link", "iframe", "object", "b2"} & set(page.elements)
    assert page.elements.count("img") == len(pictures)
    for tag, key, value in page.attributes:
        assert not key.startswith("on"), (tag, key)
        assert not (key in ("src", "href", "srcset", "action") and not value.startswith(("data:image/png", "#"))), value
    assert 'charset="utf-8"' in source and "default-src 'none'" in source and "@import" not in source
    assert "url(" not in source and source.rstrip().endswith("</body></html>")
    return page


def check_facts(result: dict, sections: tuple) -> None:
    """The facts beside a page are strict JSON with the numbers of the last line, and all that the page is made of."""
    page = Path(result["page"])
    name = "report.json" if page.name == "index.html" else f"{page.stem}.json"
    facts = json.loads(page.with_name(name).read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert {key: facts[key] for key in result.keys() - {"page", "pictures"}} == {
        key: value for key, value in result.items() if key not in ("page", "pictures")
    }
    assert report.make_page(facts, sections).html() == page.read_text(encoding="utf-8")
    assert {key for key, *_ in sections if key} <= facts.keys()


# ---- whole reports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single_label", "two", "multi_label", "regression", "family"])
def test_a_report_of_each_task(runs, name, tmp_path):
    result = reported(runs[name], "--output", tmp_path)
    want = PICTURES.get(name, PICTURES["single_label"]).split()
    assert result["pictures"] == [f"{n}.png" for n in want] and result["page"] == str(tmp_path / "index.html")
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "report.json", *result["pictures"]}
    page = check_page(result["page"], result["pictures"])
    saved = json.loads((runs[name] / "result.json").read_text())
    assert {k: round(v, 6) for k, v in result["metrics"].items()} == saved["metrics"]
    assert f"{saved['majority']:.4f}" in page.text and str(runs[name]) in page.text
    cfg, labels = trained.run_facts(runs[name])
    assert all(label in page.text for label in labels.names) or cfg.task == "regression"
    assert f"on {saved['metrics']['rows']} rows" in page.text and '"lora_dropout": 0.0' in page.text
    check_facts(result, report.SECTIONS)
    if name == "family":
        assert all(member in page.text for member in trained.members(runs[name]))
        assert "2: each row is scored by models trained on the others" in page.text
        assert f"{saved['mean']['macro_f1']:.4f}" in page.text and f"{saved['std']['macro_f1']:.4f}" in page.text


def test_the_command_the_newest_run_and_the_last_line(runs, command, tmp_path):
    run = runs["single_label"]
    status, out, err = command("report.py", "--outputs", run.parent.parent.parent, "--samples", 100, cwd=tmp_path)
    assert status == 0 and "Traceback" not in err, err
    result = last_json(out)
    assert result["run"] == str(run) and result["page"] == str(run / "report/index.html")
    check_page(result["page"], result["pictures"])


def test_intervals_are_those_of_metrics(tmp_path):
    for task, classes in (("single_label", 4), ("single_label", 2), ("multi_label", 3), ("regression", 1)):
        targets, logits = simulated(task, 90, classes, 3)
        run = finished_run(tmp_path / f"{task}{classes}", task, targets, logits, names(classes) if classes > 1 else ())
        result = reported(run, "--samples", 150, "--seed", 5)
        want = bootstrap.intervals(task, logits, targets, list(result["metrics"]), samples=150, seed=5)
        want = {name: span for name, span in want.items() if name not in ("rows", "ece")}
        assert result["intervals"].keys() == want.keys()
        for name, span in want.items():
            np.testing.assert_allclose(result["intervals"][name], span, atol=1e-7, err_msg=f"{task} {name}")


def test_a_report_says_the_same_twice(tmp_path):
    run = finished_run(tmp_path / "run", "single_label", *simulated("single_label", 60, 3, 0), names(3), decision=True)
    first = {p.name: p.read_bytes() for p in Path(reported(run)["page"]).parent.iterdir()}
    assert first == {p.name: p.read_bytes() for p in Path(reported(run)["page"]).parent.iterdir()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "classes, task", [(2, "single_label"), (45, "single_label"), (45, "multi_label"), (1, "regression")]
)
def test_odd_names_few_rows_and_many_classes_are_drawn_without_a_warning(tmp_path, classes, task):
    odd = [
        "<b>b</b>",
        "$x_1^2$",
        "_private",
        "数学",
        "😀",
        "very long " * 9,
        "a\tb",
        "$\\oops{$",
        "100%",
        "\\frac{1}{2}",
    ]
    values = [f"{odd[i % 10]} {i}" for i in range(classes)] if task != "regression" else ()
    for rows in (1, 2, 12, 120) if classes < 9 else (1, 120):
        targets, logits = simulated(task, rows, classes, 1)
        if rows == 12:
            logits, targets = np.ones_like(logits), np.zeros_like(targets)  # no skill, one class
        run = finished_run(
            tmp_path / str(rows), task, targets, logits, values, decision=task != "regression" and rows > 9
        )
        result = reported(run, "--worst", 0 if rows == 2 else 3)
        page = check_page(result["page"], result["pictures"])
    assert all(" ".join(v.split()) in " ".join(page.text.split()) for v in values)
    if classes == 45 and task == "single_label":
        assert "The 30 most frequent of 45 classes" in page.text
    if classes == 45:
        assert "The 40 most frequent of 45" in page.text and (
            "Boxes are characters" in page.text or shutil.which("fc-list")
        )


def test_without_resamples_there_are_no_intervals(tmp_path):
    a, b = two_runs(tmp_path)
    assert reported(a, "--samples", 0)["intervals"] == {}
    result = reported(a, b, "--samples", 0)
    assert result["metrics"]["micro_f1"]["low"] is None and "without an interval" in result["verdict"]


def test_runs_of_a_family_without_a_log_are_left_out_of_its_curves(runs, tmp_path):
    family = tmp_path / "family"
    shutil.copytree(runs["family"], family, ignore=shutil.ignore_patterns("best", "last", ".*", "report"))
    first, second, third, fourth = map(unsealed, trained.members(family).values())
    (first / "metrics.jsonl").unlink()
    (second / "metrics.jsonl").write_text("")
    (third / "metrics.jsonl").write_text('{"step": 1, "loss": null, "lr": 0.1}\n')
    assert "loss.png" in reported(family)["pictures"]
    (fourth / "metrics.jsonl").unlink()
    result = reported(family)
    assert (
        "loss.png" not in result["pictures"]
        and "Training" not in check_page(*map(result.get, ("page", "pictures"))).text
    )


def test_the_audit_is_counted(tmp_path):
    run = finished_run(tmp_path / "run", "single_label", *simulated("single_label", 30, 3, 0), names(3))
    groups = {"duplicates": [["a", "b", "c"], ["d", "e"]], "near": [], "leaks": {"train-test": [["a", "z"]]}}
    (run / "audit.json").write_text(json.dumps(groups))
    text = check_page(reported(run)["page"], reported(run)["pictures"]).text
    assert "duplicates25" in text and "leaks train-test12" in text and "near0" not in text


# ---- what the rows hold stays text ----------------------------------------------------------------------------------


def test_texts_and_labels_stay_text(runs, tmp_path):
    page = check_page(*map(reported(runs["two"], "--output", tmp_path).get, ("page", "pictures")))
    assert not {"b2", "script"} & set(page.elements) and page.elements.count("body") == 1
    assert [v for t, k, v in page.attributes if t == "img" and k == "src" and v == "x"] == []
    for label in LABELS:
        assert label in page.text
    assert "False positives" in page.text and "False negatives" in page.text and "By group" in page.text
    shown = [text for text in HOSTILE[:7] if text in page.text]
    cfg, labels = trained.run_facts(runs["two"])
    ids, targets, logits = report_runs.validation_rows(runs["two"], cfg, labels)
    wrong = {int(i[1:]) % 8 for i in np.array(ids)[logits.argmax(axis=1) != targets]}
    assert len(wrong) > 2 and shown == [text for k, text in enumerate(HOSTILE[:7]) if k in wrong]


def test_texts_of_errors_and_long_ones_behind_a_click(tmp_path):
    targets = np.arange(8) % 2
    logits = np.where(np.eye(2)[targets] > 0, -3.0, 3.0 + np.arange(8)[:, None]).astype(np.float32)  # all wrong
    texts = [*HOSTILE[:7], "x" * 30_000]
    run = finished_run(tmp_path / "run", "single_label", targets, logits, LABELS, texts)
    result = reported(run, "--worst", 3)
    text = check_page(result["page"], result["pictures"]).text
    most = [i for i in np.argsort(-logits.max(axis=1)) if targets[i] == 0][:3]
    least = [i for i in np.argsort(-logits.max(axis=1)) if targets[i] == 0][3:]
    assert all(f"id r{i}" in text for i in most) and not any(f"id r{i}" in text for i in least)
    assert "id r7" in text and "20,000 of 30,000 characters" in text and "x" * 20_001 not in text
    places = [text.index(f"id r{i}") for i in most]
    assert places == sorted(places)


def test_a_real_browser_reads_it(runs, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = (shutil.which(n) for n in ("chromium", "chromedriver"))
    if not (binary and driver):
        pytest.skip("chromium and chromedriver are not installed")
    result = reported(runs["two"], "--output", tmp_path / "page")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            browser.get(Path(result["page"]).absolute().as_uri())
            assert browser.get_log("browser") == []
            assert browser.title == "toy: " + trained.run_facts(runs["two"])[0].base
            images = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
            assert len(images) == len(result["pictures"]) and all(done and wide > 200 for done, wide in images)
            assert browser.execute_script("return document.scripts.length") == 0
            inside = "return document.querySelectorAll('.text *, .text img, article script, td b, th b').length"
            assert browser.execute_script(inside) == 0, "an element came out of a row's text"
            assert "<script>alert(1)</script>" in browser.find_element("tag name", "body").text
            log = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
            sent = [m["params"]["request"]["url"] for m in log if m["method"] == "Network.requestWillBeSent"]
            assert [url for url in sent if url.startswith(("http", "ws", "ftp"))] == []
            for width in (360, 1200):
                browser.set_window_size(width, 900)
                wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
                assert browser.execute_script(wide) <= 0, "the page itself scrolls sideways"
        finally:
            browser.quit()


# ---- texts that are gone, runs that are none ------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["gone", "fewer", "relabelled", "other ids", "another column"])
def test_data_that_changed_leave_a_page_without_texts(tmp_path, change, capsys):
    run = finished_run(tmp_path / "run", "single_label", *simulated("single_label", 40, 3, 0, 0.3), names(3))
    assert "length.png" in reported(run)["pictures"]
    capsys.readouterr()
    lines = (run / "rows.csv").read_text().splitlines()
    if change == "gone":
        (run / "rows.csv").unlink()
    else:
        lines = {
            "fewer": lines[:-1],
            "relabelled": [*lines[:-1], re.sub(r"class \d", lambda m: f"class {(int(m[0][-1]) + 1) % 3}", lines[-1])],
            "other ids": [lines[0], *("z" + line for line in lines[1:])],
            "another column": [lines[0].replace("Question", "Text"), *lines[1:]],
        }[change]
        (run / "rows.csv").write_text("\n".join(lines) + "\n")
    result = reported(run, "--output", tmp_path / "page")
    out = capsys.readouterr().out
    assert (
        "length.png" not in result["pictures"]
        and out.count("\n") == 2
        and out.count("texts and lengths are left out") == 1
    )
    text = check_page(result["page"], result["pictures"]).text
    assert "texts and lengths are left out" in text and "id r" in text and "text 1" not in text


def refused(*flags) -> str:
    with pytest.raises(UserError) as e:
        reported(*flags)
    assert "\n" not in str(e.value) and e.value.exit_status == 2
    return str(e.value)


def test_what_cannot_be_reported_is_refused(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "run", "single_label", *simulated("single_label", 30, 3, 0), names(3))
    shutil.copytree(run, tmp_path / "unfinished")
    (tmp_path / "unfinished/result.json").unlink()
    assert "is not finished (no result.json): continue it with --resume" in refused(tmp_path / "unfinished")
    shutil.copytree(run, tmp_path / "cpt")
    (tmp_path / "cpt/labels.json").unlink()
    (tmp_path / "cpt/texts.json").write_text("{}")
    assert "was trained by cpt.py and has no labels" in refused(tmp_path / "cpt")
    assert "no classification run" in refused(tmp_path / "nothing")
    assert "holds no finished run" in refused("--outputs", tmp_path)
    assert "expected one run, or two" in refused(run, tmp_path, tmp_path / "cpt")
    assert "name the runs once" in refused(run, "--runs", run)
    assert "--samples 50: expected 100 or more" in refused(run, "--samples", 50)
    assert "rows.csv is not a folder; name another folder" in refused(run, "--output", run / "rows.csv")
    assert "unknown flag --sample (did you mean --samples?)" in refused(run, "--sample", 100)
    assert not (run / "report").exists()
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert refused(run) == "report.py draws with matplotlib: pip install matplotlib"
    assert not (run / "report").exists()


@pytest.mark.parametrize("damage", ["column", "decision", "metrics", "log"])
def test_a_damaged_run_is_not_trusted(tmp_path, damage):
    run = finished_run(tmp_path / "run", "single_label", *simulated("single_label", 30, 3, 0), names(3), decision=True)
    if damage == "column":
        text = (run / "val_predictions.csv").read_text()
        (run / "val_predictions.csv").write_text(text.replace("logit_class 1", "logit_else"))
    elif damage == "log":
        (run / "metrics.jsonl").write_text('{"step": 1, "lo')
    else:
        (run / ("decision.json" if damage == "decision" else "result.json")).write_text("{")
    with pytest.raises(Untrusted):
        reported(run)


def test_a_report_that_fails_leaves_the_one_before_it(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "run", "single_label", *simulated("single_label", 30, 3, 0), names(3))
    reported(run)
    before = (run / "report/index.html").read_bytes()
    finished_run(tmp_path / "other", "single_label", *simulated("single_label", 30, 3, 1), names(3))
    shutil.copy(tmp_path / "other/val_predictions.csv", unsealed(run))
    plain, calls = disk.fs_write, []

    def full(path, content):
        calls.append(path)
        if len(calls) % 3 == 0 or path.name.startswith(".index"):
            plain(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        plain(path, content)

    monkeypatch.setattr(disk, "fs_write", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            reported(run)
        assert (run / "report/index.html").read_bytes() == before
        assert not [p for p in (run / "report").iterdir() if p.name.startswith(".")]
        for png in (run / "report").glob("*.png"):
            assert png.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_nothing_is_written_where_a_picture_cannot_be_drawn(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "run", "single_label", *simulated("single_label", 30, 3, 0), names(3))
    monkeypatch.setattr(pictures, "lengths", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reported(run)
    assert not (run / "report").exists()


# ---- the numbers ----------------------------------------------------------------------------------------------------


def test_counts_above_thresholds_are_plain_counts():
    rng = np.random.default_rng(0)
    p, y, grid = np.round(rng.random((50, 3)), 2), (rng.random((50, 3)) < 0.4).astype(int), np.linspace(0.1, 0.9, 9)
    hits, chosen = report_numbers.counts_above(p, y, grid)
    want = np.array([[(p[:, c] > t).sum() for c in range(3)] for t in grid])
    assert np.array_equal(chosen, want)
    assert np.array_equal(hits, [[((p[:, c] > t) & (y[:, c] == 1)).sum() for c in range(3)] for t in grid])


@pytest.mark.parametrize(
    "task, classes, kind", [("single_label", 4, "none"), ("single_label", 2, "global"), ("multi_label", 5, "per_class")]
)
def test_calibration_and_thresholds_are_those_of_other_rows(tmp_path, task, classes, kind):
    targets, logits = simulated(task, 80, classes, 1)
    run = report_runs.read_run(
        finished_run(tmp_path / "run", task, targets, 3 * logits, names(classes), decision=True, thresholds=kind)
    )
    scores, predicted, p = decide.cross_fitted(task, 3 * logits, targets, seed=0, kind=kind)
    assert np.array_equal(run.decided, predicted) and np.array_equal(run.calibrated, p) and run.scores == scores
    assert run.thresholds == ("" if kind == "none" else kind)
    flipped = targets.copy()
    flipped[3] = 1 - targets[3] if task == "multi_label" else (targets[3] + 1) % classes
    other = report_runs.read_run(
        finished_run(tmp_path / "other", task, flipped, 3 * logits, names(classes), decision=True, thresholds=kind)
    )
    np.testing.assert_array_equal(other.calibrated[3], run.calibrated[3])  # a row's own label has no part in it
    assert not np.array_equal(other.calibrated, run.calibrated)
    page = Read(Path(reported(run.path)["page"]).read_text())
    assert f"{scores['after']['ece']:.4f}" in page.text and f"{scores['before']['ece']:.4f}" in page.text


def test_smoothing_keeps_a_constant_and_follows_a_step():
    for rows in (1, 2, 3, 9, 10, 11, 50):
        assert np.allclose(pictures.smoothed([2.0] * rows), 2.0) and len(pictures.smoothed([2.0] * rows)) == rows
    steps = pictures.smoothed([0.0] * 300 + [1.0] * 300)
    assert (
        steps[200] == 0 and steps[400] == 1 and np.all(np.diff(steps) >= 0) and abs(steps[299:301].mean() - 0.5) < 0.01
    )
    line = np.arange(100.0)
    assert np.allclose(pictures.smoothed(line)[8:-8], line[8:-8]), "no lag"


def test_facts_are_strict_json():
    values = {"a": np.array([[1.5, np.nan], [np.inf, 2]]), "b": (np.int64(3), np.float32(0.5)), "c": np.bool_(True)}
    values |= {"d": np.str_("text"), "e": -math.inf, "f": None, "g": {"h": []}}
    want = {
        "a": [[1.5, None], [None, 2.0]],
        "b": [3, 0.5],
        "c": True,
        "d": "text",
        "e": None,
        "f": None,
        "g": {"h": []},
    }
    plain = report.as_json(values)
    assert plain == want and json.loads(json.dumps(plain, allow_nan=False)) == want


def test_coverage_of_many_rows_is_thinned_and_of_few_is_whole(tmp_path, monkeypatch):
    targets, logits = simulated("single_label", 300, 4, 2)
    run = report_runs.read_run(finished_run(tmp_path / "run", "single_label", targets, logits, names(4)))
    order = np.argsort(-run.probabilities.max(axis=1), kind="stable")
    want = (run.predicted == targets)[order].cumsum() / np.arange(1, 301)
    whole = report_numbers.coverage(run)
    np.testing.assert_allclose(whole["accuracy"], want[19:])
    assert whole["half"] == want[149] and whole["all"] == want[-1]
    monkeypatch.setattr(report_numbers, "MOST_POINTS", 50)
    few = report_numbers.coverage(run)
    assert len(few["share"]) == 50 and few["share"][0] == 20 / 300 and few["share"][-1] == 1
    np.testing.assert_allclose(few["accuracy"], want[(few["share"] * 300).round().astype(int) - 1])


@pytest.mark.parametrize("argv, runs", [(["a,b", "c", "--samples", "0"], 2), (["--runs", "a"], 0), ([], 0), (["a"], 1)])
def test_words_before_the_first_flag_are_runs(argv, runs):
    assert report.split_argv(argv) == (argv[:runs], argv[runs:])


# ---- two runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, classes", [("single_label", 4), ("single_label", 2), ("multi_label", 3), ("regression", 1)]
)
def test_a_comparison_is_the_paired_bootstrap_done_by_hand(tmp_path, task, classes, capsys):
    a, b = two_runs(tmp_path, task, classes)
    result = reported(a, b, "--samples", 150, "--seed", 4)
    (_, x), (targets, y) = simulated(task, 120, classes, 1, 1.2), simulated(task, 120, classes, 2, 1.5)
    want = {n: (v, metrics.of_task(task, y, targets)[n]) for n, v in metrics.of_task(task, x, targets).items()}
    want = {name: pair for name, pair in want.items() if name not in ("rows", "ece")}
    assert result["metrics"].keys() == want.keys() and result["rows"] == 120 and result["runs"] == [str(a), str(b)]
    rng, apart = np.random.default_rng(4), {name: [] for name in want}
    for _ in range(150):
        rows = rng.integers(120, size=120)
        scores = [metrics.of_task(task, z[rows], targets[rows]) for z in (x, y)]
        for name, values in apart.items():
            values.append(scores[1][name] - scores[0][name])
    for name, got in result["metrics"].items():
        np.testing.assert_allclose([got["a"], got["b"]], want[name], atol=1e-6)
        np.testing.assert_allclose([got["low"], got["high"]], np.quantile(apart[name], [0.025, 0.975]), atol=1e-6)
        d = np.array(apart[name])
        least = min((d < 1e-9).sum(), (d > -1e-9).sum())
        assert got["p"] == pytest.approx(min(1, 2 * (least + 1) / 151))
    page, out = check_page(result["page"], result["pictures"]), capsys.readouterr().out
    check_facts(result, report.COMPARED)
    assert (
        result["page"] == str(a / "report/compare_b.html")
        and result["verdict"] in page.text
        and result["verdict"] in out
    )
    for name, got in result["metrics"].items():
        assert re.search(rf"^{name} +{got['a']:.4f} +{got['b']:.4f} ", out, re.MULTILINE), out
    if task == "regression":
        assert result["mcnemar"] == {} and "closer" in page.text
        return
    right = [np.asarray(trained.decided(task, None, z)[0] == targets) for z in (x, y)]
    cases = {"rows": [r.all(axis=1) if r.ndim == 2 else r for r in right]}
    cases |= {"cells": [r.ravel() for r in right]} if task == "multi_label" else {}
    assert result["mcnemar"].keys() == cases.keys()
    for name, (one, two) in cases.items():
        counts = int((one & ~two).sum()), int((two & ~one).sum())
        assert [result["mcnemar"][name][k] for k in ("only_a", "only_b")] == [*counts]
        assert result["mcnemar"][name]["p"] == bootstrap.mcnemar(*counts)[0]
    one, two = cases["rows"]
    for title, rows in (("Only A is right", one & ~two), ("Only B is right", two & ~one)):
        assert f"{title} ({rows.sum()}" in page.text
    shown = set(re.findall(r"id (r\d+)", page.text))
    assert shown <= {f"r{i}" for i in np.flatnonzero(one != two)} and shown


def test_a_run_against_itself_shows_no_difference(runs, tmp_path):
    for name in ("single_label", "two", "multi_label", "regression"):
        copy = tmp_path / name / "copy"
        shutil.copytree(runs[name], copy, ignore=shutil.ignore_patterns("best", "last", ".*", "report"))
        result = reported(runs[name], copy, "--output", tmp_path / name)
        assert {v[k] for v in result["metrics"].values() for k in ("difference", "low", "high")} == {0.0}
        assert {v["p"] for v in result["metrics"].values()} == {1.0}
        assert all(t["p"] == 1.0 and t["only_a"] == t["only_b"] == 0 for t in result["mcnemar"].values())
        assert result["verdict"].startswith("No difference that these rows can show: B - A is +0.0000")
        assert "thresholds" in "".join(result["metrics"]) or name in ("single_label", "regression")
        page = check_page(result["page"], result["pictures"])
        assert page.elements.count("article") == 0


def test_shared_rows_are_found_by_id_in_any_order(tmp_path, capsys):
    targets, x = simulated("single_label", 100, 3, 1)
    y = simulated("single_label", 100, 3, 2)[1]
    a = finished_run(tmp_path / "a", "single_label", targets, x, names(3))
    order = np.random.default_rng(0).permutation(100)
    b = finished_run(tmp_path / "b", "single_label", targets[order], y[order], names(3), ids=[f"r{i}" for i in order])
    whole = reported(a, b)
    assert "warning" not in capsys.readouterr().out and whole["rows"] == 100
    assert whole["metrics"]["accuracy"]["b"] == pytest.approx((y.argmax(axis=1) == targets).mean())
    some = order[:70]
    part = finished_run(
        tmp_path / "part", "single_label", targets[some], y[some], names(3), ids=[f"r{i}" for i in some]
    )
    result = reported(a, part)
    out = capsys.readouterr().out
    assert result["rows"] == 70 and "warning: only the 70 rows that both judged, of 100 of A and 70 of B" in out
    kept = np.sort(some)
    assert result["metrics"]["accuracy"]["a"] == pytest.approx((x.argmax(axis=1) == targets)[kept].mean())
    assert "70 that both judged, of 100 of A" in check_page(result["page"], result["pictures"]).text


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    targets, x = simulated("single_label", 40, 3, 1)
    a, other = finished_run(tmp_path / "a", "single_label", targets, x, names(3)), ["r0", *(f"z{i}" for i in range(39))]

    def another(name, task="single_label", labels=targets, logits=x, classes=3, **changes):
        return finished_run(tmp_path / name, task, labels, logits, names(classes), **changes)

    others = {
        "multi_label of 3 labels": another("m", "multi_label", *simulated("multi_label", 40, 3, 1)),
        "single_label of 4 labels": another("c", "single_label", *simulated("single_label", 40, 4, 1), classes=4),
        "share 1 row ids": another("o", ids=other),
        "different labels": another("l", labels=(targets + 1) % 3),
        "duplicated and in another": another("t", ids=["r"] * 40),
    }
    for words, b in others.items():
        message = refused(a, b)
        assert words in message and str(a) in message and str(b) in message
    assert not (a / "report").exists()
    same = [finished_run(tmp_path / n, "single_label", targets, x, names(3), ids=["r"] * 40) for n in ("t1", "t2")]
    assert reported(*same)["rows"] == 40


def test_thresholds_of_each_run_are_compared_too(tmp_path):
    a, b = two_runs(tmp_path, "multi_label", 5, decision=True)
    result = reported(a, b)["metrics"]
    targets = simulated("multi_label", 120, 5, 1)[0]
    for side, seed, skill in (("a", 1, 1.2), ("b", 2, 1.5)):
        logits = simulated("multi_label", 120, 5, seed, skill)[1]
        scores = decide.cross_fitted("multi_label", logits, targets, seed=0, kind="global")[0]["after"]
        assert result["micro_f1, thresholds"][side] == pytest.approx(scores["micro_f1"])
        assert result["macro_f1, thresholds"][side] == pytest.approx(scores["macro_f1"])


def test_verdicts():
    assert (
        compare_runs.verdict("micro_f1", 0.012, 0.003, 0.021)
        == "B is better by 0.0120 micro-F1 (95% 0.0030 to 0.0210)."
    )
    assert compare_runs.verdict("log_loss", 0.1, 0.05, 0.2) == "A is better by 0.1000 log loss (95% 0.0500 to 0.2000)."
    assert compare_runs.verdict("mse", -0.1, -0.3, -0.05) == "B is better by 0.1000 mse (95% 0.0500 to 0.3000)."
    assert compare_runs.verdict("accuracy", 0.01, -0.01, 0.03).startswith("No difference that these rows can show")
    assert set(metrics.LOWER) < {m for known in checks.METRICS.values() for m in known}


def test_the_name_of_a_comparison_tells_b_from_a():
    for a, b, want in [
        ("o/x/d/run_0", "o/x/d/run_1", "run_1"), ("o/x/d/run_0", "o/y/d/run_0", "y_d_run_0"),
        ("o/x/d/run_0", "o/x/d/run_0/seed_1", "seed_1"), ("o/x/d/run_0/seed_1", "o/x/d/run_0", "run_0"),
    ]:  # fmt: skip
        assert compare_runs.name_beside(Path(a), Path(b)) == want


def test_words_before_the_flags_are_runs_even_with_commas(tmp_path):
    a, b = two_runs(tmp_path / "x,y")
    assert reported(a, b)["runs"] == [str(a), str(b)]
    a, b = two_runs(tmp_path / "z")
    assert reported("--runs", a, b)["runs"] == reported(a, b)["runs"] == [str(a), str(b)]


def test_the_entry_point_ends_like_the_others(tmp_path, monkeypatch, capsys):
    run = finished_run(tmp_path / "run", "single_label", *simulated("single_label", 30, 3, 0), names(3))
    for argv, code in (([str(run), "--samples", "100"], 0), ([str(tmp_path)], 2), ([str(run), "--samples", "x"], 2)):
        monkeypatch.setattr(sys, "argv", ["report.py", *argv])
        with pytest.raises(SystemExit) as e:
            ddp.launch(report.main)
        out, err = capsys.readouterr()
        assert e.value.code == code and (json.loads(out.splitlines()[-1])["run"] == str(run) if code == 0 else not out)
        assert code == 0 or (err.startswith("error: ") and err.count("\n") == 1)
    assert dataclasses.asdict(report.ReportConfig())["worst"] == 30
