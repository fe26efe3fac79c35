"""Sequence classifiers of transformers, run over packed rows: loading, families, pooling, heads.

The only file that touches transformers' model classes, with language.py. Attention is one function in transformers'
attention interface, which keeps the sequences of a packed row apart by their lengths: the stock mask lets them leak.
A new family is a row of FAMILIES and a test that packed == padded == alone; a new pooling is a row of POOLINGS.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

import bases
import fused
import lora
import nf4
import numerics
import packed_cuda
from errors import UserError, few, one_line
from packed import KERNELS, Batch, packed_attention, sequence_of_tokens

ATTENTION = "lasttoken"
AttentionInterface.register(ATTENTION, packed_attention)
KERNELS["cuda"] = packed_cuda.attention
logging.disable_progress_bar()  # transformers' bars for weights; ours is the one of training
logging.set_verbosity_error()  # its tables of missing weights: we account for every tensor ourselves


# ---- families -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What sets a model_type of transformers apart. Without a row: a decoder that runs right-padded.

    head: (classifier m, pooled states x (B, D)) -> logits (B, C), by transformers' own modules; those that pool by
    themselves read a sequence's first state. poolings: those of transformers' own classifier, its default first.
    packs: it computes packed rows right with our attention, as a test shows. transformers' own flag is not enough: with
    it gpt-oss, Llama 4 and hybrids still drop attention sinks, ignore chunked masks or carry state between rows.
    """

    head: Callable = lambda m, x: m.score(m.dropout(x))
    poolings: tuple[str, ...] = ("last",)
    encoder: bool = False
    packs: bool = True


# Tensors of a text model's layers; old checkpoints hold some that are no weights.
OF_LAYERS = re.compile(r"(?:\w+\.){0,2}(?:layers?|h)\.\d+\.(?!.*(?:inv_freq|masked_bias|attn\.bias)$)")
CLS = {"poolings": ("cls",), "encoder": True}
FAMILIES = {
    **dict.fromkeys("qwen2 qwen3 llama mistral gemma3_text phi3".split(), Family()),
    "bert": Family(lambda m, x: m.classifier(m.dropout(m.bert.pooler(x[:, None]))), **CLS),
    **dict.fromkeys(("roberta", "xlm-roberta"), Family(lambda m, x: m.classifier(x[:, None]), **CLS)),
    "distilbert": Family(lambda m, x: m.classifier(m.dropout(m.pre_classifier(x).relu())), **CLS),
    "modernbert": Family(lambda m, x: m.classifier(m.drop(m.head(x))), poolings=("cls", "mean"), encoder=True),
    "deberta-v2": Family(lambda m, x: m.classifier(m.dropout(m.pooler(x[:, None]))), **CLS, packs=False),
}


def family_of(config) -> Family:
    """The row of a transformers config."""
    return FAMILIES.get(config.model_type, Family(packs=False))


def stored_pooling(base: str) -> str:
    """The pooling with which transformers' own classifier of this base was trained."""
    config = bases.load_config(base)
    poolings = family_of(config).poolings
    return config.classifier_pooling if len(poolings) > 1 else poolings[0]


# ---- pooling --------------------------------------------------------------------------------------------------------
# Packed states (T, D), cu_seqlens (B + 1,) -> a state (B, D) for each sequence, by position: padding may end a text.


def last(hidden, cu_seqlens):
    return hidden[cu_seqlens[1:].long() - 1]


def first(hidden, cu_seqlens):
    return hidden[cu_seqlens[:-1].long()]


def mean(hidden, cu_seqlens):
    lengths = cu_seqlens.diff()
    sequence = sequence_of_tokens(cu_seqlens, len(hidden))
    sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, sequence, hidden)
    return sums / lengths[:, None]


class AttentionPooling(nn.Module):
    """A learned query's attention over a sequence: the softmax over its tokens of h . query weighs their states h.

    One hop of Lin et al. 2017, https://arxiv.org/abs/1703.03130, without its hidden layer. transformers has no such
    pooling: an export is refused, and peft would load the adapter without it and pool the last token instead.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Linear(width, 1, bias=False)

    def forward(self, hidden, cu_seqlens):
        texts = hidden.split(cu_seqlens.diff().tolist())  # of (n, D)
        return torch.stack([(self.query(states).softmax(0) * states).sum(0) for states in texts])


# A pooling is a function, or a module made for the width D of the states, which becomes a part of the head.
POOLINGS = {"last": last, "mean": mean, "cls": first, "attention": AttentionPooling}


# ---- the classifier -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What makes logits of a backbone's states."""

    outputs: int  # columns of the logits
    pooling: str = "last"  # a key of POOLINGS
    dropout: float = 0.0
    words: tuple[tuple[int, ...], ...] = ()  # token ids of each class, for a head of label words


