"""Each guard meets sound input and passes, then the injected fault, and is seen to catch it."""

import re

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from medaug import guards, paths
from medaug.guards import GuardError

CLASSES = ["normal", "bacterial", "viral"]


def caught(pattern):
    return pytest.raises(GuardError, match=pattern)


# -- training ------------------------------------------------------------------------------------------------


@pytest.fixture()
def clip():
    """The real class at toy size: 2 layers, width 8, in each tower."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return CLIPModel(
        CLIPConfig(
            text_config=dict(tower, vocab_size=16, max_position_embeddings=8, bos_token_id=0, eos_token_id=1),
            vision_config=dict(tower, image_size=16, patch_size=8),
            projection_dim=8,
        )
    )


def add_lora(model, target_modules):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=target_modules))


def test_lora_coverage_passes_and_counts(clip):
    adapted = add_lora(clip, ["self_attn.q_proj", "mlp.fc1"])
    # 2 towers x 2 layers x (q_proj: 2*(8+8), fc1: 2*(8+16))
    expected = {"modules": 8, "params": 4 * (32 + 48)}
    assert (
        guards.check_lora_coverage(adapted, ["self_attn.q_proj", "mlp.fc1"], 8, expected["params"])
        == expected
    )
    assert guards.check_lora_coverage(adapted, r".*\.(q_proj|fc1)")["modules"] == 8


def test_lora_coverage_catches_report_0s_configuration(clip):
    """peft matches "mlp.fc1", says nothing of "attn.q_proj", and the attention stays frozen."""
    adapted = add_lora(clip, ["attn.q_proj", "mlp.fc1"])
    with caught("attn.q_proj matched no module"):
        guards.check_lora_coverage(adapted, ["attn.q_proj", "mlp.fc1"])
    with caught("wrapped 4 modules, expected 8"):
        guards.check_lora_coverage(adapted, ["mlp.fc1"], expected_modules=8)
    with caught("parameters, expected 1"):
        guards.check_lora_coverage(adapted, ["mlp.fc1"], expected_params=1)
    with caught("nothing_such matched no module"):
        guards.check_lora_coverage(adapted, "nothing_such")


def take_step(detach):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    output = model(torch.ones(3, 4))
    loss = (output.detach() if detach else output).square().mean()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    if not detach:
        loss.backward()
    optimiser.step()
    return model, before, {n: p.detach().clone() for n, p in model.named_parameters()}


def test_a_step_that_reaches_the_weights_passes():
    model, before, after = take_step(detach=False)
    assert guards.check_weights_change(before, after) == 1.0
    assert guards.check_gradients_flow(model) == 2


def test_a_step_under_no_grad_is_caught():
    model, before, after = take_step(detach=True)
    with caught("none of 2 trainable tensors changed"):
        guards.check_weights_change(before, after)
    with caught("got no gradient, first weight"):
        guards.check_gradients_flow(model)


def test_weights_and_gradients_other_faults():
    model, before, after = take_step(detach=False)
    with caught("not finite, first weight"):
        guards.check_weights_change(before, {**after, "weight": after["weight"] * torch.nan})
    with caught("different names"):
        guards.check_weights_change(before, {"weight": after["weight"]})
    model.weight.grad.fill_(torch.inf)
    with caught("gradient is not finite"):
        guards.check_gradients_flow(model)
    model.zero_grad(set_to_none=False)
    with caught("exactly zero"):
        guards.check_gradients_flow(model)
    with caught("no trainable parameter"):
        guards.check_gradients_flow(model.requires_grad_(False))


def test_loss_falls():
    assert guards.check_loss_falls([1.0, 0.8], [0.5, 0.7]) == pytest.approx(0.3)
    with caught("from 0.5 to 0.5"):
        guards.check_loss_falls(0.5, 0.5)
    with caught("nan"):
        guards.check_loss_falls(0.5, float("nan"))


def test_round_trip():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4), dtype=np.uint8)
    assert guards.check_round_trip(images, images.copy()) == 0
    darker = np.where(images > 0, images - 1, images).astype(np.uint8)
    assert guards.check_round_trip(images, darker, tolerance=1) == 1
    with caught("differ by up to 1 "):  # 255 if uint8 had wrapped
        guards.check_round_trip(darker, images)
    with caught("shapes"):
        guards.check_round_trip(images, images[:1])
    with caught("nan"):
        guards.check_round_trip(images, torch.full(images.shape, torch.nan))


# -- data ----------------------------------------------------------------------------------------------------


@pytest.fixture()
def manifest():
    return pd.DataFrame(
        {
            "image_id": list("abcdef"),
            "sha256": list("uvwxyz"),
            "origin": "real",
            "patient_id": ["1", "1", "2", "3", "4", "4"],
            "split": ["train", "train", "val", "val", "test", "test"],
        }
    )


def test_sound_splits_pass(manifest):
    synthetic = pd.DataFrame({"sha256": ["s1", "s2"], "source_image_id": ["a", "b"]})
    assert guards.check_split_integrity(manifest, synthetic) == {"images": 6, "patients": 4, "synthetic": 2}


@pytest.mark.parametrize(
    "column, row, value, message",
    [
        ("patient_id", 4, "1", "patient.s. stand in more than one split, first 1"),
        ("patient_id", 4, "", "patient_id is empty"),
        ("sha256", 5, "u", "file content.s. stand in more than one split, first u"),
        ("origin", 5, "synthetic", "1 synthetic image.s. stand in the test split"),
    ],
)
def test_leaking_splits_are_caught(manifest, column, row, value, message):
    manifest.loc[row, column] = value
    with caught(message):
        guards.check_split_integrity(manifest)


@pytest.mark.parametrize(
    "sha256, source, message", [("z", "a", "byte-equal to held-out"), ("s", "f", "made from held-out images")]
)
def test_synthetic_images_from_held_out_ones_are_caught(manifest, sha256, source, message):
    """Report 2: 31 of 75 test images had their DCT source in training."""
    with caught(message):
        guards.check_split_integrity(
            manifest, pd.DataFrame({"sha256": [sha256], "source_image_id": [source]})
        )


def test_label_order():
    prompts = ["a normal chest", "bacterial pneumonia", "pneumonia caused by a virus"]
    assert guards.check_label_order(CLASSES, prompts, CLASSES) == []
    assert guards.check_label_order(CLASSES, ["clear lungs", *prompts[1:]], CLASSES) == ["normal"]
    with caught("class 'bacterial' has the prompt .* names 'viral'"):  # report 0's swap
        guards.check_label_order(CLASSES, [prompts[0], prompts[2], prompts[1]], CLASSES)
    with caught("prompts are keyed"):
        guards.check_label_order(CLASSES, dict(zip(["normal", "viral", "bacterial"], prompts)), CLASSES)
    with caught("are not the model's"):
        guards.check_label_order(CLASSES, prompts, sorted(CLASSES))
    with caught("3 classes but 2 different prompts"):
        guards.check_label_order(CLASSES, [*prompts[:2], prompts[1]], CLASSES)


def test_value_range():
    images_u8 = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert guards.check_value_range(images_u8, 0, 255) == (0, 255)
    with caught("span only"):  # divided by 255 where 0-255 is expected
        guards.check_value_range(images_u8 / 255, 0, 255)
    with caught("expected 0 to 1"):
        guards.check_value_range(images_u8, 0, 1)
    with caught("nan"):
        guards.check_value_range(np.full((2, 2), np.nan), 0, 1)


def test_augmentation_changes():
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6), dtype=np.uint8)
    flipped = images.copy()
    flipped[:4] = flipped[:4, :, ::-1]
    assert guards.check_augmentation_changes(images, flipped) == 0.5
    with caught("changed 0% of 8 images"):  # report 2's sigma = 0: rounding is all that remains
        guards.check_augmentation_changes(images, np.clip(images.astype(int) + 1, 0, 255).astype(np.uint8))
    with caught("changed 0%"):
        guards.check_augmentation_changes(images / 255, images / 255)
    with caught("differ"):
        guards.check_augmentation_changes(images, images[:3])


# -- comparison ----------------------------------------------------------------------------------------------


def test_equal_steps():
    assert guards.check_equal_steps({"real": 300, "real+synthetic": 300}) == 300
    with caught("real: 300, real.synthetic: 600"):
        guards.check_equal_steps({"real": 300, "real+synthetic": 600})


def test_a_working_predictor_passes():
    probs = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.4, 0.3, 0.3]])
    found = guards.check_not_degenerate([*CLASSES, "viral"], probs, CLASSES)
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx(-np.log([0.8, 0.7, 0.7, 0.3]).mean())


def test_report_0s_constant_predictor_is_caught_with_its_numbers():
    """234 normal and 390 pneumonia images, all called normal at p = 1/2: the four published figures."""
    y_true = ["normal"] * 234 + ["pneumonia"] * 390
    with caught("accuracy 0.3750, macro_recall 0.5000, macro_f1 0.2727, loss 0.6931"):
        guards.check_not_degenerate(y_true, np.full((624, 2), 0.5), ["normal", "pneumonia"])


def test_uniform_probabilities_are_caught_even_when_the_argmax_varies():
    probs = np.full((300, 3), 1 / 3) + np.random.default_rng(0).normal(0, 1e-5, (300, 3))
    with caught("the loss is ln 3"):
        guards.check_not_degenerate(np.tile(CLASSES, 100), probs, CLASSES)


def test_a_weak_but_honest_predictor_passes():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([5, 5, 5], 300)
    assert 0.2 < guards.check_not_degenerate(np.tile(CLASSES, 100), probs, CLASSES)["macro_recall"] < 0.5


REPORT_4 = {
    "4.12": (0.9597, 0.961, 0.9268),
    "4.13": (0.9648, 0.9666, 0.9602),
    "4.07": (0.9668, 0.9699, 0.9639),
}


@pytest.mark.parametrize("claim, possible", [("4.12", False), ("4.13", False), ("4.07", True)])
def test_macro_f1_bound_on_report_4(claim, possible):
    row = dict(zip(["macro_f1", "macro_precision", "macro_recall"], REPORT_4[claim]))
    if possible:
        guards.check_metrics_consistent(row)
    else:
        with caught("which cannot be"):
            guards.check_metrics_consistent(row)


def test_macro_f1_bound_holds_for_any_predictions():
    from medaug.statistics import classification_metrics

    rng = np.random.default_rng(0)
    for _ in range(50):
        guards.check_metrics_consistent(
            classification_metrics(
                rng.choice(CLASSES, 30), rng.dirichlet(rng.uniform(0.1, 3, 3), 30), CLASSES
            ),
            1e-12,
            every_class_present=False,
        )


def test_other_inconsistent_metrics():
    with caught("accuracy = 1.2000 lies outside"):
        guards.check_metrics_consistent({"accuracy": 1.2})
    with caught("is not macro recall"):
        guards.check_metrics_consistent({"balanced_accuracy": 0.8, "macro_recall": 0.7})
    guards.check_metrics_consistent({"brier": 1.5, "auroc": float("nan"), "arm": "real"})


def test_same_path():
    assert guards.check_same_path(0.79, 0.79) == 0
    with caught("scores 0.7900 in training and 0.3300 on the test path"):
        guards.check_same_path(0.79, 0.33)
    with caught("nan"):
        guards.check_same_path(0.79, float("nan"))


# -- text ----------------------------------------------------------------------------------------------------

SOUND_PROSE = """---
title: "7 · What may be claimed?"
version: 1.25
---
A 95 % interval, 2,000 replicates, 3 classes, about 25 s, torch `2.14`, row `4.12`,
claims 4.12, 4.13 and 0.25; $p = 0.05$, [a link](x/0.123),
arXiv 1911.03347, [@pink2026, p. 0.12], {{< fragment answer >}} and 1.5 times.
```python
x = 0.375
```
"""


def test_prose_without_results_passes():
    assert guards.check_numbers_from_tables(SOUND_PROSE) > 0


@pytest.mark.parametrize("typed", ["0.375", "50.51 %", "50.5%", "5,406.72", "macro F1 of 0.82."])
def test_typed_results_are_caught(typed):
    with caught(f"hand-typed number.s.: {re.search(r'[0-9.,]+[0-9]', typed)[0]}"):
        guards.check_numbers_from_tables(SOUND_PROSE + f"\nWe got {typed}, as expected")
    assert guards.check_numbers_from_tables("we got 0.375", allowed=["0.375"])


@pytest.mark.parametrize("path", sorted(paths.NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_notebook_types_its_results(path):
    guards.check_numbers_from_tables(guards.read_prose(path), where=path.name)


def executed(counts):
    cells = [nbformat.v4.new_code_cell("1", execution_count=count) for count in counts]
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("x"), *cells, nbformat.v4.new_code_cell()]
    )


def test_execution_counts(tmp_path):
    nbformat.write(executed([1, 2, 3]), tmp_path / "a.ipynb")
    assert guards.check_execution_counts(tmp_path / "a.ipynb") == 3
    for counts, message in (
        ([1, 3, 2], r"found \[1, 3, 2\]"),
        ([1, 1], "count 1 appears 2 times"),
        ([1, None], "found"),
        ([5, 6], "found"),
    ):
        with caught(message):
            guards.check_execution_counts(executed(counts))
