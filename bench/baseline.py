"""What a run must beat: the majority class, and TF-IDF with a linear SVM, on the very rows that train.py validates on.

    python bench/baseline.py --run outputs/Qwen__Qwen2.5-0.5B/math/run_0      # the run's own data and split
    python bench/baseline.py --train_data ../shared/data/math_problems/train.csv --text "{Question}"

Needs `pip install scikit-learn`. The last line of stdout is one JSON object.
"""

import argparse
import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checks  # noqa: E402
import cli  # noqa: E402
import labelling  # noqa: E402
import metrics  # noqa: E402
import prompts  # noqa: E402
import splits  # noqa: E402
from configs import TrainConfig  # noqa: E402
from errors import UserError  # noqa: E402


def main() -> None:
    cfg, run = read_options()
    rows, val, labels = splits.read(cfg, print)
    known, held_out = splits.cut(cfg, rows, val)  # the split of train.py
    classes = len(labels.values)
    majority = np.full(len(held_out.labels), np.bincount(known.labels, minlength=classes).argmax())
    predicted = {"majority": majority}
    if run:
        predicted["run"] = run_predictions(run, held_out, labels)
    predicted["tfidf_svm"] = tfidf_svm(cfg.text, known, held_out, cfg.seed)
    print(f"{len(known.labels):,} training rows, {len(held_out.labels):,} validation rows, seed {cfg.seed}")
    print(f"{'':<20} {'micro F1':>9} {'macro F1':>9}")
    result = {"run": str(run) if run else None, "rows": len(held_out.labels)}
    for key, name in (("majority", "majority class"), ("tfidf_svm", "TF-IDF + LinearSVC"), ("run", str(run))):
        if key in predicted:
            scores = metrics.of_task("single_label", np.eye(classes)[predicted[key]], held_out.labels)
            print(f"{name:<20} {scores['micro_f1']:>9.4f} {scores['macro_f1']:>9.4f}")
            result["metrics" if key == "run" else key] = {k: round(scores[k], 6) for k in ("micro_f1", "macro_f1")}
    print(json.dumps(result))


def read_options() -> tuple[TrainConfig, Path | None]:
    """The config that decides the split: that of the run, or the defaults; flags win."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run; its config names data and split")
    for name in ("train_data", "val_data", "text", "label_column", "id_column"):
        parser.add_argument(f"--{name}", help="as in train.py")
    parser.add_argument("--val_size", type=float, help="as in train.py")
    parser.add_argument("--seed", type=int, help="as in train.py")
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    run = given.pop("run", None)
    cfg = cli.read_config(TrainConfig, run) if run else TrainConfig()
    cfg = replace(checks.own_data(cfg, set(given)), **given)
    checks.check(cfg)
    return cfg, run


def tfidf_svm(template: str, known: splits.Split, held_out: splits.Split, seed: int) -> np.ndarray:
    """Classes predicted from words and pairs of words, and runs of 2 to 5 characters."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline, make_union
        from sklearn.svm import LinearSVC
    except ImportError:
        raise UserError("this baseline needs scikit-learn: pip install scikit-learn") from None

    def texts(split: splits.Split) -> list[str]:
        return ["".join(piece for _, piece in prompts.render(template, row)) for row in split.rows]

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True)
    classifier = make_pipeline(make_union(words, characters), LinearSVC(random_state=seed))
    return classifier.fit(texts(known), known.labels).predict(texts(held_out))


def run_predictions(run: Path, held_out: splits.Split, labels: labelling.Labels) -> np.ndarray:
    """The run's predicted classes. Raises UserError unless it was validated on these very rows."""
    try:
        with open(run / "val_predictions.csv", encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
    except OSError as e:
        raise UserError(f"--run {run}: no val_predictions.csv ({e.strerror}); is the run finished?") from None
    expected = list(zip(held_out.ids, [labels.values[y] for y in held_out.labels], strict=True))
    if [(r["id"], r["label"]) for r in rows] != expected:
        raise UserError(f"--run {run}: it was validated on other rows: give the data flags and the seed of that run")
    return labelling.encode_labels([r["prediction"] for r in rows], labels, f"--run {run}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_status)