class Classifier(nn.Module):
    """transformers' own modules of a sequence classifier under their own names, run over packed rows.

    So parameter names are those of its checkpoints and of peft's adapters. The head is the family's own, in fp32
    whatever the rest is. With label words it is a causal LM, and the logits of class c are those of its words' rows of
    the LM head, summed as probabilities.

    heads: names of the modules that are trained whole at head_lr; fresh: names of tensors that the base does not hold.
    Every module that is added here is both, so that it is drawn from the seed, trained, saved and never adapted.
    """

    def __init__(self, whole: nn.Module, head: Head, fresh=()):
        super().__init__()
        for name, module in whole.named_children():
            self.add_module(name, module)
        self.config = whole.config
        self.prefix = whole.base_model_prefix
        self.architecture = type(whole).__name__
        self.family = family_of(self.config)
        self.outputs = head.outputs
        self.pooling = head.pooling
        self.words = head.words

        # What a pooling learns is a module of its own.
        if isinstance(POOLINGS[head.pooling], type):
            self.add_module(f"{head.pooling}_pooling", POOLINGS[head.pooling](self.config.hidden_size))

        # Label words need rows of the LM head; encoders bring a dropout of their own.
        if head.words:
            self.generation_config = whole.generation_config
            self.register_buffer("word_ids", torch.tensor(sum(head.words, ())), persistent=False)
        elif not self.family.encoder:
            if not hasattr(self, "score"):
                known = ", ".join(FAMILIES)
                raise UserError(f"{self.config.model_type}: its head is not known here, as those of {known} are")
            self.dropout = nn.Dropout(head.dropout)

        # Everything beside the backbone is head, and so is the pooler that BERT keeps in it; an LM head is the base's.
        self.heads = tuple(name for name, _ in self.named_children() if name not in (self.prefix, "lm_head"))
        if getattr(self.backbone, "pooler", None) is not None:
            self.heads += (f"{self.prefix}.pooler",)
        for name in self.heads:
            self.get_submodule(name).float()

        held = dict(whole.named_parameters(remove_duplicate=False))
        self.fresh = (*fresh, *(name for name, _ in self.named_parameters() if name not in held))

    @property
    def backbone(self) -> nn.Module:
        return getattr(self, self.prefix)

    def forward(self, batch: Batch) -> torch.Tensor:
        """fp32 logits (B, C) of a packed micro-batch."""
        pool = getattr(self, f"{self.pooling}_pooling", POOLINGS[self.pooling])
        if self.pooling == "last" and fused.installed(bases.decoder_layers(self.backbone)[-1]):
            batch = replace(batch, asked=batch.cu_seqlens[1:].long() - 1)
            pool = lambda pooled, _: pooled  # noqa: E731
        hidden = hidden_states(self.backbone, batch)  # (T, D), or (B, D)
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = pool(hidden.float(), batch.cu_seqlens)  # (B, D)
            return self.word_logits(pooled) if self.words else self.family.head(self, pooled)

    def word_logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, C): log of the summed exp of each class's words."""
        logits = lora.output_rows(self.lm_head, pooled, self.word_ids)  # (B, words of all classes)
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        classes = logits.split([len(tokens) for tokens in self.words], dim=1)
        return torch.stack([words.logsumexp(1) for words in classes], dim=1)


def hidden_states(backbone: nn.Module, batch: Batch) -> torch.Tensor:
    """Final hidden states (T, D) of a packed micro-batch; a family that cannot pack runs right-padded inside."""
    if backbone.config._attn_implementation == ATTENTION:
        positions = batch.position_ids + first_position(backbone)
        out = backbone(input_ids=batch.input_ids[None], position_ids=positions[None], use_cache=False, packed=batch)
        return out.last_hidden_state[0]
    index, back = batch.padding
    mask = torch.arange(index.shape[1], device=index.device) < batch.cu_seqlens.diff()[:, None]  # (B, L)
    out = backbone(input_ids=batch.input_ids[index], attention_mask=mask.long())
    return out.last_hidden_state.flatten(0, 1)[back]


