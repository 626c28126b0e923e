"""Small random convolutional models of the families whose grids can be finer."""

from functools import partial

import timm
import timm.models.convnext
import timm.models.densenet
import timm.models.nfnet
import timm.models.resnet
import timm.models.resnetv2
import torch
import torchvision
from timm.layers import BlurPool2d
from torch import nn
from torchvision.models.convnext import CNBlockConfig

NUM_CLASSES = 5


def _timm_resnet(block, **options):
    return timm.models.resnet.ResNet(
        getattr(timm.models.resnet, block),
        layers=(1, 1, 1, 1),
        channels=(16, 16, 16, 32),
        num_classes=NUM_CLASSES,
        **options,
    )


def _resnetv2(**options):
    return timm.models.resnetv2.ResNetV2(
        layers=(1, 1, 1, 1), channels=(128, 128, 128, 128), num_classes=NUM_CLASSES, **options
    )


def _nfnet(**options):
    configuration = timm.models.nfnet.NfCfg(
        depths=(1, 1, 1, 1), channels=(16, 32, 32, 64), group_size=8, **options
    )
    return timm.models.nfnet.NormFreeNet(configuration, num_classes=NUM_CLASSES)


def _torchvision_convnext():
    widths = [(8, 16), (16, 16), (16, 32), (32, None)]
    return torchvision.models.ConvNeXt(
        [CNBlockConfig(before, after, 1) for before, after in widths], num_classes=NUM_CLASSES
    )


def _torchvision_resnext():
    return torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck,
        [1, 1, 1, 1],
        groups=8,
        width_per_group=4,
        num_classes=NUM_CLASSES,
    )


def _timm(name):
    return partial(timm.create_model, name, num_classes=NUM_CLASSES)


def _torchvision(name):
    return partial(torchvision.models.get_model, name, num_classes=NUM_CLASSES)


GRID_MODELS = {
    "timm-resnet18": _timm("resnet18"),
    "timm-resnet-d": partial(_timm_resnet, "BasicBlock", stem_type="deep", avg_down=True),
    "timm-resnet-blur": partial(_timm_resnet, "Bottleneck", aa_layer=BlurPool2d),
    "timm-resnext": partial(_timm_resnet, "Bottleneck", cardinality=8, base_width=4),
    "timm-resnetv2": _resnetv2,
    "timm-resnetv2-d": partial(_resnetv2, avg_down=True),
    "timm-nfnet": _nfnet,
    "timm-nfnet-same": partial(_nfnet, same_padding=True),
    "timm-densenet": partial(
        timm.models.densenet.DenseNet, 8, (1, 1, 1, 1), num_classes=NUM_CLASSES
    ),
    "timm-regnetx": _timm("regnetx_002"),
    "timm-regnety": _timm("regnety_002"),
    "timm-test-convnext": _timm("test_convnext"),
    "timm-convnext": partial(
        timm.models.convnext.ConvNeXt,
        depths=(1, 1, 1, 1),
        dims=(8, 16, 16, 32),
        conv_mlp=True,
        num_classes=NUM_CLASSES,
    ),
    "timm-efficientnet": _timm("test_efficientnet"),
    "timm-tf-efficientnet": _timm("tf_efficientnet_b0"),
    "timm-efficientnetv2": _timm("tf_efficientnetv2_b0"),
    "timm-mobilenetv3": _timm("mobilenetv3_small_050"),
    "torchvision-resnet18": _torchvision("resnet18"),
    "torchvision-resnext": _torchvision_resnext,
    "torchvision-regnet": _torchvision("regnet_y_400mf"),
    "torchvision-convnext": _torchvision_convnext,
    "torchvision-efficientnet": _torchvision("efficientnet_b0"),
    "torchvision-mobilenetv3": _torchvision("mobilenet_v3_small"),
}


def build_grid_model(kind: str) -> nn.Module:
    """A model in eval mode whose residual branches and biases are not zero, as new ones are."""
    model = GRID_MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()
