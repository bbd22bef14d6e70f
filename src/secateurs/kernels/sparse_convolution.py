"""1x1 convolutions with many zeros, multiplied as sparse matrices.

A 1x1 convolution of stride 1 is y = W x + b with x [I, P], P the places of an image. With W in CSR a product does only what is left
of W, in torch's own kernel (MKL's on x86), on images in the usual layout. Our bitmask kernels save reading weights, which is little
here: they multiply all P places by each weight, zeros too, and are behind oneDNN at any sparsity (docs/log.md).
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.kernels.packed_linear import LayerChoice

# the share of zeros from which a 1x1 convolution in CSR was faster than oneDNN's best on every shape that was tried (docs/log.md)
PAYS_FROM = 0.875


class SparseConvolution(nn.Module):
    """y [N, O, *places] = W x + b of x [N, I, *places] or [I, *places], fp32 on the CPU; W [O, I] in CSR. For inference."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.shape = (conv.out_channels, conv.in_channels)
        self.kind, self.axes = type(conv), len(conv.kernel_size)
        with warnings.catch_warnings():
            # torch says once that CSR is in beta
            warnings.simplefilter("ignore")
            csr = conv.weight.detach().flatten(1).to_sparse_csr()
        self.weight = nn.Parameter(csr.values(), requires_grad=False)
        self.register_buffer("columns", csr.col_indices().to(torch.int32))
        self.register_buffer("rows", csr.crow_indices().to(torch.int32))
        bias = conv.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def matrix(self) -> Tensor:
        """W, sparse; its tensors are those of the module."""
        rows: Any = self.rows
        columns: Any = self.columns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.sparse_csr_tensor(rows, columns, self.weight, self.shape, check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix
        images: Any = x.unsqueeze(0) if x.dim() == self.axes + 1 else x
        # one image after another: of several the places do not lie side by side
        made = torch.stack([matrix @ image.flatten(1) for image in images])
        bias: Any = self.bias
        if bias is not None:
            made += bias[:, None]
        return made.view(*x.shape[: x.dim() - self.axes - 1], self.shape[0], *x.shape[x.dim() - self.axes :])

    def dense(self) -> nn.Module:
        """The convolution that it replaces, with the same weights bit for bit."""
        conv: nn.Module = self.kind(1, 1, 1, bias=False)
        conv.__dict__.update(in_channels=self.shape[1], out_channels=self.shape[0])
        weight = self.matrix.to_dense().view(*self.shape, *[1] * self.axes)
        conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return conv

    def extra_repr(self) -> str:
        sparsity = 1 - self.weight.numel() / (self.shape[0] * self.shape[1])
        return f"in_channels={self.shape[1]}, out_channels={self.shape[0]}, sparsity={sparsity:.3f}"


def choose_convolution(name: str, conv: Any) -> LayerChoice:
    """CSR for a 1x1 convolution of which at least PAYS_FROM are zeros; else it stays, with the reason."""
    weight = conv.weight.detach()
    shape = (weight.shape[0], weight[0].numel())
    survivors = int(torch.count_nonzero(weight))
    dense_nbytes = weight.numel() * weight.element_size()
    nbytes = survivors * (weight.element_size() + 4) + 4 * (shape[0] + 1)
    sparsity = 1 - survivors / max(1, weight.numel())

    def stays(why: str) -> LayerChoice:
        return LayerChoice(name, shape, "dense", survivors, dense_nbytes, dense_nbytes, dense_nbytes, why)

    if any(k != 1 for k in conv.kernel_size) or any(s != 1 for s in conv.stride) or conv.groups != 1:
        size = "x".join(map(str, conv.kernel_size))
        return stays(
            f"a {size} convolution of stride {conv.stride[0]} and {conv.groups} groups: zeros pay in plain 1x1 ones only"
        )
    if conv.padding not in ("same", "valid") and any(conv.padding):
        return stays("a 1x1 convolution with padding has no kernel")
    if weight.dtype != torch.float32:
        return stays(f"no kernel for {str(weight.dtype).removeprefix('torch.')} convolutions")
    if sparsity < PAYS_FROM:
        return stays(f"{sparsity:.1%} zeros: oneDNN's dense convolution is faster below {PAYS_FROM:.1%}")
    return LayerChoice(
        name, shape, "csr", survivors, nbytes, dense_nbytes, nbytes, f"{nbytes / dense_nbytes:.2f}x the bytes"
    )
