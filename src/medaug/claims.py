"""The claims of the five reports: what became of each, with the value and the place that show it.

`data/claims.csv` lists them; each function here settles one or a few, by arithmetic on the published figures,
by counting the parameters of a configuration, by a fault re-enacted (`medaug.faults`), or from a study's
tables. A claim without such a function, or whose table is not there, is `not testable here`, with what it
needs.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import fisher_exact
from statsmodels.stats.proportion import proportion_confint

from medaug import faults, guards, paths
from medaug.statistics import classification_metrics

CLAIMS_FILE = paths.ROOT / "data" / "claims.csv"
VERDICTS = ("reproduced", "refuted", "corrected", "answered", "not testable here")
COLUMNS = ["id", "verdict", "evidence", "value", "published_value", "report", "claim"]
TEST_COUNTS = {"normal": 234, "bacterial": 242, "viral": 148}  # the official test set, Kermany et al. 2018


class Finding(NamedTuple):
    """What became of a claim: a word of `VERDICTS`, `page#section` of the evidence, and the value found
    there."""

    verdict: str
    evidence: str
    value: str


Published = dict[str, list[float]]
Studies = dict[str, dict[str, pd.DataFrame | dict]]
SETTLERS: dict[str, Callable[[str, Published, Studies], Finding | None]] = {}

ARITHMETIC, COUNTING, CAUGHT = (f"07-verdict#{section}" for section in ("arithmetic", "counting", "caught"))


def settles(*ids: str) -> Callable:
    """Register the function below as the one that settles the claims `ids`."""

    def register(function: Callable) -> Callable:
        SETTLERS.update(dict.fromkeys(ids, function))
        return function

    return register


def load_claims() -> pd.DataFrame:
    """Return the 94 claims: `id, report, system, claim, published_value, needs`, all as text."""
    return pd.read_csv(CLAIMS_FILE, dtype=str, keep_default_na=False)


def evaluate_claims(studies: Studies) -> pd.DataFrame:
    """Return one line per claim (`COLUMNS`), in the order of the list.

    `studies` maps a study's name to its tables by file name (`{"phantom": {"verdict.csv": frame, ...}}`);
    what is absent settles nothing.
    """
    claims = load_claims()
    published = {claim.id: read_numbers(claim.published_value) for claim in claims.itertuples()}
    rows = []
    for claim in claims.itertuples():
        settle = SETTLERS.get(claim.id)
        finding = settle(claim.id, published, studies) if settle else None
        verdict, evidence, value = finding or Finding("not testable here", claim.needs, "")
        rows.append(
            (
                claim.id,
                verdict,
                evidence or claim.needs,
                value,
                claim.published_value,
                claim.report,
                claim.claim,
            )
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def read_numbers(text: str) -> list[float]:
    """Return the numbers in a published value ("5,406,720 / 1.2486 %" gives 5406720 and 1.2486)."""
    found = re.findall(r"\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?(?:e-?\d+)?", text)
    return [float(number.replace(",", "")) for number in found]


# -- counting without weights -------------------------------------------------------------------------------


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return the parameters of a LoRA's adapters and of the whole model."""
    lora = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    return lora, sum(weight.numel() for weight in model.parameters())


def build_clip_lora(target_modules: Sequence[str], rank: int = 16) -> torch.nn.Module:
    """Return CLIP ViT-L/14 (Radford et al. 2021, table 20) with LoRA, on the meta device (no memory)."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import CLIPConfig, CLIPModel

    text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    vision = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
    )
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
        return inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(target_modules)), clip)


def build_unet_lora(target_modules: Sequence[str], rank: int = 4) -> torch.nn.Module:
    """Return the U-Net of Stable Diffusion 2 with LoRA, on the meta device."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, inject_adapter_in_model

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
        return inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(target_modules)), unet)


@functools.cache
def count_clip_lora(target_modules: tuple[str, ...], rank: int = 16) -> tuple[int, int]:
    """Return LoRA's and all parameters of CLIP ViT-L/14."""
    return count_parameters(build_clip_lora(target_modules, rank))


@functools.cache
def count_unet_lora(target_modules: tuple[str, ...], rank: int = 4) -> tuple[int, int, int]:
    """Return LoRA's parameters, all parameters and the wrapped modules of Stable Diffusion 2's U-Net."""
    unet = build_unet_lora(target_modules, rank)
    return *count_parameters(unet), sum(hasattr(module, "lora_A") for module in unet.modules())


