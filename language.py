"""Language models: load them, score their next tokens, and complete prompts with them."""

from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

import bases
import data
import ddp
import estimates
import losses
import model as models
import nf4
import numerics
import prompts
import signals
from errors import UserError
from packed import Batch, pack

# ---- loading --------------------------------------------------------------------------------------------------------


def load_language_model(
    base: str, device: torch.device, dtype: torch.dtype, random_seed=None, quant="none", compute=torch.float32
):
    """The base with its LM head, every tensor accounted for; with random_seed (int) its weights are drawn, not loaded.

    quant, compute (a dtype): as in load_classifier. Raises UserError when weights are missing or do not fit.
    """
    if random_seed is not None:
        torch.manual_seed(random_seed)
        lm = models.from_config(AutoModelForCausalLM, base, models.changed_config(base), dtype=dtype)
        lm.generation_config = bases.generation_config(bases.find_base(base)) or lm.generation_config
        models.prepare_layers(lm)
    else:
        # nf4 is made from the stored weights, which a cast to another dtype would have rounded.
        lm, missing = models.from_weights(AutoModelForCausalLM, base, "auto" if quant == "nf4" else dtype)
        models.refuse_missing(base, missing)
        lm.base_fingerprint = bases.fingerprint(lm)
    if quant == "nf4":
        nf4.quantize(lm.base_model, device, compute)
        for p in lm.parameters():
            if p.is_floating_point():
                p.data = p.data.to(dtype)
    return lm.to(device)


def language_skeleton(base: str) -> nn.Module:
    """A decoder with its LM head and no weights (on the meta device). Raises UserError for an encoder."""
    config = models.changed_config(base)
    if models.family_of(config).encoder:
        raise UserError(f"--base {base}: {config.model_type} is an encoder, which writes no text; give a decoder")
    with torch.device("meta"):
        return models.from_config(AutoModelForCausalLM, base, config)


def vocabulary_head(lm: nn.Module):
    """The LM head as a function: states (N, D) -> logits (N, V), capped where the family caps them."""
    head = lm.get_output_embeddings()
    cap = getattr(lm.config, "final_logit_softcapping", None)
    if cap:
        return lambda hidden: torch.tanh(head(hidden) / cap) * cap
    return head


def vocabulary_modules(lm: nn.Module) -> tuple[str, ...]:
    """Names of the embedding and the LM head, adapted or not."""
    ends = lm.get_input_embeddings(), lm.get_output_embeddings()
    return tuple(name for name, module in lm.named_modules() if module in ends)


def whole_config(lm) -> dict:
    """The config.json of a base whose adapter, if it had one, is merged."""
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    return models.plain_config(lm) | {
        "architectures": [type(lm).__name__],
        "use_cache": True,
        "tie_word_embeddings": tied,
    }


# ---- scores ---------------------------------------------------------------------------------------------------------


def next_token_loss(lm, batch: Batch) -> torch.Tensor:
    """Sum of the next-token losses (nats) of a packed micro-batch; no token is predicted from another sequence."""
    hidden = models.hidden_states(lm.base_model, batch)[batch.targets - 1]  # (P, D) states that predict a token
    chunk = chunk_of(hidden.device.type, lm.get_output_embeddings())
    return losses.lm_cross_entropy(hidden, vocabulary_head(lm), batch.input_ids[batch.targets], chunk)


def chunk_of(kind: str, head: nn.Module) -> int:
    """Rows of logits at a time: a trained head adds up a gradient (V, D) for each chunk, so that GPUs take fewer."""
    return 2048 if kind == "cuda" and is_trained(head) else 512


def is_trained(head: nn.Module) -> bool:
    return any(p.requires_grad for name, p in head.named_parameters() if "lora_" not in name)


@torch.no_grad()
def language_scores(lm, tokens: data.Tokens, world: ddp.World, precision: str, max_tokens: int) -> dict[str, float]:
    """loss (mean nats a token), perplexity and bits_per_byte over all segments, the same on every rank.

    Raises Stopped where a rank was asked to stop in training.
    """
    was_training = lm.training
    lm.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)  # read once, at the end
    for rows in data.pack_by_length(tokens.lengths, max_tokens)[world.rank :: world.size]:
        if signals.STOP.number:
            break
        ddp.computes()
        length = int(tokens.lengths[rows].sum())
        with estimates.room_for(length, world.device), numerics.autocast(world.device, precision):
            total += next_token_loss(lm, pack(tokens, rows, world.device, predict=True)).double()
    lm.train(was_training)
    if ddp.stopping(world):
        raise signals.Stopped
    total = ddp.sum_over_ranks(world, float(total))
    loss = total / float(tokens.targets.sum())
    scores = {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}  # e^710 is more than a float holds
    if tokens.bytes:
        scores["bits_per_byte"] = total / np.log(2) / tokens.bytes
    return scores


