"""Decoder layers in few passes over memory: transformers' own values, with backward passes written by hand.

The plain forward of a layer keeps each of its results for the backward pass and reads them again there. Here a layer
is three autograd functions around attention. They keep the residual stream and the outputs of large products, and
compute norms and activations again, which costs less than to keep them.

    install(backbone)      # the layers whose structure is known get another forward
    with plain(): ...      # their own forward: what these functions are tested against

A layer runs its own forward wherever this one does not apply: weights that are trained or quantized, hooks on its
modules, a cache of keys, attention of another kind.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import lora
from dropout import keep_mask, keep_scale
from packed import packed_attention

KNOWN = {f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}
PLAIN = [False]


def install(layers: nn.ModuleList, config) -> None:
    """Give layers of a known class this file's forward."""
    for layer in layers:
        if type(layer).__name__ in KNOWN and config.hidden_act == "silu":
            layer.forward = MethodType(forward, layer)


def installed(layer: nn.Module) -> bool:
    """Whether a layer has this file's forward, and gives only the tokens that are asked for."""
    return getattr(layer.forward, "__func__", None) is forward


@contextmanager
def plain():
    """Inside the block all layers run their own forward."""
    PLAIN[0] = True
    try:
        yield
    finally:
        PLAIN[0] = False


def recompute(layer: nn.Module) -> None:
    """Let an installed layer keep its input alone, and compute the rest again in the backward pass.

    transformers would do so with the forward of the layer's class.
    """
    layer.gradient_checkpointing = False
    layer.recomputed = True


def forward(layer, hidden_states: Tensor, **options) -> Tensor:
    """A layer over one packed row: hidden states (1, T, D) -> (1, T, D), or (1, B, D) of the tokens it is asked for."""
    if layer.training and getattr(layer, "recomputed", False):
        return checkpoint(compute, layer, hidden_states, use_reentrant=False, **options)
    return compute(layer, hidden_states, **options)


def compute(layer, hidden_states: Tensor, position_embeddings=None, cache=None, packed=None, **options) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    linears = [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]
    products = list(map(product_of, linears))
    is_last = attention.layer_idx == attention.config.num_hidden_layers - 1
    asked = packed.asked if packed and is_last else None

    modules = (*norms, attention, mlp)
    fits = None not in products and all(map(is_frozen, modules))
    if PLAIN[0] or packed is None or cache is not None or not fits:
        options |= {"position_embeddings": position_embeddings, "cache": cache, "packed": packed}
        out = type(layer).forward(layer, hidden_states, **options)
        return out if asked is None else out[:, asked]

    # The residual stream stays in fp32; products run in the dtype of autocast.
    stream = hidden_states[0]
    kind = stream.device.type
    dtype = stream.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    q, k, v, o, gate, up, down = products
    with torch.autocast(kind, enabled=False):
        queries, keys, values = project(stream, norms[0], [q, k, v], dtype)
        states = attend(attention, queries, keys, values, position_embeddings, packed)
        if asked is not None:  # nobody reads the other tokens of the last layer
            stream = stream[asked]
            states = states[asked]
        stream = Added.apply(stream, states, o, *o.trained)
        trained = [*gate.trained, *up.trained, *down.trained]
        stream = Fed.apply(stream, norms[1], gate, up, down, dtype, *trained)
    return stream[None]