def first_position(backbone: nn.Module) -> int:
    """The id of a sequence's first position: 0, but after the padding row in RoBERTa's table of positions."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def attention_note(device: torch.device, config, precision: str) -> str:
    """Which attention runs here, and why."""
    if not family_of(config).packs:
        return f"stock attention on right-padded rows: {config.model_type} is not known to compute packed rows right"
    if device.type != "cuda":
        return "packed, one fused call per sequence: fastest on a CPU, because padding costs time there"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return packed_cuda.note(device, numerics.DTYPES[precision], head_dim)


# ---- loading --------------------------------------------------------------------------------------------------------


DROPOUTS = ("classifier_dropout", "cls_dropout", "pooler_dropout", "seq_classif_dropout")  # of encoders' heads


def head_class(base: str, head: Head) -> tuple[type, dict]:
    """transformers' auto class for a head, and the changes of the base's config."""
    if head.words:
        return AutoModelForCausalLM, {}
    changes = {"num_labels": head.outputs}
    if family_of(bases.load_config(base)).encoder:
        changes |= dict.fromkeys(DROPOUTS, head.dropout)
    return AutoModelForSequenceClassification, changes


def changed_config(base: str, **changes):
    """The base's config without a cache of keys and values, with changes, and with our attention if its family packs.

    Otherwise attention is transformers' own choice, as DeBERTa has one kind only.
    """
    config = bases.load_config(base)
    config.update({"use_cache": False, **changes})
    if family_of(config).packs:
        config._attn_implementation = ATTENTION
    return config


def from_config(auto, base: str, config, **options) -> nn.Module:
    """A model with drawn weights. Raises UserError for a config that transformers cannot build."""
    try:
        return auto.from_config(config, trust_remote_code=False, **options)
    except Exception as e:  # whatever a foreign config can make of it
        raise UserError(f"--base {base}: no model of this kind can be built from its config ({one_line(e)})") from None


def from_weights(auto, base: str, dtype, **changes) -> tuple[nn.Module, list[str]]:
    """A model on the CPU and the names of its tensors that the base does not hold, or holds in another size."""
    folder = bases.find_base(base)
    bases.need_weights(folder)
    options = {"config": changed_config(base, **changes), "dtype": dtype, "trust_remote_code": False}
    options |= {"weights_only": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        with bases.alone(folder) as folder:
            model, info = auto.from_pretrained(folder, **options)
    except Exception as e:  # whatever a foreign file, pickled ones included, can make of loading
        raise UserError(f"--base {base}: its weights cannot be loaded ({type(e).__name__}: {one_line(e)})") from None
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise UserError(f"--base {base}: an adapter beside this base was loaded into it; give the base alone")
    left = sorted(filter(OF_LAYERS.match, info["unexpected_keys"]))
    if left:
        problem = f"{len(left)} tensors of its layers have no place in a model of its config ({few(left, 3)})"
        raise UserError(f"--base {base}: {problem}: weights and config.json do not belong together")
    damaged = bases.not_finite(model)
    if damaged:
        problem = f"{len(damaged)} of its weights hold NaN or infinity ({few(damaged, 3)})"
        raise UserError(f"--base {base}: {problem}: they are damaged, or overflowed when they were cast")
    prepare_layers(model)
    return model, sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})


def refuse_missing(base: str, names: list[str]) -> None:
    """Raise UserError when tensors are missing."""
    if names:
        problem = f"{len(names)} tensors are missing from its weights or misshapen ({names[0]}, ...)"
        raise UserError(f"--base {base}: {problem}")


def prepare_layers(model: nn.Module) -> None:
    """Fused layers (see fused.py), and fp32 from the embedding on: a half-precision stream overflows otherwise.

    Cast again before the first layer, for some bases project a narrow embedding to the layers' width in between.
    """
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
    layers = bases.decoder_layers(model)
    layers[0].register_forward_pre_hook(_cast_input)
    fused.install(layers, model.config)


def _cast_input(module, inputs):
    return inputs and (inputs[0].float(), *inputs[1:])


def skeleton(base: str, head: Head, layers: int = 0, max_length: int = 0) -> Classifier:
    """A classifier without weights (on the meta device), to check structure before anything is loaded.

    Raises UserError for a family without the head, a head that the family's logits do not allow, and more trained
    layers or tokens than there are layers or positions.
    """
    auto, changes = head_class(base, head)
    config = changed_config(base, **changes)
    encoder = family_of(config).encoder
    if head.words and (encoder or hasattr(config, "logit_scale") or hasattr(config, "logits_scaling")):
        raise UserError(f"--head label_words on {config.model_type}: it needs a decoder with a plain LM head")
    with torch.device("meta"):
        model = Classifier(from_config(auto, base, config), head)
    if head.pooling == "cls" and not encoder:
        raise UserError(f"--pooling cls on {config.model_type}: a causal decoder's first token sees nothing; take last")
    available = len(bases.decoder_layers(model.backbone))
    if layers > available:
        raise UserError(f"--train_layers {layers}: this base has {available} layers")
    for name, table in model.backbone.named_modules():
        if isinstance(table, nn.Embedding) and name.endswith(("position_embeddings", "wpe")):
            most = table.num_embeddings - first_position(model.backbone)
            if max_length > most:
                raise UserError(f"--max_length {max_length}: this base has positions for {most} tokens; lower it")
    bases.need_positions(base, max_length)
    return model


def load_classifier(
    base: str, head: Head, device: torch.device, dtype: torch.dtype, quant="none", compute=torch.float32, seed=0
) -> Classifier:
    """A classifier on its device: the base's weights in `dtype`, or its layers in nf4; a fresh head drawn from seed.

    compute: the dtype of nf4 products. A base that is a classifier with this many outputs brings its head. Raises
    UserError when weights are missing or do not fit.
    """
    auto, changes = head_class(base, head)
    whole, fresh = from_weights(auto, base, "auto" if quant == "nf4" else dtype, **changes)
    model = Classifier(whole, head, fresh)
    refuse_missing(base, [name for name in fresh if not lora.within(name, model.heads)])
    model.base_fingerprint = bases.fingerprint(model)
    draw_fresh(model, seed)

    # The layers go to the device one by one in nf4; what stays in 16 bits takes the dtype of frozen weights.
    if quant == "nf4":
        nf4.quantize(model.backbone, device, compute)
        for name, p in model.named_parameters():
            if p.is_floating_point() and not lora.within(name, model.heads):
                p.data = p.data.to(device, dtype)
    return model.to(device)


def draw_fresh(model: Classifier, seed: int) -> None:
    """Draw every tensor that the base does not hold from the seed alone: linears normal with std 0.02 and zero biases.

    Other modules draw themselves. Raises AssertionError for a module that does not.
    """
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        fresh = {n for n, _ in module.named_parameters(recurse=False) if f"{name}.{n}" in model.fresh}
        if fresh and not hasattr(module, "reset_parameters"):
            raise AssertionError(f"{name}: reset_parameters() is missing, which draws {', '.join(fresh)} from the seed")
        if fresh - {"bias"}:
            module.reset_parameters()
        if isinstance(module, nn.Linear):
            if "weight" in fresh:
                nn.init.normal_(module.weight, std=0.02)
            if fresh and module.bias is not None:
                nn.init.zeros_(module.bias)


# ---- training and saving --------------------------------------------------------------------------------------------


def train_layers(model: Classifier, count: int) -> list[str]:
    """Train the head and the last `count` layers with the final norm (0: the head alone; -1: the whole base), as fp32.

    Returns the names of the trained parameters.
    """
    modules = [model] if count == -1 else [model.get_submodule(name) for name in model.heads]
    if count > 0:
        modules += bases.decoder_layers(model.backbone)[-count:]
        modules += [module for name, module in model.backbone.named_children() if "norm" in name]
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_().float()
    return [name for name, p in model.named_parameters() if p.requires_grad]


def add_adapter(model: Classifier, adapter: lora.Adapter) -> None:
    """LoRA on the backbone and a trained head; everything else frozen."""
    lora.inject(model, adapter)
    lora.train_only(model)


def head_to_save(model: Classifier) -> tuple[str, ...]:
    """What an adapter trains and saves whole beside its updates: the output layer, and what the base does not hold."""
    output = ("score", "classifier")
    saved = [name for name in model.heads if name in output or any(lora.within(key, [name]) for key in model.fresh)]
    return tuple(sorted(saved, key=lambda name: name not in output))  # the output layer comes first


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model once: a tied LM head is left out, for the embedding holds its weight."""
    first = {}  # by address: its first name, and the tensor
    for name, tensor in model.state_dict().items():
        first.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(first.values())


def classifier_config(model: Classifier, names, pad: int | None = None) -> dict:
    """The config.json with which transformers loads the whole model as its own. names: of the classes."""
    config = plain_config(model) | {"architectures": [model.architecture], "dtype": "float32"}
    config.pop("use_cache", None)
    if model.words:
        return config | {"tie_word_embeddings": model.lm_head.weight is model.backbone.get_input_embeddings().weight}
    if pad is not None and not model.family.encoder:
        config["pad_token_id"] = pad  # transformers pools the last token that is not this one
    if len(model.family.poolings) > 1:
        config["classifier_pooling"] = model.pooling
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def plain_config(model: nn.Module) -> dict:
    """A model's config as its own file holds it: what differs from the family's defaults, no paths, code or kernels."""
    left_out = ("_name_or_path", "_attn_implementation", "transformers_version", "auto_map", "transformers_weights")
    return {key: value for key, value in model.config.to_diff_dict().items() if key not in left_out}


def checkpoint_activations(backbone: nn.Module) -> None:
    """Recompute activations in the backward pass; never reentrant, which trains nothing on a frozen base."""
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in filter(fused.installed, bases.decoder_layers(backbone)):
        fused.recompute(layer)
