"""A chest radiograph simulator: an analytic chest, Beer-Lambert attenuation, scatter, blur, quantum noise,
display curve.

Coordinates are anatomical: x runs from the image's left (the patient's right) to its right, y downwards, and
the field of view is about [-1, 1] in both. The primary image is exp(-A), A = sum of mu_i t_i (Beer-Lambert);
see Bushberg et al., The Essential Physics of Medical Imaging, ch. 4 and 7. Everything is simulated: no pixel
comes from a patient.

A patient's seed fixes the anatomy, an image's seed the acquisition and the layout of the finding, and neither
knows the label; a finding leaves the mean attenuation of the lungs as it was. So neither brightness nor
background tells the class.
"""

import numpy as np
import torch
import torch.nn.functional as F

from medaug.phantom import anatomy, findings
from medaug.phantom.anatomy import AERATED, MU_SOFT
from medaug.phantom.geometry import blur, place_patient, smooth_field, soft_step, splat, take
from medaug.runtime import progress

CLASSES = ("normal", "bacterial", "viral", "covid", "opacity")
GENERIC = ("healthy", "effusion", "nodule", "cardiomegaly", "device")

# name: (low, high) of a uniform draw
PATIENT = {
    "build": (0.0, 1.0), "cage": (0.68, 0.80), "apex": (-0.74, -0.66), "base": (0.70, 0.84),
    "depth": (0.9, 1.1), "rib_gap": (0.135, 0.165), "rib_phase": (0.0, 1.0), "rib_drop": (0.22, 0.31),
    "rib_size": (0.26, 0.33), "bone": (0.65, 1.05), "heart": (0.88, 1.10), "heart_tilt": (0.45, 0.85),
    "knob": (0.075, 0.105), "vessels": (0.7, 1.4), "clavicle": (-0.60, -0.50),
    "clavicle_rise": (0.08, 0.20), "spine_bend": (-0.02, 0.02), "breast": (-1.2, 1.0),
    "nipple": (-1.3, 0.7), "dome_right": (0.40, 0.50), "dome_left": (0.45, 0.54),
}  # fmt: skip
IMAGE = {
    "angle": (-0.07, 0.07), "shift_x": (-0.07, 0.07), "shift_y": (-0.07, 0.05), "zoom": (0.90, 1.06),
    "turn": (-0.05, 0.05), "breath": (-0.10, 0.06), "exposure": (-1.0, 1.0), "contrast": (0.8, 1.25),
    "gamma": (0.85, 1.25), "noise": (0.5, 1.6), "scatter": (0.25, 0.7), "focus": (0.0, 0.8),
    "marker": (0.0, 1.0), "marker_y": (-0.93, -0.70), "border": (-1.5, 1.0), "gas": (-0.8, 1.0),
    "fold": (-2.0, 1.0), "lead": (-2.3, 0.7), "arms": (-0.03, 0.10), "mottle": (0.6, 1.4),
    "side": (0.0, 1.0), "lobe": (0.0, 1.0), "extent": (0.0, 1.0), "strength": (0.85, 1.15),
    "where_x": (-1.0, 1.0), "where_y": (-1.0, 1.0), "kind": (0.0, 1.0), "balance": (0.7, 1.3),
}  # fmt: skip
TWIGS = sum(level[0] for level in anatomy.BRANCHES)


def draw_parameters(patients, images) -> tuple[dict, dict]:
    """Draw all that N images need from their seeds: ({name: (N, 1, 1) float32}, {name: larger draws}).

    Each image owns two numpy generators, seeded by its patient and by itself, so no draw depends on the
    batch.
    """
    values, rows = [], []
    for patient, image in zip(np.asarray(patients).tolist(), np.asarray(images).tolist(), strict=True):
        body, shot = np.random.default_rng([1, patient]), np.random.default_rng([2, image, patient])
        values.append(np.concatenate([body.random(len(PATIENT)), shot.random(len(IMAGE))]))
        rows.append(
            {
                "vessels": body.random((2, TWIGS, 4), dtype=np.float32),
                "bronchi": body.random((2, TWIGS, 4), dtype=np.float32),
                "septa": shot.random((findings.SEPTA, 6), dtype=np.float32),
                "coarse": shot.standard_normal((2, 6, 6), dtype=np.float32),
                "fine": shot.standard_normal((1, 24, 24), dtype=np.float32),
            }
        )
        rows[-1]["shot"] = shot  # the noise is drawn last: it alone depends on the size
    names = [name for name in rows[0] if name != "shot"]
    draws = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in names}
    unit, p = np.stack(values), {}
    for column, (name, (low, high)) in enumerate((PATIENT | IMAGE).items()):
        p[name] = torch.tensor(low + (high - low) * unit[:, column], dtype=torch.float32)[:, None, None]
    return p, draws | {"shot": [row["shot"] for row in rows]}


