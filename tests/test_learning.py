"""The point of it all: minimising the Shapley loss turns patch values into Shapley values."""

import torch

from shapwrap import (
    all_coalitions,
    exact_shapley_values,
    kernel_regression,
    sample_coalitions,
    shapley_loss,
)
from tests.backbones import make_case


def _train(case, steps, anchor):
    """Fit one image; logits are held where they were, or the game could vanish."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(case.wrapped.parameters(), lr=3e-3)
    for _ in range(steps):
        coalitions = sample_coalitions(1, case.wrapped.num_patches, 16, generator=generator)
        output = case.wrapped(case.images, coalitions)
        # The values are held too: what is learned must be the explanation of a given game.
        loss = 3 * shapley_loss(output) + (output.values - anchor(coalitions)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_patch_values_approach_the_shapley_values_of_the_model():
    case = make_case("vit-average", grid=(2, 3), batch=1)
    wrapped = case.wrapped
    everything = all_coalitions(6)[None]
    codes = 2 ** torch.arange(6)
    # A game that is far from additive: interactions, and patches that matter unequally.
    generator = torch.Generator().manual_seed(3)
    goal = torch.randn(64, wrapped.num_classes, generator=generator)
    goal[0] = 0

    @torch.no_grad()
    def relative_error(found, exact):
        return float((found - exact).square().mean() / exact.square().mean())

    exact = exact_shapley_values(goal)
    with torch.no_grad():
        assert relative_error(wrapped.attribute(case.images)[0], exact) > 0.5
    _train(case, 500, lambda coalitions: goal[(coalitions.long() * codes).sum(-1)])
    with torch.no_grad():
        values = wrapped.value(case.images, everything)[0]
        found = wrapped.attribute(case.images)[0]
    own = exact_shapley_values(values)
    torch.testing.assert_close(kernel_regression(values), own, atol=1e-4, rtol=1e-4)
    additive = everything[0].float() @ own
    assert relative_error(additive, values) > 0.2, "an additive game would be no test"
    assert relative_error(found, own) < 0.05


def test_skill_and_residual_follow():
    case = make_case("resnet", grid=(2, 3), batch=2)
    case.wrapped.eval()
    before = case.wrapped.audit(case.images)
    with torch.no_grad():
        logits = case.wrapped(case.images)
    optimizer = torch.optim.Adam(case.wrapped.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        output = case.wrapped(case.images, sample_coalitions(2, 6, 4, generator=generator))
        loss = shapley_loss(output) * 10 + (output.logits - logits).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = case.wrapped.audit(case.images)
    assert after.overall_skill > before.overall_skill + 0.1
    assert (after.residual < before.residual).all()


def test_audit_is_what_it_says():
    case = make_case("vit-average", grid=(2, 2), batch=2)
    audit = case.wrapped.audit(case.images, num_coalitions=4, chunk_size=2)
    coalitions = torch.cat(
        [sample_coalitions(2, 4, 2, generator=g) for g in [torch.Generator().manual_seed(0)] * 2],
        dim=1,
    )
    with torch.no_grad():
        output = case.wrapped(case.images, coalitions)
    errors = (output.values - output.estimates).square().mean((1, 2))
    trivial = coalitions.float().mean(2)[..., None] * output.logits[:, None]
    spread = (output.values - trivial).square().mean((1, 2))
    torch.testing.assert_close(audit.residual, errors)
    torch.testing.assert_close(audit.skill, 1 - errors / spread, atol=1e-4, rtol=1e-4)
    assert "skill" in str(audit)
