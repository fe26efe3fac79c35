"""TF-IDF + logistic regression on the very rows of a run: trained on its training rows, judged on its validation rows.

python bench/tfidf.py outputs/tiny__base/rules/run_0
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import metrics  # noqa: E402
import report_runs  # noqa: E402
import splits  # noqa: E402
import trained  # noqa: E402


def main(run: Path) -> dict:
    """The metrics of the baseline and of the run, on the same rows; single-label runs that are no family."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    cfg, labels = trained.run_facts(run)
    rows, val, _ = splits.read(cfg, lambda *words: None)
    known, judge = splits.cut(cfg, rows, val)
    ids, targets, logits = report_runs.validation_rows(run, cfg, labels)
    assert ids == judge.ids, "the data changed since the run"
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True, max_features=200_000)
    model = make_pipeline(make_union(words, letters), LogisticRegression(C=10, max_iter=1000))
    model.fit(fields(cfg, known.rows), known.labels)
    theirs = model.predict_log_proba(fields(cfg, judge.rows)).astype(np.float32)
    found = {}
    for name, z in (("tfidf + logistic regression", theirs), ("run", logits)):
        scores = metrics.of_task("single_label", z, targets)
        found[name] = {n: round(scores[n], 4) for n in ("accuracy", "macro_f1", "roc_auc", "log_loss")}
        by = evaluate.by_value(cfg, cfg.by_column, judge.rows, z, targets, print)
        found[name] |= {"mean_by_column": by["mean_by_column"]} if by else {}
    print(json.dumps({"train_rows": len(known.ids), "rows": len(ids), **found}, indent=1))
    return found


def fields(cfg, rows: list[dict]) -> list[str]:
    """What stands in the template's fields, without its own words."""
    import prompts

    names = prompts.fields(cfg.text)
    return ["\n".join(row[n] for n in names) for row in rows]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
