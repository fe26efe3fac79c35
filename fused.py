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


def forward(layer, hidden_states: Tensor, position_embeddings=None, cache=None, packed=None, **options) -> Tensor:
    """A layer over one packed row: hidden states (1, T, D) -> (1, T, D), or (1, B, D) of the tokens it is asked for."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    inner = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    products = [product_of(linear) for linear in (*inner, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    is_last = attention.layer_idx == attention.config.num_hidden_layers - 1
    asked = packed.asked if packed and is_last else None
    if PLAIN[0] or packed is None or cache is not None or None in products or not all(map(is_frozen, norms)):
        options |= {"position_embeddings": position_embeddings, "cache": cache, "packed": packed}
        out = type(layer).forward(layer, hidden_states, **options)
        return out if asked is None else out[:, asked]

    # The residual stream stays in fp32; products run in the dtype of autocast.
    stream = hidden_states[0]
    kind = stream.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else stream.dtype
    q, k, v, o, gate, up, down = products
    with torch.autocast(kind, enabled=False):
        queries, keys, values = project(stream, norms[0], [q, k, v], dtype)
        states = attend(attention, queries, keys, values, position_embeddings, packed)
        if asked is not None:  # nobody reads the other tokens of the last layer
            stream, states = stream[asked], states[asked]
        stream = Added.apply(stream, states, o, *o.factors)
        factors = [*gate.factors, *up.factors, *down.factors]
        stream = Fed.apply(stream, norms[1], gate, up, down, dtype, *factors)
    return stream[None]


# ---- products with frozen weights -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A linear with frozen weights, and the LoRA update that it may have."""

    weight: Tensor  # (D_out, D_in)
    bias: Tensor | None
    factors: tuple[Tensor, ...] = ()  # A (rank, D_in) and B (D_out, rank)
    scaling: float = 1.0
    dropout: float = 0.0

    def out(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(..., D_out), with what its backward pass needs: the dropout mask, and A's output (T, rank)."""
        out = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if not self.factors:
            return out, None, None
        a, b = (factor.to(x.dtype) for factor in self.factors)
        keep = keep_mask(x, self.dropout) if self.dropout else None
        low = F.linear(kept(x, keep), a)
        out.addmm_(low, b.T, alpha=self.scale)
        return out, keep, low

    @property
    def scale(self) -> float:
        return self.scaling * keep_scale(self.dropout)

    def back(self, d: Tensor, x: Tensor | None, keep, low, into: Tensor | None, first=True) -> list[Tensor]:
        """Gradients of A and B from that of the output, d. The input's goes to `into`, unless that is None.

        first: it is written there, for the first product of an input; otherwise added.
        """
        if into is not None:
            into.addmm_(d, self.weight.to(d.dtype), beta=not first)
        if not self.factors:
            return []
        a, b = (factor.to(d.dtype) for factor in self.factors)
        d_low = (d @ b).mul_(self.scale)
        d_b = (d.T @ low).mul_(self.scale)
        d_a = d_low.T @ kept(x, keep)
        if into is not None and keep is None:
            into.addmm_(d_low, a)
        elif into is not None:
            into.addcmul_(d_low @ a, keep.to(d.dtype))
        return [d_a.float(), d_b.float()]


def kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep.to(x.dtype)


def product_of(module: nn.Module) -> Product | None:
    """The product of a linear, adapted or not; None where it is of another kind."""
    base = module.base_layer if type(module) is lora.LoRALinear else module
    if type(base) is not nn.Linear or not (is_frozen(base) and is_plain(module)):
        return None
    if module is base or not module.enabled:
        return Product(base.weight, base.bias)
    dropout = module.lora_dropout.p if module.training else 0.0
    return Product(base.weight, base.bias, (module.lora_A.weight, module.lora_B.weight), module.scaling, dropout)


def is_frozen(module: nn.Module) -> bool:
    """Whether none of a module's own parameters gets a gradient, and nobody looks at what it computes."""
    trained = [p for p in module._parameters.values() if p is not None and p.requires_grad]
    return is_plain(module) and not (trained and torch.is_grad_enabled())


def is_plain(module: nn.Module) -> bool:
    """Whether a module has no hooks, which would not be called here."""
    return not (module._forward_hooks or module._forward_pre_hooks)


# ---- norms ----------------------------------------------------------------------------------------------------------


def normed(stream: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) of (..., D), and the factor (..., 1) that each vector got."""
    size = torch.linalg.vector_norm(stream, dim=-1, keepdim=True)
    factor = size.square_().div_(stream.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return (stream * factor).mul_(norm.weight), factor


def normed_again(stream: Tensor, norm: nn.Module, factor: Tensor) -> Tensor:
    return (stream * factor).mul_(norm.weight)


def normed_back(d: Tensor, stream: Tensor, norm: nn.Module, factor: Tensor) -> Tensor:
    """The stream's gradient from that of the normed stream, d, which is overwritten."""
    d = d.mul_(norm.weight)
    shared = (d * stream).sum(-1, keepdim=True).mul_(factor.pow(3) / stream.shape[-1])
    return d.mul_(factor).addcmul_(stream, shared, value=-1)


# ---- the three functions --------------------------------------------------------------------------------------------


def project(stream: Tensor, norm: nn.Module, products: list[Product], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Norm, then products that share its output: (T, D) -> (T, D_out) each."""
    factors = [factor for product in products for factor in product.factors]
    return Projected.apply(stream, norm, products, dtype, *factors)


class Projected(Function):
    @staticmethod
    def forward(ctx, stream, norm, products, dtype, *factors):
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
        for d, product, keep, low in zip(ds, ctx.products, rest[:count], rest[count:], strict=True):
            grads += product.back(d, x, keep, low, into, first=product is ctx.products[0])
        d_stream = None if into is None else normed_back(into.float(), stream, ctx.norm, factor)
        return d_stream, None, None, None, *grads


class Added(Function):
    """stream (T, D) plus a product of x (T, D_in)."""

    @staticmethod
    def forward(ctx, stream, x, product, *factors):
        out, keep, low = product.out(x)
        ctx.product = product
        ctx.save_for_backward(x if product.factors else None, keep, low)
        return stream + out

    @staticmethod
    def backward(ctx, d):
        x, keep, low = ctx.saved_tensors
        dtype = ctx.product.weight.dtype if x is None else x.dtype
        half = d.to(dtype)
        into = d.new_empty(len(d), ctx.product.weight.shape[1], dtype=dtype)
        grads = ctx.product.back(half, x, keep, low, into)
        return d, into, None, *grads


class Fed(Function):
    """stream (T, D) plus the gated MLP of its norm: down(silu(gate(x)) * up(x)), Shazeer 2020, arXiv:2002.05202."""

    @staticmethod
    def forward(ctx, stream, norm, gate, up, down, dtype, *factors):
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
        grads = down.back(d.to(opened.dtype), gated * raised if down.factors else None, *of_down, d_inner)

        d_raised = gated.mul_(d_inner)
        d_opened = torch.ops.aten.silu_backward(d_inner.mul_(raised), opened)
        x = None
        if gate.factors or up.factors:
            x = normed_again(stream, ctx.norm, factor).to(opened.dtype)
        into = opened.new_empty(stream.shape)
        grads = [
            *gate.back(d_opened, x, *of_gate, into),
            *up.back(d_raised, x, *of_up, into, first=False),
            *grads,
        ]
        d_stream = normed_back(into.float(), stream, ctx.norm, factor).add_(d)
        return d_stream, None, None, None, None, None, *grads


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
    queries, keys, values = (t.unflatten(-1, (-1, module.head_dim)) for t in (queries, keys, values))
    if hasattr(module, "q_norm"):
        queries = module.q_norm(queries)
        keys = module.k_norm(keys)
    cos, sin = (angles[0, :, None, : module.head_dim // 2] for angles in position_embeddings)
    queries, keys = (Rotated.apply(t, cos, sin) for t in (queries, keys))
    out, _ = packed_attention(
        module,
        *(t.transpose(0, 1)[None] for t in (queries, keys, values)),
        scaling=module.scaling,
        dropout=module.attention_dropout if module.training else 0.0,
        sliding_window=getattr(module, "sliding_window", getattr(module.config, "sliding_window", None)),
        packed=packed,
    )
    return out[0].flatten(1)
