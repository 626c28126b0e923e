"""Heat maps and figures."""

import matplotlib
import numpy as np
import pytest
import torch

from shapwrap import Explanation
from shapwrap.backbones.base import Normalization
from shapwrap.plotting import true_colors
from tests.backbones import make_case


def _explanation(**changes):
    values = torch.arange(6.0)[None] - 2
    fields = {
        "values": values,
        "logits": torch.tensor([[values.sum(), 0.0]]),
        "target": torch.tensor([0]),
        "grid": (2, 3),
        "image_size": (8, 12),
    }
    return Explanation(**(fields | changes))


def test_heatmap_keeps_rows_and_columns():
    explanation = _explanation()
    assert explanation.heatmap().shape == (1, 8, 12)
    native = explanation.heatmap((2, 3))
    torch.testing.assert_close(native[0], torch.tensor([[-2.0, -1, 0], [1, 2, 3]]))
    large = explanation.heatmap((40, 60))[0]
    assert large[0, 0] == -2
    assert large[-1, -1] == 3
    assert large[0, -1] == 0


def test_efficiency_gap_sees_a_gap():
    assert _explanation().efficiency_gap().item() == 0
    shifted = _explanation(logits=torch.tensor([[4.5, 0.0]]))
    assert shifted.efficiency_gap().item() == pytest.approx(1.5)
    contrast = _explanation(contrast=True, logits=torch.tensor([[3.0, 1.0]]))
    assert contrast.efficiency_gap().item() == pytest.approx(2.0)
    baseline = _explanation(baseline=torch.tensor([1.0, 0.0]))
    assert baseline.efficiency_gap().item() == pytest.approx(1.0)


def _arrays(figure):
    return [axes.get_images() for axes in figure.axes if axes.get_images()]


def test_figure_is_image_map_and_overlay_in_true_colours():
    statistics = Normalization((0.2, 0.4, 0.6), (0.5, 0.25, 0.1))
    pixels = torch.rand(1, 3, 8, 12)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in statistics)
    figure = _explanation(class_names=["cat", "dog"]).plot(
        (pixels - mean) / std, normalization=statistics
    )
    image, heat, overlay = _arrays(figure)
    np.testing.assert_allclose(image[0].get_array(), pixels[0].permute(1, 2, 0), atol=1e-5)
    np.testing.assert_allclose(heat[0].get_array(), _explanation().heatmap()[0], atol=1e-5)
    assert len(overlay) == 2
    low, high = heat[0].get_clim()
    assert low == -high, "the colour map must be centred at 0"
    assert high == 3
    assert "cat" in figure.axes[0].get_title()
    assert heat[0].cmap(0.0)[2] > heat[0].cmap(0.0)[0], "blue speaks against"
    assert heat[0].cmap(1.0)[0] > heat[0].cmap(1.0)[2], "red speaks for"


def test_rows_share_one_scale_and_pyplot_is_left_alone():
    case = make_case("resnet", grid=(2, 3), batch=3)
    before = set(matplotlib.pyplot.get_fignums()) if hasattr(matplotlib, "pyplot") else set()
    explanation = case.wrapped.explain(case.images)
    figure = explanation.plot(case.images, normalization=((0.5,) * 3, (0.2,) * 3))
    limits = {images[0].get_clim() for images in _arrays(figure)[1::3]}
    assert len(_arrays(figure)) == 9
    assert len(limits) == 1
    if hasattr(matplotlib, "pyplot"):
        assert set(matplotlib.pyplot.get_fignums()) == before
    assert (
        len(
            _arrays(
                explanation.plot(case.images, normalization=((0.5,) * 3, (0.2,) * 3), max_images=2)
            )
        )
        == 6
    )


def test_pixels_in_range_need_no_statistics():
    pixels = torch.rand(2, 3, 4, 4)
    assert torch.equal(true_colors(pixels, None), pixels)
    _explanation(values=torch.zeros(1, 6)).plot(torch.rand(1, 1, 8, 12))


def test_a_new_figure_of_a_model_that_tells_its_statistics():
    import timm

    from shapwrap import ShapleyWrapper

    wrapped = ShapleyWrapper(timm.create_model("test_resnet"))
    explanation = wrapped.explain(torch.randn(1, 3, 160, 160))
    assert explanation.normalization.mean == wrapped.pretrained_cfg["mean"]
    assert explanation.plot(torch.randn(1, 3, 160, 160)) is not None
