"""Measures against published implementations and hand-made references; each must see the failure it is for."""

import numpy as np
import pandas as pd
import prdc
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import pairwise_distances
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.models import mobilenet_v2
from transformers import CLIPProcessor

from medaug import fidelity, foundations, paths

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(60, 8))
SYNTHETIC = RNG.normal(0.3, 1.2, size=(50, 8))


class Features(nn.Module):
    """Lets torchmetrics see given features: an 'image' is a row of them."""

    num_features = 8

    def forward(self, rows):
        return rows.flatten(1).double()


def test_fid_agrees_with_torchmetrics_and_the_closed_form():
    reference = FrechetInceptionDistance(feature=Features(), normalize=True, input_img_size=(8, 1, 1)).set_dtype(
        torch.float64)
    for rows, real in ((REAL, True), (SYNTHETIC, False)):
        reference.update(torch.from_numpy(rows)[..., None, None], real=real)
    assert fidelity.compute_fid(REAL, SYNTHETIC) == pytest.approx(reference.compute().item(), abs=1e-4)
    moved = REAL * 2 + 3  # same shape, twice the spread, three further: 8 * 9 + tr(S + 4 S - 4 S)
    shift = (moved.mean(0) - REAL.mean(0)) @ (moved.mean(0) - REAL.mean(0))
    assert fidelity.compute_fid(REAL, moved) == pytest.approx(shift + np.trace(np.cov(REAL.T)), abs=1e-9)
    assert fidelity.compute_fid(REAL, REAL) == pytest.approx(0, abs=1e-9)


def test_fid_of_fewer_images_than_dimensions_is_finite():
    assert np.isfinite(fidelity.compute_fid(RNG.normal(size=(5, 20)), RNG.normal(size=(6, 20))))


def test_kid_agrees_with_torchmetrics():
    reference = KernelInceptionDistance(feature=Features(), subsets=2, subset_size=50, normalize=True)
    for rows, real in ((REAL[:50], True), (SYNTHETIC, False)):
        reference.update(torch.from_numpy(rows)[..., None, None], real=real)
    assert fidelity.compute_kid(REAL[:50], SYNTHETIC) == pytest.approx(reference.compute()[0].item(), abs=1e-4)


def test_kid_by_hand_and_over_subsets():
    x, y = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])

    def kernel(a, b):
        return (a * b + 1) ** 3

    by_hand = kernel(1, 2) + kernel(0, 1) - 2 * np.mean([kernel(a, b) for a in (1, 2) for b in (0, 1)])
    assert fidelity.compute_kid(x, y) == pytest.approx(by_hand)
    whole = fidelity.compute_kid(REAL, SYNTHETIC)
    assert fidelity.compute_kid(REAL, SYNTHETIC, subset_size=30, subsets=300) == pytest.approx(whole, rel=0.1)
    with pytest.raises(ValueError, match="subset_size 51 exceeds the smaller set"):
        fidelity.compute_kid(REAL, SYNTHETIC, subset_size=51)


def test_kid_is_unbiased():
    """The mean over many pairs of sets of one distribution is zero, where FID's and CMMD's are above it."""
    pairs = [RNG.normal(size=(2, 30, 8)) for _ in range(200)]
    kid = [fidelity.compute_kid(a, b) for a, b in pairs]
    assert abs(np.mean(kid)) < 3 * np.std(kid) / np.sqrt(len(kid))
    assert min(fidelity.compute_fid(a, b) for a, b in pairs) > 0
    assert min(fidelity.compute_cmmd(a, b) for a, b in pairs) > 0


def test_cmmd_by_hand():
    x, y = np.array([[3.0, 0.0], [0.0, 5.0]]), np.array([[2.0, 0.0]])  # after scaling: e1, e2 against e1
    near = np.exp(-2 / 200)  # e1 and e2 are sqrt(2) apart, sigma = 10
    by_hand = 1000 * ((2 + 2 * near) / 4 + 1 - 2 * (1 + near) / 2)
    assert fidelity.compute_cmmd(x, y) == pytest.approx(by_hand, abs=1e-9)


def test_prdc_by_hand():
    k = 3
    real, synthetic = REAL[:25], SYNTHETIC[:20]
    to_synthetic = pairwise_distances(real, synthetic)
    radius = np.sort(pairwise_distances(real), axis=1)[:, k]
    radius_synthetic = np.sort(pairwise_distances(synthetic), axis=1)[:, k]
    expected = {
        "precision": np.mean([any(to_synthetic[i, j] < radius[i] for i in range(25)) for j in range(20)]),
        "recall": np.mean([any(to_synthetic[i, j] < radius_synthetic[j] for j in range(20)) for i in range(25)]),
        "density": sum(to_synthetic[i, j] < radius[i] for i in range(25) for j in range(20)) / (k * 20),
        "coverage": np.mean([min(to_synthetic[i]) < radius[i] for i in range(25)]),
    }
    assert fidelity.compute_prdc(real, synthetic, k) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("nearest_k", [1, 5])
