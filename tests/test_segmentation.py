"""Segmentation: every network takes two steps at toy size, from any weights; masks move with images; files come back."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file

from medaug import masks as lung_masks
from medaug import segmentation
from medaug.segmentation import SegmenterPlan

OPTIONS = {"unet": {"decoder_channels": [16, 16, 8, 8, 8]}, "manet": {"decoder_channels": [16, 16, 8, 8, 8]},
           "unetplusplus": {"decoder_channels": [16, 16, 8, 8, 8]}}
TINY = "tu-lcnet_035"


def build_tiny(num_classes: int = 0) -> torch.nn.Module:
    torch.manual_seed(0)
    return segmentation.build_segmenter("unet", TINY, num_classes=num_classes, **OPTIONS["unet"])


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 64, 64), bool)
    masks[:, 20:40, 10:50] = True
    images = np.where(masks, 40, 200) + rng.integers(-20, 20, masks.shape)
    return images.astype(np.uint8), masks


@pytest.mark.parametrize("architecture", segmentation.ARCHITECTURES)
def test_every_network_trains_two_steps(architecture, pairs):
    images, masks = (np.repeat(np.repeat(a, 2, 1), 2, 2) for a in pairs)  # PAN needs 128 px
    torch.manual_seed(0)
    network = segmentation.build_segmenter(architecture, TINY, **OPTIONS.get(architecture, {}))
    before = [p.clone() for p in network.parameters()]
    history = segmentation.fit_segmenter(network, images, masks, SegmenterPlan(steps=2, batch_size=2), seed=0)
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    probs, classes = segmentation.predict_masks(network, images)
    assert probs.shape == images.shape and 0 <= probs.min() and probs.max() <= 1 and classes is None
    assert len(history) == 2


# Counted with segmentation-models-pytorch 0.6 on its own defaults for grey images; the fourth report states none.
@pytest.mark.parametrize("architecture, params", [
    ("unet", 32_514_833), ("unetplusplus", 48_979_473), ("manet", 147_433_721), ("fpn", 26_109_761),
    ("pspnet", 24_294_721), ("pan", 24_253_544), ("deeplabv3", 39_627_457), ("deeplabv3plus", 26_671_313)])
def test_parameters_with_the_fourth_reports_encoder(architecture, params):
    def count(network: torch.nn.Module) -> int:
        return sum(p.numel() for p in network.parameters())

    with torch.device("meta"):
        grey = count(segmentation.build_segmenter(architecture, "resnet50"))
        colour = count(smp.create_model(architecture, "resnet50", None))
        with_head = count(segmentation.build_segmenter(architecture, "resnet50", num_classes=4))
    assert grey == params
    assert colour - grey == 2 * 64 * 7 * 7, "two more colours in the first convolution, and nothing else"
    features = 512 if architecture == "pspnet" else 2048  # PSPNet uses three of the encoder's five stages
    assert with_head - grey == 4 * (features + 1)


@pytest.mark.parametrize("encoder", ["tu-lcnet_035", "mobilenet_v2"])
def test_an_encoder_starts_from_a_local_file(encoder, tmp_path):
    torch.manual_seed(5)
    if encoder.startswith("tu-"):
        source = timm.create_model(encoder.removeprefix("tu-"), num_classes=7).state_dict()
    else:
        source = smp.encoders.get_encoder(encoder, weights=None).state_dict()
    save_file(source, tmp_path / "encoder.safetensors")
    torch.manual_seed(6)
    network = segmentation.build_segmenter("fpn", encoder, str(tmp_path / "encoder.safetensors"))
    loaded = network.encoder.state_dict()
    kernels = [name for name, tensor in source.items() if tensor.ndim == 4]
    name, first = (next(n for n in loaded if n.endswith(kernels[i])) for i in (1, 0))
    assert torch.equal(loaded[name], source[kernels[1]])
    assert torch.allclose(loaded[first], source[kernels[0]].sum(1, keepdim=True), atol=1e-5), "colours are summed"


def test_weights_that_are_not_there_are_named():
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        segmentation.build_segmenter("unet", TINY, "none.safetensors")


def test_a_network_learns_an_easy_mask(pairs):
    images, masks = pairs
    network = build_tiny()
    plan = SegmenterPlan(steps=40, batch_size=6, learning_rate=1e-2)
    segmentation.fit_segmenter(network, images, masks, plan, seed=0)
    probs, _ = segmentation.predict_masks(network, images)
    assert lung_masks.segmentation_metrics(probs > 0.5, masks)["dice_per_image"] > 0.9


@pytest.mark.parametrize("steps", [1, 5])
def test_a_handful_of_steps_is_a_run_too(pairs, steps):
    history = segmentation.fit_segmenter(build_tiny(), *pairs, SegmenterPlan(steps=steps, batch_size=2), seed=0)
    assert history[-1]["step"] == steps


def test_training_repeats_itself(pairs):
    images, masks = pairs
    plan = SegmenterPlan(steps=2, batch_size=3)
    losses = [segmentation.fit_segmenter(build_tiny(), images, masks, plan, seed=4)[-1]["loss"] for _ in range(2)]
    other = segmentation.fit_segmenter(build_tiny(), images, masks, plan, seed=5)[-1]["loss"]
    assert losses[0] == losses[1] != other


LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("mask_weight, decoder_moves, head_moves", [
    (1.0, True, False), (0.5, True, True), ("learned", True, True), (0.0, False, True)])
def test_the_weight_decides_which_head_learns(pairs, mask_weight, decoder_moves, head_moves):
    images, masks = pairs
    network = build_tiny(num_classes=3)
    mask_logits, class_logits = network(segmentation.to_image_01(images))
    assert mask_logits.shape == (6, 1, 64, 64) and class_logits.shape == (6, 3)

    def copy(module: torch.nn.Module) -> list[torch.Tensor]:
        return [p.detach().clone() for p in module.parameters()]

    parts = network.decoder, network.classification_head
    before = [copy(part) for part in parts]
    plan = SegmenterPlan(steps=1, batch_size=4, weight_decay=0.0)  # weight decay would move an unused head too
    segmentation.fit_segmenter(network, images, masks, plan, seed=0, labels=LABELS, mask_weight=mask_weight)
    moved = [any(not torch.equal(a, b) for a, b in zip(old, copy(part), strict=True))
             for old, part in zip(before, parts, strict=True)]
    assert moved == [decoder_moves, head_moves]


def test_the_learned_weight_leaves_the_task_that_cannot_be_learned(pairs):
    """Classes without any relation to the images: the loss stays at ln 3, and its weight falls (Kendall et al. 2018)."""
    images, masks = pairs
    plan = SegmenterPlan(steps=40, batch_size=6, learning_rate=1e-2)
    labels = np.random.default_rng(0).permutation(LABELS)
    history = segmentation.fit_segmenter(build_tiny(3), images, masks, plan, seed=0, labels=labels, mask_weight="learned")
    assert history[-1]["mask_weight"] > history[0]["mask_weight"]


def test_a_plan_with_unknown_words_is_refused(pairs):
    with pytest.raises(ValueError, match="sgd.*choose"):
        segmentation.fit_segmenter(build_tiny(), *pairs, SegmenterPlan(steps=1, optimizer="sgd"), seed=0)


def test_a_loss_that_is_not_finite_stops(pairs):
    network = build_tiny()
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        segmentation.fit_segmenter(network, *pairs, SegmenterPlan(steps=1), seed=0)


def test_image_and_mask_move_together(pairs):
    _, masks = pairs
    mask = torch.from_numpy(masks).float()[:, None]
    moved, moved_mask = segmentation.augment_together(mask, mask, torch.Generator().manual_seed(3))
    assert not torch.equal(moved_mask, mask), "the augmentation must do something"
    # The image is its own mask here, so after gain and bias both must still agree on every pixel but the soft edge.
    middle = moved.amin((2, 3), keepdim=True) / 2 + moved.amax((2, 3), keepdim=True) / 2
    assert ((moved > middle) == (moved_mask > 0.5)).float().mean() > 0.98
    assert ((mask > 0.5) == (moved_mask > 0.5)).float().mean() < 0.98


CARD = {"architecture": "unet", "encoder": TINY, "num_classes": 0, "options": OPTIONS["unet"], "image_size": 64,
        "threshold": 0.5}


def test_a_saved_network_comes_back_whole(pairs, tmp_path):
    images, _ = pairs
    network = build_tiny()
    segmentation.save_segmenter(tmp_path / "unet.safetensors", network, CARD)
    loaded, card = segmentation.load_segmenter(tmp_path / "unet.safetensors")
    assert card == CARD
    expected, found = (segmentation.predict_masks(n, images)[0] for n in (network, loaded))
    assert np.array_equal(expected, found)


def test_a_file_that_is_no_network_is_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, error in (("other", ValueError), ("text", ValueError), ("none", FileNotFoundError)):
        with pytest.raises(error, match=f"{name}.safetensors"):
            segmentation.load_segmenter(tmp_path / f"{name}.safetensors")


def test_an_image_of_any_shape_gets_a_mask_of_its_own_size(pairs):
    images, masks = pairs
    network = build_tiny()
    segmentation.fit_segmenter(network, images, masks, SegmenterPlan(steps=40, batch_size=6, learning_rate=1e-2), seed=0)
    same = segmentation.predict_own_size(network, images[0], 64)
    assert same == pytest.approx(segmentation.predict_masks(network, images[:1])[0][0], abs=1e-4)
    wide = np.concatenate([images[0], images[0][:, :37]], 1)  # (64, 101): nothing may be cut off
    large = wide.repeat(3, 0).repeat(3, 1)
    probs = segmentation.predict_own_size(network, large, 64)
    assert probs.shape == (192, 303)
    truth = np.concatenate([masks[0], masks[0][:, :37]], 1).repeat(3, 0).repeat(3, 1)
    assert lung_masks.compute_dice_per_image((probs > 0.5)[None], truth[None])[0] > 0.8


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="vnet.*unknown.*unet"):
        segmentation.build_segmenter("vnet", TINY)
