"""How the relevance of an operation's outputs goes to its inputs: one rule a kind of operation.

Rules and names are those of Chefer, Gur & Wolf 2021, with alpha = 1 and beta = 0: the relevance of
an output is shared among what made it in proportion to what each contributed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shapwrap.errors import UnsupportedBackboneError
from shapwrap.explainers.relevance.arithmetic import pulled_back, safe_divide
from shapwrap.explainers.relevance.tape import Operation

Relevance = Sequence[Tensor | None]
"""One tensor an output, or an input, of an operation; None where there is none."""

Rule = Callable[[Operation, Relevance, int], Relevance]
"""Operation, relevance of its outputs and number of images, to relevance of its inputs."""


def move(operation: Operation, relevance: Relevance, batch: int) -> Relevance:
    """Entries only change place: the vector-Jacobian product. Copies of an entry are summed."""
    return pulled_back(_of_inputs(operation), operation.inputs, lambda place, _: relevance[place])


def keep(operation: Operation, relevance: Relevance, batch: int) -> Relevance:
    """Softmax, activations, norms, dropout, scaling by a constant: the identity."""
    tokens, *others = operation.inputs
    return [_fitted(relevance[0], tokens), *(None for _ in others)]


def contribute(operation: Operation, relevance: Relevance, batch: int) -> Relevance:
    """Means, sums: input times the gradient under S = R / output."""
    gradients = pulled_back(
        _of_inputs(operation),
        operation.inputs,
        lambda place, output: _ratio(relevance[place], output),
    )
    return [x * gradient for x, gradient in zip(operation.inputs, gradients, strict=True)]


def multiply(operation: Operation, relevance: Relevance, batch: int) -> Relevance:
    """Products of two activations: as `contribute`, half for each operand.

    A factor that is one number a token, such as the inverse deviation of a norm that is written
    out, is a scale: it takes no relevance.
    """
    if len(operation.inputs) == 2:
        if operation.name not in MATRIX_PRODUCTS:
            scaled = _scaled(*operation.inputs)
            if scaled is not None:
                return [_fitted(relevance[0], x) if x is scaled else None for x in operation.inputs]
        return [None if r is None else r / 2 for r in contribute(operation, relevance, batch)]
    if operation.name in MATRIX_PRODUCTS:
        return transform(operation, relevance, batch)
    return keep(operation, relevance, batch)


def add(operation: Operation, relevance: Relevance, batch: int) -> Relevance:
    """Skip connections: shares x0 * S and x1 * S, each image's rescaled so that they keep its sum.

    A constant, such as a bias or a position, takes no relevance.
    """
    if len(operation.inputs) == 1:
        return keep(operation, relevance, batch)
    shares = [share for share in contribute(operation, relevance, batch) if share is not None]
    arriving = relevance[0]
    if arriving is None:
        return [None, None]
    axis = _image_axis(shares, batch) if batch > 1 else None
    sums = [_of_images(share, axis) for share in shares]
    sizes = sums[0].abs() + sums[1].abs()
    total = _of_images(arriving, axis)
    return [
        share * safe_divide(safe_divide(own.abs(), sizes) * total, own)
        for share, own in zip(shares, sums, strict=True)
    ]


def subtract(operation: Operation, relevance: Relevance, batch: int) -> Relevance:
    """A constant, or a number a token (the mean that a written-out norm takes off): the identity.

    Raises:
        UnsupportedBackboneError: A difference of two activations.
    """
    if len(operation.inputs) == 1:
        return keep(operation, relevance, batch)
    scaled = _scaled(*operation.inputs)
    if scaled is None or scaled is not operation.arguments[0]:
        raise _without_rule(operation, "of two activations")
    return [_fitted(relevance[0], x) if x is scaled else None for x in operation.inputs]


def divide(operation: Operation, relevance: Relevance, batch: int) -> Relevance:
    """By a constant or by a number a token: the identity.

    Raises:
        UnsupportedBackboneError: A ratio of two activations.
    """
    return subtract(operation, relevance, batch)


def transform(operation: Operation, relevance: Relevance, batch: int) -> Relevance:
    """Layers linear in one activation: the alpha-beta rule, bias ignored.

    R_i = x_i+ sum_j w_ji+ S_j + x_i- sum_j w_ji- S_j with S_j = R_j / sum_i (x_i+ w_ji+ + x_i-
    w_ji-).

    Raises:
        UnsupportedBackboneError: Both operands depend on the image, or neither is a tensor.
    """
    arguments, keywords = operation.arguments, dict(operation.keywords)
    if operation.name not in MATRIX_PRODUCTS:
        # Input, weight, bias, and further arguments of convolutions.
        arguments = (*arguments[:2], *((None,) if len(arguments) > 2 else ()), *arguments[3:])
        keywords = {key: None if key == "bias" else given for key, given in keywords.items()}
    arriving = relevance[0]
    (tokens,) = operation.inputs if len(operation.inputs) == 1 else (None,)
    bare = replace(operation, arguments=arguments, keywords=keywords)
    weights = [tensor for tensor in bare.tensors() if tensor is not tokens]
    if tokens is None or len(weights) != 1 or arriving is None:
        raise _without_rule(operation, "whose weight depends on the image")
    weight = weights[0].detach()

    def both(positive: Tensor, negative: Tensor) -> Sequence[Tensor]:
        parts = [
            bare.again({id(tokens): x, id(weights[0]): w})[0]
            for x, w in ((positive, weight.clamp(min=0)), (negative, weight.clamp(max=0)))
        ]
        return [parts[0] + parts[1]]

    signed = [tokens.detach().clamp(min=0), tokens.detach().clamp(max=0)]
    gradients = pulled_back(both, signed, lambda _, output: safe_divide(arriving, output))
    return [signed[0] * gradients[0] + signed[1] * gradients[1]]


MATRIX_PRODUCTS = {"matmul", "rmatmul", "mm", "bmm", "einsum"}
_BY_RULE: dict[Rule, str] = {
    transform: "linear conv1d conv2d conv3d",
    multiply: "matmul rmatmul mm bmm einsum mul rmul multiply",
    add: "add radd",
    subtract: "sub subtract rsub",
    divide: "div divide true_divide",
    contribute: "mean sum adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d",
    keep: "softmax layer_norm rms_norm group_norm batch_norm normalize gelu relu relu6 silu "
    "sigmoid tanh softplus elu leaky_relu mish hardswish hardsigmoid logsigmoid neg "
    "dropout dropout1d dropout2d alpha_dropout feature_dropout",
    move: "reshape view flatten ravel unflatten permute transpose swapaxes swapdims movedim "
    "moveaxis t T mT unsqueeze squeeze expand expand_as broadcast_to repeat tile "
    "repeat_interleave unbind chunk split split_with_sizes tensor_split select narrow "
    "index_select getitem gather take_along_dim cat concat concatenate stack hstack vstack "
    "contiguous clone to float double half bfloat16 type type_as view_as reshape_as roll flip "
    "pad masked_fill unfold",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _BY_RULE.items() for name in names.split()}
"""By the name of the operation."""


def relevance_of_inputs(operation: Operation, relevance: Relevance, batch: int) -> Relevance:
    """The relevance of each input.

    Raises:
        UnsupportedBackboneError: There is no rule for the operation as it was called.
    """
    if operation.in_place or operation.overwritten():
        raise _without_rule(operation, "that changes a tensor in place, or that is changed so")
    if operation.untracked:
        raise _without_rule(operation, "on a tensor whose making is hidden (scripted, compiled)")
    rule = RULES.get(operation.name)
    if rule is None or operation.keywords.get("alpha", 1) != 1:
        raise _without_rule(operation, "called as this model does")
    return rule(operation, relevance, batch)


def _of_inputs(operation: Operation) -> Callable[..., Sequence[Tensor]]:
    ids = [id(tensor) for tensor in operation.inputs]
    return lambda *values: operation.again(dict(zip(ids, values, strict=True)))


def _ratio(relevance: Tensor | None, output: Tensor) -> Tensor | None:
    return None if relevance is None else safe_divide(relevance, output)


def _fitted(relevance: Tensor | None, like: Tensor) -> Tensor | None:
    """Summed where the operation broadcast the input."""
    return None if relevance is None else relevance.sum_to_size(like.shape).to(like.dtype)


def _scaled(one: Tensor, other: Tensor) -> Tensor | None:
    """That of two tensors which the other, one number a token, scales or shifts."""
    widths = (one.shape[-1] if one.ndim else 1, other.shape[-1] if other.ndim else 1)
    if min(widths) != 1 or max(widths) == 1:
        return None
    return one if widths[0] > 1 else other


def _image_axis(shares: Sequence[Tensor], batch: int) -> int:
    shapes = [tuple(share.shape) for share in shares]
    for axis in range(2):
        if all(len(shape) > axis and shape[axis] == batch for shape in shapes):
            return axis
    raise UnsupportedBackboneError(
        f"the model adds activations of shapes {shapes} for {batch} images; expected the axis of "
        "the images first or second. Explain one image at a time (chunk_size=1)."
    )


def _of_images(relevance: Tensor, axis: int | None) -> Tensor:
    """Sum over everything but the axis of the images, broadcastable to the relevance."""
    axes = [other for other in range(relevance.ndim) if other != axis]
    return torch.sum(relevance, dim=axes, keepdim=True) if axes else relevance


def _without_rule(operation: Operation, how: str) -> UnsupportedBackboneError:
    shapes = [tuple(tensor.shape) for tensor in operation.inputs]
    return UnsupportedBackboneError(
        f"relevance propagation has no rule for {operation.name!r} {how} (shapes {shapes}); "
        f"expected one of: {', '.join(sorted(RULES))}. Use a method that needs no such rules, "
        "such as attention rollout or integrated gradients."
    )
