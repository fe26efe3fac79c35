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
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from packed import packed_attention
from products import Product, back, is_frozen, outs_of, product_of, trained_by

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
        trained = trained_by([gate, up, down])
        stream = Fed.apply(stream, norms[1], gate, up, down, dtype, *trained)
    return stream[None]


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
    return Projected.apply(stream, norm, products, dtype, *trained_by(products))


class Projected(Function):
    @staticmethod
    def forward(ctx, stream, norm, products, dtype, *trained):
        x, factor = normed(stream, norm)
        outs, keep, low = outs_of(products, x.to(dtype))
        ctx.norm, ctx.products, ctx.dtype = norm, products, dtype
        ctx.save_for_backward(stream, factor, keep, low)
        return tuple(outs)

    @staticmethod
    def backward(ctx, *ds):
        stream, factor, keep, low = ctx.saved_tensors
        x = normed_again(stream, ctx.norm, factor).to(ctx.dtype)
        d_x, grads = back(ctx.products, ds, x, keep, low, needed=ctx.needs_input_grad[0])
        d_stream = None if d_x is None else normed_back(d_x.float(), stream, ctx.norm, factor)
        return d_stream, None, None, None, *grads


class Added(Function):
    """stream (T, D) plus a product of x (T, D_in)."""

    @staticmethod
    def forward(ctx, stream, x, product, *trained):
        (out,), keep, low = outs_of([product], x)
        ctx.product, ctx.dtype = product, x.dtype
        ctx.save_for_backward(None if product.a is None else x, keep, low)
        return out.to(stream.dtype).add_(stream)

    @staticmethod
    def backward(ctx, d):
        x, keep, low = ctx.saved_tensors
        d_x, grads = back([ctx.product], [d.to(ctx.dtype)], x, keep, low)
        return d, d_x, None, *grads


class Fed(Function):
    """stream (T, D) plus the gated MLP of its norm: down(silu(gate(x)) * up(x)), Shazeer 2020, arXiv:2002.05202."""

    @staticmethod
    def forward(ctx, stream, norm, gate, up, down, dtype, *trained):
        x, factor = normed(stream, norm)
        (opened, raised), *of_inputs = outs_of([gate, up], x.to(dtype))
        (out,), *of_down = outs_of([down], F.silu(opened).mul_(raised))
        ctx.norm, ctx.products = norm, (gate, up, down)
        ctx.save_for_backward(stream, factor, opened, raised, *of_inputs, *of_down)
        return out.to(stream.dtype).add_(stream)

    @staticmethod
    def backward(ctx, d):
        stream, factor, opened, raised, *rest = ctx.saved_tensors
        gate, up, down = ctx.products
        of_inputs, of_down = rest[:2], rest[2:]
        gated = F.silu(opened)
        inner = None if down.a is None else gated * raised
        d_inner, of_inner = back([down], [d.to(opened.dtype)], inner, *of_down)

        d_raised = gated.mul_(d_inner)
        d_opened = torch.ops.aten.silu_backward(d_inner.mul_(raised), opened)
        x = None
        if gate.a is not None or up.a is not None:
            x = normed_again(stream, ctx.norm, factor).to(opened.dtype)
        d_x, grads = back([gate, up], [d_opened, d_raised], x, *of_inputs)
        d_stream = normed_back(d_x.float(), stream, ctx.norm, factor)
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