def test_prdc_agrees_with_its_authors_package(nearest_k):
    reference = prdc.compute_prdc(real_features=REAL, fake_features=SYNTHETIC, nearest_k=nearest_k)
    assert fidelity.compute_prdc(REAL, SYNTHETIC, nearest_k) == pytest.approx(reference, abs=1e-4)


def test_prdc_knows_collapse_from_noise():
    same = fidelity.compute_prdc(REAL[:30], REAL[30:])
    collapsed = fidelity.compute_prdc(REAL, REAL.mean(0) + 0.01 * RNG.normal(size=(50, 8)))
    far = fidelity.compute_prdc(REAL, RNG.normal(50, 1, size=(50, 8)))
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.1 < same["recall"]
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_copies_and_new_images_are_told_apart():
    train, held_out = RNG.normal(size=(400, 8)), RNG.normal(size=(400, 8))
    copies = fidelity.compute_memorisation(train[:50] + 1e-3, train, held_out)
    new = fidelity.compute_memorisation(RNG.normal(size=(400, 8)), train, held_out)
    assert copies["memorised_share"] == 1 and copies["nn_ratio"] < 0.01
    assert new["memorised_share"] < 0.04 and 0.9 < new["nn_ratio"] < 1.1
    distance, nearest = fidelity.find_nearest(train[7:9], train)
    assert list(nearest) == [7, 8] and distance.max() < 1e-6


def test_a_planted_near_copy_is_found_where_plain_distance_fails():
    """A blurred mean image is closer to all training images than a noisy copy is to its source."""
    smooth = np.kron(RNG.normal(size=(60, 8, 8)), np.ones((8, 8)))  # what all images share lies in coarse blocks
    images = (128 + 25 * smooth + RNG.normal(0, 6, (60, 64, 64))).clip(0, 255).astype(np.uint8)
    near_copy = (np.roll(images[11], 1, axis=1) * 0.7 + 40 + RNG.normal(0, 12, (64, 64))).clip(0, 255).astype(np.uint8)
    new = (128 + 25 * np.kron(RNG.normal(size=(20, 8, 8)), np.ones((8, 8)))).clip(0, 255).astype(np.uint8)
    train, queries = fidelity.embed_pixels(images), fidelity.embed_pixels(np.concatenate([near_copy[None], new]))
    score, nearest = fidelity.find_copies(queries, train, neighbours=20)
    assert nearest[0] == 11 and score[0] < 0.5 and score[1:].min() > 0.8
    assert fidelity.find_copies(train[:5], train)[0].max() < 1e-6  # exact copies
    rgb = np.repeat(images[..., None], 3, -1)
    np.testing.assert_allclose(fidelity.embed_pixels(rgb), train, atol=1e-6)


def test_mia_auc():
    assert fidelity.compute_mia_auc(np.array([0.1, 0.2]), np.array([0.3, 0.4])) == 1
    assert fidelity.compute_mia_auc(np.array([0.1, 0.4]), np.array([0.1, 0.4])) == 0.5


def test_interval_covers_at_about_its_level():
    """The squared gap between two means is 0.25; a 90 % interval misses it in about one of ten trials."""
    def gap(a, b):
        return float((a.mean() - b.mean()) ** 2 - a.var() / len(a) - b.var() / len(b))  # unbiased

    rng, hits = np.random.default_rng(1), 0
    for trial in range(50):
        a, b = rng.normal(size=(120, 1)), rng.normal(0.5, 1, size=(120, 1))
        low, high = fidelity.subsample_interval(gap, a, b, draws=60, level=0.9, seed=trial)
        hits += low < 0.25 < high
    assert 38 <= hits <= 49


def test_interval_keeps_patients_together():
    groups = np.repeat(np.arange(6), 10)
    seen = []
    fidelity.subsample_interval(lambda a, b: seen.append(a) or 0.0, groups[:, None], SYNTHETIC, groups, draws=5)
    for half in seen[:5]:
        assert len(half) == 30 and len(np.unique(half)) == 3


