"""The classifier factory, preprocessing and cached features."""

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from medaug import classifiers
from medaug.classifiers import Preprocessing, build_classifier, extract_features, split_head, split_model

GREY = Preprocessing(32, (0.5,), (0.5,))
RGB = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)


def make_images(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8)


@pytest.mark.parametrize("name", classifiers.TORCHVISION)
def test_torchvision_networks_have_the_published_size(name):
    with torch.device("meta"):
        model = build_classifier(name, num_classes=1000)
    weights = torchvision.models.get_model_weights(classifiers.TORCHVISION[name]).DEFAULT
    assert classifiers.count_parameters(model)[1] == weights.meta["num_params"]


@pytest.mark.parametrize(("name", "millions"), [("vit-tiny", 5.5), ("dinov2-b", 86), ("beitv2-b", 86)])
def test_timm_networks_have_their_size(name, millions):
    with torch.device("meta"):
        model = build_classifier(name, num_classes=3)
    assert classifiers.count_parameters(model)[1] / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", classifiers.SMALL)
def test_small_networks_return_logits(name):
    model = build_classifier(name, num_classes=3, in_chans=1, image_size=64)
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(("name", "total"), [("cnn2", 25_695_459), ("cnn5", 507_427)])
def test_the_networks_of_report_3_at_224_px(name, total):
    with torch.device("meta"):
        assert classifiers.count_parameters(build_classifier(name, 3, in_chans=3, image_size=224))[1] == total


def test_small_cnn_has_95_thousand_parameters():
    assert classifiers.count_parameters(build_classifier("small-cnn", 3, in_chans=1)) == (95_427, 95_427)


def test_an_unknown_name_and_a_wrong_channel_count_are_errors():
    with pytest.raises(ValueError, match="no classifier 'resnet51': choose one of"):
        build_classifier("resnet51", 3)
    with pytest.raises(ValueError, match="takes 3 channels, not 1"):
        build_classifier("mobilenetv2", 3, in_chans=1)


def test_weights_file_is_loaded_but_for_a_last_layer_of_another_size(tmp_path):
    source = build_classifier("small-cnn", 10, in_chans=1)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    save_file(halves, tmp_path / "w.safetensors")
    model = build_classifier("small-cnn", 3, str(tmp_path / "w.safetensors"), in_chans=1)
    assert model[1].weight.dtype == torch.float32
    assert torch.equal(model[1].weight, source[1].weight.half().float())
    assert model[-1].out_features == 3
    same = build_classifier("small-cnn", 10, str(tmp_path / "w.safetensors"), in_chans=1)
    assert torch.equal(same[-1].weight, source[-1].weight.half().float())


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_an_error(tmp_path, fault):
    state = build_classifier("small-cnn", 3, in_chans=1).state_dict()
    if fault == "missing":
        del state["1.weight"]
    elif fault == "extra":
        state["99.weight"] = torch.zeros(1)
    else:
        state["1.weight"] = torch.zeros(32, 3, 8, 8)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="w.safetensors does not fit Sequential: 1 tensor"):
        build_classifier("small-cnn", 3, str(tmp_path / "w.safetensors"), in_chans=1)


def test_a_missing_weights_file_is_named():
    with pytest.raises(FileNotFoundError, match="no weights file nowhere.safetensors"):
        build_classifier("small-cnn", 3, "nowhere.safetensors", in_chans=1)


@pytest.mark.parametrize("frozen_blocks", [1, 7, 19])
def test_a_split_mobilenet_computes_the_same(frozen_blocks):
    torch.manual_seed(0)
    model = build_classifier("mobilenetv2", 3).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    body, tail = split_model(model, frozen_blocks)
    assert torch.equal(tail.eval()(body(pixel_values)), model(pixel_values))
    assert not any(p.requires_grad for p in body.parameters())
    assert all(p.requires_grad for p in tail.parameters())