@functools.cache
def count_text_encoder() -> tuple[int, int]:
    """Return the parameters and the layers of Stable Diffusion 2's text encoder (OpenCLIP ViT-H/14's text
    half)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
            )
        )
    return count_parameters(encoder)[1], encoder.config.num_hidden_layers


CLIP_AS_RUN = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc1", "mlp.fc2")
CLIP_AS_MEANT = tuple(name.replace("attn", "self_attn") for name in CLIP_AS_RUN)
UNET_AS_RUN = ("attn", "proj_in")
UNET_AS_MEANT = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out")


@settles("0.06")
def _size_of_unet(claim, published, studies):
    lora, with_lora, _ = count_unet_lora(UNET_AS_RUN)
    total = with_lora - lora
    return Finding(_agree(total / 1e6, published[claim][0], 1), COUNTING, f"{total:,} parameters")


@settles("0.07")
def _text_encoder(claim, published, studies):
    total, layers = count_text_encoder()
    return Finding("corrected", COUNTING, f"the text half alone: {layers} layers, {total:,} parameters")


@settles("0.09")
def _unet_coverage(claim, published, studies):
    lora, _, modules = count_unet_lora(UNET_AS_RUN)
    meant, _, modules_meant = count_unet_lora(UNET_AS_MEANT)
    return Finding(
        "refuted",
        COUNTING,
        f"{modules} modules (proj_in only), {lora:,} parameters; attention and "
        f"projections would be {modules_meant} and {meant:,}",
    )


@settles("0.15")
def _reduction(claim, published, studies):
    lora, total = count_clip_lora(CLIP_AS_RUN)
    return Finding(
        "corrected",
        COUNTING,
        f"{(total - lora) / lora:.0f} x for CLIP as configured (the published "
        "figure belongs to a language model)",
    )


@settles("0.16")
def _share_trained(claim, published, studies):
    (clip, clip_total), (unet, unet_total, _) = count_clip_lora(CLIP_AS_RUN), count_unet_lora(UNET_AS_RUN)
    return Finding(
        "corrected", COUNTING, f"{clip / clip_total:.2%} of CLIP, {unet / unet_total:.3%} of the U-Net"
    )


@settles("0.17")
def _clip_coverage(claim, published, studies):
    lora, total = count_clip_lora(CLIP_AS_RUN)
    exact = (lora, total) == tuple(published[claim][:2])
    meant = count_clip_lora(CLIP_AS_MEANT)
    return Finding(
        "reproduced" if exact else "corrected",
        COUNTING,
        f"{lora:,} / {total:,} / {lora / total:.4%}, all in the MLP; with attention, as meant, {meant[0]:,}",
    )


@settles("0.30")
def _clip_text(claim, published, studies):
    _, layers = count_text_encoder()
    return Finding(
        "corrected",
        COUNTING,
        f"a transformer reads the text ({layers} layers in the generator); no CBOW, "
        "and no language model that writes",
    )


@settles("2.02")
def _alexnet_head(claim, published, studies):
    from torchvision.models import alexnet

    with torch.device("meta"):
        body = alexnet().classifier[-1].in_features
        head = sum(weight.numel() for weight in torch.nn.Linear(body, 3).parameters())
    return Finding(_agree(head, published[claim][0], 0), COUNTING, f"{head:,} trained parameters")


def _agree(found: float, published: float, tolerance: float) -> str:
    return "reproduced" if abs(found - published) <= tolerance else "corrected"


# -- arithmetic on the published figures --------------------------------------------------------------------


@functools.cache
def score_constant() -> dict[str, float]:
    """Return the metrics and the log loss of report 0's test: two classes, p = 1/2 for each of the 624
    images."""
    y_true, probs = faults.predict_constant({"normal": 234, "pneumonia": 390})
    return {**classification_metrics(y_true, probs, ["normal", "pneumonia"]), "loss": -math.log(probs[0, 0])}


@settles("0.25")
def _constant_predictor(claim, published, studies):
    found = [score_constant()[name] for name in ("accuracy", "macro_recall", "macro_f1", "loss")]
    exact = np.allclose(found, published[claim], atol=5e-5)
    return Finding(
        "reproduced" if exact else "corrected",
        CAUGHT,
        " / ".join(f"{value:.4f}" for value in found) + ": one class for all 624 images",
    )


@settles("0.18")
def _two_classes(claim, published, studies):
    _, recall, _, loss = published["0.25"]
    return Finding(
        "refuted",
        ARITHMETIC,
        f"recall {recall:g} = 1/2 and loss {loss:g} = ln 2: two classes (three give "
        f"{1 / 3:.4f} and {math.log(3):.4f})",
    )


@settles("0.26")
def _meaning_of_recall(claim, published, studies):
    found = score_constant()
    return Finding(
        "corrected",
        ARITHMETIC,
        f"{found['accuracy']:.1%} are right; {found['macro_recall']:g} is the mean of recall 1 and recall 0",
    )


@settles("0.23")
def _training_curve(claim, published, studies):
    recall = np.array(published[claim][3:6])
    return Finding(
        "corrected",
        ARITHMETIC,
        f"macro recall within {np.abs(recall - 0.5).max():.4f} of chance (1/2) in "
        f"every epoch; the highest is epoch {recall.argmax() + 1}, not the last",
    )


@settles("0.24")
def _epochs_not_arms(claim, published, studies):
    before, after = (share / 100 for share in published[claim])
    epochs = [
        published["0.23"].index(share) + 1 for share in (before, after) if share in published["0.23"][:3]
    ]
    if epochs != [1, 2]:
        return None
    return Finding(
        "refuted", ARITHMETIC, "the two figures are epochs 1 and 2 of one run" + _describe_effect(studies)
    )


def _describe_effect(studies: Studies) -> str:
    verdicts = studies.get("phantom", {}).get("verdict.csv")
    if verdicts is None:
        return ""
    rows = verdicts.query("arm == 'real+synthetic' and control == 'real' and metric == 'macro_f1'")
    rows = rows[
        rows["family"].astype(bool) | (rows["model"] == "clip-lora")
    ]  # the endpoint, and the claim's own model
    return "".join(
        f"; with an arm for each (phantom, {row.model}): {100 * row.delta:+.1f} points of macro F1 "
        f"[{100 * row.ci_low:+.1f}, {100 * row.ci_high:+.1f}]"
        for row in rows.itertuples()
    )


@settles("0.12")
def _images_made(claim, published, studies):
    each, other, total = published[claim]
    return Finding(
        "corrected",
        CAUGHT,
        f"{each + other:,.0f} by the slides, {total:,.0f} by the page; made by a model "
        "without the adapter (claims 0.10 and 0.11)",
    )


@settles("2.11", "2.12")
def _possible_counts(claim, published, studies):
    n_train = 299 if claim == "2.11" else 299 + int(published["2.08"][0])
    train, val = published[claim][:5], published[claim][5:10]
    impossible = faults.find_impossible_shares(train, n_train) + faults.find_impossible_shares(val, 75)
    listed = ", ".join(f"{share:.2f}" for share in impossible)
    value = f"of {len(train + val)} percentages, no count of {n_train} or 75 images gives: {listed or 'none'}"
    return Finding("corrected", ARITHMETIC, value) if impossible else Finding("not testable here", "", value)


@settles("2.13")
def _two_folds(claim, published, studies):
    hits = [round(share * 75 / 100) for share in published[claim]]
    p = fisher_exact([[hit, 75 - hit] for hit in hits]).pvalue
    return Finding(
        "reproduced" if p > 0.05 else "refuted",
        ARITHMETIC,
        f"{hits[0]} against {hits[1]} of 75 right: p = {p:.2f} (Fisher), and the two test sets differed",
    )


@settles("3.09")
def _best_model(claim, published, studies):
    n = sum(TEST_COUNTS.values())
    hits = [round(share * n / 100) for share in published[claim]]
    intervals = [proportion_confint(hit, n, method="wilson") for hit in hits]
    p = fisher_exact([[hit, n - hit] for hit in hits]).pvalue
    listed = " and ".join(f"{100 * low:.1f}-{100 * high:.1f} %" for low, high in intervals)
    return Finding(
        "answered" if p > 0.05 else "reproduced",
        ARITHMETIC,
        f"intervals {listed} of {n} images, p = {p:.2f}: the two are not separable",
    )


@settles("4.01")
def _class_sizes(claim, published, studies):
    total, *classes = published[claim][:5]
    return Finding("not testable here", "", f"the classes add up to {sum(classes):,.0f} of {total:,.0f}")


@settles("4.07", "4.08", "4.09", "4.10", "4.11", "4.12", "4.13")
def _macro_f1_bound(claim, published, studies):
    f1, precision, recall = published[claim][:3]
    bound = guards.harmonic_mean(precision, recall)
    try:
        guards.check_metrics_consistent(dict(macro_f1=f1, macro_precision=precision, macro_recall=recall))
    except guards.GuardError:
        return Finding(
            "refuted", CAUGHT, f"macro F1 can be {bound:.4f} at most with that precision and recall"
        )
    return Finding("not testable here", "", f"possible: macro F1 {f1:.4f}, at most {bound:.4f}")


@settles("4.14")
def _most_accurate(claim, published, studies):
    rows = [f"4.{number:02d}" for number in range(7, 15)]
    by_accuracy, by_f1 = (sorted(rows, key=lambda row: -published[row][column]) for column in (3, 0))
    return Finding(
        "corrected",
        ARITHMETIC,
        f"{_ordinal(by_accuracy.index(claim))} of {len(rows)} by accuracy, "
        f"{_ordinal(by_f1.index(claim))} by macro F1: the row contradicts itself or "
        "'Swin is best'",
    )


@settles("4.22")
def _best_supervised(claim, published, studies):
    rows = [f"4.{number:02d}" for number in range(7, 13)]
    by_f1 = sorted(rows, key=lambda row: -published[row][0])
    return Finding(
        "refuted",
        ARITHMETIC,
        f"in its own table ConvNeXt is {_ordinal(by_f1.index('4.09'))} of {len(rows)} "
        f"supervised networks, Swin {_ordinal(by_f1.index('4.07'))}",
    )


def _ordinal(index: int) -> str:
    return ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")[index]


@settles("4.15")
def _speed_up(claim, published, studies):
    minutes = [published[f"4.{number:02d}"][4] for number in range(7, 13)]
    ratios = np.array(minutes) / published["4.13"][4]
    return Finding(
        "corrected",
        ARITHMETIC,
        f"{ratios.min():.2f} x is the least of six ratios to DINOv2 (mean "
        f"{ratios.mean():.2f} x), with batch 64 against 16",
    )


# -- from the tables of studies -----------------------------------------------------------------------------


def _audit(studies: Studies, study: str) -> dict:
    return studies.get(study, {}).get("audit.json", {})


def _count_classes(audit: dict, splits: Sequence[str]) -> dict[str, int]:
    """Return the images of each class in `splits`, in the audit's class order."""
    found = dict.fromkeys(audit["classes"], 0)
    for row in audit["counts"]:
        found[row["label"]] += row["images"] * (row["split"] in splits)
    return found


