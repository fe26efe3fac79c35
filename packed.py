"""Packed batches and attention over them: torch and numpy only, so that this file alone can be lifted elsewhere.

`pack` makes one row of many sequences; `packed_attention` keeps them apart by length, without padding or masks:
    AttentionInterface.register("packed", packed_attention)
    model = AutoModel.from_pretrained(folder, attn_implementation="packed")
    batch = pack(tokens, rows, device)
    model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, packed=batch)
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class Batch:
    """One packed micro-batch on its device: B sequences, T tokens; the longest sequence has L tokens."""

    lengths: tuple[int, ...]  # on the host: reading cu_seqlens would wait for the GPU
    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, from 0 in each sequence
    cu_seqlens: Tensor  # (B + 1,) int32, where each sequence starts, and the end of the last one
    targets: Tensor | None = None  # (P,) int64, for a language model: positions of the tokens to predict
    asked: Tensor | None = None  # (B,) int64: positions whose last states are all that is needed
    beside: tuple[Tensor, ...] = ()  # what else came with the rows

    @cached_property
    def padding(self) -> tuple[Tensor, Tensor]:
        """Right-padding, where a sequence repeats its last token, and back: indices (B, L), and (T,) into (B * L)."""
        starts = self.cu_seqlens[:-1, None]
        longest = max(self.lengths)
        columns = torch.arange(longest, device=starts.device)
        index = torch.minimum(starts + columns, self.cu_seqlens[1:, None] - 1)
        return index, sequence_of_tokens(self.cu_seqlens, sum(self.lengths)) * longest + self.position_ids


def sequence_of_tokens(cu_seqlens: Tensor, total: int) -> Tensor:
    """(T,) int64: the sequence of each token of a packed row. total: T, which the host knows without waiting."""
    return torch.repeat_interleave(cu_seqlens.diff().long(), output_size=total)


def pack(tokens, rows: np.ndarray, device, predict: bool = False, beside=()) -> Batch:
    """Concatenate rows of tokens into one packed micro-batch; predict: with its targets, for a language model.

    beside: arrays that travel with them. tokens: anything with `lengths` (N,), `row(i)` (its ids) and, for predict,
    `starts`, `stops` (N,), `learned` ((T,) bool over the ids of all rows, or None for everything).
    """
    lengths = tokens.lengths[rows]
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    input_ids = np.concatenate([tokens.row(i) for i in rows]).astype(np.int64)
    position_ids = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)
    arrays = [input_ids, position_ids, cu_seqlens]

    # Nothing stands before a sequence's first token that could predict it.
    if predict:
        predicted = position_ids > 0
        if tokens.learned is not None:
            predicted &= np.concatenate([tokens.learned[tokens.starts[i] : tokens.stops[i]] for i in rows])
        arrays.append(np.flatnonzero(predicted))

    # From pinned memory the copy runs while the GPU still computes.
    tensors = [torch.from_numpy(array) for array in (*arrays, *beside)]
    if torch.device(device).type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    tensors = [tensor.to(device, non_blocking=True) for tensor in tensors]
    count = len(arrays)
    return Batch(tuple(lengths.tolist()), *tensors[:count], beside=tuple(tensors[count:]))


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    packed=None,
    is_causal=None,
    **options,
):
    """Block-diagonal attention over one packed row: query (1, H, T, d), key and value (1, H_kv, T, d) -> (1, T, H, d).

    packed: its Batch. Causal unless is_causal, or else the module, says otherwise. A window lets token i see i - window
    + 1 .. i (and as far ahead if not causal). Raises AssertionError without a batch, ValueError for other options.
    """
    if packed is None:
        raise AssertionError(f"{type(module).__name__} got no batch: its model does not pass keyword arguments on")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} asks for {name}, which packed attention does not compute")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal

    # Rotary angles in fp32 on a residual stream in fp32 leave query and key in fp32.
    query = query.to(value.dtype)
    key = key.to(value.dtype)

    # A window matters where some sequence is longer.
    window = None
    if sliding_window and sliding_window < max(packed.lengths):
        window = sliding_window
    kernel = KERNELS.get(query.device.type, attention_by_sequence)
    return kernel(query, key, value, packed, dropout, scaling, window, causal), None


def attention_by_sequence(query, key, value, packed, dropout, scaling, window, causal):
    """One call a sequence, with a mask (n, n) only where the sequence is longer than the window: no padding."""
    outs = []
    splits = [t.split(packed.lengths, dim=2) for t in (query, key, value)]
    for q, k, v, length in zip(*splits, packed.lengths, strict=True):  # (1, H, n, d)
        mask = None
        if window and window < length:
            positions = torch.arange(length, device=q.device)
            distance = positions[:, None] - positions
            mask = distance.abs() < window
            if causal:
                mask &= distance >= 0
        whole = causal and mask is None

        # Torch's kernel for CPUs takes twice as long in half precision, unless the sequence is long.
        if length <= SHORT:
            q, k, v = q.float(), k.float(), v.float()
        out = scaled_dot_product_attention(q, k, v, mask, dropout, whole, scale=scaling, enable_gqa=True)
        outs.append(out.to(value.dtype))
    return torch.cat(outs, dim=2).transpose(1, 2)  # (1, T, H, d)


SHORT = 512  # tokens of a sequence
KERNELS = {}  # by the kind of device, instead of this loop: see packed_cuda.py