def attenuate_chest(g, p, draws, labels, difficulty):
    """Return A of each ray, A without the label's pattern, the lung and the finding masks; all (N, H, W)."""
    coarse, fine = smooth_field(draws["coarse"], g["size"]), smooth_field(draws["fine"], g["size"])
    big = torch.from_numpy((labels == "cardiomegaly").astype(np.float32))[:, None, None]
    body, lung = anatomy.measure_body(g, p), anatomy.measure_lungs(g, p)
    air = (lung - anatomy.measure_heart(g, p, big)).mul_(AERATED)
    mask = (g["above"] > 0.5) & (g["lateral"] > 0) & ~g["silhouette"]

    pattern = findings.fill_lungs(g, p, labels, coarse, draws["septa"])
    filled = (pattern * p["strength"] * (1 - 0.85 * difficulty)).clamp_(0, 1)
    vessels = anatomy.grow_tree(g, p, draws["vessels"]) * (air * (1 / 6)).clamp_max_(1) * (2.6 * p["vessels"])
    delta = air * filled
    dense = findings.select(labels, "bacterial")
    if len(dense):  # a vessel does not show in lung as dense as itself, but an open airway does
        solid = (filled[dense] * 1.6).clamp_(0, 1)
        bronchi = anatomy.grow_tree(*take(dense, g, p), draws["bronchi"][dense], levels=(0, 1))
        delta[dense] -= solid * (vessels[dense] + 0.35 * air[dense] * bronchi)
    delta = findings.balance_opacity(delta, air, mask)
    finding = (pattern > 0.3) & mask

    mottle = (0.025 * p["mottle"]) * (coarse[0] + 0.8 * fine[0])
    tissue = (body - air - anatomy.measure_airways(g, p) - anatomy.measure_gas(g, p)).clamp_min_(0)
    soft = MU_SOFT * (tissue + air * mottle + vessels)
    bones = anatomy.attenuate_ribs(g, p) + anatomy.attenuate_spine(g, p) + anatomy.attenuate_shoulders(g, p)
    overlay = p["bone"] * bones + anatomy.attenuate_distractors(g, p)
    plain = soft + overlay * (body * (1 / 3)).clamp_max_(1)
    attenuation = plain + MU_SOFT * delta
    for name in ("effusion", "nodule", "device"):
        which = findings.select(labels, name)
        if len(which):
            extra, shown = add_generic(name, *take(which, g, p), air[which], mask[which])
            attenuation[which] += extra
            finding[which] |= shown & mask[which]
    return attenuation, plain, findings.dilate(mask), finding


def add_generic(name, g, p, air, mask):
    """Return the attenuation that a generic finding adds, and where it is."""
    if name == "device":
        extra = findings.attenuate_devices(g, p)
    elif name == "nodule":
        extra = MU_SOFT * findings.measure_nodules(g, p) * mask
    else:
        extra = MU_SOFT * air * findings.pool_effusion(g, p)
    return extra, extra > 0.1