@settles("0.01", "2.01", "3.01")
def _number_of_images(claim, published, studies):
    study = "lymphoma-local" if claim == "2.01" else "guangzhou-local"
    if not (audit := _audit(studies, study)):
        return None
    n, expected = audit["n_images"], published[claim][0]
    agrees = n > expected if claim == "3.01" else n == expected
    parts = ", ".join(
        f"{total:,} in {split}"
        for split in ("train", "val", "test")
        if (total := sum(_count_classes(audit, [split]).values()))
    )
    return Finding(
        "reproduced" if agrees else "corrected",
        f"{study}/01-data-audit",
        f"{n:,} images ({parts}) of {len(audit['classes'])} classes",
    )


@settles("0.02")
def _class_counts(claim, published, studies):
    if not (audit := _audit(studies, "guangzhou-local")):
        return None
    train, all_parts = (
        _count_classes(audit, ["train", "val"]),
        _count_classes(audit, ["train", "val", "test"]),
    )
    listed = [
        " / ".join(f"{count[c]:,}" for c in ("bacterial", "normal", "viral")) for count in (train, all_parts)
    ]
    return Finding(
        "corrected",
        "guangzhou-local/01-data-audit",
        f"{listed[0]} is the training part (with validation); {listed[1]} in all; normal is no pneumonia",
    )


