"""Random weights that let no wrong code pass: nothing is zero, one or 1e-5 by initialisation."""

import torch
from torch import Tensor, nn

from shapwrap.masking.batch_norm import evaluation_mode

VECTOR_NOISE = 0.2
MATRIX_NOISE = 0.5
BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def perturb(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Add noise to all weights, and give batch norms random running statistics.

    Biases, gains and layer scales get noise of a fixed size, matrices and kernels noise that keeps
    the size of what they pass on. Batch norms get the statistics of `images`, disturbed, so that
    deep networks stay finite.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2 or parameter.numel() == max(parameter.shape):
            parameter.add_(noise * VECTOR_NOISE)
        else:
            fan_in = parameter[0].numel()
            parameter.add_(noise * (MATRIX_NOISE * fan_in**-0.5))
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if norms:
        _take_statistics(model, norms, images)
    for norm in norms:
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            continue
        variance.clamp_(min=0.1 * float(variance.mean())).mul_(
            1 + torch.rand(variance.shape, generator=generator) - 0.5
        )
        mean.add_(torch.randn(mean.shape, generator=generator) * 0.1 * variance.sqrt())


def _take_statistics(model: nn.Module, norms: list[BatchNorm], images: Tensor) -> None:
    before = [(norm.training, norm.momentum) for norm in norms]
    with evaluation_mode(model.modules()):
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        model(images)
    for norm, (training, momentum) in zip(norms, before, strict=True):
        norm.training, norm.momentum = training, momentum
