"""The training loop: fixed steps, selection on validation, resume, and what it withstands."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from medaug import training
from medaug.classifiers import Preprocessing, build_classifier, split_model
from medaug.training import Examples, TrainingPlan, fit_classifier, fit_head, predict_probs

GREY = Preprocessing(32, (0.5,), (0.5,))
RGB = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
PLAN = TrainingPlan(steps=12, batch_size=8, learning_rate=3e-3, evaluations=3)


def make_discs(n: int, seed: int = 0) -> Examples:
    """Noisy images with a bright spot left (0), right (1) or nowhere (2)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    images = rng.normal(100, 20, (n, 32, 32))
    for image, label in zip(images, labels, strict=True):
        if label < 2:
            image[12:20, 4 + 16 * label:12 + 16 * label] += 80
    return Examples(images.clip(0, 255).astype(np.uint8), labels)


def make_model(name: str = "small-cnn") -> nn.Module:
    torch.manual_seed(0)
    return build_classifier(name, 3, in_chans=3 if name == "mobilenetv2" else 1, image_size=32)


def train_small(train=None, plan=PLAN, **options):
    model = make_model()
    history = fit_classifier(model, train or make_discs(64), make_discs(48, 1), plan, GREY, **options)
    return model, history


def test_a_small_cnn_learns_and_keeps_its_best_validation_score():
    plan = TrainingPlan(steps=60, batch_size=16, learning_rate=5e-3, evaluations=6)
    model, history = train_small(make_discs(128), plan)
    test = make_discs(64, 2)
    preds = predict_probs(model, test.inputs, GREY).argmax(1)
    assert (preds == test.labels).mean() > 0.9
    assert history["step"].tolist() == [10, 20, 30, 40, 50, 60]
    val = make_discs(48, 1)
    again = f1_score(val.labels, predict_probs(model, val.inputs, GREY).argmax(1), average="macro")
    assert again == pytest.approx(history["val_macro_f1"].max(), abs=1e-9)


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_handful_of_steps_is_a_run_too(steps):
    _, history = train_small(plan=TrainingPlan(steps=steps, batch_size=8, learning_rate=3e-3, evaluations=1))
    assert history["step"].tolist() == [steps] and history["learning_rate"].notna().all()


def test_the_number_of_steps_does_not_depend_on_the_number_of_images():
    for n in (3, 20, 700):
        rows = training.draw_batches(n, 8, 25, seed=1)
        assert rows.shape == (25, 8)
        counts = np.bincount(rows.ravel(), minlength=n)
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(training.draw_batches(20, 8, 25, 1), training.draw_batches(20, 8, 25, 2))


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not():
    one, two = train_small()[0], train_small()[0]
    other = train_small(plan=TrainingPlan(**{**PLAN.__dict__, "seed": 1}))[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one[1].weight, other[1].weight)


