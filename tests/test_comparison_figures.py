"""Figures of a comparison: what the colours are."""

from dataclasses import replace

import pytest
import torch

from shapwrap.comparison.figures import AGAINST, FOR, Strip, figure_of_methods, map_grid
from shapwrap.errors import ArgumentError, ImageError
from tests.reports import made_explanation


def drawn(figure):
    """Pictures of each axes, and texts."""
    pictures = [[image.get_array() for image in axes.get_images()] for axes in figure.axes]
    return pictures, [text.get_text() for axes in figure.axes for text in axes.texts]


def test_zero_leaves_the_picture_and_colour_grows_evenly():
    images = torch.full((1, 3, 1, 4), 0.6)
    maps = torch.tensor([[[0.0, 0.5, 1.0, -1.0]]])
    pictures, texts = drawn(map_grid(images, ["cat"], [Strip("m", maps, 1.0, ["cat"])]))
    shown = torch.as_tensor(pictures[1][0].data)
    pale = torch.full((3,), 0.55 + 0.45 * 0.6)
    expected = torch.stack(
        [pale, (pale + torch.tensor(FOR)) / 2, torch.tensor(FOR), torch.tensor(AGAINST)]
    )
    torch.testing.assert_close(shown[0].float(), expected)
    assert texts == []


def test_a_map_of_another_class_says_so_and_each_method_shows_its_scale():
    images, maps = torch.rand(2, 3, 6, 8), torch.randn(2, 6, 8)
    strips = [Strip("a", maps, 2.0, ["cat", "dog"]), Strip("b", maps, 0.25)]
    figure = map_grid(images, ["cat", "bird"], strips)
    assert drawn(figure)[1] == ["as dog"]
    ticks = [[tick.get_text() for tick in axes.get_xticklabels()] for axes in figure.axes]
    assert ticks[-2:] == [["−2", "0", "2"], ["−0.25", "0", "0.25"]]


def test_methods_side_by_side_on_one_scale_or_their_own():
    images = torch.rand(2, 3, 50, 70)
    one, other = made_explanation(seed=1), made_explanation(seed=2)
    other = replace(other, values=other.values * 5, all_values=None)
    methods = {"this": one, "that": other}

    def ends(figure):
        return [figure.axes[-i].get_xticklabels()[-1].get_text() for i in (2, 1)]

    own = ends(figure_of_methods(methods, images))
    assert float(own[1]) > 3 * float(own[0])
    figure = figure_of_methods(methods, images, shared_scale=True, width=3.25)
    assert ends(figure) == [own[1], own[1]]
    assert figure.get_figwidth() == 3.25
    with pytest.raises(ImageError, match="that were explained"):
        figure_of_methods(methods, images[:1])
    with pytest.raises(ArgumentError, match="no explanation"):
        figure_of_methods({}, images)
    with pytest.raises(ArgumentError, match="width"):
        figure_of_methods(methods, images, width=-1)
