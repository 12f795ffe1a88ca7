"""Simulated H&E patches of three lymphomas: nuclei as blobs in two stains, mixed by Beer-Lambert in optical
density.

RGB = white * 10^-(h H + e E), after Ruifrok and Johnston, Anal Quant Cytol Histol 2001 (their H; a pinker
E). What the classes look like follows the WHO classification (Swerdlow et al. 2017): CLL small, round,
clumped chromatin, pale growth centres; FL nodules that mix small cleaved cells with large pale ones; MCL
medium, notched, monotonous. The amount and the contrast of each stain are drawn without the label, so mean
colour and its spread do not tell the class. No pixel is a patient's.
"""

import math

import numpy as np
import torch

from medaug.phantom.geometry import bump, smooth_field, soft_step
from medaug.runtime import progress

CLASSES = ("cll", "fl", "mcl")
FIELD = 64.0  # micrometres across a patch, at any size in pixels; `render` takes others
WINDOW = 15.0  # micrometres across the window in which a nucleus is drawn
GRID = 17  # candidate nuclei per side of such a field
HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.14, 0.85, 0.42)

TRAITS = ("radius", "spread", "large", "elongation", "notch", "irregularity", "clumping", "nodularity")
# by class; the radius in um, the rest relative to it or a share of 1
CELLS = {
    "cll": (2.9, 0.05, 0.02, 0.04, 0.00, 0.02, 0.50, 0.15),
    "fl": (3.4, 0.10, 0.22, 0.30, 0.24, 0.05, 0.20, 1.00),
    "mcl": (4.0, 0.05, 0.00, 0.10, 0.40, 0.12, 0.10, 0.05),
}
SLIDE = {
    "haematoxylin": (0.38, 0.62), "eosin": (0.09, 0.24), "hue_h": (-0.10, 0.10), "hue_e": (-0.12, 0.12),
    "white": (0.90, 1.0), "blue": (-0.04, 0.04),
}  # fmt: skip
IMAGE = {
    "amount": (0.88, 1.12), "contrast": (0.36, 0.54), "pitch": (0.95, 1.05), "turn": (0.0, math.pi),
    "gaps": (0.3, 1.0), "node_x": (-0.7, 0.7), "node_y": (-0.7, 0.7), "node_r": (0.45, 0.75),
}  # fmt: skip


def render(patients, images, labels, size=64, difficulty=0.5, batch_size=None, show_progress=False, field=FIELD) -> dict:
    """Render N patches: {"image_u8": (N, H, W, 3) uint8 RGB, "nucleus_mask": (N, H, W) bool}, numpy arrays.

    `patients` (the slide: stains, scanner) and `images` (cells, focus) are N non-negative int64 seeds,
    `labels` N names of `CLASSES`. `difficulty` 1 leaves a tenth of the difference between the classes. `field` is
    the width of a patch in micrometres: a wide one shows many small nuclei. Equal seeds give equal bytes in any
    batch. Raises ValueError for a label that is not known.
    """
    patients, images, labels = np.asarray(patients), np.asarray(images), np.asarray(labels, dtype=object)
    unknown = sorted(set(labels) - set(CLASSES))
    if unknown:
        raise ValueError(f"phantom: no such tissue label {unknown}: use one of {', '.join(CLASSES)}")
    out = {
        "image_u8": np.zeros((len(labels), size, size, 3), np.uint8),
        "nucleus_mask": np.zeros((len(labels), size, size), bool),
    }
    batch_size = batch_size or max(1, int(16 * min((64 / size) ** 2, (4 * FIELD / field) ** 2)))  # keeps memory below 200 MB
    starts = range(0, len(labels), batch_size)
    for start in progress(starts, "rendering") if show_progress else starts:
        rows = slice(start, start + batch_size)
        batch = render_batch(patients[rows], images[rows], labels[rows], size, difficulty, field)
        for name, values in zip(out, batch, strict=True):
            out[name][rows] = values.numpy()
    return out


