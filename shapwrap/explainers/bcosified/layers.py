"""B-cos convolution and B-cos linear layer, with the weights of plain ones."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shapwrap.errors import ArgumentError, UnsupportedBackboneError
from shapwrap.explainers.bcosified.dynamic import BcosLayer
from shapwrap.masking.pooling import compute_dtype, without_autocast

Factor = Literal["cosine", "response"]
"""What is raised to B - 1: |cos(x, w)|, or |w . x| / |x|, as the authors' code has it."""

SMALLEST = 1e-6
"""Lengths, and cosines under a fractional power, count as no smaller: roots have no slope at 0."""


class BcosConv2d(nn.Conv2d, BcosLayer):
    """Y = |cos(x, w)|^(B - 1) (w . x) for each place and output channel, without bias.

    x is the window that the convolution reads, its zero padding included.

    Args:
        layer: A convolution, whose weight is copied, in float32 at least; its bias is left out.
        b: B.
        factor: See `Factor`.
        weight: Instead of the layer's own.

    Raises:
        UnsupportedBackboneError: A grouped convolution, or one that pads with other than zeros.
        ArgumentError: An unknown factor.

    References:
        Boehle, Fritz & Schiele 2022, "B-cos Networks: Alignment is All We Need for
        Interpretability"; Arya, Rao, Boehle & Schiele 2024, "B-cosification".
    """

    def __init__(
        self,
        layer: nn.Conv2d,
        *,
        b: float,
        factor: Factor | str = "cosine",
        weight: Tensor | None = None,
    ):
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise UnsupportedBackboneError(
                f"the convolution has {layer.groups} groups and pads with {layer.padding_mode!r}; "
                "expected one group and zeros, as in CLIP's ResNets."
            )
        weight = copied(layer.weight if weight is None else weight)
        given: Any = {
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }
        # Nothing is drawn for weights that are replaced.
        super().__init__(weight.shape[1], weight.shape[0], **given, bias=False, device="meta")
        self.weight = nn.Parameter(weight)
        self.b = float(b)
        self.factor = checked(factor)

    def forward(self, input: Tensor) -> Tensor:
        """What a convolution would give, times the factor."""
        response = super().forward(input)
        if self.b == 1:
            return response
        with without_autocast(input):
            squares = input.to(compute_dtype(input)).square().sum(dim=1, keepdim=True)
            window = squares.new_ones(1, 1, *self.kernel_size)
            lengths = functional.conv2d(
                squares, window, None, self.stride, self.padding, self.dilation
            )
            weights = torch.linalg.vector_norm(self.weight, dim=(1, 2, 3))[None, :, None, None]
            return scaled(self, response, lengths, weights, self.factor)

    def extra_repr(self) -> str:
        """That of the convolution, and B."""
        return f"{super().extra_repr()}, b={self.b:g}"


class BcosLinear(nn.Linear, BcosLayer):
    """Y = |cos(x, w)|^(B - 1) (w . x) for each output, without bias.

    Args:
        layer: A linear layer, whose weight is copied, in float32 at least; its bias is left out.
        b: B.
        factor: See `Factor`.

    Raises:
        ArgumentError: An unknown factor.
    """

    def __init__(self, layer: nn.Linear, *, b: float, factor: Factor | str = "cosine"):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(copied(layer.weight))
        self.b = float(b)
        self.factor = checked(factor)

    def forward(self, input: Tensor) -> Tensor:
        """What a linear layer would give, times the factor."""
        response = super().forward(input)
        if self.b == 1:
            return response
        with without_autocast(input):
            squares = input.to(compute_dtype(input)).square().sum(dim=-1, keepdim=True)
            weights = torch.linalg.vector_norm(self.weight, dim=1)
            return scaled(self, response, squares, weights, self.factor)

    def extra_repr(self) -> str:
        """That of the linear layer, and B."""
        return f"{super().extra_repr()}, b={self.b:g}"


def scaled(
    layer: BcosLayer,
    response: Float[Tensor, "*places"],
    squared_lengths: Tensor,
    weight_lengths: Tensor,
    factor: Factor | str,
) -> Float[Tensor, "*places"]:
    """Responses w . x times |cos(x, w)|^(B - 1), or times (|w . x| / |x|)^(B - 1).

    Args:
        layer: Tells B, and whether the factor is a constant.
        response: w . x.
        squared_lengths: |x|^2, broadcast to the responses.
        weight_lengths: |w|, broadcast to the responses.
        factor: See `Factor`.
    """
    exact = response.to(compute_dtype(response))
    lengths = squared_lengths.clamp(min=SMALLEST**2).sqrt()
    if factor == "cosine":
        lengths = lengths * weight_lengths.clamp(min=SMALLEST)
    gain = exact.abs() / lengths
    if layer.b != 2:
        gain = gain.clamp(min=SMALLEST) ** (layer.b - 1)
    return (exact * (gain.detach() if layer.detached else gain)).to(response.dtype)


def copied(weight: Tensor) -> Tensor:
    """The same numbers in a tensor of their own, in float32 at least."""
    return weight.detach().clone().to(compute_dtype(weight))


def checked(factor: Factor | str) -> Factor:
    """The factor.

    Raises:
        ArgumentError: Unknown.
    """
    for known in get_args(Factor):
        if factor == known:
            return known
    raise ArgumentError(f"factor is {factor!r}; expected one of {get_args(Factor)}.")