@settles("0.03")
def _class_names(claim, published, studies):
    if not (audit := _audit(studies, "guangzhou-local")):
        return None
    return Finding(
        "corrected",
        "guangzhou-local/01-data-audit",
        f"there is no such class, only {', '.join(audit['classes'])}",
    )


@settles("0.04")
def _number_of_patients(claim, published, studies):
    if not (audit := _audit(studies, "guangzhou-local")):
        return None
    readings = " or ".join(f"{r['patients']:,} patients, {r['reading']}" for r in audit["patient_readings"])
    return Finding(
        "corrected", "guangzhou-local/01-data-audit", f"{audit['n_images']:,} images of {readings}"
    )


@settles("3.03", "4.02")
def _split_by_image(claim, published, studies):
    study = "guangzhou-local" if claim == "3.03" else "covid-local"
    if not (rows := _audit(studies, study).get("split_by_image")):
        return None
    most = max(rows, key=lambda row: row["difference"])
    return Finding(
        "answered",
        f"{study}/01-data-audit",
        f"drawn by image instead of by patient, the same {most['model']} "
        f"scores {100 * most['difference']:+.1f} points of balanced accuracy [{100 * most['ci_low']:+.1f}, "
        f"{100 * most['ci_high']:+.1f}] more, for nothing",
    )


@settles("4.23")
def _easy_for_the_wrong_reason(claim, published, studies):
    rows = _audit(studies, "covid-local").get("shortcut_scores", [])
    border = next((row for row in rows if row["sentence"].startswith("border")), None)
    if not border or border["ci_low"] <= border["chance"]:
        return None
    return Finding(
        "corrected",
        "covid-local/01-data-audit",
        f"without a lung in sight: a classifier of the border alone reaches {border['balanced_accuracy']:.3f} balanced accuracy "
        f"[{border['ci_low']:.3f}, {border['ci_high']:.3f}], chance {border['chance']:.3f}",
    )


def _accuracies(studies: Studies, study: str, model: str, split: str) -> pd.DataFrame:
    """Return the runs of `model` on all real training images of `study` (no rows where there are none)."""
    runs = studies.get(study, {}).get(
        "classification.csv", pd.DataFrame(columns=["arm", "model", "split", "fraction"])
    )
    return runs[
        (runs["arm"] == "real")
        & (runs["model"] == model)
        & (runs["split"] == split)
        & (runs["fraction"] == 1)
    ]


@settles("3.10")
def _mobilenet(claim, published, studies):
    runs = _accuracies(studies, "guangzhou-local", "mobilenetv2", "test")
    if runs.empty:
        return None
    mean, n, expected = runs["accuracy"].mean(), int(runs["n"].iloc[0]), published[claim][0] / 100
    low, high = proportion_confint(round(expected * n), n, method="wilson")
    return Finding(
        "reproduced" if low <= mean <= high else "corrected",
        "guangzhou-local/05-baselines",
        f"{mean:.1%} on average of {len(runs)} seeds ({runs['accuracy'].min():.1%} to "
        f"{runs['accuracy'].max():.1%}); "
        f"one run of {n} images leaves {low:.1%} to {high:.1%}",
    )


