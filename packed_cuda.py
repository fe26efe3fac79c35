"""Attention over packed rows on GPUs: one launch for all sequences, which cu_seqlens keeps apart.

    packed.KERNELS["cuda"] = packed_cuda.attention

Every kernel computes what attention_by_sequence in packed.py does, one call a sequence: that is their plain twin.
"""

import torch
from torch.autograd import Function
from torch.nn.functional import pad, scaled_dot_product_attention


def attention(query, key, value, packed, dropout, scaling, window, causal):
    """One packed row: query (1, H, T, d), key and value (1, H_kv, T, d) -> (1, T, H, d)."""
    gpu = capability(query.device)
    kind = kernel_of(gpu, query.dtype, query.shape[-1], window, dropout)
    kernel = KERNELS[kind]
    return kernel(query, key, value, packed, dropout, scaling, window, causal)


# ---- which kernel ---------------------------------------------------------------------------------------------------


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability, as far as this torch has kernels for it."""
    if not torch.version.cuda:
        return 0, 0  # ROCm: its own kernels take other arguments
    found = torch.cuda.get_device_capability(device)
    if not torch.backends.cuda.is_flash_attention_available():
        found = min(found, (7, 5))
    return found


def kernel_of(capability: tuple[int, int], dtype: torch.dtype, head_dim: int, window=None, dropout=0.0) -> str:
    """flash, efficient (without a copy for padding), or padded: what takes all that is asked for.

    All three compute causal and bidirectional rows. Key heads that are fewer than query heads are repeated, but for
    flash.
    """
    new = capability >= (8, 0)
    if head_dim * dtype.itemsize % 16:  # rows of heads that are not aligned
        return "padded"

    # Where shared memory is small, the backward pass of large heads is not built.
    small = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    most = 256
    if small and (dropout or head_dim <= 224):
        most = 192
    half = dtype in (torch.float16, torch.bfloat16)
    if new and half and head_dim <= most:
        return "flash"

    # Its backward pass is not told of a window (torch 2.13), and would give wrong gradients.
    known = [torch.float16, torch.float32]
    if new:
        known.append(torch.bfloat16)
    if dtype in known and capability >= (5, 0) and not window:
        return "efficient"
    return "padded"


def note(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Which kernel runs on a GPU, in words."""
    words = {
        "flash": "packed, one flash call for all sequences, grouped key heads",
        "efficient": "packed, one memory-efficient call for all sequences, key heads expanded (below 8.0, or fp32)",
        "padded": "packed, right-padded inside attention, key heads expanded (no kernel for this GPU and precision)",
    }
    return words[kernel_of(capability(device), dtype, head_dim)]


# ---- the kernels ----------------------------------------------------------------------------------------------------


def flash(query, key, value, packed, dropout, scaling, window, causal):
    """Flash attention (Dao 2023, arXiv:2307.08691) of sequences of any lengths."""
    left = window - 1 if window else -1  # -1: no limit
    right = 0 if causal else left
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (T, H, d)
    sizes = {"window_size_left": left, "window_size_right": right}
    attend = torch.ops.aten._flash_attention_forward
    results = attend(q, k, v, *bounds(packed), dropout, causal, False, scale=scaling, **sizes)
    return results[0][None]


def efficient(query, key, value, packed, dropout, scaling, window, causal):
    """Memory-efficient attention (Rabe & Staats 2021, arXiv:2112.05682) of sequences of any lengths."""
    key, value = expanded(query, key, value)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (1, T, H, d)
    trains = torch.is_grad_enabled()
    attend = torch.ops.aten._efficient_attention_forward
    kind = int(causal)
    results = attend(q, k, v, None, *bounds(packed), dropout, kind, trains, scale=scaling)
    return results[0]


def bounds(packed):
    """Where queries and keys of each sequence start, and the longest of both."""
    longest = max(packed.lengths)
    return packed.cu_seqlens, packed.cu_seqlens, longest, longest


def padded(query, key, value, packed, dropout, scaling, window, causal):
    """One call over right-padded sequences, with a mask where a token could see padding or too far."""
    index, back = packed.padding  # (B, L), (T,)
    columns = torch.arange(index.shape[1], device=query.device)
    lengths = packed.cu_seqlens.diff()
    real = columns < lengths[:, None]  # (B, L)
    there = index.masked_fill(~real, query.shape[2]).flatten()
    key, value = expanded(query, key, value)
    heads = (Take.apply(t[0], there, back) for t in (query, key, value))
    q, k, v = (t.unflatten(1, index.shape).transpose(0, 1) for t in heads)  # (B, H, L, d)

    # A causal row needs no mask: nothing sees what follows it. Padding sees padding, or its softmax would be NaN.
    mask = None
    if window or not causal:
        mask = (real[:, :, None] == real[:, None, :])[:, None]  # (B, 1, L, L)
        distance = columns[:, None] - columns
        if window:
            mask = mask & (distance.abs() < window)
        if causal:
            mask = mask & (distance >= 0)
    out = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling)
    rows = out.transpose(0, 1).flatten(1, 2)  # (H, B * L, d)
    out = Take.apply(rows, back, there)  # (H, T, d)
    return out.transpose(0, 1)[None]


def expanded(query, key, value):
    """Key and value with each head repeated for its group of query heads."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key = key.repeat_interleave(repeats, dim=1)
        value = value.repeat_interleave(repeats, dim=1)
    return key, value


class Take(Function):
    """x (H, N, d) -> x[:, index], and zeros where index is N. back: its inverse, by which gradients are taken too.

    Torch's own gradient of indexing sorts the index on a GPU, and adds up what can meet only once here.
    """

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return pad(x, (0, 0, 0, 1))[:, index]

    @staticmethod
    def backward(ctx, d):
        (back,) = ctx.saved_tensors
        taken = pad(d, (0, 0, 0, 1))[:, back]
        return taken, None, None


KERNELS = {"flash": flash, "efficient": efficient, "padded": padded}
