"""The analytic chest: thickness (cm) or attenuation of each structure along the ray, one function per
structure.

Fields are (N, H, W) float32; parameters `p` are (N, 1, 1); `g` holds the coordinates of
`geometry.place_patient` and what one structure leaves for the next. Attenuation coefficients are in 1/cm at
about 80 keV (NIST XCOM).
"""

import numpy as np
import torch

from medaug.phantom.geometry import (
    blur,
    bump,
    ellipse,
    root,
    soft_step,
    splat,
    squared_distance,
    take,
    to_pixels,
)

MU_SOFT, MU_CORTICAL, MU_SPONGY = 0.18, 0.62, 0.16  # bone is in excess of the soft tissue that it displaces
AERATED = 0.74  # part of the lung's volume that is air
BRANCHES = (
    (6, 0.46, 0.030),
    (18, 0.27, 0.019),
    (54, 0.17, 0.012),
)  # per lung and level: how many, length, width


def measure_body(g, p):
    """Return soft tissue in cm: trunk with sloping shoulders, neck and arms, as rounded solids."""
    y, ax = g["y"], g["ax"]
    wide = p["cage"] + 0.10 + 0.16 * p["build"]
    half = wide + (1.22 - wide) * soft_step(-0.30 - y, 0.22)
    top = -1.12 + 0.40 * (ax - 0.22).clamp_min_(0)  # the line of the trapezius
    flat = (ax / half) ** 2
    depth = (19 + 5 * p["build"]) * p["depth"] * (0.80 + 0.20 * soft_step(y - 0.1, 0.5))
    trunk = (1 - flat * flat).clamp_min_(0).mul_(((y - top) * (1 / 0.34)).clamp_(0, 1)).mul_(depth * depth)
    neck = (1 - (ax * (1 / (0.24 + 0.05 * p["build"]))) ** 2).mul_(soft_step(-0.55 - y, 0.3)).mul_(144)
    radius = 0.17 + 0.05 * p["build"]
    g["humerus"] = squared_distance(ax, y, 0.97 + p["arms"], -0.5, 1.11 + p["arms"], 0.9)
    arm = 1 - g["humerus"] * (1 / radius**2)
    return root(torch.maximum(torch.maximum(trunk, neck), arm.mul_(100)))


def measure_lungs(g, p):
    """Return aerated lung in cm, and leave the outline that other structures need in `g`."""
    y, ax, left = g["y"], g["ax"], g["left"]
    base = p["base"] + p["breath"]
    rise = ((y - p["apex"]) * (1 / (base - p["apex"]))).clamp_(0, 1)
    fall = 1 - rise
    flare = (1 - fall * fall * (0.4 + 0.6 * fall)).sqrt_()
    turn = p["turn"] * (1 - 2 * left)  # a patient turned to one side shows more of one lung
    outer = 0.30 + (p["cage"] * (1 + turn) - 0.32) * flare
    steep = (1.5 * rise).clamp_max_(1) - 1
    inner = 0.30 - (0.19 + turn) * (1 - steep * steep).sqrt_()
    across = ((ax - 0.08) / (outer - 0.08)).clamp_(0, 1)
    dome = p["dome_right"] + (p["dome_left"] - p["dome_right"]) * left + p["breath"]
    offset = ((ax - 0.30) / (outer - 0.30).clamp_min_(0.1)).clamp_(-0.4, 1.2)
    dome = dome + offset * offset * (0.22 + 0.10 * offset)
    edge = 0.012 + 0.5 * g["px"]
    lateral = torch.minimum(outer - ax, (ax - inner) * 0.8)
    above = soft_step(dome - y, edge)
    outline = soft_step(lateral, edge) * soft_step(y - p["apex"], 0.02)
    recess = 0.16 * soft_step(dome + 0.10 - y, 0.08) * (1 - above)  # lung behind the dome
    chord = root(1 - across * across) * (0.52 + 0.48 * rise)
    g["cage"] = 0.22 + (p["cage"] - 0.22) * flare
    g["dome"], g["above"], g["lateral"], g["across"] = dome, above, lateral, across
    g["lung"] = 16.5 * p["depth"] * chord * outline * (above + recess)
    return g["lung"]