@settles("3.17")
def _validation_beside_test(claim, published, studies):
    val, test = (_accuracies(studies, "guangzhou-local", "mobilenetv2", split) for split in ("val", "test"))
    if val.empty or test.empty:
        return None
    return Finding(
        "answered",
        "guangzhou-local/05-baselines",
        f"MobileNetV2: validation {val['accuracy'].mean():.1%}, test {test['accuracy'].mean():.1%} "
        f"(means of {len(test)} seeds)",
    )


def _rows(studies: Studies, study: str, table: str, **wanted) -> pd.DataFrame:
    """Return the rows of a study's table that have the `wanted` values (no rows where there is no such table); of runs on
    a part of the training patients none.
    """
    used = [
        "arm",
        "model",
        "split",
        "seed",
        "loss",
        "val_loss",
        "macro_f1",
        "dice_per_image",
        "y_true",
        "y_pred",
        "fraction",
        "train_source",
        "test_source",
    ]
    rows = studies.get(study, {}).get(table, pd.DataFrame(columns=used)).reindex(columns=used)
    rows = rows[rows["fraction"].isna() | (rows["fraction"] == 1)]
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows


@settles("0.19")
def _in_batch_labels(claim, published, studies):
    losses = {
        name: _rows(studies, "phantom", "history.csv", model=model, arm="real")
        .groupby("seed")["loss"]
        .last()
        .mean()
        for name, model in (
            ("as published", "clip-lora-in-batch-index"),
            ("class prompts", "clip-lora"),
            ("symmetric contrastive", "clip-lora-contrastive"),
        )
    }
    if any(math.isnan(loss) for loss in losses.values()) or abs(losses["as published"] - math.log(4)) > 0.1:
        return None  # no such runs, or they do not show what is said below
    listed = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    return Finding(
        "corrected",
        "phantom/04-clip-lora",
        f"labels that number the batch's own captions teach nothing: the loss ends near ln 4 = "
        f"{math.log(4):.3f}. Last training losses: {listed}",
    )


@settles("0.29")
def _two_configurations(claim, published, studies):
    epochs = len(published["0.23"]) // 3  # accuracy, recall and F1 of each
    if epochs <= published[claim][0]:
        return None
    return Finding(
        "corrected",
        ARITHMETIC,
        f"the training table has {epochs} epochs, so its run was not the slides' one epoch; learning rate and alpha "
        "of that run are given twice and differ",
    )


def _compare_clip(studies: Studies, first: str, second: str) -> tuple[str, str] | None:
    """Return the evidence and both models' macro F1 on test patients, of the first study that has run both."""
    for study in ("guangzhou", "guangzhou-local", "phantom", "phantom-full"):
        runs = [
            _rows(studies, study, "classification.csv", arm="real", model=m, split="test")
            for m in (first, second)
        ]
        if not any(rows.empty for rows in runs):
            means = " and ".join(f"{rows['macro_f1'].mean():.3f} ({len(rows)} run(s))" for rows in runs)
            return f"{study}/04-clip-lora", means
    return None


@settles("0.21")
def _preprocessing(claim, published, studies):
    found = _compare_clip(studies, "clip-linear-probe", "clip-linear-probe-squashed")
    if found is None:
        return None
    square = (
        "; simulated films are square, so only the normalisation differs"
        if found[0].startswith("phantom")
        else ""
    )
    return Finding(
        "answered",
        found[0],
        f"macro F1 of a probe on frozen CLIP, its own preprocessing and the reports': {found[1]}{square}",
    )


@settles("0.22")
def _precision(claim, published, studies):
    found = _compare_clip(studies, "clip-lora", "clip-lora-float32")
    if found is None:
        return None
    return Finding("answered", found[0], f"macro F1 in mixed precision and in float32: {found[1]}")


@settles("0.27")
def _clip_beside_cnn(claim, published, studies):
    for study, network in (("guangzhou-local", "mobilenetv2"), ("phantom", "small-cnn")):
        runs = {m: _rows(studies, study, "classification.csv", arm="real", model=m, split="test")
                for m in ("clip-lora", network)}  # fmt: skip
        if not any(rows.empty for rows in runs.values()):
            listed = ", ".join(
                f"{model} {rows['macro_f1'].mean():.3f} ({len(rows)} seeds)" for model, rows in runs.items()
            )
            return Finding(
                "answered", f"{study}/04-clip-lora", f"macro F1 on the same test patients: {listed}"
            )
    return None


@settles("2.16")
def _predicts_noise(claim, published, studies):
    rows = _rows(studies, "phantom", "history.csv", model="lora").dropna(subset=["val_loss"])
    if rows.empty:
        return None
    first, last = rows["val_loss"].iloc[[0, -1]]
    if last >= first:
        return None
    return Finding(
        "answered",
        "phantom/02-sd-lora",
        f"yes, at a noise level drawn for each image; on fixed noise the loss goes from {first:.3f} to {last:.3f}",
    )