@torch.no_grad()
def render_batch(patients, images, labels, size, difficulty, field=FIELD):
    """Render one batch at once; see `render`."""
    p, draws = draw_parameters(patients, images, field)
    traits = mix_traits(labels, difficulty)
    texture = smooth_field(draws["texture"], size)
    cells = place_cells(p, draws["cells"], traits, field)
    haematoxylin, mask = draw_nuclei(cells, traits, size, field)
    haematoxylin = haematoxylin + (0.10 + 0.03 * texture[0]).clamp_min(0)
    crack = soft_step(texture[2] - 1.0 + 0.9 * p["gaps"], 0.5)
    gap = bump(texture[1] * 4) * crack * ~mask  # where the section has torn
    eosin = (
        (1 + 0.25 * texture[0] + 0.15 * texture[2]).clamp_min(0.2) * torch.where(mask, 0.6, 1.0) * (1 - gap)
    )
    contrast = p["contrast"] * min(1, 3.5 * size / field)  # a pixel wider than a nucleus's radius (um) averages over it
    haematoxylin = p["amount"] * balance_stain(haematoxylin * (1 - 0.8 * gap), contrast)
    eosin = balance_stain(eosin, 0.7 * contrast)
    return stain(haematoxylin, eosin, p, draws["shot"]), mask


def draw_parameters(patients, images, field=FIELD) -> tuple[dict, dict]:
    """Draw all that N images need from their seeds: ({name: (N, 1, 1)}, {"cells", "texture", "shot"})."""
    side = round(GRID * field / FIELD)
    values, cells, texture, shots = [], [], [], []
    for patient, image in zip(patients.tolist(), images.tolist(), strict=True):
        slide, shot = np.random.default_rng([4, patient]), np.random.default_rng([5, image, patient])
        values.append(np.concatenate([slide.random(len(SLIDE)), shot.random(len(IMAGE))]))
        cells.append(shot.random((12, side * side), dtype=np.float32))
        texture.append(shot.standard_normal((3, 12, 12), dtype=np.float32))
        shots.append(shot)
    unit, p = np.stack(values), {}
    for column, (name, (low, high)) in enumerate((SLIDE | IMAGE).items()):
        p[name] = torch.tensor(low + (high - low) * unit[:, column], dtype=torch.float32)[:, None, None]
    return p, {
        "cells": torch.from_numpy(np.stack(cells)),
        "texture": torch.from_numpy(np.stack(texture)),
        "shot": shots,
    }


def mix_traits(labels, difficulty):
    """Return {trait: (N, 1)}: the class's own value, drawn towards the mean of all by `difficulty`."""
    table = torch.tensor([CELLS[name] for name in CLASSES])
    table = table.mean(0) + (1 - 0.9 * difficulty) * (table - table.mean(0))
    rows = table[[CLASSES.index(label) for label in labels]]
    return {name: rows[:, k, None] for k, name in enumerate(TRAITS)}


def place_cells(p, u, traits, field=FIELD) -> dict:
    """Place the candidate nuclei `u` (N, 12, K) of each image on a jittered hexagonal lattice; {name: (N, K)}, lengths
    in um.

    Large cells gather in the nodule and small ones around it, in proportion to the class's nodularity.
    """
    side = math.isqrt(u.shape[-1])
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    column = column + 0.5 * (row % 2)
    pitch = 1.98 * traits["radius"] * (1 + 0.35 * traits["large"]) * p["pitch"][:, :, 0]
    x = (column.flatten() - side / 2 + 0.25 + 0.45 * (u[:, 0] - 0.5)) * pitch
    y = (row.flatten() - side / 2 + 0.5 + 0.45 * (u[:, 1] - 0.5)) * pitch * 0.87
    c, s = torch.cos(p["turn"])[:, :, 0], torch.sin(p["turn"])[:, :, 0]
    x, y = x * c - y * s, x * s + y * c
    away = ((x / field * 2 - p["node_x"][:, :, 0]) ** 2 + (y / field * 2 - p["node_y"][:, :, 0]) ** 2).sqrt()
    node = soft_step(p["node_r"][:, :, 0] - away, 0.15)
    large = u[:, 2] < traits["large"] * (1 + traits["nodularity"] * (1.6 * node - 0.8))
    radius = traits["radius"] * (1 + traits["spread"] * (3.4 * u[:, 3] - 1.7)) * torch.where(large, 1.5, 1.0)
    radius = radius * (1 + 0.10 * traits["nodularity"] * (node - 0.5))
    turns = 2 * math.pi * u[:, (4, 5, 7, 9, 11)]
    angles = dict(zip(("axis", "notch_at", "bend", "phase", "spots"), turns.unbind(1), strict=True))
    return angles | {
        "x": x, "y": y, "radius": radius, "is_large": large.float(), "dark": 0.8 + 0.4 * u[:, 8],
        "notch": traits["notch"] * (0.4 + 1.2 * u[:, 6]),
        "elongation": traits["elongation"] * (0.4 + 1.2 * u[:, 10]),
    }  # fmt: skip


