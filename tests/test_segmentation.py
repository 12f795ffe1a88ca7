"""Segmentation: every network takes two steps at toy size; masks move with images; Dice against hand-made answers."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from medaug import segmentation

OPTIONS = {"unet": {"decoder_channels": [16, 16, 8, 8, 8]}, "manet": {"decoder_channels": [16, 16, 8, 8, 8]},
           "unetplusplus": {"decoder_channels": [16, 16, 8, 8, 8]}}


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
    network = segmentation.build_segmenter(architecture, "tu-lcnet_035", **OPTIONS.get(architecture, {}))
    before = [p.clone() for p in network.parameters()]
    history = segmentation.fit_segmenter(network, images, masks, steps=2, batch_size=2, learning_rate=1e-3, seed=0)
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    probs, classes = segmentation.predict_masks(network, images)
    assert probs.shape == images.shape and 0 <= probs.min() and probs.max() <= 1 and classes is None
    assert len(history) == 2


def test_a_network_learns_an_easy_mask(pairs):
    images, masks = pairs
    torch.manual_seed(0)
    network = segmentation.build_segmenter("unet", "tu-lcnet_035", **OPTIONS["unet"])
    segmentation.fit_segmenter(network, images, masks, steps=40, batch_size=6, learning_rate=1e-2, seed=0)
    probs, _ = segmentation.predict_masks(network, images)
    assert segmentation.segmentation_metrics(probs > 0.5, masks)["dice_per_image"] > 0.9


def test_the_second_head_learns_its_own_task(pairs):
    images, masks = pairs
    network = segmentation.build_segmenter("unet", "tu-lcnet_035", num_classes=3, **OPTIONS["unet"])
    mask_logits, class_logits = network(segmentation.to_image_01(images))
    assert mask_logits.shape == (6, 1, 64, 64) and class_logits.shape == (6, 3)
    head = [p.clone() for p in network.classification_head.parameters()]
    segmentation.fit_segmenter(network, images, masks, steps=1, batch_size=4, learning_rate=1e-3, seed=0,
                               labels=np.array([0, 1, 2, 0, 1, 2]), mask_weight=0.5)
    assert any(not torch.equal(a, b) for a, b in zip(head, network.classification_head.parameters(), strict=True))


def test_image_and_mask_move_together(pairs):
    _, masks = pairs
    mask = torch.from_numpy(masks).float()[:, None]
    moved, moved_mask = segmentation.augment_together(mask, mask, torch.Generator().manual_seed(3))
    assert not torch.equal(moved_mask, mask), "the augmentation must do something"
    # The image is its own mask here, so after gain and bias both must still agree on every pixel but the soft edge.
    middle = moved.amin((2, 3), keepdim=True) / 2 + moved.amax((2, 3), keepdim=True) / 2
    assert ((moved > middle) == (moved_mask > 0.5)).float().mean() > 0.98
    assert ((mask > 0.5) == (moved_mask > 0.5)).float().mean() < 0.98


def test_dice_per_image_is_f1_and_pooling_differs():
    rng = np.random.default_rng(0)
    masks, pred_masks = rng.random((5, 9, 9)) < 0.4, rng.random((5, 9, 9)) < 0.4
    masks[0] = False
    masks[0, 0, 0] = True
    expected = [f1_score(m.ravel(), p.ravel()) for m, p in zip(masks, pred_masks, strict=True)]
    assert segmentation.compute_dice_per_image(pred_masks, masks) == pytest.approx(expected)
    metrics = segmentation.segmentation_metrics(pred_masks, masks)
    assert metrics["dice_pooled"] == pytest.approx(f1_score(masks.ravel(), pred_masks.ravel()))
    assert metrics["dice_pooled"] > metrics["dice_per_image"]  # the tiny mask counts for one image, for no pixels


def test_empty_masks_are_defined():
    empty, full = np.zeros((1, 8, 8), bool), np.ones((1, 8, 8), bool)
    assert segmentation.compute_dice_per_image(empty, empty)[0] == 1
    assert segmentation.compute_dice_per_image(empty, full)[0] == 0
    assert segmentation.compute_hd95_per_image(empty, empty)[0] == 0
    assert segmentation.compute_hd95_per_image(empty, full)[0] == pytest.approx(np.hypot(8, 8))


def test_hd95_of_a_shifted_square():
    mask, shifted = np.zeros((1, 32, 32), bool), np.zeros((1, 32, 32), bool)
    mask[0, 8:16, 8:16], shifted[0, 8:16, 11:19] = True, True
    assert segmentation.compute_hd95_per_image(shifted, mask)[0] == pytest.approx(3.0)


def test_the_threshold_finds_dark_regions(pairs):
    images, masks = pairs
    dice = segmentation.compute_dice_per_image(segmentation.predict_threshold(images) > 0.5, masks)
    assert dice.min() > 0.95


def test_the_interval_widens_when_images_share_patients():
    values = np.repeat(np.random.default_rng(0).random(40), 5)
    apart = segmentation.bootstrap_mean(values, np.arange(200))
    shared = segmentation.bootstrap_mean(values, np.repeat(np.arange(40), 5))
    assert shared[1] - shared[0] > 1.5 * (apart[1] - apart[0])


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="vnet.*unknown.*unet"):
        segmentation.build_segmenter("vnet", "tu-lcnet_035")