def estimate_scatter(attenuation):
    """Return scattered photons: a broad blur of exp(-A), computed on a coarse grid (Bushberg, ch. 7)."""
    coarse = torch.exp(-F.avg_pool2d(attenuation[:, None], max(1, attenuation.shape[-1] // 16)))
    for _ in range(3):
        coarse = F.avg_pool2d(F.pad(coarse, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return F.interpolate(coarse, attenuation.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def expose(attenuation, plain, p, noise):
    """Turn attenuation into grey levels 0-1: Beer-Lambert, scatter, focal blur, quantum noise, film-like
    display curve.

    The variance of a Poisson count falls as its mean rises, and with the pixel's area; in log space it is 1 /
    count. Scatter comes from the chest without the label's pattern (`plain`), or it would carry the label
    into the background.
    """
    size = attenuation.shape[-1]
    received = torch.exp(-attenuation) + p["scatter"] * estimate_scatter(plain)
    density = -torch.log(received)
    density = density + (p["focus"] - 0.3) * (
        blur(density, 0.005 * size) - density
    )  # < 0.3: edge enhancement
    density = density + torch.rsqrt(received).mul_(noise).mul_(0.0045 * size / 128 * p["noise"])
    odds = torch.exp((-1.35 * p["contrast"]) * (density - 2.15 - 0.25 * p["exposure"]))
    return torch.exp(-p["gamma"] * torch.log(1 + odds))  # = sigmoid^gamma


def close_shutters(grey, p):
    """Return (N, H, W) in 0-1 with the collimator's dark border, which about two films in five show."""
    size = grey.shape[-1]
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    edge = torch.maximum((axis[:, None] - p["where_x"] * 0.02).abs(), (axis + p["where_y"] * 0.02).abs())
    shutter = soft_step(1 - 0.10 * p["border"].clamp_min(0) - edge, 2 / size)
    return torch.where(p["border"] > 0, grey * shutter, grey)


def burn_marker(grey, p):
    """Write a lead R at the image's upper left or an L at its upper right (or none) into (N, H, W) in 0-1."""
    size = grey.shape[-1]
    t = torch.linspace(0, 1, max(12, size // 6))
    bow = torch.stack([0.55 * torch.sin(t * np.pi), 0.25 - 0.25 * torch.cos(t * np.pi)])
    stem, leg, foot = (
        torch.stack(v) for v in ((0 * t, t), (0.1 + 0.45 * t, 0.5 + 0.5 * t), (0.55 * t, 0 * t + 1))
    )
    right, left = torch.cat([stem, bow, leg], 1), torch.cat([stem, foot, foot], 1)
    is_right = (p["marker"] < 0.45)[:, :, 0]
    glyph = torch.where(is_right[:, :, None], right, left)  # (N, 2, P)
    height = 0.12 * size / 2
    px = torch.where(is_right, 0.05, 0.90) * size + glyph[:, 0] * height
    py = (p["marker_y"][:, :, 0] + 1) * size / 2 + glyph[:, 1] * height
    ink = splat(px, py, (p["marker"] < 0.9)[:, :, 0] * torch.full_like(px, height / len(t)), size)
    return torch.maximum(grey, (blur(ink, max(0.45, size / 320)) * 2.4).clamp_max_(0.96))


def render(patients, images, labels, size=64, difficulty=0.5, batch_size=None, show_progress=False) -> dict:
    """Render N radiographs: {"image_u8": (N, H, W) uint8, "lung_mask", "finding_mask": (N, H, W) bool}.

    `patients` and `images` are N non-negative int64 seeds (anatomy; pose, exposure, noise and layout of the
    finding), `labels` N names of `CLASSES` or `GENERIC`. `difficulty` 0 shows a finding at full density, 1 at
    15 % of it. Equal seeds give equal bytes in any batch. Raises ValueError for a label that is not known or
    lists of unequal length.
    """
    patients, images, labels = np.asarray(patients), np.asarray(images), np.asarray(labels, dtype=object)
    unknown = sorted(set(labels) - set(CLASSES + GENERIC))
    if unknown:
        raise ValueError(f"phantom: no such label {unknown}: use one of {', '.join(CLASSES + GENERIC)}")
    if not len(patients) == len(images) == len(labels):
        raise ValueError("phantom: patients, images and labels must be equally long")
    shape = (len(labels), size, size)
    out = {
        "image_u8": np.zeros(shape, np.uint8),
        "lung_mask": np.zeros(shape, bool),
        "finding_mask": np.zeros(shape, bool),
    }
    batch_size = batch_size or max(1, 16 * 128**2 // size**2)  # fields of a megabyte are the fastest
    starts = range(0, len(labels), batch_size)
    for start in progress(starts, "rendering") if show_progress else starts:
        rows = slice(start, start + batch_size)
        batch = render_batch(patients[rows], images[rows], labels[rows], size, difficulty)
        for name, field in zip(out, batch, strict=True):
            out[name][rows] = field.numpy()
    return out


@torch.no_grad()
def render_batch(patients, images, labels, size, difficulty):
    """Render one batch at once; see `render`."""
    p, draws = draw_parameters(patients, images)
    g = place_patient(p, size)
    attenuation, plain, mask, finding = attenuate_chest(g, p, draws, labels, difficulty)
    noise = np.stack([shot.standard_normal((size, size), dtype=np.float32) for shot in draws["shot"]])
    grey = expose(attenuation, plain, p, torch.from_numpy(noise))
    grey = burn_marker(close_shutters(grey, p), p)
    return (grey * 255).round_().to(torch.uint8), mask, finding


FINDING_WORDS = {
    "healthy": "unremarkable", "effusion": "fluid at the base", "nodule": "round spot",
    "cardiomegaly": "enlarged heart", "device": "implanted hardware",
}  # fmt: skip


def describe(patients, images, labels) -> list[str]:
    """Return a caption for each image, made of attributes that its pixels show, in words that no study prompt
    uses.

    Example: "frontal film of a chest, broad build, large heart, dark exposure, deep breath, upright, marker
    L, round spot". A study class adds no words: its captions are the study's business.
    """
    p, _ = draw_parameters(patients, images)
    heart = p["heart"] + 0.3 * torch.tensor([label == "cardiomegaly" for label in labels])[:, None, None]
    scales = (
        (p["build"], 0.33, 0.67, ("slim build", "average build", "broad build")),
        (heart, 0.95, 1.12, ("small heart", "ordinary heart", "large heart")),
        (p["exposure"], -0.4, 0.4, ("light exposure", "medium exposure", "dark exposure")),
        (p["breath"], -0.04, 0.02, ("shallow breath", "calm breath", "deep breath")),
        (p["angle"], -0.03, 0.03, ("leaning right", "upright", "leaning left")),
        (p["marker"], 0.45, 0.9, ("marker R", "marker L", "no marker")),
    )
    words = [
        [names[int(v >= low) + int(v >= high)] for v in q.flatten().tolist()]
        for q, low, high, names in scales
    ]
    ends = [FINDING_WORDS.get(label, "") for label in labels]
    return [", ".join(filter(None, ("frontal film of a chest", *w))) for w in zip(*words, ends, strict=True)]
