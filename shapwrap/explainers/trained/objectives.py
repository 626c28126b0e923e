"""What surrogates and explainers minimise, and the normalisation that makes values add up."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Coalitions, CoalitionValues, Logits, PatchValues
from shapwrap.masking.pooling import compute_dtype


def additive_efficient(
    raw: PatchValues, gain: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch patches classes"]:
    """Values whose sum over patches is `gain` = v(1) - v(0): what is missing, shared equally.

    References:
        Ruiz, Valenciano & Zarzuelo 1998; Jethani et al. 2022 (FastSHAP).
    """
    missing = gain - raw.sum(dim=1)
    return raw + missing[:, None] / raw.shape[1]


def surrogate_loss(logits: CoalitionValues, original: Logits) -> Float[Tensor, ""]:
    """KL(softmax of the original model || surrogate on masked images), mean over both.

    Args:
        logits: Of the surrogate, one row a coalition.
        original: Of the explained model on the clean images.
    """
    log_probabilities = torch.log_softmax(logits.to(compute_dtype(logits)), dim=-1)
    targets = torch.log_softmax(original.to(log_probabilities.dtype), dim=-1)
    divergence = functional.kl_div(
        log_probabilities,
        targets[:, None].expand_as(log_probabilities),
        reduction="none",
        log_target=True,
    )
    return divergence.sum(dim=-1).mean()


def explainer_losses(
    raw: PatchValues,
    empty: Float[Tensor, "batch classes"],
    full: Float[Tensor, "batch classes"],
    coalitions: Coalitions,
    values: CoalitionValues,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """N x mean (v(0) + s . phi - v(s))^2 and N x mean (sum of raw values - (v(1) - v(0)))^2.

    The first is the Shapley regression on the normalised values phi, with gradient through the
    normalisation; its mean runs over images, coalitions and all classes. The second asks the
    network itself for efficiency; methods give it a small weight or none.

    Args:
        raw: What the network says, before normalisation.
        empty: v(0).
        full: v(1).
        coalitions: Drawn from the Shapley kernel.
        values: v(s).

    References:
        Jethani et al. 2022 (FastSHAP); Covert et al. 2023 (ViT-Shapley).
    """
    raw = raw.to(compute_dtype(raw))
    gain = full - empty
    phi = additive_efficient(raw, gain)
    estimates = empty[:, None] + torch.einsum("bsn,bnk->bsk", coalitions.to(phi.dtype), phi)
    num_patches = raw.shape[1]
    regression = num_patches * functional.mse_loss(estimates, values.to(estimates.dtype))
    efficiency = num_patches * functional.mse_loss(raw.sum(dim=1), gain.to(raw.dtype))
    return regression, efficiency
