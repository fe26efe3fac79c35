"""nf4."""

import torch
from torch import nn

import bases
import optim
from errors import UserError


def quantize(backbone: nn.Module, device: torch.device, compute: torch.dtype) -> None:
    """Store the linears of the layers in nf4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314).

    One module at a time goes to the device, so neither memory ever holds the 16-bit base whole. Embeddings, norms and
    every head stay as they are; so do linears whose inputs are no multiple of a block of 64, of which bitsandbytes'
    CPU kernel loses the scales. compute: the dtype of products. Raises UserError without bitsandbytes.
    """
    try:
        bnb = optim.bitsandbytes()
    except ImportError:
        raise UserError("--quant nf4 needs bitsandbytes: pip install bitsandbytes") from None

    class NF4(bnb.nn.Linear4bit):
        """The product alone: its own forward repacks weights for AVX512-BF16 (rounded, no gradient), casts biases."""

        def forward(self, x):
            y = bnb.matmul_4bit(x.to(self.compute_dtype), self.weight.t(), quant_state=self.weight.quant_state)
            y = y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)  # autocast leaves it in half precision
            return y if self.bias is None else y + self.bias.to(y.dtype)

    nf4 = {"compress_statistics": True, "quant_type": "nf4"}
    for layer in bases.decoder_layers(backbone):
        for name, linear in [(n, m) for n, m in layer.named_modules() if type(m) is nn.Linear]:
            if linear.in_features % 64 == 0:
                sizes = linear.in_features, linear.out_features, linear.bias is not None
                small = NF4(*sizes, compute_dtype=compute, device="meta", **nf4)
                weight = linear.weight.data.to(compute)  # dequantized to the dtype of products, not rounded to another
                small.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=small, **nf4).to(device)
                small.bias = linear.bias
                layer.set_submodule(name, small)
