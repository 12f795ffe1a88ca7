"""The guards: each one would have stopped a published number.

Every guard takes plain values, returns what it measured when all is well, and otherwise raises `GuardError`
with one line that says what is wrong, what it would have done to the numbers, and what to do. They run in
every study.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score


class GuardError(ValueError):
    """A result that must not be reported. The message says what is wrong, its effect, and the remedy."""


def fail(wrong: str, effect: str, remedy: str) -> None:
    """Raise `GuardError` in the one form that all guards use."""
    raise GuardError(f"{wrong}. Left alone, {effect}. Remedy: {remedy}.")


# -- the generator and the vision-language model: does the training train? -----------------------------------


def check_lora_coverage(
    model,
    target_modules: Sequence[str] | str,
    expected_modules: int | None = None,
    expected_params: int | None = None,
) -> dict[str, int]:
    """Check that every requested LoRA target wrapped at least one module; return `{"modules", "params"}`
    found.

    `model` is a torch module after peft's injection (`get_peft_model`, `add_adapter`); a target matches a
    module of that name or one that ends in ".target", a string is a regular expression, as in
    `peft.LoraConfig`. peft itself is silent when only a part of the list matches (peft issues 1959 and 3658).
    """
    wrapped = [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    ]
    params = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    if isinstance(target_modules, str):
        unmatched = [] if any(re.fullmatch(target_modules, name) for name in wrapped) else [target_modules]
    else:
        unmatched = [t for t in target_modules if not any(n == t or n.endswith(f".{t}") for n in wrapped)]
    effect = "fewer weights are trained than the report says, and nothing else would tell"
    if unmatched:
        fail(
            f"LoRA target(s) {', '.join(unmatched)} matched no module ({len(wrapped)} were wrapped)",
            effect,
            "list model.named_modules() and name the targets as they are called there",
        )
    for what, found, expected in (
        ("modules", len(wrapped), expected_modules),
        ("parameters", params, expected_params),
    ):
        if expected is not None and found != expected:
            fail(
                f"LoRA wrapped {found:,} {what}, expected {expected:,}",
                effect,
                "compare rank and target_modules",
            )
    return {"modules": len(wrapped), "params": params}


def check_weights_change(before: Mapping, after: Mapping) -> float:
    """Check that training moved at least one tensor and left all finite; return the share of tensors that
    moved.

    `before` and `after` map names to tensors (copies of the trainable weights around a step).
    """
    if before.keys() != after.keys():
        fail(
            "the two sets of weights have different names",
            "another model would be compared with this one",
            "copy the same parameters before and after the step",
        )
    spoiled = [name for name, tensor in after.items() if not bool(tensor.isfinite().all())]
    if spoiled:
        fail(
            f"{len(spoiled)} tensor(s) are not finite, first {spoiled[0]}",
            "every later image and score is noise",
            "lower the learning rate, clip gradients or use float32",
        )
    moved = sum(not bool((before[name] == after[name]).all()) for name in before)
    if not moved:
        fail(
            f"none of {len(before)} trainable tensors changed",
            "the untuned model would be reported as a tuned one",
            "check that the loss reaches the weights (no no_grad, no detach) and the optimiser holds them",
        )
    return moved / len(before)


def check_gradients_flow(model) -> int:
    """Check, after `loss.backward()`, that every trainable parameter has a finite gradient and not all are
    zero.

    Returns the number of trainable tensors. (A fresh LoRA has B = 0, so the gradient of A is zero in the
    first step.)
    """
    trainable = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    effect = "the loss curve is that of a model which does not learn"
    if not trainable:
        fail("the model has no trainable parameter", effect, "unfreeze the adapter or the head")
    missing = [name for name, grad in trainable.items() if grad is None]
    if missing:
        fail(
            f"{len(missing)} of {len(trainable)} trainable tensors got no gradient, first {missing[0]}",
            effect,
            "compute the loss from the model's output, outside no_grad and without detach",
        )
    if not all(bool(grad.isfinite().all()) for grad in trainable.values()):
        fail(
            "a gradient is not finite",
            "the weights become NaN at the next step",
            "lower the learning rate or clip",
        )
    if not any(bool((grad != 0).any()) for grad in trainable.values()):
        fail("every gradient is exactly zero", effect, "check that the loss depends on the trainable weights")
    return len(trainable)


def check_loss_falls(before: float | Sequence[float], after: float | Sequence[float]) -> float:
    """Check that the mean loss on fixed noise (or any fixed batch) fell; return by how much.

    Fixed, because a training loss over random timesteps falls and rises by luck alone.
    """
    first, last = float(np.mean(before)), float(np.mean(after))
    if not last < first:  # also true for NaN
        fail(
            f"the loss on fixed noise went from {first:.4g} to {last:.4g}",
            "an adapter that learned nothing is used",
            "train longer, check the learning rate and the prediction type (epsilon or v)",
        )
    return first - last


def check_round_trip(images_a, images_b, tolerance: float = 0) -> float:
    """Check that the saved and reloaded model makes the same images; return the largest difference (in their
    unit).

    Arrays or tensors of equal shape. The difference is taken in float: uint8 arrays wrap (10 - 20 would be
    246).
    """
    a, b = np.asarray(images_a), np.asarray(images_b)
    if a.shape != b.shape:
        fail(
            f"images have shapes {a.shape} and {b.shape}",
            "the reloaded model is not the saved one",
            "generate both with the same prompts, seeds and size",
        )
    worst = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    if not worst <= tolerance:
        fail(
            f"images before saving and after loading differ by up to {worst:g} (allowed {tolerance:g})",
            "what is published is not what was measured (the adapter was dropped, or another one loaded)",
            "load strictly, list missing and unexpected keys, and fix the seed and the dtype",
        )
    return worst


# -- the data ------------------------------------------------------------------------------------------------


def check_split_integrity(manifest: pd.DataFrame, synthetic: pd.DataFrame | None = None) -> dict[str, int]:
    """Check that no patient, no file content and no synthetic image's source crosses the splits; return the
    counts.

    `manifest` has `image_id, sha256, patient_id, split, origin`; `synthetic` (optional) has `sha256, origin`
    and, where images were made from others, `source_image_id` (the manifest's image that each came from).
    """
    for column, word, effect in (
        ("patient_id", "patient(s)", "test accuracy measures recognition of patients, not of disease"),
        ("sha256", "file content(s)", "the model is tested on images that it was trained on"),
    ):
        if manifest[column].isna().any() or (manifest[column].astype(str) == "").any():
            fail(
                f"{column} is empty in part of the manifest",
                effect,
                f"fill {column} for every image, then split by it",
            )
        spread = manifest.groupby(column)["split"].nunique()
        crossing = spread[spread > 1].index.tolist()
        if crossing:
            fail(
                f"{len(crossing)} {word} stand in more than one split, first {crossing[0]}",
                effect,
                "split by patient (or near-duplicate group) and drop exact duplicates",
            )
    if "origin" in manifest.columns:
        stray = manifest[(manifest["origin"] != "real") & (manifest["split"] != "train")]
        if len(stray):
            fail(
                f"{len(stray)} synthetic image(s) stand in the {stray['split'].iloc[0]} split",
                "the arms are tested on different images",
                "keep val and test real",
            )
    if synthetic is not None and len(synthetic):
        _check_provenance(manifest, synthetic)
    return {
        "images": len(manifest),
        "patients": manifest["patient_id"].nunique(),
        "synthetic": 0 if synthetic is None else len(synthetic),
    }


def _check_provenance(manifest: pd.DataFrame, synthetic: pd.DataFrame) -> None:
    held_out = manifest[manifest["split"] != "train"]
    effect = "training holds what the test asks for"
    copies = int(synthetic["sha256"].isin(held_out["sha256"]).sum())
    if copies:
        fail(
            f"{copies} synthetic image(s) are byte-equal to held-out images",
            effect,
            "make them from training images",
        )
    if "source_image_id" in synthetic.columns:
        leaks = int(synthetic["source_image_id"].isin(held_out["image_id"]).sum())
        if leaks:
            fail(
                f"{leaks} synthetic image(s) were made from held-out images",
                effect,
                "make them from training images of the same fold",
            )


def check_label_order(
    classes: Sequence[str], prompts: Sequence[str] | Mapping[str, str], model_classes: Sequence[str]
) -> list[str]:
    """Check that class index, prompt order and the model's output order agree; return the classes left
    unchecked.

    `prompts` is one caption per class, in class order or keyed by class. A caption that names another class
    and not its own is a swap; names are compared by their first three letters (viral, virus). A caption that
    names no class cannot be checked and its class is returned.
    """
    effect = "two classes are exchanged in training or in every metric"
    if list(classes) != list(model_classes):
        fail(
            f"the manifest's classes {list(classes)} are not the model's {list(model_classes)}",
            effect,
            "build the model's labels from the manifest's class list",
        )
    if isinstance(prompts, Mapping) and list(prompts) != list(classes):
        fail(
            f"prompts are keyed {list(prompts)}, classes are {list(classes)}",
            effect,
            "list prompts in class order",
        )
    captions = list(prompts.values()) if isinstance(prompts, Mapping) else list(prompts)
    if len(captions) != len(classes) or len(set(captions)) != len(captions):
        fail(
            f"{len(classes)} classes but {len(set(captions))} different prompts",
            effect,
            "write one prompt per class",
        )
    unchecked = []
    for own, caption in zip(classes, captions, strict=True):
        named = [c for c in classes if re.search(rf"\b{re.escape(c[:3])}", caption, flags=re.IGNORECASE)]
        if named and own not in named:
            fail(
                f"class '{own}' has the prompt \"{caption}\", which names '{named[0]}'",
                effect,
                "look each caption up by its class name, never by position in two lists",
            )
        if not named:
            unchecked.append(own)
    return unchecked


def check_value_range(images, low: float, high: float) -> tuple[float, float]:
    """Check that image values are finite, inside [low, high] and use more than a hundredth of it; return
    (min, max).

    The last condition sees a 0-1 image given to a model that expects 0-255.
    """
    values = np.asarray(images)
    smallest, largest = float(values.min()), float(values.max())
    effect = "the network sees near-constant or clipped images and scores fall without an error"
    if not (low <= smallest and largest <= high):  # also true for NaN
        fail(
            f"image values span {smallest:g} to {largest:g}, expected {low:g} to {high:g}",
            effect,
            "convert to the range that the model's own preprocessing states",
        )
    if largest - smallest < 0.01 * (high - low):
        fail(
            f"image values span only {smallest:g} to {largest:g} of {low:g} to {high:g}",
            effect,
            "check for a second division by 255, or an empty image",
        )
    return smallest, largest


def check_augmentation_changes(before, after, tolerance: float = 1 / 255, at_least: float = 0.1) -> float:
    """Check that the augmentation, as the training loop applies it, changes images; return the share that it
    changed.

    `before` and `after` (N, ...) are uint8 0-255 or float 0-1. An image counts as changed when one pixel
    moves by more than `tolerance` (of the 0-1 range: rounding to 8 bits is no change); a share under
    `at_least` fails.
    """
    a, b = (
        np.asarray(x).astype(np.float64) / (255 if np.asarray(x).dtype == np.uint8 else 1)
        for x in (before, after)
    )
    if a.shape != b.shape:
        fail(
            f"shapes {a.shape} and {b.shape} differ",
            "nothing is compared",
            "pass the same images before and after",
        )
    changed = float((np.abs(a - b).reshape(len(a), -1).max(axis=1) > tolerance * (1 + 1e-9)).mean())
    if changed < at_least:
        fail(
            f"the augmentation changed {changed:.0%} of {len(a)} images",
            "the 'augmented' arm is a set of plain duplicates, or the plain arm trained twice",
            "draw it from the training loader; give train and val their own transform; check sigma > 0",
        )
    return changed


# -- the comparison ------------------------------------------------------------------------------------------


def check_equal_steps(steps_by_arm: Mapping[str, int]) -> int:
    """Check that all arms were trained for the same number of optimiser steps; return that number."""
    counts = {int(steps) for steps in steps_by_arm.values()}
    if len(counts) != 1:
        listed = ", ".join(f"{arm}: {steps}" for arm, steps in steps_by_arm.items())
        fail(
            f"arms differ in optimiser steps ({listed})",
            "an arm with more images is also trained longer",
            "fix the number of steps, not of epochs",
        )
    return counts.pop()


def check_not_degenerate(y_true: Sequence[str], probs, classes: Sequence[str]) -> dict[str, float]:
    """Check that the predictor is not a constant; return its accuracy, macro recall, macro F1 and mean log
    loss.

    The signature of a constant among k classes: one class predicted, macro recall exactly 1/k, and a loss of
    ln k when the probabilities are uniform. `probs` (N, k) in the order of `classes`.
    """
    probs, k = np.asarray(probs, dtype=np.float64), len(classes)
    y_true, preds = np.asarray(y_true), np.asarray(classes)[probs.argmax(axis=1)]
    found = {
        "accuracy": accuracy_score(y_true, preds),
        "macro_recall": recall_score(y_true, preds, labels=list(classes), average="macro", zero_division=0),
        "macro_f1": f1_score(y_true, preds, labels=list(classes), average="macro", zero_division=0),
        "loss": _mean_log_loss(y_true, probs, classes),
    }
    signature = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    remedy = "look at the logits' spread; check loss, labels, learning rate and loaded weights"
    if len(set(preds)) == 1:
        fail(
            f"the model predicts '{preds[0]}' for all {len(preds)} images ({signature})",
            f"accuracy repeats that class's share and macro recall 1/{k}, both read as a weak result",
            remedy,
        )
    if abs(found["loss"] - math.log(k)) < 1e-4 and probs.max(axis=1).mean() < 1 / k + 0.02:
        fail(
            f"probabilities are uniform: the loss is ln {k} = {math.log(k):.4f} ({signature})",
            "the scores are chance, read as a weak result",
            remedy,
        )
    return found


def _mean_log_loss(y_true: np.ndarray, probs: np.ndarray, classes: Sequence[str]) -> float:
    order = np.argsort(classes)  # scikit-learn wants the columns in the labels' sorted order
    probs = probs / probs.sum(axis=1, keepdims=True)
    return float(log_loss(y_true, probs[:, order], labels=sorted(classes)))


_SHARES = "accuracy balanced_accuracy macro_f1 macro_precision macro_recall auroc auprc ece".split()


def check_metrics_consistent(row: Mapping, tolerance: float = 1e-4, every_class_present: bool = True) -> None:
    """Check that the metrics of one row can belong to one set of predictions (keys as in
    `classification.csv`).

    The main bound: macro F1 <= HM(macro precision, macro recall), HM the harmonic mean. Proof: each class has
    F1_c = HM(P_c, R_c); HM(p, r) = 2pr/(p + r) is concave on the positive quadrant (its Hessian is
    -4/(p + r)^3 v v' with v = (r, -p), so never positive); by Jensen the mean of HM(P_c, R_c) over classes is
    at most HM(mean P_c, mean R_c). Source: Opitz & Burst, "Macro F1 and Macro F1", arXiv 1911.03347. Also:
    shares lie in [0, 1], Brier in [0, 2], balanced accuracy is macro recall where `every_class_present`.
    `tolerance` covers figures rounded to four digits.
    """
    given = {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, (int, float, np.number)) and not math.isnan(value)
    }
    effect = "at least one published number is not of this run"
    remedy = "recompute all metrics from predictions.parquet"
    for name, top in {**dict.fromkeys(_SHARES, 1), "brier": 2}.items():
        if not -tolerance <= given.get(name, 0) <= top + tolerance:
            fail(f"{name} = {given[name]:.4f} lies outside 0 to {top}", effect, remedy)
    if {"macro_f1", "macro_precision", "macro_recall"} <= given.keys():
        f1, precision, recall = (given[name] for name in ("macro_f1", "macro_precision", "macro_recall"))
        bound = harmonic_mean(precision, recall)
        if f1 > bound + tolerance:
            fail(
                f"macro F1 {f1:.4f} exceeds {bound:.4f}, the harmonic mean of macro precision {precision:.4f}"
                f" and macro recall {recall:.4f}, which cannot be",
                effect,
                remedy,
            )
    if every_class_present and {"balanced_accuracy", "macro_recall"} <= given.keys():
        balanced, recall = given["balanced_accuracy"], given["macro_recall"]
        if abs(balanced - recall) > tolerance:
            fail(f"balanced accuracy {balanced:.4f} is not macro recall {recall:.4f}", effect, remedy)


def harmonic_mean(a: float, b: float) -> float:
    """Return 2ab/(a + b), and 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def check_same_path(score_val: float, score_val_through_test_path: float, tolerance: float = 1e-6) -> float:
    """Check that the validation set, sent down the *test* code path, gives the validation score; return the
    gap.

    Stops a test score from a model whose weights were never loaded, that was left in training mode, that got
    other preprocessing or another class order.
    """
    gap = abs(float(score_val) - float(score_val_through_test_path))
    if not gap <= tolerance:
        fail(
            f"the validation set scores {score_val:.4f} in training and {score_val_through_test_path:.4f} "
            f"on the test path (allowed gap {tolerance:g})",
            "the test score is that of another model or another preprocessing",
            "load the weights strictly, call eval(), reuse the validation transform and the class order",
        )
    return gap


# -- the text ------------------------------------------------------------------------------------------------

_NOT_PROSE = re.compile(
    r"\A---\n.*?\n---\n|```.*?```|<!--.*?-->|\{\{<.*?>\}\}|\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]+`|\]\([^)]*\)|<[^>\n]+>"
    r"|\bclaims? \d\.\d\d(?:(?:, | and )\d\.\d\d)*"
    r"|\[-?@[^\]]*\]|https?://\S+|arXiv[: ]?\d{4}\.\d{4,5}|\b10\.\d{4,}/\S+",
    flags=re.DOTALL | re.IGNORECASE,
)
_MEASURED = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d{2,}|\.\d+(?=\s?%))(?![\d.]*\w)")


def check_numbers_from_tables(prose: str, where: str = "the text", allowed: Iterable[str] = ()) -> int:
    """Check that Markdown `prose` holds no hand-typed result; return the number of characters looked at.

    A result is recognised by its form: two or more decimals, or a percentage with decimals. Code, formulas,
    links, citations, shortcodes and front matter do not count, so a setting or a row's id goes into backticks
    and a measured number comes from a table (`Markdown(f"...")`, or a fragment). `allowed` lists literals
    that may stand.
    """
    text = _NOT_PROSE.sub(" ", prose)
    typed = [n for n in _MEASURED.findall(text) if n not in set(allowed)]
    if typed:
        fail(
            f"{where} holds {len(typed)} hand-typed number(s): {', '.join(typed[:5])}",
            "text and tables drift apart at the next run (and typing errors stay)",
            "read the number from its table; put a setting or a claim's id in backticks",
        )
    return len(text)


def read_prose(path: Path | str) -> str:
    """Return the Markdown of a notebook's markdown cells, or the whole text of a `.qmd` or `.md` file."""
    path = Path(path)
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def check_execution_counts(notebook: Mapping | Path | str) -> int:
    """Check that the code cells of an executed notebook (a path, or its JSON as a dict) ran once each, in
    order 1..n.

    Returns n. Empty code cells have no count.
    """
    if isinstance(notebook, (str, Path)):
        notebook = json.loads(Path(notebook).read_text(encoding="utf-8"))
    code = [
        cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()
    ]
    counts = [cell["execution_count"] for cell in code]
    if counts != list(range(1, len(counts) + 1)):
        twice = [count for count, times in Counter(counts).items() if times > 1]
        what = f"count {twice[0]} appears {counts.count(twice[0])} times" if twice else f"found {counts}"
        fail(
            f"{len(counts)} code cells should have counts 1 to {len(counts)}; {what}",
            "the outputs may come from code that is no longer there",
            "restart the kernel and run all cells",
        )
    return len(counts)