@settles("4.21")
def _two_tasks(claim, published, studies):
    words = []
    for word, table, column, alone in (
        ("Dice", "segmentation.csv", "dice_per_image", "unet"),
        ("macro F1", "classification.csv", "macro_f1", "singletask"),
    ):
        together, single = (
            _rows(studies, "phantom", table, model=model, split="test")[column].mean()
            for model in ("multitask", alone)
        )
        if math.isnan(together) or math.isnan(single):
            return None
        words.append(f"{word} {together:.3f} with two tasks, {single:.3f} with one")
    return Finding("answered", "phantom/06-segmentation", "same encoder, same steps: " + "; ".join(words))


@settles("4.20")
def _eight_networks(claim, published, studies):
    names = ["unet", "unetplusplus", "manet", "fpn", "pspnet", "pan", "deeplabv3", "deeplabv3plus"]
    for study in ("covid-segmentation", "covid", "phantom-full"):
        rows = _rows(studies, study, "segmentation.csv", split="test")
        rows = (
            rows[rows["model"].isin(names) & (rows["train_source"] == rows["test_source"])]
            if len(rows)
            else rows
        )
        if len(rows) and rows["model"].nunique() == len(names) and rows["seed"].nunique() > 1:
            means = rows.groupby("model")["dice_per_image"].mean().sort_values(ascending=False)
            spread = rows.groupby("model")["dice_per_image"].agg(lambda dice: dice.max() - dice.min()).max()
            value = (
                f"hard Dice per image {means.iloc[0]:.4f} ({means.index[0]}) to {means.iloc[-1]:.4f} ({means.index[-1]}); "
                f"first and second differ by {means.iloc[0] - means.iloc[1]:.4f}, a change of seed moves a network by "
                f"up to {spread:.4f}"
            )
            return Finding("answered", f"{study}/06-segmentation", value)
    return None


@settles("4.25")
def _cited(claim, published, studies):
    cited = "@article{zhou2021," in (paths.ROOT / "references.bib").read_text(encoding="utf-8")
    told = "@zhou2021" in (paths.NOTEBOOKS / "06-segmentation.ipynb").read_text(encoding="utf-8")
    if not (cited and told):
        return None
    value = "cited; that network reads volumes of breast ultrasound, the report's is a plain U-Net with a second head"
    return Finding("answered", "phantom/06-segmentation", value)


@settles("3.02")
def _balancing(claim, published, studies):
    runs = _rows(studies, "guangzhou-local", "classification.csv", model="mobilenetv2-frozen", split="test")
    means = runs.groupby("arm")["macro_f1"].mean()
    ways = ["real", "real-downsampled", "real-weighted", "real-oversampled"]
    if not set(ways) <= set(means.index):
        return None
    listed = ", ".join(f"{way} {means[way]:.3f}" for way in ways)
    return Finding(
        "answered", "guangzhou-local/05-baselines", f"macro F1 of the frozen MobileNetV2: {listed}"
    )


LYMPHOMA_ARMS = {
    "2.08": ("real+synthetic",),
    "2.09": ("real+dct1", "real+dct1-corrected"),
    "2.14": ("real+dct1", "real+dct1-corrected", "real+dct2", "real+dct2-corrected"),
    "2.15": ("real+synthetic", "real+dct1", "real+dct2", "real+duplicates"),
}


@settles(*LYMPHOMA_ARMS)
def _lymphoma_arms(claim, published, studies):
    rows = studies.get("lymphoma-local", {}).get("verdict.csv", pd.DataFrame(columns=["arm", "control"]))
    rows = rows[rows["control"] == "real"].set_index("arm")
    if not set(LYMPHOMA_ARMS[claim]) <= set(rows.index):
        return None
    listed = "; ".join(
        f"{arm} {100 * row.delta:+.1f} [{100 * row.ci_low:+.1f}, {100 * row.ci_high:+.1f}]"
        for arm, row in rows.loc[list(LYMPHOMA_ARMS[claim])].iterrows()
    )
    first = rows.iloc[0]
    return Finding(
        "answered",
        "lymphoma-local/07-verdict",
        f"points of {first['metric']} over the real images alone ({first['model']}, {first['n_images']:.0f} images, each "
        f"tested once): {listed}",
    )