# ---- completions ----------------------------------------------------------------------------------------------------


def stop_ids(lm, tokenizer) -> set[int]:
    """Tokens that end a completion: EOS of the tokenizer and of the base, and what ends a turn of the chat template."""
    # The base has one id, a list of them, or None.
    stored = lm.generation_config.eos_token_id
    stops = [tokenizer.eos_token_id, *(stored if isinstance(stored, list) else [stored])]
    if tokenizer.chat_template:
        # An added token right behind an answer ends the turn; a model that learned chats writes it in place of EOS.
        try:
            pieces = prompts.chat(tokenizer, [prompts.QUESTION, prompts.turn("assistant", ".")])
        except ValueError:
            pieces = []
        if len(pieces) > 1 and not pieces[-1][0]:
            after = tokenizer(pieces[-1][1].lstrip(), add_special_tokens=False)["input_ids"]
            stops += set(after[:1]) & set(tokenizer.get_added_vocab().values())
    return {token for token in stops if type(token) is int and 0 <= token < lm.config.vocab_size}


def generation_settings(lm, tokenizer) -> dict:
    """The generation_config.json of a saved model: where it begins, stops and pads.

    A base's sampling and penalties are left out: they were chosen for what it was before.
    """
    settings = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(stop_ids(lm, tokenizer)),
        "pad_token_id": data.end_of_text(tokenizer, padding=True),
    }
    return {name: value for name, value in settings.items() if value not in (None, [])}


@contextmanager
def generating(lm: nn.Module):
    """Inside the block a language model takes transformers' `generate`: eval mode, stock attention, and no setting
    of the base's generation_config.json. Afterwards everything is exactly as it was.
    """
    modes = [(module, module.training) for module in lm.modules()]
    settings = lm.generation_config
    attention = lm.config._attn_implementation
    try:
        lm.eval()
        lm.generation_config = GenerationConfig()
        if attention == models.ATTENTION:
            lm.config._attn_implementation = "sdpa"
        with ddp.relaxed():  # top_p adds up probabilities, which GPUs do in any order
            yield lm
    finally:
        lm.generation_config = settings
        lm.config._attn_implementation = attention
        for module, mode in modes:
            module.training = mode


def complete(
    lm, prompts: list, pad: int, stops, precision="fp32", max_new_tokens=256, temperature=0.0, top_p=1.0, seed=0
) -> list[list[int]]:
    """At most max_new_tokens ids after each prompt, up to and with its first stop token, from one left-padded batch.

    Temperature 0 is greedy; else tokens are drawn from seed. Neither the model nor torch's random state is changed.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=lm.device)  # (B, L)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    ends = sorted(stops) or None
    settings = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends, use_cache=True)
    if temperature:
        # top_k 0: transformers by itself draws from the 50 likeliest tokens only.
        settings.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    gpus = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), numerics.autocast(lm.device, precision), generating(lm):
        torch.manual_seed(seed)
        out = lm.generate(ids, attention_mask=mask, generation_config=settings)

    # Rows that end early are padded; what counts ends with the first stop token.
    completions = out[:, longest:].tolist()
    for row in completions:
        end = next((i for i, token in enumerate(row, 1) if token in stops), len(row))
        del row[end:]
    return completions


def completion_text(tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of a completion without special tokens, as it stands behind its prompt: some tokenizers drop the space
    before a text's first word.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = decode(prompt)
    whole = decode(prompt + ids)
    return whole[len(before) :] if whole.startswith(before) else decode(ids)


def generate(lm, tokenizer, rows: list[list[int]], **options) -> list[str]:
    """The completions of one batch of encoded prompts as text; options: those of `complete`.

    A model in training is left exactly as it was.
    """
    pad = data.end_of_text(tokenizer, padding=True)
    completions = complete(lm, rows, pad, stop_ids(lm, tokenizer), **options)
    return [completion_text(tokenizer, row, ids) for row, ids in zip(rows, completions, strict=True)]
