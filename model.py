"""The only file that touches transformers' model classes: backbone, packed attention, pooling, head, quantization.

Attention is one function in transformers' attention interface. It sees a micro-batch as one row of concatenated
sequences and keeps them apart by their lengths; no mask tensor exists (PITFALLS: packed rows leak under the stock one).
"""

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

import bases
import lora
import nf4
import numerics
from errors import UserError, one_line
from packed import Packed, packed_attention, takes_grouped

ATTENTION = "lasttoken"


def attention_note(device: torch.device, config, precision: str) -> str:
    """Which attention runs here, and why."""
    causal = config.model_type not in bases.ENCODERS
    if not bases.packs(config):
        return f"stock attention on right-padded rows: {config.model_type} is not known to compute packed rows right"
    if device.type != "cuda":
        return "packed, one fused call a sequence: fastest on a CPU, where no padding is free"
    if not causal:
        return "packed, one fused call a sequence: a bidirectional row cannot be right-padded without a mask"
    if takes_grouped(device, numerics.DTYPES[precision]):
        return "packed, one causal flash call over a micro-batch, grouped key heads"
    return "packed, one causal memory-efficient call over a micro-batch, key heads expanded (below 8.0, or fp32)"


AttentionInterface.register(ATTENTION, packed_attention)
logging.disable_progress_bar()  # transformers' bars for weights; ours is the one of training
logging.set_verbosity_error()  # its tables of missing weights: we account for every tensor ourselves


def _from_config(auto, base: str, config, **options) -> nn.Module:
    """A model with drawn weights. Raises UserError for a family or a config that transformers cannot make one of."""
    try:
        return auto.from_config(config, trust_remote_code=False, **options)
    except Exception as e:  # whatever a foreign config can make of it
        raise UserError(f"--base {base}: no model of this kind can be made of it ({one_line(e)})") from None


def _config(base: str, **changes):
    config = bases.load_config(base)
    for name, value in {"use_cache": False, **changes}.items():
        setattr(config, name, value)
    return config


def _attention(base: str) -> str | None:
    return (
        ATTENTION if bases.packs(bases.load_config(base)) else None
    )  # None: transformers' choice, for DeBERTa has one kind only


def _load(auto, base: str, dtype, **changes) -> tuple[nn.Module, list[str]]:
    """A model on the CPU and the names of its tensors that the base does not hold, or holds in another size."""
    folder = bases.find_base(base)
    bases.need_weights(folder)
    options = {"config": _config(base, **changes), "dtype": dtype, "attn_implementation": _attention(base)}
    safe = {"trust_remote_code": False, "weights_only": True, "ignore_mismatched_sizes": True}
    try:
        with bases.without_adapter(folder) as folder:
            model, info = auto.from_pretrained(folder, **options, **safe, output_loading_info=True)
    except Exception as e:  # whatever a foreign file, pickled ones included, can make of loading
        raise UserError(f"--base {base}: its weights cannot be loaded ({type(e).__name__}: {one_line(e)})") from None
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise UserError(f"--base {base}: an adapter lies beside this base and was put into it; give the base alone")
    model.get_input_embeddings().register_forward_hook(_cast_out)
    return model, sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})


def _refuse_missing(base: str, names: list[str]) -> None:
    if names:
        raise UserError(
            f"--base {base}: {len(names)} tensors are missing from its weights or misshapen ({names[0]}, ...)"
        )


def _cast_out(module, inputs, output):
    """fp32 from the embedding on: the residual stream of a half-precision model overflows otherwise."""
    return output.float()


def hidden_states(backbone: nn.Module, batch) -> torch.Tensor:
    """Final hidden states (T, D) of a packed micro-batch (a data.Batch).

    A family that cannot pack runs right-padded inside, with the same result.
    """
    packed = Packed(batch.cu_seqlens, batch.lengths)
    if backbone.config._attn_implementation == ATTENTION:
        positions = batch.position_ids + first_position(backbone)
        out = backbone(input_ids=batch.input_ids[None], position_ids=positions[None], use_cache=False, packed=packed)
        return out.last_hidden_state[0]
    index, back = packed.gather()
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long()
    mask = torch.arange(index.shape[1], device=index.device) < lengths[:, None]  # (B, L)
    out = backbone(input_ids=batch.input_ids[index], attention_mask=mask.long())
    return out.last_hidden_state.flatten(0, 1)[back]