@settles("2.05", "2.07")
def _lymphoma_generator(claim, published, studies):
    rows = studies.get("lymphoma-local", {}).get("synthesis.csv", pd.DataFrame(columns=["generator", "label"]))
    rows = rows[rows["label"] == "all"].dropna(subset=["kid"] if len(rows) else None)
    sweep = "lora@guidance_scale=" if claim == "2.07" else "lora@"
    kept = rows[rows["generator"].str.match(rf"{sweep}[0-9.]+$") | ((claim == "2.05") & (rows["generator"] == "lora"))]
    if kept["generator"].nunique() < 2 or (claim == "2.07" and f"{sweep}40.0" not in set(kept["generator"])):
        return None
    means = kept[kept["encoder"] == kept["encoder"].iloc[0]].groupby("generator", sort=False)[["kid", "class_recovery"]].mean()
    listed = "; ".join(
        f"{name.removeprefix(sweep)}: KID {row.kid:.2f}, class recovered {row.class_recovery:.0%}" for name, row in means.iterrows()
    )
    what = "guidance" if claim == "2.07" else "steps of training (lora: all)"
    return Finding("answered", "lymphoma-local/03-generation", f"a small generator, by {what}: {listed}")


def _judged_generators(studies: Studies, study: str) -> pd.DataFrame:
    """Return the rows of a study's `synthesis.csv` of all classes together, seen by its first encoder (none without a table)."""
    rows = studies.get(study, {}).get("synthesis.csv", pd.DataFrame(columns=["generator", "encoder", "label"], dtype=str))
    return rows[(rows["label"] == "all") & (rows["encoder"] == rows["encoder"].iloc[:1].squeeze())] if len(rows) else rows


WAYS_OF_TUNING = {
    "0.31": ("lora", "lora@num_inference_steps=4", "lcm"),
    "0.32": ("lora", "reward"),
    "0.33": ("lora", "dreambooth", "full"),
    "2.04": ("untuned", "full", "textual-inversion"),
}


@settles(*WAYS_OF_TUNING)
def _ways_of_tuning(claim, published, studies):
    rows = _judged_generators(studies, "phantom-full")
    rows = rows[rows["generator"].isin(WAYS_OF_TUNING[claim])]
    if rows["generator"].nunique() < len(WAYS_OF_TUNING[claim]):
        return None
    columns = ["kid", "recall", "class_recovery", "second_recovery"]
    means = rows.groupby("generator")[columns].mean().loc[list(WAYS_OF_TUNING[claim])]
    listed = "; ".join(
        f"{name.replace('lora@num_inference_steps=', 'lora in steps: ')}: KID {row.kid:.2f}, recall {row.recall:.2f}, class "
        f"recovered {row.class_recovery:.0%}"
        + ("" if math.isnan(row.second_recovery) else f", by a second judge {row.second_recovery:.0%}")
        for name, row in means.iterrows()
    )
    return Finding("answered", "phantom-full/03-generation", (_time_distilled() if claim == "0.31" else "") + listed)


def _time_distilled() -> str:
    """Say how much faster a distilled model samples (`make bench`)."""
    bench = pd.read_csv(paths.ROOT / "bench" / "results" / "generation.csv")
    return "".join(
        f"{row.what}: {row.ratio:.1f} times as fast, KID {row.kid_ours:.2f} beside {row.kid_plain:.2f}; "
        for row in bench.itertuples()
    )


@settles("0.13")
def _prompts(claim, published, studies):
    rows = _judged_generators(studies, "phantom-full")
    rows = rows[(rows["generator"] == "lora") | rows["generator"].str.startswith("lora@prompts=")]
    if rows["generator"].nunique() < 3:
        return None
    means = rows.groupby("generator")[["kid", "class_recovery"]].mean()
    listed = "; ".join(
        f"{'those it was tuned with' if name == 'lora' else name.partition('=')[2]}: KID {row.kid:.2f}, class recovered "
        f"{row.class_recovery:.0%}"
        for name, row in means.iterrows()
    )
    return Finding(
        "answered",
        "phantom-full/03-generation",
        f"a small generator, by prompts; a tuned one answers to the words it was tuned with: {listed}",
    )


@settles("4.17")
def _fewer_patients(claim, published, studies):
    runs = studies.get("covid-local", {}).get("classification.csv", pd.DataFrame(columns=["arm", "model", "split", "fraction"]))
    runs = runs[(runs["split"] == "test") & (runs["model"] == "small-cnn") & runs["arm"].isin(["real", "real+duplicates", "real+synthetic"])]
    if runs["fraction"].nunique() < 2:
        return None
    runs = runs[(runs["arm"] == "real") | (runs["ratio"] == runs["ratio"].max())]
    means = runs.groupby(["fraction", "arm"])["macro_f1"].mean().unstack()
    listed = "; ".join(
        f"{fraction:.0%}: " + ", ".join(f"{arm} {value:.3f}" for arm, value in row.items())
        for fraction, row in means[::-1].iterrows()
    )
    seeds = runs["seed"].nunique()
    return Finding("answered", "covid-local/05-baselines", f"macro F1 of a small CNN on three classes, mean of {seeds} seeds: {listed}")


SCRATCH = {"3.05": "cnn2", "3.06": "cnn5", "3.12": "vit-tiny"}


