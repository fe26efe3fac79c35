"""A language model that writes: a run of cpt.py, a base, or a base with an adapter, opened to complete prompts."""

from dataclasses import dataclass, replace
from pathlib import Path

import bases
import checkpoint
import cli
import data
import ddp
import foreign
import language
import parts
import seals
import trained
from configs import CptConfig
from errors import UserError

# ---- what is on disk: checked by headers, before any weight is loaded -----------------------------------------------


def of_run(run: Path, base: str = "") -> foreign.Given:
    """A run of cpt.py by its best save, or else its last. base: where its base is now, if it moved.

    Raises UserError for any other folder, Untrusted where no save can be trusted.
    """
    if seals.has(run / "labels.json") or not seals.has(run / "config.json"):
        raise UserError(f"run {run}: no run of cpt.py, whose models write text; name another")
    config = cli.read_config(CptConfig, run)
    save = checkpoint.trusted_of(run, "best") or checkpoint.trusted_of(run, "last")
    if save is None:
        raise UserError(f"run {run}: it holds no save yet; continue it with python cpt.py --resume {run}")
    if (save.folder / "model.safetensors").exists():  # the whole base was trained: the save is a base itself
        if base:
            raise UserError(f"--base {base} has no effect: {run} trained its whole base and holds it")
        return foreign.given_writer(replace(config, base=str(save.folder), quant="none"), None)
    config = replace(config, base=base or config.base)
    trained.need_base(run, config.base)
    return foreign.given_writer(config, save.folder)


def of_base(base: str, adapter: str = "", quant: str = "none") -> foreign.Given:
    """A base, perhaps with an adapter on it; without a base, the one that the adapter names.

    Raises UserError for what does not fit together.
    """
    folder = bases.find_adapter(adapter) if adapter else None
    return foreign.given_writer(CptConfig(base=base, quant=quant), folder)


# ---- completing prompts ---------------------------------------------------------------------------------------------


def encode_prompts(tokenizer, rows: list, max_length: int, chat: bool = True, rules: list = ()):
    """(ids of each prompt, given as pieces; a report), as data.encode makes them.

    An end that the tokenizer adds by itself is left out, for nothing could follow it. Of a plain prompt (chat=False)
    over max_length the last tokens are kept: those are to be continued.
    """
    tokens, report = data.encode(tokenizer, rows, max_length if chat else 10**9, rules=rules)
    special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    ends = special[::-1].index(0)  # tokens that the tokenizer adds at the end
    prompts = []
    for i in range(len(rows)):
        ids = tokens.row(i).tolist()
        ids = ids[: len(ids) - ends] or ids
        over = len(ids) - max_length
        if over > 0:
            bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
            ids = bos + ids[over + len(bos) :]
            report.cut_rows += 1
            report.cut_tokens += over
        prompts.append(ids)
    return prompts, report


def check_room(base: str, longest: int, max_new_tokens: int) -> None:
    """Raise UserError where a prompt's tokens and a completion's exceed the positions that the base was made for."""
    room = getattr(bases.load_config(base), "max_position_embeddings", None)
    if room and longest + max_new_tokens > room:
        problem = f"a prompt of {longest} tokens and --max_new_tokens {max_new_tokens} exceed the {room} positions"
        shorter = f", or --max_length to {room - max_new_tokens}" if room > max_new_tokens else ""
        raise UserError(f"{problem} of {base}: lower --max_new_tokens{shorter}")


@dataclass
class Writer:
    """A loaded language model and how it draws."""

    lm: object
    tokenizer: object
    precision: str
    max_new_tokens: int
    temperature: float
    top_p: float

    def __post_init__(self):
        self.stops = language.stop_ids(self.lm, self.tokenizer)
        self.pad = data.end_of_text(self.tokenizer, padding=True)

    def complete(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """The ids of a completion for each prompt of a batch."""
        limits = self.precision, self.max_new_tokens, self.temperature, self.top_p
        return language.complete(self.lm, prompts, self.pad, self.stops, *limits, seed)

    def progress(self, output: str, prompts: list[list[int]], size: int, seed: int) -> parts.Parts:
        """Where the completions of batches of prompts are kept until the output is written."""
        limits = self.precision, self.max_new_tokens, self.temperature, self.top_p, sorted(self.stops), self.pad
        return parts.Parts(output, parts.digest_of(self.lm, prompts, size, seed, limits))

    def text(self, prompt: list[int], ids: list[int]) -> str:
        return language.completion_text(self.tokenizer, prompt, ids)


def in_batches(world: ddp.World, prompts: list[list[int]], size: int, complete):
    """Yield (first row, completions) of whole rounds, one batch a rank, in the order of the rows, on every rank.

    complete(batch, its number) -> completions. Batches are neighbours in the list: what is drawn depends on the
    prompts and the batch size, never on the ranks.
    """
    for first in range(0, len(prompts), size * world.size):
        start = first + size * world.rank
        batch = prompts[start : start + size]
        mine = complete(batch, start // size) if batch else []
        completions = []
        for theirs in ddp.gather_objects(world, mine):
            completions += theirs
        yield first, completions