def test_halves_share_no_patient_and_are_even_in_each_class():
    groups = np.repeat(np.arange(40), 3)
    labels = np.where(groups < 10, "viral", "normal")
    labels[0] = "normal"  # one patient with both findings
    mask = fidelity.split_groups(groups, labels, seed=2)
    assert not set(groups[mask]) & set(groups[~mask])
    for label in ("viral", "normal"):
        assert 0.4 < mask[labels == label].mean() < 0.6
    assert not np.array_equal(mask, fidelity.split_groups(groups, labels, seed=3))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = foundations.build_tokenizer(["a chest"], vocab_size=150)
    foundations.save_clip(folder, foundations.build_clip(tokenizer), tokenizer)
    return str(folder)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_clip_embeddings_are_those_of_its_processor(clip_folder, channels):
    encoder = fidelity.load_encoder(clip_folder)
    images = RNG.integers(0, 256, (5, 64, 64, *channels), dtype=np.uint8)
    rgb = images if channels else np.repeat(images[..., None], 3, -1)
    pixel_values = CLIPProcessor.from_pretrained(clip_folder)(images=list(rgb), return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = encoder.model.get_image_features(pixel_values=pixel_values).pooler_output.numpy()
    expected *= np.sqrt(128) / np.linalg.norm(expected, axis=1, keepdims=True)
    features = fidelity.embed_images(encoder, images, batch_size=2)
    assert features.shape == (5, 128)
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_an_encoder_is_found_by_its_model_id(clip_folder, tmp_path, monkeypatch):
    (tmp_path / "clip").symlink_to(clip_folder)
    monkeypatch.setattr(paths, "FOUNDATIONS", tmp_path)
    encoder = fidelity.load_encoder("clip-foundation", "foundations/clip")
    assert (encoder.name, encoder.image_size) == ("clip-foundation", 64)


def test_mobilenetv2_comes_from_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDAUG_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="mobilenetv2: no .*set MEDAUG_DATA"):
        fidelity.load_encoder("mobilenetv2")
    torch.manual_seed(0)
    model = mobilenet_v2().eval()
    (tmp_path / "weights").mkdir()
    save_file({name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()},
              tmp_path / "weights" / "mobilenet_v2_imagenet.safetensors")
    images = RNG.integers(0, 256, (2, 224, 224), dtype=np.uint8)
    features = fidelity.embed_images(fidelity.load_encoder("mobilenetv2"), images)
    pixel_values = torch.from_numpy(images).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    with torch.inference_mode():
        expected = model.features(pixel_values).mean(dim=(2, 3))
    assert features.shape == (2, 1280)
    np.testing.assert_allclose(features, expected.numpy(), atol=0.02)


def draw_marks(n, label, seed):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"label": label, "confidence": rng.random(n), "ratio": rng.random(n), "distance": rng.random(n)})


def test_limits_fail_the_stated_share_of_real_images():
    marks = pd.concat([draw_marks(400, "normal", 1), draw_marks(200, "viral", 2)], ignore_index=True)
    limits = fidelity.choose_limits(marks, share=0.1, copies=0.01)
    assert list(limits.index) == ["normal", "viral"] and limits["ratio"].nunique() == 1
    passed = fidelity.select_images(marks, limits)
    by_class = passed.groupby("label")[["confident", "inside"]].mean()
    assert np.allclose(by_class, 0.9, atol=0.01) and passed["new"].mean() == pytest.approx(0.99, abs=0.005)
    assert (passed["selected"] == passed["confident"] & passed["new"] & passed["inside"]).all()
    with pytest.raises(ValueError, match="no limits for class 'covid'"):
        fidelity.select_images(draw_marks(3, "covid", 5), limits)


def test_copies_strangers_and_the_unsure_are_not_selected():
    train = np.random.default_rng(3).normal(size=(120, 8))
    labels = np.repeat(["normal", "viral"], 60)
    held_out = np.random.default_rng(4).normal(size=(80, 8))
    of_held_out = fidelity.mark_images(np.repeat(["normal", "viral"], 40), np.linspace(0.5, 1, 80), held_out, held_out,
                                       labels, train, train)
    limits = fidelity.choose_limits(of_held_out)
    usual = int(of_held_out["distance"][:40].argsort().iloc[20])  # a normal one, neither near nor far
    good, copied, strange = held_out[usual], train[7] + 1e-3, np.full(8, 9.0)
    queries = np.stack([good, copied, strange, good])
    marks = fidelity.mark_images(np.full(4, "normal"), np.array([0.99, 0.99, 0.99, 0.01]), queries, queries, labels, train,
                                 train)
    found = fidelity.select_images(marks, limits)
    assert list(found["selected"]) == [True, False, False, False]
    assert list(found["new"]) == [True, False, True, True] and list(found["inside"]) == [True, True, False, True]
    assert list(found["confident"]) == [True, True, True, False]


def test_distance_is_to_the_own_class():
    train, labels = np.array([[0.0], [10.0]]), np.array(["normal", "viral"])
    ones = np.ones((2, 1))
    marks = fidelity.mark_images(labels, ones[:, 0], ones, ones, labels, train, train)
    assert marks["distance"].tolist() == pytest.approx([1.0, 9.0])