def first_position(backbone: nn.Module) -> int:
    """The id of a sequence's first position: 0, but after the padding row in RoBERTa's table of positions."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


# ---- the classifier -------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """transformers' own modules of a sequence classifier under their own names, run over packed rows.

    So parameter names are those of its checkpoints and of peft's adapters. The head is the family's own: dropout and
    a bias-free linear `score` for decoders, poolers and `classifier` for encoders, fp32 whatever the rest is. With
    `words` it is a causal LM, and the logits of class c are those of its words' rows of the LM head, summed as
    probabilities. heads: names of the head's modules; fresh: names of tensors that the base did not hold.
    """

    def __init__(self, whole: nn.Module, pooling: str = "last", dropout: float = 0.0, words=(), fresh=()):
        super().__init__()
        for name, module in whole.named_children():
            self.add_module(name, module)
        self.config, self.prefix = whole.config, whole.base_model_prefix
        self.pooling, self.words, self.fresh = pooling, words, tuple(fresh)
        self.family, self.architecture = self.config.model_type, type(whole).__name__
        outside = () if words else tuple(n for n, _ in whole.named_children() if n != self.prefix)
        pooler = () if words or getattr(self.backbone, "pooler", None) is None else (f"{self.prefix}.pooler",)
        self.heads = outside + pooler
        if words:
            sizes = [len(w) for w in words]
            self.word_spans = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
            self.register_buffer("word_ids", torch.tensor([i for w in words for i in w]), persistent=False)
        elif self.family not in bases.ENCODERS:
            if not hasattr(self, "score"):
                raise UserError(
                    f"{self.family}: its head is not known here; the encoders are {', '.join(bases.ENCODERS)}"
                )
            self.dropout = nn.Dropout(dropout)
        for name in self.heads:
            self.get_submodule(name).float()

    @property
    def backbone(self) -> nn.Module:
        return getattr(self, self.prefix)

    @property
    def outputs(self) -> int:
        """Columns of the logits."""
        return len(self.words) or self.config.num_labels

    def forward(self, batch) -> torch.Tensor:
        """fp32 logits (B, C) of a packed micro-batch (a data.Batch)."""
        pooled = pool(hidden_states(self.backbone, batch), batch.cu_seqlens, self.pooling)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.logits(pooled.float())

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """The head: pooled states (B, D) -> logits (B, C). Poolers of encoders read a sequence's first state."""
        if self.words:
            z = lora.output_rows(self.lm_head, pooled, self.word_ids)  # (B, words)
            cap = getattr(self.config, "final_logit_softcapping", None)
            z = torch.tanh(z / cap) * cap if cap else z
            return torch.stack([z[:, span].logsumexp(1) for span in self.word_spans], dim=1)
        if self.family == "bert":
            return self.classifier(self.dropout(self.bert.pooler(pooled[:, None])))
        if self.family == "roberta":
            return self.classifier(pooled[:, None])
        if self.family == "modernbert":
            return self.classifier(self.drop(self.head(pooled)))
        if self.family == "deberta-v2":
            return self.classifier(self.dropout(self.pooler(pooled[:, None])))
        return self.score(self.dropout(pooled))


def _parts(base: str, outputs: int, dropout: float, words) -> tuple[type, dict]:
    """transformers' class of model for a head, and what its config must say for it."""
    if words:
        return AutoModelForCausalLM, {}
    encoder = bases.load_config(base).model_type in bases.ENCODERS
    rates = {n: dropout for n in ("classifier_dropout", "cls_dropout", "pooler_dropout") if encoder}
    return AutoModelForSequenceClassification, {"num_labels": outputs, **rates}


def skeleton(base: str, outputs: int, pooling: str = "last", words=()) -> Classifier:
    """A classifier without weights (on the meta device), to check structure before anything is loaded.

    Raises UserError for a family without the head, or a head that the family's logits do not allow.
    """
    auto, changes = _parts(base, outputs, 0.0, words)
    config = _config(base, **changes)
    if words and (
        config.model_type in bases.ENCODERS or any(hasattr(config, n) for n in ("logit_scale", "logits_scaling"))
    ):
        raise UserError(f"--head label_words on {config.model_type}: it needs a decoder with a plain LM head")
    with torch.device("meta"):
        model = Classifier(_from_config(auto, base, config), pooling, 0.0, words)
    if pooling == "cls" and config.model_type not in bases.ENCODERS:
        raise UserError(f"--pooling cls on {config.model_type}: a causal decoder's first token sees nothing; take last")
    return model


def check_structure(model: Classifier, layers: int, max_length: int) -> None:
    """Raise UserError for trained layers or lengths that a skeleton does not have, before weights are loaded."""
    if layers > len(bases.decoder_layers(model.backbone)):
        raise UserError(f"--train_layers {layers}: this base has {len(bases.decoder_layers(model.backbone))} layers")
    tables = ("position_embeddings", "wpe")
    for name, table in model.backbone.named_modules():
        if isinstance(table, nn.Embedding) and name.rsplit(".", 1)[-1] in tables:
            most = table.num_embeddings - first_position(model.backbone)
            if max_length > most:
                raise UserError(f"--max_length {max_length}: this base has positions for {most} tokens; lower it")


