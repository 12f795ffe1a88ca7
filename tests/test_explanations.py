"""Grad-CAM finds the place that decides, in networks of every kind, and says where it cannot."""

import numpy as np
import pytest
import torch
from torch import nn

from medaug import classifiers, explanations
from medaug.classifiers import build_classifier


def build_spot_counter() -> nn.Module:
    """A network whose logit 1 is the brightness of the image, and logit 0 nothing."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(1, 2, bias=False))  # fmt: skip
    with torch.no_grad():
        network[0].weight.fill_(1 / 9)
        network[4].weight.copy_(torch.tensor([[0.0], [1.0]]))
    return network


def test_the_map_is_where_the_evidence_is():
    pixel_values = torch.zeros(2, 1, 32, 32)
    pixel_values[0, 0, 4:8, 20:24] = 1
    pixel_values[1, 0, 24:28, 2:6] = 1
    maps = explanations.explain_images(build_spot_counter(), pixel_values, np.array([1, 1]))
    assert maps.shape == (2, 32, 32) and maps.dtype == np.float32 and maps.min() == 0
    spots = pixel_values[:, 0].numpy() > 0
    assert (explanations.share_outside(maps, ~spots) > 0.4).all()
    assert [np.unravel_index(m.argmax(), m.shape) in zip(*np.nonzero(s), strict=True)
            for m, s in zip(maps, spots, strict=True)] == [True, True]


def test_a_class_that_nothing_speaks_for_has_an_empty_map():
    maps = explanations.explain_images(build_spot_counter(), torch.ones(1, 1, 16, 16), np.array([0]))
    assert not maps.any()
    assert np.isnan(explanations.share_outside(maps, np.zeros(maps.shape, bool))).all()


@pytest.mark.parametrize(("name", "channels", "size"), [
    ("small-cnn", 1, 64), ("cnn2", 1, 32), ("cnn5", 3, 224), ("mobilenetv2", 3, 224), ("alexnet", 3, 227),
    ("resnet18", 3, 224), ("densenet161", 3, 224)])  # alexnet and densenet overwrite their maps in place
def test_maps_of_every_convolutional_network(name, channels, size):
    torch.manual_seed(0)
    network = build_classifier(name, 3, in_chans=channels, image_size=size)
    pixel_values = torch.randn(2, channels, size, size)
    layer = explanations.find_layer(network, pixel_values)
    maps = explanations.explain_images(network, pixel_values, np.array([0, 2]), layer, batch_size=1)
    assert maps.shape == (2, size, size) and np.isfinite(maps).all()
    assert np.allclose(maps, explanations.explain_images(network, pixel_values, np.array([0, 2]), layer), atol=1e-5)


def test_a_network_cut_in_two_is_explained_like_the_whole():
    torch.manual_seed(0)
    network = build_classifier("mobilenetv2", 3).eval()
    pixel_values = torch.randn(1, 3, 224, 224)
    whole = explanations.explain_images(network, pixel_values, np.array([1]))
    halves = nn.Sequential(*classifiers.split_model(network, 14))
    assert np.allclose(whole, explanations.explain_images(halves, pixel_values, np.array([1])), atol=1e-6)


@pytest.mark.parametrize("name", ["vit-tiny", "vit-b16", "beitv2-b"])
def test_a_transformer_is_refused(name):
    with torch.device("meta"):
        network, pixel_values = build_classifier(name, 3, image_size=224), torch.zeros(1, 3, 224, 224)
        with pytest.raises(ValueError, match="Grad-CAM is for convolutional networks"):
            explanations.find_layer(network, pixel_values)


@pytest.mark.parametrize("name", ["swin-b", "convnext-b", "efficientnetv2-l", "resnext101-64x4d", "vgg16", "efficientnet-b0"])
def test_the_layer_of_large_networks_is_their_last_map(name):
    with torch.device("meta"):
        network, pixel_values = build_classifier(name, 3), torch.zeros(1, 3, 224, 224)
        shapes = []
        explanations.find_layer(network, pixel_values).register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
        network(pixel_values)
    assert shapes[0][2:] == (7, 7) and shapes[0][1] >= 512


def test_a_flat_map_scores_the_share_of_the_image_outside():
    masks = np.zeros((2, 8, 8), bool)
    masks[0, :, :2] = True
    assert explanations.share_outside(np.ones((2, 8, 8)), masks) == pytest.approx([0.75, 1])
    negative = np.where(masks, 1.0, -1.0)
    assert explanations.share_outside(negative, masks)[0] == 0
    with pytest.raises(ValueError, match="in the size of the maps"):
        explanations.share_outside(np.ones((2, 4, 4)), masks)
