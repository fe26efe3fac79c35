"""The tokens of a large file's rows: encoded once, by rank 0, into files that every rank maps.

They lie in outputs/token_cache, in a folder named by the sha256 of all that they follow from (rows, template, limits,
tokenizer, code). It appears whole: what is half written when its process dies is another name's, and is made again.
"""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoint
import data
import ddp
import prompts
import spool
from errors import Untrusted

WINDOW = 2**14  # rows that are encoded together
KINDS = {"ids": np.int32, "lengths": np.int64, "uncut": np.int64}  # the files
CODE = "cutting data files prompts special_tokens spool token_store".split()  # what tokens follow from, too


def tokenize(cfg, tokenizer, rows: spool.Sequence, world: ddp.World) -> tuple[data.Tokens, data.TokenReport]:
    """The tokens of rows by a TrainConfig, and what happened on the way; see data.py. In files where rows are."""
    how = tokenizer, cfg.text, cfg.max_length, cfg.kept, cfg.budgets
    if not isinstance(rows, spool.View):
        return encode(rows, *how)

    def on_rank0():
        folder = Path(cfg.outputs) / "token_cache" / name_of(rows, *how)
        try:
            if checkpoint.trusted(folder):
                return folder
        except Untrusted as e:
            print(f"{e}: it is made again")
            checkpoint.fs_remove(folder)
        checkpoint.save_once(folder, lambda hidden: write(hidden, rows, *how), {"rows": len(rows)})
        return folder

    folder = Path(ddp.from_rank0(world, on_rank0))
    ddp.say(world, f"tokens in {folder}")
    report = data.TokenReport(**checkpoint.load_json(folder / "report.json"))
    lengths, report.lengths = (np.fromfile(folder / name, KINDS[name]) for name in ("lengths", "uncut"))
    stops = np.cumsum(lengths)
    return data.Tokens(np.memmap(folder / "ids", KINDS["ids"], mode="r"), stops - lengths, stops), report


def encode(rows, tokenizer, template, max_length, kept, budgets):
    return data.tokenize(tokenizer, template, rows, max_length, kept, budgets)


def name_of(rows: spool.View, tokenizer, template: str, *limits) -> str:
    """A hash of all that the tokens follow from."""
    parts = [template, *limits, tokenizer.chat_template, str(tokenizer.special_tokens_map)]
    parts += [tokenizer.backend_tokenizer.to_str(), prompts.fields(template), list(rows[0])]
    parts += [checkpoint.sha256(Path(__file__).with_name(f"{name}.py")) for name in CODE]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for line in rows.lines():
        digest.update(line)
        digest.update(b"\n")
    return digest.hexdigest()[:32]


def write(folder: Path, rows: spool.View, *how) -> None:
    """Encode rows window by window into a folder's files."""
    report = data.TokenReport()
    with tqdm(total=len(rows), desc="encoding", unit=" rows", file=sys.stderr) as bar:
        for start in range(0, len(rows), WINDOW):
            tokens, own = encode(rows[start : start + WINDOW], *how)
            arrays = {"ids": tokens.ids, "lengths": tokens.lengths, "uncut": own.lengths}
            for name, values in arrays.items():
                checkpoint.append_whole(folder / name, np.asarray(values, KINDS[name]).tobytes())
            own.lengths = []
            report.add(own)
            bar.update(len(tokens.lengths))
    checkpoint.save_json(folder / "report.json", asdict(report))