def measure_heart(g, p, big):
    """Return heart and great vessels in cm (`big` 1: an enlarged heart), and leave their silhouette in `g`.

    In the order of the code: ventricles, right atrium, aortic knob, pulmonary trunk, descending aorta, cava,
    mediastinum.
    """
    x, y = g["x"], g["y"]
    scale = p["heart"] * (1 + 0.28 * big)
    cy = 0.29 + 0.8 * p["breath"]
    parts = (
        (13.5, (0.13 + 0.07 * big, cy, 0.37 * scale, 0.245 * scale, p["heart_tilt"])),
        (11.5, (-0.04, cy - 0.04, 0.175 * scale, 0.27 * scale)),
        (6.5, (0.095, -0.36, p["knob"], p["knob"] * 1.15)),
        (7.0, (0.10, -0.16, 0.105, 0.15)),
        (4.0, (0.075, 0.05, 0.065, 0.62)),
        (5.0, (-0.075, -0.35, 0.075, 0.42)),
        (12.0, (0.0, 0.1, 0.115, 1.5)),
    )
    solid = torch.zeros_like(x)
    for height, where in parts:
        torch.maximum(solid, ellipse(x, y, *where).mul_(height**2), out=solid)
    g["silhouette"] = solid > 2.25
    return torch.minimum(solid.sqrt_(), g["lung"])


def attenuate_tube(q, size):
    """Return the attenuation of a bone, shell and spongy core; `q` = (distance / radius)^2, `size` in cm."""
    outer, inner = (1 - q).clamp_min_(0), (1 - 1.55 * q).clamp_min_(0)
    outer = (2 - outer).mul_(
        outer
    )  # a smooth stand-in for the chord, whose root would cost more than all the rest
    inner = (2 - inner).mul_(inner)
    return outer.mul_(size * MU_CORTICAL).sub_(inner.mul_(0.8 * size * (MU_CORTICAL - MU_SPONGY)))


def attenuate_ribs(g, p):
    """Return posterior and anterior ribs: tilted loops around an elliptic cage, seen edge-on along the chest
    wall.

    A rib that leaves the spine at y_i passes the back at y_i + drop(x) and the front at y_i + 2 drop(cage) -
    drop(x).
    """
    y, gap, fall = g["y"], p["rib_gap"], p["rib_drop"]
    q = (g["ax"] / g["cage"]).clamp_max_(0.999)
    s = (1 - q * q).sqrt_()
    drop = fall * (0.55 * (1 - s) + q * (0.16 + 0.29 * q))
    slope = fall / g["cage"] * (0.55 * q / (s + 0.12) + (0.16 + 0.58 * q))
    flatness = 1 / (1 + slope * slope)  # turns a vertical distance, squared, into one across the rib
    along = 1 + 0.9 * (1 / (s + 0.35) - 0.74).clamp_(0, 1.5)  # the ray runs along the rib at the chest wall
    ribs = 0
    for front, level in ((False, y - drop + 0.12 * q * (1 - q)), (True, y - 2.16 * fall + 1.25 * drop)):
        phase = level / gap + p["rib_phase"] + 0.07 * torch.sin(7 * level + 9 * p["rib_phase"])
        radius = gap * p["rib_size"] * (1.18 if front else 1.0)
        distance = (phase - phase.round()) * (gap / radius)
        rib = attenuate_tube(distance * distance * flatness, 0.55 if front else 1.15)
        # the front ends are cartilage, which hardly shows
        ribs = ribs + (rib * soft_step(g["ax"] - 0.46 * g["cage"], 0.10) if front else rib)
    rim = torch.minimum(g["cage"] + 0.012 - g["ax"], (g["ax"] - 0.05) * 0.5)
    fade = soft_step(y - g["dome"], 0.1).mul_(-0.6).add_(1).mul_(soft_step(y - p["apex"] - 0.02, 0.10))
    return ribs.mul_(along).mul_(fade).mul_(soft_step(rim, 0.012 + 0.5 * g["px"]))