@settles(*SCRATCH)
def _from_scratch(claim, published, studies):
    val, test = (_accuracies(studies, "guangzhou-local", SCRATCH[claim], split) for split in ("val", "test"))
    if test.empty:
        return None
    words = "a small one, " if claim == "3.12" else ""
    return Finding(
        "answered",
        "guangzhou-local/05-baselines",
        f"{words}at the size and steps of studies/guangzhou-local.yaml: accuracy {val['accuracy'].mean():.1%} on validation "
        f"patients, {test['accuracy'].mean():.1%} on the official test images ({test['accuracy'].min():.1%} to "
        f"{test['accuracy'].max():.1%}, {len(test)} seeds)",
    )


@settles("3.16")
def _ill_called_normal(claim, published, studies):
    rows = _rows(
        studies, "guangzhou-local", "predictions.parquet", arm="real", model="mobilenetv2", split="test"
    )
    if rows.empty:
        return None
    missed = rows[(rows["y_true"] != "normal") & (rows["y_pred"] == "normal")].groupby("seed").size()
    missed = missed.reindex(rows["seed"].unique(), fill_value=0)
    ill = (rows["y_true"] != "normal").sum() // rows["seed"].nunique()
    return Finding(
        "answered",
        "guangzhou-local/05-baselines",
        f"MobileNetV2 calls {missed.min()} to {missed.max()} of {ill} ill test images normal ({len(missed)} seeds)",
    )


@settles("0.34")
def _maps(claim, published, studies):
    for study, tables in studies.items():
        runs = tables.get("classification.csv", pd.DataFrame()).reindex(
            columns=["model", "arm", "cam_outside", "cam_outside_flat"]
        )
        runs = runs[runs["arm"] == "real"].dropna()
        if len(runs):
            row = runs.iloc[0]
            return Finding(
                "answered",
                f"{study}/05-baselines",
                f"the repository has none; the maps of {row['model']} here: {row['cam_outside']:.0%} of the attribution lies "
                f"outside the lungs, of a flat map {row['cam_outside_flat']:.0%}",
            )
    return None


# -- faults re-enacted --------------------------------------------------------------------------------------


def catch(guard: Callable, *arguments) -> str:
    """Return the first sentence of what `guard` raises on a fault, "" if it raises nothing."""
    try:
        guard(*arguments)
    except guards.GuardError as error:
        return str(error).split(". Left alone")[0]
    return ""


@settles("0.10")
def _no_gradient(claim, published, studies):
    generator, before, after, _ = faults.step_without_gradient()
    caught = catch(guards.check_gradients_flow, generator), catch(guards.check_weights_change, before, after)
    return Finding("refuted", CAUGHT, "; ".join(caught)) if all(caught) else None


@settles("0.11")
def _lost_adapter(claim, published, studies):
    caught = catch(guards.check_round_trip, *faults.lose_adapter_at_loading(), 1e-6)
    return Finding("refuted", CAUGHT, f"strict=False drops the adapter: {caught}") if caught else None


@settles("0.20")
def _swapped_captions(claim, published, studies):
    classes = ["normal", "viral", "bacterial"]
    caught = catch(
        guards.check_label_order, classes, ["normal", "bacterial pneumonia", "viral pneumonia"], classes
    )
    return Finding("corrected", CAUGHT, caught) if caught else None


@settles("2.10")
def _no_perturbation(claim, published, studies):
    images_u8 = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8)
    caught = catch(guards.check_augmentation_changes, images_u8, faults.perturb_dct(images_u8, sigma=0))
    return Finding("refuted", CAUGHT, f"sigma is 0: {caught}") if caught else None


@settles("4.04")
def _flips_never_applied(claim, published, studies):
    images_u8 = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8)
    caught = catch(guards.check_augmentation_changes, images_u8, faults.overwrite_transform(images_u8))
    return Finding("refuted", CAUGHT, f"both subsets share one transform: {caught}") if caught else None


@functools.cache
def measure_path_faults(seeds: int = 10) -> pd.DataFrame:
    """Return accuracy, entropy (share of ln 3) and largest predicted class's share of each of report 3's
    suspects, one row per fault and seed of the small network."""
    rows = []
    for fault in faults.PATH_FAULTS:
        for seed in range(seeds):
            y_index, probs = faults.follow_test_path(fault, seed)
            entropy = -(probs * np.log(np.maximum(probs, 1e-12))).sum(axis=1).mean() / math.log(3)
            preds = probs.argmax(axis=1)
            rows.append(
                (fault, seed, (preds == y_index).mean(), entropy, np.bincount(preds).max() / len(preds))
            )
    return pd.DataFrame(rows, columns=["fault", "seed", "accuracy", "entropy", "largest_class"])


@settles("3.15")
def _third_of_the_test_set(claim, published, studies):
    constant = " / ".join(f"{n / sum(TEST_COUNTS.values()):.3f}" for n in TEST_COUNTS.values())
    lost = measure_path_faults().query("fault == 'weights never loaded'")["accuracy"]
    return Finding(
        "answered",
        CAUGHT,
        f"no constant class (those give {constant}); weights that were never loaded give "
        f"{lost.mean():.2f} on average ({lost.min():.2f} to {lost.max():.2f})",
    )
