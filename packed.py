"""Packed batches and attention over them: torch and numpy only."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import data
from errors import UserError


@dataclass
class Batch:
    """One packed micro-batch on its device."""

    input_ids: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64, from 0 in each sequence
    cu_seqlens: torch.Tensor  # (B + 1,) int32, where each sequence starts
    lengths: tuple[int, ...]  # the same on the host
    targets: torch.Tensor | None = None  # (P,) int64, for a language model: where tokens to be predicted stand


def pack(tokens: data.Tokens, rows: np.ndarray, device, predict: bool = False) -> Batch:
    """Concatenate rows into one packed micro-batch; built on the CPU, copied once. predict: with its targets."""
    lengths = tokens.lengths[rows]
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([tokens.row(i) for i in rows]).astype(np.int64)
    positions = np.arange(len(ids)) - np.repeat(cu[:-1].astype(np.int64), lengths)
    arrays = [ids, positions, cu]
    if predict:
        spans = [slice(tokens.starts[i], tokens.stops[i]) for i in rows]
        learned = True if tokens.learned is None else np.concatenate([tokens.learned[s] for s in spans])
        arrays.append(np.flatnonzero((positions > 0) & learned))
    parts = [torch.from_numpy(a) for a in arrays]
    if torch.device(device).type == "cuda":
        parts = [p.pin_memory() for p in parts]
    parts = [p.to(device, non_blocking=True) for p in parts]
    return Batch(*parts[:3], tuple(int(n) for n in lengths), *parts[3:])


# ---- packed attention -----------------------------------------------------------------------------------------------


@dataclass
class Packed:
    """How a row of concatenated sequences falls apart; shared by all layers of a forward pass."""

    cu_seqlens: torch.Tensor  # (B + 1,) int32
    lengths: tuple[int, ...]

    def __post_init__(self):
        self._gather = None

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (B, L) of each sequence's tokens in the packed row (its last one repeated), and (T,) the way back."""
        if self._gather is None:
            device, longest = self.cu_seqlens.device, max(self.lengths)
            starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
            columns = torch.arange(longest, device=device)
            out = torch.minimum(starts[:, None] + columns, ends[:, None] - 1)  # (B, L)
            which = torch.repeat_interleave(
                torch.arange(len(self.lengths), device=device), ends - starts, output_size=sum(self.lengths)
            )
            back = which * longest + torch.arange(sum(self.lengths), device=device) - starts[which]  # (T,)
            self._gather = out, back
        return self._gather


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
    **kwargs,
):
    """Block-diagonal attention over one packed row: query (1, H, T, d), key and value (1, H_kv, T, d) -> (1, T, H, d).

    Causal unless the module says otherwise; a sliding window lets token i see tokens i - window + 1 .. i (and as far
    ahead where not causal), as in transformers. Signature: https://huggingface.co/docs/transformers/attention_interface
    """
    if packed is None:
        raise AssertionError(f"{type(module).__name__} got no packing: its model does not pass keyword arguments on")
    unknown = [n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None]
    if unknown:
        raise UserError(f"{type(module).__name__} asks for {unknown}, which packed attention does not do")
    query, key = query.to(value.dtype), key.to(value.dtype)  # fp32 rotary angles on an fp32 residual leave them fp32
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    longest = max(packed.lengths)
    window = sliding_window if sliding_window and sliding_window < longest else None
    grouped = query.is_cuda and takes_grouped(query.device, query.dtype)
    if not grouped and key.shape[1] != query.shape[1]:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": grouped and key.shape[1] != query.shape[1]}
    if query.is_cuda and causal and window is None:
        return _padded(query, key, value, packed, options).transpose(1, 2), None
    outs = []
    parts = zip(*(t.split(packed.lengths, dim=2) for t in (query, key, value)), strict=True)
    for q, k, v in parts:  # (1, H, n, d)
        n = q.shape[2]
        band = _band(n, window, causal, q.device) if window and n > window else None
        outs.append(F.scaled_dot_product_attention(q, k, v, band, is_causal=causal and band is None, **options))
    return torch.cat(outs, dim=2).transpose(1, 2), None


def _padded(query, key, value, packed: Packed, options: dict) -> torch.Tensor:
    """One causal kernel call over right-padded sequences: what follows a token is never seen, so no mask is needed."""
    out, back = packed.gather()
    q, k, v = (t[0][:, out].transpose(0, 1) for t in (query, key, value))  # (B, H, L, d)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)  # (B, H, L, d)
    return y.transpose(0, 1).flatten(1, 2)[None][:, :, back]  # (1, H, T, d)


def _band(n: int, window: int, causal: bool, device) -> torch.Tensor:
    """(n, n) bool: which keys a query sees within its window."""
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)[None, :]
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def takes_grouped(device, dtype) -> bool:
    """Whether the fused kernel takes fewer key heads than query heads: flash, from capability 8.0 in half precision."""
    return torch.cuda.get_device_capability(device) >= (8, 0) and dtype in (torch.float16, torch.bfloat16)