def attenuate_spine(g, p):
    """Return vertebral bodies with end plates and discs, pedicles and spinous processes."""
    x, y = g["x"] - 0.06 * p["turn"], g["y"]
    ax, gap = x.abs(), p["rib_gap"] * (0.86 + 0.10 * y)
    t = y / gap + p["rib_phase"]
    t = (t - t.round()).abs_() * 2  # 0 in the middle of a body, 1 in the middle of a disc
    flat = soft_step(0.074 + 0.018 * y + 0.008 * t - ax, 0.012 + 0.4 * g["px"])
    body = flat * (0.36 + 0.144 * soft_step(0.80 - t, 0.1) + 0.264 * bump((t - 0.72) * 10))
    pedicle = bump((ax - 0.052) * (1 / 0.014)) * bump((t - 0.1) * (gap * (1 / 0.036)))
    return body + 0.29 * pedicle + 0.22 * bump(x * (1 / 0.014)) * soft_step(0.72 - t, 0.2)


def attenuate_shoulders(g, p):
    """Return clavicles, scapulae and upper arms; all but the shafts lie in the upper 55 % of the film."""
    top = int(0.55 * g["size"])
    y, ax, left = (g[name][:, :top] for name in ("y", "ax", "left"))
    t = ((ax - 0.07) * 1.25).clamp_(0, 1)
    tilt = p["turn"] * (1 - 2 * left)
    line = p["clavicle"] + 0.4 * tilt - p["clavicle_rise"] * t + 0.6 * t * (0.5 - t) * (1 - t)  # an S
    radius = 0.034 - 0.032 * t * (1 - t) + 0.2 * g["px"]
    clavicle = attenuate_tube(((y - line) / radius) ** 2, 2.0)
    clavicle = clavicle * soft_step(ax - 0.065 - tilt, 0.02) * soft_step(0.86 - ax, 0.02)
    px = ax - p["arms"]
    d = torch.minimum((px - 0.60) * 0.97 - (y + 0.55) * 0.16, (0.92 - px) * 0.86 - (y + 0.44) * 0.42)
    d = torch.minimum(d, (y + 0.64) + (px - 0.6) * 0.05)  # depth inside the scapula's triangle
    scapula = 0.11 * soft_step(d, 0.012) + 0.20 * bump((d - 0.014) * (1 / 0.016))
    head = root(ellipse(px, y, 0.93, -0.55, 0.105, 0.115)) * 0.45
    bones = attenuate_tube(g["humerus"] * (1 / 0.062**2), 1.5)
    bones[:, :top] += clavicle + scapula + head
    return bones


def measure_airways(g, p):
    """Return the air of the trachea and main bronchi in cm."""
    x, y = g["x"] - 0.5 * p["turn"], g["y"]
    trachea = (1 - (x * (1 / 0.040)) ** 2).mul_(soft_step(-0.22 - y, 0.06) * 1.9**2)
    bronchi = 1 - squared_distance(x.abs(), y, 0.0, -0.26, 0.13, -0.10) * (1 / 0.026**2)
    return root(torch.maximum(trachea, bronchi.mul_(1.2**2)))


def measure_gas(g, p):
    """Return the gas of the stomach in cm, below the left dome (the image's right); many films show none."""
    bubble = ellipse(g["x"], g["y"], 0.34, g["dome"] + 0.17, 0.13, 0.085)
    return root(bubble) * (5.5 * p["gas"].clamp_min(0))