# ---- products with frozen weights -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A linear with a frozen weight, its bias, and the LoRA update that it may have."""

    weight: Tensor  # (D_out, D_in)
    bias: Tensor | None
    a: Tensor | None = None  # (rank, D_in)
    b: Tensor | None = None  # (D_out, rank)
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def trained(self) -> list[Tensor]:
        """What gets a gradient: A and B, and a bias that is trained."""
        return [p for p in (self.a, self.b, self.bias) if p is not None and p.requires_grad]

    @property
    def scale(self) -> float:
        """Of the update, with what dropout multiplies by."""
        return self.scaling * keep_scale(self.dropout)

    def out(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(T, D_out), with what its backward pass needs: the dropout mask, and A's output (T, rank)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = F.linear(x, self.weight.to(x.dtype), bias)
        if self.a is None:
            return out, None, None
        keep = keep_mask(x, self.dropout) if self.dropout else None
        low = F.linear(kept(x, keep), self.a.to(x.dtype))
        out.addmm_(low, self.b.to(x.dtype).T, alpha=self.scale)
        return out, keep, low

    def back(self, d: Tensor, x: Tensor | None, keep, low, into: Tensor | None, first=True) -> list[Tensor]:
        """Gradients of what is trained from that of the output, d. The input's goes to `into`, unless that is None.

        first: it is written there, for the first product of an input; otherwise added.
        """
        if into is not None:
            into.addmm_(d, self.weight.to(d.dtype), beta=not first)
        grads = []
        if self.a is not None:
            d_low = (d @ self.b.to(d.dtype)).mul_(self.scale)
            d_a = d_low.T @ kept(x, keep)
            d_b = (d.T @ low).mul_(self.scale)
            grads = [(self.a, d_a), (self.b, d_b)]
            if into is not None:
                add_kept(into, d_low @ self.a.to(d.dtype), keep)
        if self.bias is not None:
            grads.append((self.bias, d))
        return [d.float().sum(0) if p is self.bias else d.float() for p, d in grads if p.requires_grad]


def kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep.to(x.dtype)


def add_kept(total: Tensor, x: Tensor, keep: Tensor | None) -> None:
    if keep is None:
        total.add_(x)
    else:
        total.addcmul_(x, keep.to(x.dtype))


def product_of(module: nn.Module) -> Product | None:
    """The product of a linear, adapted or not; None where it is of another kind."""
    base = module.base_layer if type(module) is lora.LoRALinear else module
    if type(base) is not nn.Linear or not (is_plain(base) and is_plain(module)):
        return None
    if base.weight.requires_grad and torch.is_grad_enabled():
        return None
    if module is base or not module.enabled:
        return Product(base.weight, base.bias)
    return Product(
        base.weight,
        base.bias,
        module.lora_A.weight,
        module.lora_B.weight,
        module.scaling,
        module.lora_dropout.p if module.training else 0.0,
    )


def is_frozen(module: nn.Module) -> bool:
    """Whether none of a module's own parameters gets a gradient, and nobody looks at what it computes."""
    trained = any(p.requires_grad for p in module.parameters(recurse=False))
    return is_plain(module) and not (trained and torch.is_grad_enabled())


def is_plain(module: nn.Module) -> bool:
    """Whether a module has no hooks, which would not be called here."""
    return not (module._forward_hooks or module._forward_pre_hooks)


# ---- norms ----------------------------------------------------------------------------------------------------------


def normed(stream: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) of (..., D), and the factor (..., 1) that each vector got."""
    size = torch.linalg.vector_norm(stream, dim=-1, keepdim=True)
    mean_square = size.square_().div_(stream.shape[-1])
    factor = mean_square.add_(norm.variance_epsilon).rsqrt_()
    return normed_again(stream, norm, factor), factor


def normed_again(stream: Tensor, norm: nn.Module, factor: Tensor) -> Tensor:
    return (stream * factor).mul_(norm.weight)


def normed_back(d: Tensor, stream: Tensor, norm: nn.Module, factor: Tensor) -> Tensor:
    """The stream's gradient from that of the normed stream, d, which is overwritten."""
    d.mul_(norm.weight)
    along = (d * stream).sum(-1, keepdim=True)
    along.mul_(factor.pow(3)).div_(stream.shape[-1])
    return d.mul_(factor).addcmul_(stream, along, value=-1)


# ---- the three functions --------------------------------------------------------------------------------------------


def project(stream: Tensor, norm: nn.Module, products: list[Product], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Norm, then products that share its output: (T, D) -> (T, D_out) each."""
    trained = [p for product in products for p in product.trained]
    return Projected.apply(stream, norm, products, dtype, *trained)


class Projected(Function):
    @staticmethod
    def forward(ctx, stream, norm, products, dtype, *trained):
        x, factor = normed(stream, norm)
        x = x.to(dtype)
        outs, keeps, lows = zip(*(product.out(x) for product in products), strict=True)
        ctx.norm, ctx.products, ctx.dtype = norm, products, dtype
        ctx.save_for_backward(stream, factor, *keeps, *lows)
        return outs

    @staticmethod
    def backward(ctx, *ds):
        stream, factor, *rest = ctx.saved_tensors
        count = len(ctx.products)
        x = normed_again(stream, ctx.norm, factor).to(ctx.dtype)
        into = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grads = []
        keeps, lows = rest[:count], rest[count:]
        for d, product, keep, low in zip(ds, ctx.products, keeps, lows, strict=True):
            first = product is ctx.products[0]
            grads += product.back(d, x, keep, low, into, first)
        d_stream = None if into is None else normed_back(into.float(), stream, ctx.norm, factor)
        return d_stream, None, None, None, *grads


class Added(Function):
    """stream (T, D) plus a product of x (T, D_in)."""

    @staticmethod
    def forward(ctx, stream, x, product, *trained):
        out, keep, low = product.out(x)
        ctx.product, ctx.dtype = product, x.dtype
        ctx.save_for_backward(None if product.a is None else x, keep, low)
        return stream + out

    @staticmethod
    def backward(ctx, d):
        x, keep, low = ctx.saved_tensors
        into = d.new_empty(len(d), ctx.product.weight.shape[1], dtype=ctx.dtype)
        grads = ctx.product.back(d.to(ctx.dtype), x, keep, low, into)
        return d, into, None, *grads


class Fed(Function):
    """stream (T, D) plus the gated MLP of its norm: down(silu(gate(x)) * up(x)), Shazeer 2020, arXiv:2002.05202."""

    @staticmethod
    def forward(ctx, stream, norm, gate, up, down, dtype, *trained):
        x, factor = normed(stream, norm)
        x = x.to(dtype)
        opened, *of_gate = gate.out(x)
        raised, *of_up = up.out(x)
        out, *of_down = down.out(F.silu(opened).mul_(raised))
        ctx.norm, ctx.products = norm, (gate, up, down)
        ctx.save_for_backward(stream, factor, opened, raised, *of_gate, *of_up, *of_down)
        return stream + out

    @staticmethod
    def backward(ctx, d):
        stream, factor, opened, raised, *rest = ctx.saved_tensors
        gate, up, down = ctx.products
        of_gate, of_up, of_down = rest[:2], rest[2:4], rest[4:]
        gated = F.silu(opened)
        d_inner = torch.empty_like(opened)
        inner = None if down.a is None else gated * raised
        of_inner = down.back(d.to(opened.dtype), inner, *of_down, d_inner)

        d_raised = gated.mul_(d_inner)
        d_opened = torch.ops.aten.silu_backward(d_inner.mul_(raised), opened)
        x = None
        if gate.a is not None or up.a is not None:
            x = normed_again(stream, ctx.norm, factor).to(opened.dtype)
        into = opened.new_empty(stream.shape)
        grads = gate.back(d_opened, x, *of_gate, into)
        grads += up.back(d_raised, x, *of_up, into, first=False)
        d_stream = normed_back(into.float(), stream, ctx.norm, factor)
        return d_stream.add_(d), None, None, None, None, None, *grads, *of_inner


# ---- attention ------------------------------------------------------------------------------------------------------


class Rotated(Function):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): x (T, H, d) turned by angles (T, 1, d / 2)."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx, d):
        cos, sin = ctx.saved_tensors
        return turned(d, cos, -sin), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    left, right = x.chunk(2, dim=-1)
    out_left, out_right = out.chunk(2, dim=-1)
    torch.mul(left, cos, out=out_left).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=out_right).addcmul_(left, sin)
    return out.to(x.dtype)


def attend(module, queries, keys, values, position_embeddings, packed) -> Tensor:
    """Attention of one packed row: queries (T, H * d), keys and values (T, H_kv * d) -> (T, H * d)."""
    heads = (-1, module.head_dim)
    queries = queries.unflatten(-1, heads)
    keys = keys.unflatten(-1, heads)
    values = values.unflatten(-1, heads)
    if hasattr(module, "q_norm"):
        queries = module.q_norm(queries)
        keys = module.k_norm(keys)
    cos, sin = (angles[0, :, None, : module.head_dim // 2] for angles in position_embeddings)
    queries = Rotated.apply(queries, cos, sin)
    keys = Rotated.apply(keys, cos, sin)
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:  # Mistral has one for all layers
        window = getattr(module.config, "sliding_window", None)
    out, _ = packed_attention(
        module,
        *(t.transpose(0, 1)[None] for t in (queries, keys, values)),
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
        sliding_window=window,
        packed=packed,
    )
    return out[0].flatten(1)
