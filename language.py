"""Language models."""

from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
)

import bases
import data
import ddp
import losses
import model as models
import nf4
import numerics
import prompts
from errors import UserError
from packed import Batch, pack


def next_token_loss(lm, batch: Batch) -> torch.Tensor:
    """Sum of the next-token losses (nats) of a packed micro-batch; no token is predicted from another sequence."""
    hidden = models.hidden_states(lm.base_model, batch)[batch.targets - 1]  # (P, D) states that predict a token
    return losses.lm_cross_entropy(hidden, vocabulary_head(lm), batch.input_ids[batch.targets])


@torch.no_grad()
def language_scores(lm, tokens: data.Tokens, world: ddp.World, precision: str, max_tokens: int) -> dict[str, float]:
    """loss (mean nats a token), perplexity and bits_per_byte over all segments, the same on every rank."""
    was_training = lm.training
    lm.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)  # read once, at the end
    for j, rows in enumerate(data.pack_by_length(tokens.lengths, max_tokens)):
        if j % world.size == world.rank:
            with numerics.autocast(world.device, precision):
                total += next_token_loss(lm, pack(tokens, rows, world.device, predict=True)).double()
    lm.train(was_training)
    (total,) = ddp.sum_over_ranks(world, [float(total)])
    loss = total / float(tokens.targets.sum())
    scores = {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}
    return scores | ({"bits_per_byte": total / np.log(2) / tokens.bytes} if tokens.bytes else {})


# ---- generation -----------------------------------------------------------------------------------------------------


def stop_ids(lm, tokenizer) -> set[int]:
    """Tokens that end a completion: EOS of the tokenizer and of the base, and what ends a turn of the chat template."""
    own = lm.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if tokenizer.chat_template:
        try:
            turns = prompts.chat(tokenizer, [prompts.QUESTION, {"role": "assistant", "content": "."}])
        except ValueError:
            turns = []
        end = turns[-1][1].lstrip() if len(turns) > 1 and not turns[-1][0] else ""
        first = tokenizer(end, add_special_tokens=False)["input_ids"][:1]
        found.update(set(first) & set(tokenizer.get_added_vocab().values()))
    return {token for token in found if isinstance(token, int)}


def completion_text(tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of a completion without special tokens, as it stands behind its prompt: some tokenizers drop the space
    before a text's first word.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (tokenizer.decode(part, **options) for part in (prompt, prompt + ids))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids, **options)


def generate(
    lm, tokenizer, rows: list[list[int]], precision="fp32", most=256, temperature=0.0, top_p=1.0, seed=0, stops=None
) -> list[str]:
    """The completions of one batch of encoded prompts as text; see models.complete. stops: ids, None for stop_ids.

    A model in training is left exactly as it was.
    """
    how = precision, most, temperature, top_p, seed
    stops, pad = stop_ids(lm, tokenizer) if stops is None else stops, data.end_of_text(tokenizer, padding=True)
    found = complete(lm, rows, pad, stops, *how)
    return [completion_text(tokenizer, row, ids) for row, ids in zip(rows, found, strict=True)]


def load_language_model(
    base: str,
    device: torch.device,
    dtype: torch.dtype,
    random_seed: int | None = None,
    quant: str = "none",
    compute: torch.dtype = torch.float32,
):
    """The base with its LM head, every tensor accounted for; with random_seed its weights are drawn, not loaded.

    quant, compute: as in load_classifier.
    """
    if random_seed is None:
        model, fresh = models._load(AutoModelForCausalLM, base, "auto" if quant == "nf4" else dtype)
        models._refuse_missing(base, fresh)
        model.base_fingerprint = bases.fingerprint(model)
        if quant == "nf4":
            nf4.quantize(model.base_model, device, compute)
            for p in model.parameters():
                p.data = p.data.to(dtype) if p.is_floating_point() else p.data
    else:
        torch.manual_seed(random_seed)
        options = {"dtype": dtype, "attn_implementation": models._attention(base)}
        model = models._from_config(AutoModelForCausalLM, base, models._config(base), **options)
        model.get_input_embeddings().register_forward_hook(models._cast_out)
    return model.to(device)


def language_skeleton(base: str) -> nn.Module:
    """A decoder with its LM head and no weights (on the meta device). Raises UserError for an encoder."""
    config = models._config(base)
    if config.model_type in bases.ENCODERS:
        raise UserError(f"--base {base}: {config.model_type} is an encoder, which writes no text; give a decoder")
    with torch.device("meta"):
        return models._from_config(AutoModelForCausalLM, base, config)


@contextmanager
def generating(lm: nn.Module):
    """Inside the block a language model takes transformers' `generate`: eval mode, stock attention, a cache, and no
    setting of the base's generation_config.json. Afterwards everything is exactly as it was.
    """
    modes, before = [(m, m.training) for m in lm.modules()], lm.generation_config
    packed, use_cache = lm.config._attn_implementation, lm.config.use_cache
    try:
        lm.eval()
        lm.generation_config, lm.config.use_cache = GenerationConfig(), True
        lm.config._attn_implementation = "sdpa" if packed == models.ATTENTION else packed
        yield lm
    finally:
        lm.generation_config, lm.config.use_cache, lm.config._attn_implementation = before, use_cache, packed
        for module, mode in modes:
            module.training = mode


def complete(
    lm, prompts: list[list[int]], pad: int, stops, precision="fp32", most=256, temperature=0.0, top_p=1.0, seed=0
) -> list[list[int]]:
    """At most `most` token ids after each prompt, up to and with its first stop token, from one left-padded batch.

    Temperature 0 is greedy; else tokens are drawn from seed. Neither the model nor torch's random state is changed.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=lm.device)  # (B, L)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    draw = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    ends = {"max_new_tokens": most, "pad_token_id": pad, "eos_token_id": sorted(stops) or None}
    gpus = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), numerics.autocast(lm.device, precision), generating(lm):
        torch.manual_seed(seed)
        out = lm.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**ends, **draw))
    found = out[:, longest:].tolist()
    return [row[: next((t + 1 for t, token in enumerate(row) if token in stops), len(row))] for row in found]


def vocabulary_head(lm: nn.Module):
    """The LM head as a function: states (N, D) -> logits (N, V), capped where the family caps them."""
    head, cap = lm.get_output_embeddings(), getattr(lm.config, "final_logit_softcapping", None)
    return head if not cap else lambda hidden: torch.tanh(head(hidden) / cap) * cap


def vocabulary_modules(lm: nn.Module) -> tuple[str, ...]:
    """Names of the embedding and the LM head, adapted or not."""
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    return tuple(n for n, m in lm.named_modules() if any(m is end for end in ends))
