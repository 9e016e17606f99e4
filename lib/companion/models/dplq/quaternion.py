"""Quaternion linear layers: the Hamilton product of a matrix of quaternions with a vector of them.

A tensor of D real channels is read as D / 4 quaternions r + i·**i** + j·**j** + k·**k** whose components are four equal
blocks of the last axis, in the order r, i, j, k. The product equals one real matrix with four times as many entries
as it has parameters, so a layer is one matrix product, and a stack of layers one batched matrix product.

Written from the algebra; the order of the blocks, the weight on the left and the initialisation are those of the layers
that DPLQ uses (`models.dplq`), and checked against outputs recorded from them.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ...errors import BadParameter


def hamilton(p: Tensor, q: Tensor) -> Tensor:
    """The quaternion product p ⊗ q, quaternion by quaternion. p and q (..., 4 d), as is the result."""
    a, b, c, d = p.chunk(4, -1)
    r, i, j, k = q.chunk(4, -1)
    return torch.cat(
        [
            a * r - b * i - c * j - d * k,
            b * r + a * i - d * j + c * k,
            c * r + d * i + a * j - b * k,
            d * r - c * i + b * j + a * k,
        ],
        dim=-1,
    )


def modulus(q: Tensor) -> Tensor:
    """The norm of every quaternion: (..., 4 d) to (..., d)."""
    return rearrange(q, "... (c d) -> ... c d", c=4).norm(dim=-2)


def real_matrix(weight: Tensor) -> Tensor:
    """The real matrix M (..., 4 p, 4 q), with y = x @ M, of a matrix of quaternions `weight` (..., 4, p, q).

    Rows by the input's block, columns by the output's:

        [[ R, I,  J,  K],
         [-I, R,  K, -J],
         [-J, -K, R,  I],
         [-K, J, -I,  R]]
    """
    r, i, j, k = weight.unbind(-3)
    rows = [torch.cat(row, -1) for row in ((r, i, j, k), (-i, r, k, -j), (-j, -k, r, i), (-k, j, -i, r))]
    return torch.cat(rows, -2)


class QuaternionLinear(nn.Module):
    """y = W ⊗ x + b: in / 4 quaternions to out / 4, with in · out / 4 + out parameters.

    Args:
        inputs, outputs: real channels, multiples of 4; they need not be equal.
        layers: None for one layer, else that many layers of one size, applied in parallel and initialised equally.

    Shapes: x (..., inputs) to (..., outputs), or with `layers` x (layers, ..., inputs) to (layers, ..., outputs).
    `weight` (4, inputs / 4, outputs / 4), components r, i, j, k first; `bias` (outputs,); with `layers` a leading axis.
    """

    def __init__(self, inputs: int, outputs: int, layers: int | None = None):
        super().__init__()
        if inputs % 4 or outputs % 4:
            raise BadParameter("inputs, outputs", (inputs, outputs), "multiples of 4: a quaternion has four components")
        self.layers = layers
        stack = () if layers is None else (layers,)
        self.weight = nn.Parameter(torch.empty(*stack, 4, inputs // 4, outputs // 4))
        self.bias = nn.Parameter(torch.zeros(*stack, outputs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initialisation of the released layers, Glorot's scale in quaternions.

        A weight is |w| (cos φ + v sin φ) with φ uniform on the circle and |w| = s χ₄, s = 1 / sqrt(2 (p + q)), so
        E|w|² = 4 s². v has three uniform entries in (-1, 1), divided by its norm (1e-4 under the root): so it is denser
        towards the corners of the cube instead of uniform on the sphere. The bias is 0.
        """
        shape = self.weight.shape[-2:]
        s = 1 / math.sqrt(2 * sum(shape))
        length = s * torch.randn(4, *shape, device=self.weight.device).norm(dim=0)
        v = torch.empty(3, *shape, device=self.weight.device).uniform_(-1, 1)
        v /= (v.square().sum(0) + 1e-4).sqrt()
        phase = torch.empty(shape, device=self.weight.device).uniform_(-math.pi, math.pi)
        self.weight.copy_(length * torch.cat([phase.cos()[None], v * phase.sin()]))
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        matrix = real_matrix(self.weight)  # (..., inputs, outputs)
        if self.layers is None:
            return x @ matrix + self.bias
        y = torch.baddbmm(self.bias[:, None], x.flatten(1, -2), matrix)  # (layers, ..., outputs)
        return y.unflatten(1, x.shape[1:-1])