@pytest.mark.parametrize(("name", "frozen_blocks"), [("vit-tiny", 8), ("beitv2-b", 12), ("dinov2-b", 4)])
def test_a_split_transformer_computes_the_same(name, frozen_blocks):
    torch.manual_seed(0)
    model = build_classifier(name, 3, image_size=56).eval()
    pixel_values = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        whole = model(pixel_values)
        size = classifiers.count_parameters(model)[1]
        body, tail = split_model(model, frozen_blocks)
        assert torch.allclose(tail.eval()(body(pixel_values)), whole, atol=1e-6)
    assert classifiers.count_parameters(body, tail)[1] == size
    assert body(pixel_values).ndim == 3 and not any(p.requires_grad for p in body.parameters())


def test_networks_that_cannot_be_split_say_so():
    with pytest.raises(ValueError, match="AlexNet cannot be cut"):
        split_model(build_classifier("alexnet", 3), 2)
    with pytest.raises(ValueError, match="has 19 blocks, so 20 cannot"):
        split_model(build_classifier("mobilenetv2", 3), 20)


def test_a_split_head_leaves_features():
    body = split_head(build_classifier("mobilenetv2", 3))
    assert body(torch.zeros(1, 3, 32, 32)).shape == (1, 1280)


def test_preprocessing_scales_and_repeats_grey():
    images_u8 = np.stack([np.zeros((8, 8)), np.full((8, 8), 255)]).astype(np.uint8)
    pixel_values = classifiers.normalise_images(classifiers.to_image_01(images_u8, RGB), RGB)
    assert pixel_values.shape == (2, 3, 32, 32)
    assert pixel_values[0].unique().tolist() == [-1] and pixel_values[1].unique().tolist() == [1]
    colour = np.stack([images_u8] * 3, -1)
    assert classifiers.to_image_01(colour, GREY).shape == (2, 1, 32, 32)


def test_preprocessing_belongs_to_the_weights():
    hub = classifiers.read_preprocessing("mobilenetv2", "hub", 224, 3)
    assert hub.mean == (0.485, 0.456, 0.406) and hub.interpolation == "bilinear"
    assert classifiers.read_preprocessing("dinov2-b", "hub", 224, 3).interpolation == "bicubic"
    assert classifiers.read_preprocessing("small-cnn", "none", 64, 1) == Preprocessing(64, (0.5,), (0.5,))
    with pytest.raises(ValueError, match="give the mean and std"):
        classifiers.read_preprocessing("mobilenetv2", "w.safetensors", 224, 3)


class Counter(nn.Module):
    """The mean of each image, and how often it was asked for."""

    def __init__(self):
        super().__init__()
        self.scale, self.images = nn.Parameter(torch.ones(1)), 0

    def forward(self, pixel_values):
        self.images += len(pixel_values)
        return pixel_values.mean((1, 2, 3))[:, None] * self.scale


def test_features_are_computed_once_and_again_only_for_what_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(classifiers, "BLOCK_SIZE", 4)
    model, images_u8 = Counter(), make_images(10)
    first = extract_features(model, images_u8, GREY, cache=tmp_path)
    again = extract_features(model, images_u8, GREY, cache=tmp_path)
    assert model.images == 10 and np.array_equal(first, again) and first.shape == (10, 1)
    assert first[:, 0] == pytest.approx(images_u8.mean((1, 2)) / 127.5 - 1, abs=1e-5)
    images_u8[5] = 0
    changed = extract_features(model, images_u8, GREY, cache=tmp_path)
    assert model.images == 14 and changed[5] == -1
    with torch.no_grad():
        model.scale.mul_(2)
    assert extract_features(model, images_u8, GREY, cache=tmp_path)[5] == -2
    assert extract_features(model, images_u8, Preprocessing(32, (0.0,), (1.0,)), cache=tmp_path)[5] == 0


def test_activations_can_be_kept_at_half_precision(tmp_path):
    body, _ = split_model(build_classifier("mobilenetv2", 3), 4)
    activations = extract_features(body, make_images(3), RGB, cache=tmp_path, dtype=np.float16)
    assert activations.dtype == np.float16 and activations.shape == (3, 24, 8, 8)


def test_clip_gives_its_projected_image_features():
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 50}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    assert extract_features(model, make_images(2), RGB).shape == (2, 12)
