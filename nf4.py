"""Four-bit storage of a frozen base: nf4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314)."""

import torch
from torch import nn

import bases
import optim
from errors import UserError

NF4 = {"compress_statistics": True, "quant_type": "nf4"}
BLOCK = 64  # weights that share a scale


def quantize(backbone: nn.Module, device: torch.device, compute: torch.dtype) -> None:
    """Store the linears of the layers in nf4, on the device. compute: the dtype of products.

    Embeddings, norms and every head stay as they are; so do linears whose inputs are no multiple of a block, of which
    bitsandbytes' CPU kernel loses the scales. Raises UserError without bitsandbytes.
    """
    try:
        bnb = optim.bitsandbytes()
    except ImportError:
        raise UserError("--quant nf4 needs bitsandbytes: pip install bitsandbytes") from None

    class NF4Linear(bnb.nn.Linear4bit):
        """The product alone: its own forward repacks weights for AVX512-BF16 (rounded, no gradient), casts biases."""

        def forward(self, x):
            weight = self.weight
            y = bnb.matmul_4bit(x.to(self.compute_dtype), weight.t(), quant_state=weight.quant_state)
            if not torch.is_autocast_enabled(x.device.type):  # autocast leaves it in half precision
                y = y.to(x.dtype)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    # One module at a time goes to the device, so neither memory ever holds the 16-bit base whole.
    for layer in bases.decoder_layers(backbone):
        linears = [(name, m) for name, m in layer.named_modules() if type(m) is nn.Linear and not m.in_features % BLOCK]
        for name, linear in linears:
            small = NF4Linear(linear.in_features, linear.out_features, compute_dtype=compute, device="meta", **NF4)
            weight = linear.weight.data.to(compute)  # dequantized to the dtype of products, not rounded to another
            small.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=small, **NF4).to(device)
            small.bias = linear.bias
            layer.set_submodule(name, small)