def draw_nuclei(cells, traits, size, field=FIELD):
    """Return the haematoxylin of all nuclei, which adds up where they overlap, and their mask; (N, H, W)."""
    scale = size / field  # pixels per um
    width = int(math.ceil(WINDOW * scale)) | 1
    offset, margin = torch.arange(width) - width // 2, size + 2 * width
    px, py = (cells[name] * scale + size / 2 for name in ("x", "y"))  # (N, K)
    inside = (px > -width / 2) & (px < size + width / 2) & (py > -width / 2) & (py < size + width / 2)
    ix, iy = (q.clamp(-width / 2, size + width / 2).floor().long() for q in (px, py))
    dx = (offset + 0.5 - (px - ix)[..., None, None]) / scale  # (N, K, 1, width) um
    dy = (offset[:, None] + 0.5 - (py - iy)[..., None, None]) / scale
    shape, chromatin = model_nuclei(cells, traits, dx, dy, 0.35 + 0.4 / scale)
    shape = shape * inside[..., None, None]  # (N, K, width, width)
    rows, columns = iy[..., None, None] + offset[:, None] + width, ix[..., None, None] + offset + width
    index = (torch.arange(len(px))[:, None, None, None] * margin + rows) * margin + columns
    canvas = torch.zeros(2, len(px) * margin**2)
    for layer, values in zip(canvas, (shape * chromatin, shape), strict=True):
        layer.index_add_(0, index.flatten(), values.flatten())
    density, cover = canvas.view(2, len(px), margin, margin)[:, :, width:-width, width:-width]
    return 2.2 * density / (1.2 + density), cover > 0.5  # a section is thin


def model_nuclei(cells, traits, dx, dy, blur):
    """Return outline (0 to 1) and chromatin of the nuclei at offsets dx, dy (um) from their centres."""
    c = {name: value[..., None, None] for name, value in (traits | cells).items()}
    angle, distance = torch.atan2(dy, dx), (dx * dx + dy * dy).sqrt()
    cleft = bump((angle - c["notch_at"] + math.pi) % (2 * math.pi) - math.pi) ** 2
    outline = 1 + c["elongation"] * torch.cos(2 * (angle - c["axis"])) - c["notch"] * cleft
    edge = c["radius"] * (outline + c["irregularity"] * torch.cos(3 * angle + c["bend"])) - distance
    cu, su = torch.cos(c["phase"]), torch.sin(c["phase"])
    clump = torch.cos(1.35 * (dx * cu + dy * su) + c["bend"])
    clump = clump * torch.cos(1.6 * (dy * cu - dx * su) + 2 * c["phase"]) * c["clumping"]
    rim = bump((edge - 0.5) / 0.7)
    nucleoli = bump((torch.cos(angle - c["spots"]) - 1) * 4) * bump((edge - 1.4) / 0.6)
    pale, dense = 0.42 + 0.45 * rim + 0.6 * nucleoli, 0.95 + 0.12 * rim + clump
    return soft_step(edge, blur), torch.where(c["is_large"] > 0, pale, dense) * c["dark"]


def balance_stain(density, contrast):
    """Return a stain's density with mean 1 and standard deviation `contrast` in each image, clipped at 0.

    So neither the mean colour nor its spread tells how densely a class packs its nuclei. Summed in float64
    and rounded, so that no batch can matter.
    """
    flat = density.double().flatten(1)
    mean, spread = (
        torch.from_numpy(np.round(q.numpy(), 6)).float()[:, None, None] for q in (flat.mean(1), flat.std(1))
    )
    return (1 + (density - mean) * (contrast / spread)).clamp_min(0)


def stain(haematoxylin, eosin, p, shots):
    """Mix two densities (N, H, W) into RGB (N, H, W, 3) uint8 with the slide's stains, white and noise."""
    size = haematoxylin.shape[-1]
    h, e = (
        torch.tensor(HAEMATOXYLIN).expand(len(eosin), 1, 1, 3),
        torch.tensor(EOSIN).expand(len(eosin), 1, 1, 3),
    )
    tint = torch.tensor([1.0, 0.0, -1.0])
    h, e = h + p["hue_h"][..., None] * tint, e + p["hue_e"][..., None] * -tint
    amounts = (haematoxylin * p["haematoxylin"])[..., None] * h + (eosin * p["eosin"])[
        ..., None
    ] * e.clamp_min(0)
    white = p["white"][..., None] * (1 + p["blue"][..., None] * tint)
    noise = np.stack([shot.standard_normal((size, size, 1), dtype=np.float32) for shot in shots])
    rgb = white * torch.exp(-math.log(10) * amounts) + 0.012 * torch.from_numpy(noise)
    return (rgb * 255).round().clamp(0, 255).to(torch.uint8)