def grow_tree(g, p, draws, levels=(0, 1, 2)):
    """Return the branching vessels of both lungs, drawn point by point along curved twigs; a trunk peaks at
    about 1.

    `draws` (N, 2, branches, 4) are uniform: origin along the parent, angle, length, bend.
    """
    n, size, start, canvas = len(draws), g["size"], 0, 0
    side = torch.tensor([-1.0, 1.0])[None, :, None, None]
    twigs = None
    for level, (count, length, width) in enumerate(BRANCHES[: max(levels) + 1]):
        draw = draws[:, :, start : start + count]  # (N, 2, count, 4)
        start += count
        if level == 0:
            fan = (torch.arange(count) + 0.5) / count
            ox, oy = 0.12 + 0.05 * draw[..., 0], (0.10 * fan - 0.12 + 0.5 * p["breath"]).expand(n, 2, count)
            angle = -1.35 + 2.75 * fan + 0.35 * (draw[..., 1] - 0.5)
        else:
            ox, oy, angle, reach, bend = (q.repeat_interleave(count // q.shape[2], 2) for q in twigs)
            t = 0.25 + 0.75 * draw[..., 0]
            mean = angle + 0.5 * bend * t
            ox, oy = ox + reach * t * torch.cos(mean), oy + reach * t * torch.sin(mean)
            turn = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)
            angle = angle + bend * t + turn * (0.30 + 0.55 * draw[..., 1])
        reach, bend = length * (0.65 + 0.6 * draw[..., 2]), 0.9 * (draw[..., 3] - 0.5)
        twigs = (ox, oy, angle, reach, bend)
        if level not in levels:
            continue
        steps = int(np.ceil(length * size * 0.75)) + 2
        t = (torch.arange(steps) + 0.5) / steps
        mean = angle[..., None] + 0.5 * bend[..., None] * t  # (N, 2, count, steps)
        x = (ox[..., None] + reach[..., None] * t * torch.cos(mean)) * side
        y = oy[..., None] + reach[..., None] * t * torch.sin(mean)
        spacing, sigma = reach[..., None] * (size / 2 / steps), width * size / 4
        weight = spacing * (1 - 0.6 * t) * (width / 0.030 * sigma * 2.5)
        points = splat(*to_pixels(g, p, x.flatten(1), y.flatten(1)), weight.flatten(1), size)
        canvas = canvas + blur(points, max(sigma, 0.45))
    return canvas


def draw_breasts(g, p):
    """Return two breasts over the lower zones, as attenuation."""
    return root(ellipse(g["ax"], g["y"], 0.40, 0.22, 0.30, 0.30)) * (2.6 * MU_SOFT * p["breast"])


def draw_nipples(g, p):
    """Return two nipples, which look like nodules, as attenuation."""
    return root(ellipse(g["ax"], g["y"], 0.42, 0.30, 0.030, 0.030)) * 0.16


def draw_fold(g, p):
    """Return a fold of skin, sharp on one side and fading on the other, as attenuation."""
    distance = 0.25 * g["y"] + g["x"] - 0.55 * torch.sin(9 * p["where_x"])
    return soft_step(distance, 0.012) * bump(distance.clamp_min(0) * 8) * (0.14 * p["fold"])


def draw_lead(g, p):
    """Return the lead of a heart monitor and its pad, as attenuation."""
    x, y, thin = g["x"], g["y"], 0.006 + 0.35 * g["px"]
    wire = bump((y - 0.25 * p["where_y"] - 0.35 * torch.sin(2.2 * x + 4 * p["where_x"])) * (1 / thin))
    pad = ellipse(x, y, 0.5 * torch.sin(7 * p["where_x"]), -0.3 * p["where_y"], 0.035, 0.035)
    return 0.30 * wire + root(pad) * (0.5 * (p["lead"] > 0.3))


DISTRACTORS = {"breast": draw_breasts, "nipple": draw_nipples, "fold": draw_fold, "lead": draw_lead}


def attenuate_distractors(g, p):
    """Return what may overlie a chest of any label; each is there where its parameter is positive."""
    total = torch.zeros_like(g["x"])
    for name, draw in DISTRACTORS.items():
        which = (p[name].flatten() > 0).nonzero().flatten()
        if len(which):
            total[which] += draw(*take(which, g, p))
    return total