@pytest.mark.parametrize("name", ["cnn2", "cnn5", "mobilenetv2"])
def test_two_steps_change_every_trainable_tensor(name):
    model = make_model(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    fit_classifier(model, make_discs(16), make_discs(8, 1), TrainingPlan(steps=2, batch_size=8, evaluations=1),
                   RGB if name == "mobilenetv2" else GREY)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


class Killed(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adam", "schedule": "cosine"}])
def test_a_killed_run_goes_on_and_ends_at_the_same_weights(tmp_path, monkeypatch, changes):
    augmented, plan = make_discs(64), TrainingPlan(**{**PLAN.__dict__, **changes})
    augmented = Examples(augmented.inputs, augmented.labels, augment=np.arange(64) % 2 == 0)
    model, history = train_small(augmented, plan)
    take_step = training._Trainer.take_step
    seen = []

    def kill_at_step_10(self, train, rows, step):
        seen.append(step)
        if step == 10 and seen.count(10) == 1:
            raise Killed
        return take_step(self, train, rows, step)

    monkeypatch.setattr(training._Trainer, "take_step", kill_at_step_10)
    file = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        train_small(augmented, plan, checkpoint=file)
    assert file.exists()
    resumed, resumed_history = train_small(augmented, plan, checkpoint=file)
    assert seen[-4:] == [8, 9, 10, 11] and not file.exists()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert history.equals(resumed_history)


def test_a_checkpoint_of_another_plan_is_not_used(tmp_path, monkeypatch):
    file = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(training.Path, "unlink", lambda *_, **__: None)
        train_small(plan=TrainingPlan(steps=8, batch_size=8, evaluations=1), checkpoint=file)
    assert file.exists()
    assert train_small(checkpoint=file)[1].equals(train_small()[1])


def test_running_out_of_memory_halves_the_batch_and_says_so(capsys):
    class Greedy(nn.Module):
        """A network without batch norm that takes at most three images."""

        def __init__(self, limit):
            super().__init__()
            self.layers, self.limit = make_model("cnn2"), limit

        def forward(self, pixel_values):
            if self.training and len(pixel_values) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.layers(pixel_values)

    weights = []
    for limit in (100, 3):
        model = Greedy(limit)
        fit_classifier(model, make_discs(32), make_discs(16, 1), TrainingPlan(steps=3, batch_size=8, evaluations=1), GREY)
        weights.append(model.layers[0].weight)
    assert torch.allclose(*weights, atol=1e-5)
    assert "a batch of 8 images is computed in 4 parts" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        fit_classifier(Greedy(0), make_discs(32), make_discs(16, 1), PLAN, GREY)


def test_a_loss_that_is_not_finite_stops_the_run():
    broken = make_discs(16)
    features = np.full((16, 4), np.nan, np.float32)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1: lower the learning rate"):
        fit_classifier(nn.Linear(4, 3), Examples(features, broken.labels), Examples(features, broken.labels), PLAN)


def test_data_that_cannot_be_trained_on_is_an_error():
    good = make_discs(16)
    with pytest.raises(ValueError, match="validation has 0 inputs for 0 labels"):
        fit_classifier(make_model(), good, Examples(good.inputs[:0], good.labels[:0]), PLAN, GREY)
    with pytest.raises(ValueError, match="one class only"):
        fit_classifier(make_model(), Examples(good.inputs, good.labels * 0), good, PLAN, GREY)
    with pytest.raises(ValueError, match="no schedule 'step'"):
        fit_classifier(make_model(), good, good, TrainingPlan(schedule="step"), GREY)
    with pytest.raises(ValueError, match="no optimizer 'sgd': choose adamw or adam"):
        fit_classifier(make_model(), good, good, TrainingPlan(optimizer="sgd"), GREY)


def test_cosine_falls_from_the_peak_to_zero():
    plan = TrainingPlan(steps=8, batch_size=8, learning_rate=1e-3, schedule="cosine", optimizer="adam", evaluations=8)
    rates = train_small(plan=plan)[1]["learning_rate"].to_numpy()
    assert rates == pytest.approx(5e-4 * (1 + np.cos(np.pi * np.arange(1, 9) / 8)), abs=1e-12)


def test_weight_decay_is_a_penalty_in_adam_and_a_shrinking_in_adamw():
    """Without a gradient from the data, AdamW shrinks each weight by its share; Adam steps by the rate, whatever its size."""
    for optimizer, left in (("adamw", [0.95, 1.9]), ("adam", [0.9, 1.9])):
        weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        weight.grad = torch.zeros(2)
        training._build_optimizer([weight], TrainingPlan(learning_rate=0.1, weight_decay=0.5, optimizer=optimizer)).step()
        assert weight.tolist() == pytest.approx(left)


def test_row_weights_count_in_the_loss():
    features = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    labels = np.repeat([0, 1], [50, 10])
    weights = np.where(labels == 1, 50.0, 1.0)
    shares = []
    for w in (None, weights):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        fit_classifier(model, Examples(features, labels, w), Examples(features, labels),
                       TrainingPlan(steps=100, batch_size=60, learning_rate=0.1, evaluations=1))
        shares.append(predict_probs(model, features)[:, 1].mean())
    assert shares[0] < 0.3 and shares[1] > 0.8


def test_a_head_learns_from_cached_features_of_any_scale():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = (rng.normal(size=(300, 6)) + np.eye(6)[labels] * 4).astype(np.float32) * 1000 + 5000
    head, history = fit_head(features[:200], labels[:200], features[200:], labels[200:],
                             TrainingPlan(steps=80, learning_rate=0.02), num_classes=3)
    assert history["val_macro_f1"].max() > 0.9
    assert predict_probs(head, features).sum(1) == pytest.approx(1, abs=1e-6)


def test_the_tail_of_a_split_network_trains_on_kept_activations():
    body, tail = split_model(make_model("mobilenetv2"), 7)
    from medaug.classifiers import extract_features

    train, val = make_discs(16), make_discs(8, 1)
    kept = [extract_features(body, part.inputs, RGB, dtype=np.float16) for part in (train, val)]
    frozen = body[0][0].weight.clone()
    history = fit_classifier(tail, Examples(kept[0], train.labels), Examples(kept[1], val.labels),
                             TrainingPlan(steps=2, batch_size=8, evaluations=1))
    assert len(history) == 1 and torch.equal(body[0][0].weight, frozen)


def test_augmentation_is_seeded_changes_images_and_keeps_their_range():
    image_01 = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    one, two, three = (training.augment_images(image_01, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert one.min() >= 0 and one.max() <= 1 and one.shape == image_01.shape
    assert ((one - image_01).abs().amax((1, 2, 3)) > 0.05).all()
    still = training.augment_images(image_01, torch.Generator().manual_seed(1), 0, 0, 0, 0, 0, flip=False)
    assert torch.allclose(still, image_01, atol=1e-5)


def test_only_the_marked_images_are_augmented():
    images = make_discs(6).inputs
    augment = np.array([True, False] * 3)
    plain = training._to_batch(images, GREY, "cpu")
    mixed = training._to_batch(images, GREY, "cpu", augment, torch.Generator().manual_seed(0))
    same = (plain == mixed).flatten(1).all(1)
    assert same.tolist() == (~augment).tolist()


def test_one_fixed_view_keeps_shape_and_type():
    for images in (make_discs(5).inputs, np.stack([make_discs(5).inputs] * 3, -1)):
        view = training.augment_once(images, seed=3)
        assert view.shape == images.shape and view.dtype == np.uint8 and not np.array_equal(view, images)
        assert np.array_equal(view, training.augment_once(images, seed=3))


def test_temperature_repairs_overconfidence():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 3))
    probs = torch.softmax(torch.from_numpy(logits), 1).numpy()
    labels = np.array([rng.choice(3, p=p) for p in probs])
    sharp = torch.softmax(torch.from_numpy(logits * 4), 1).float().numpy()
    assert training.fit_temperature(sharp, labels) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("name, on_cpu", [("resnet18", torch.contiguous_format), ("vgg16", torch.contiguous_format),
                                          ("mobilenetv2", torch.channels_last), ("small-cnn", torch.channels_last)])  # fmt: skip
def test_wide_plain_convolutions_keep_the_default_layout_on_a_cpu(name, on_cpu):
    with torch.device("meta"):
        network = build_classifier(name, 3, "none", 1 if name == "small-cnn" else 3, 64)
    assert training.pick_memory_format(network, "cpu") is on_cpu
    assert training.pick_memory_format(network, "cuda") is torch.channels_last