def load_classifier(
    base: str,
    outputs: int,
    device: torch.device,
    dtype: torch.dtype,
    pooling: str = "last",
    dropout: float = 0.0,
    words=(),
    quant: str = "none",
    compute: torch.dtype = torch.float32,
    seed: int = 0,
) -> Classifier:
    """A classifier on its device: the base's weights in `dtype`, or its layers in nf4; a fresh head drawn from seed.

    outputs: columns of the logits; words: token ids of each class, for a head of label words; compute: the dtype of
    nf4 products. A base that is a classifier with this many outputs brings its head. Raises UserError when weights
    are missing or do not fit.
    """
    auto, changes = _parts(base, outputs, dropout, words)
    whole, fresh = _load(auto, base, "auto" if quant == "nf4" else dtype, **changes)
    model = Classifier(whole, pooling, dropout, words, fresh)
    _refuse_missing(base, [n for n in fresh if not lora.within(n, model.heads)])
    model.base_fingerprint = bases.fingerprint(model)
    torch.manual_seed(seed)  # the head follows from the seed alone, whatever loading drew before
    for linear in (m for n, m in model.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" in fresh):
        linear.reset_parameters()
        nn.init.normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    if quant == "nf4":
        nf4.quantize(model.backbone, device, compute)
        for name, p in model.named_parameters():
            if p.is_floating_point() and not lora.within(name, model.heads):
                p.data = p.data.to(device, dtype)
    model.to(device)
    strays = {str(p.device) for p in model.parameters() if p.device != device}
    if strays:
        raise AssertionError(f"weights on {strays}, expected all on {device}")
    return model


def pool(hidden: torch.Tensor, cu_seqlens: torch.Tensor, pooling: str) -> torch.Tensor:
    """One state (B, D) a sequence from packed states (T, D), by position only, never by comparing ids with pad."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if pooling == "last":
        return hidden[ends - 1]
    if pooling == "cls":
        return hidden[starts]
    lengths = ends - starts
    which = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths, output_size=len(hidden))
    total = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32).index_add(0, which, hidden.float())
    return total / lengths[:, None]


def train_layers(model: Classifier, count: int) -> list[str]:
    """Train the head and the last `count` layers with the final norm (0: the head alone; -1: the whole base), as fp32.

    Returns the names of the trained parameters.
    """
    layers = bases.decoder_layers(model.backbone)
    modules = [model.get_submodule(n) for n in model.heads]
    if count > 0:
        modules += [*layers[-count:], *(m for n, m in model.backbone.named_children() if "norm" in n)]
    if count == -1:
        modules.append(model)
    chosen = {id(p) for m in modules for p in m.parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen)
        if id(p) in chosen:
            p.data = p.data.float()
    return [n for n, p in model.named_parameters() if p.requires_grad]


def add_adapter(model: Classifier, adapter: lora.Adapter) -> None:
    """LoRA on the backbone and a trained head; everything else frozen."""
    lora.inject(model, adapter)
    lora.train_only(model)


def head_to_save(model: Classifier) -> tuple[str, ...]:
    """What an adapter trains and saves whole beside its updates: the output layer, and what the base did not hold."""
    last = [n for n in ("score", "classifier") if n in model.heads]
    return tuple(last + [n for n in model.heads if n not in last and any(lora.within(f, [n]) for f in model.fresh)])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model once: what a tied LM head shares stands under the embedding's name."""
    seen, found = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            found[name] = tensor.detach()
        seen.add(tensor.data_ptr())
    return found


def classifier_config(model: Classifier, names, dtype: str = "float32", pad: int | None = None) -> dict:
    """The config.json with which transformers loads the whole model as its own. names: of the classes."""
    config = plain_config(model)
    config.update(architectures=[model.architecture], dtype=dtype)
    config.pop("use_cache", None)
    tied = model.words and model.lm_head.weight is model.backbone.get_input_embeddings().weight
    if model.words:
        return {**config, "tie_word_embeddings": bool(tied)}
    if pad is not None and model.family not in bases.ENCODERS:
        config["pad_token_id"] = pad  # transformers pools the last token that is not this one
    if model.family == "modernbert":
        config["classifier_pooling"] = model.pooling
    if model.outputs == 1:
        config["problem_type"] = "regression"
    return {**config, "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def transformers_pooling(model: Classifier) -> tuple[str, ...]:
    """The poolings with which transformers' own class computes what this one does."""
    return {"modernbert": ("cls", "mean")}.get(model.family, ("cls",) if model.family in bases.ENCODERS else ("last",))


def plain_config(model: nn.Module) -> dict:
    """A model's config as its own file holds it: what differs from the family's defaults, no paths, code or kernels."""
    left_out = ("_name_or_path", "_attn_implementation", "transformers_version", "auto_map", "transformers_weights")
    return {k: v for k, v in model.config.to_diff_dict().items() if k not in left_out}


def checkpoint_activations(backbone: nn.Module) -> None:
    """Recompute activations in the backward pass; never reentrant, which trains nothing on a frozen base."""
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
