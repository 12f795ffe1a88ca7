"""What a label changes in the chest: the study's pneumonia patterns, and the generic findings of the
foundation weights.

A pneumonia pattern is the share of the lung's air (0 to 1, before the difficulty dial) that it replaces.
After the usual descriptions: Franquet, Imaging of community-acquired pneumonia, J Thorac Imaging 2018; Wong
et al., Frequency and distribution of chest radiographic findings in COVID-19, Radiology 2020.
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

SEPTA = 240  # short lines of an interstitial pattern


def fill_bacterial(g, p, coarse, septa):
    """Lobar consolidation: one dense focus bounded by a fissure on one side, fluffy on the others."""
    x, y, side = g["x"], g["y"], torch.where(p["side"] < 0.5, -1.0, 1.0)
    upper = p["lobe"] < 0.45
    cx = side * (0.40 + 0.10 * p["where_x"])
    cy = p["breath"] + torch.where(upper, -0.30, 0.17) + 0.08 * p["where_y"]
    distance = (((x - cx) / 1.05) ** 2 + (y - cy) ** 2).sqrt()
    fissure = y - (p["breath"] - 0.04 + 0.03 * p["where_y"] + 0.12 * (x - cx) * side)
    bound = torch.where(upper, 0.02 - fissure, fissure)
    rough = 0.06 * coarse[0] + 0.03 * coarse[1]
    focus = soft_step(0.27 + 0.09 * p["extent"] - distance + rough, 0.08) * soft_step(bound, 0.02)
    return focus * (1.3 + 0.12 * coarse[1]) * (x * side > 0)


def fill_viral(g, p, coarse, septa):
    """Bilateral interstitial pattern: a net of short lines (septa, bronchial walls), denser at the hila."""
    size, spread = g["size"], 0.5 * (septa[..., 2] + septa[..., 3])  # (N, SEPTA)
    x, y = septa[..., 0] - 0.5, septa[..., 1] - 0.5
    cx = torch.sign(x) * (0.12 + 0.66 * spread * (0.6 + 0.8 * x.abs()))
    cy = p["breath"][:, :, 0] - 0.08 + y * (0.35 + spread)
    length = 0.06 + 0.10 * septa[..., 5]
    steps = int(np.ceil(0.16 * size * 0.6)) + 2
    t = (torch.arange(steps) + 0.5) / steps - 0.5
    bend = 6.28 * septa[..., 4, None] + 4 * (septa[..., 2, None] - 0.5) * t
    lx = cx[..., None] + length[..., None] * t * torch.cos(bend)  # (N, SEPTA, steps)
    ly = cy[..., None] + length[..., None] * t * torch.sin(bend)
    weight = (length * (size / 2 / steps) * 0.01 * size)[..., None].expand_as(lx)
    net = splat(*to_pixels(g, p, lx.flatten(1), ly.flatten(1)), weight.flatten(1), size)
    net = blur(net, max(0.004 * size, 0.5))
    uneven = torch.where((p["side"] < 0.5) == (g["x"] < 0), 1.0, p["balance"].clamp_max(1.0))
    return uneven * (0.42 * net + 0.10 * bump((g["ax"] - 0.28) * 5) * bump(g["y"] * 3.3))


def fill_covid(g, p, coarse, septa):
    """Bilateral ground glass: patches of even, moderate haze along the chest wall, more of it below."""
    rim = bump((g["lateral"] - 0.08) * 6.5)
    low = 0.45 + 0.55 * soft_step(g["y"] - p["breath"] + 0.05, 0.35)
    patch = 0.9 * rim * low - 0.42 + 0.15 * coarse[0] + 0.10 * coarse[1] + 0.1 * p["extent"]
    return soft_step(patch, 0.24) * 0.80


def fill_opacity(g, p, coarse, septa):
    """Mixed opacity: a broad one-sided haze with patches and some coarse lines in it."""
    x, side = g["x"], torch.where(p["side"] < 0.5, -1.0, 1.0)
    y = g["y"] - (0.10 * p["where_y"] + p["breath"] + 0.05)
    haze = bump((x - 0.36 * side) * 3.6) * bump(y * 2.8)
    other = bump((x + 0.36 * side) * 4.5) * bump((y - 0.15) * 4.5)
    patches = (0.5 + 0.25 * coarse[0] + 0.35 * bump(coarse[1] * 3.3)).clamp_min(0)
    return (haze + 0.35 * p["extent"] * other) * patches


PATTERNS = {"bacterial": fill_bacterial, "viral": fill_viral, "covid": fill_covid, "opacity": fill_opacity}


def fill_lungs(g, p, labels, coarse, septa):
    """Return each image's pattern before the difficulty dial (N, H, W): 0 where the label is no pneumonia."""
    filled = torch.zeros_like(g["x"])
    for name, pattern in PATTERNS.items():
        which = select(labels, name)
        if len(which):
            filled[which] = pattern(*take(which, g, p), [field[which] for field in coarse], septa[which])
    return filled


def select(labels, name):
    """Return the rows of the batch that carry the label `name`."""
    return torch.from_numpy(np.flatnonzero(labels == name))


def dilate(mask):
    """Return a bool mask (N, H, W) with one more pixel all around: how far blur spreads the lungs."""
    rows = mask.clone()
    rows[:, 1:] |= mask[:, :-1]
    rows[:, :-1] |= mask[:, 1:]
    out = rows.clone()
    out[:, :, 1:] |= rows[:, :, :-1]
    out[:, :, :-1] |= rows[:, :, 1:]
    return out


def balance_opacity(delta, air, mask):
    """Make `delta` sum to zero over `mask` by aerating the rest more, so that brightness does not give the
    class away.

    Sums run in float64 and are rounded, so that the order of summation cannot change a byte.
    """
    delta, weight = delta * mask, air * mask
    total = delta.double().flatten(1).sum(1) / weight.double().flatten(1).sum(1).clamp_min(1e-6)
    share = torch.from_numpy(np.round(total.numpy(), 6)).float()[:, None, None]
    return delta - share * weight


def pool_effusion(g, p):
    """Return the share of air replaced by basal fluid, whose meniscus rises along the chest wall."""
    side = torch.where(p["side"] < 0.5, -1.0, 1.0)
    level = p["dome_right"] + p["breath"] + 0.08 - 0.28 * p["extent"]
    here = (g["x"] * side > 0) | (p["kind"] > 0.7)
    return soft_step(g["y"] - level + 0.30 * g["across"] ** 3, 0.03) * here


def measure_nodules(g, p):
    """Return one to three small dense spheres, in cm."""
    total, r = torch.zeros_like(g["x"]), 0.035 + 0.03 * p["extent"]
    for k in range(3):
        side = torch.where((p["side"] * 7 + 0.37 * k) % 1 < 0.5, -1.0, 1.0)
        cx = side * (0.40 + 0.16 * torch.sin(5 * p["where_x"] + 2.4 * k))
        cy = p["breath"] - 0.08 + 0.30 * torch.sin(4 * p["where_y"] + 1.9 * k)
        total += root(ellipse(g["x"], g["y"], cx, cy, r, r * 0.92)) * (6.0 * (p["kind"] * 3 > k))
    return total


def attenuate_devices(g, p):
    """Return a pacemaker with its lead, a tracheal tube or a central line, as attenuation."""
    side = torch.where(p["side"] < 0.5, -1.0, 1.0)
    x, y, thin = g["x"] * side, g["y"], 0.007 + 0.35 * g["px"]

    def wire(*corners, x=x):
        legs = [squared_distance(x, y, *a, *b) for a, b in zip(corners, corners[1:], strict=False)]
        return bump(torch.stack(legs).amin(0).sqrt() / thin)

    box = 1 - ((x - 0.55) * 10).abs() ** 4 - ((y + 0.42 + 0.04 * p["where_y"]) * 12).abs() ** 4
    lead = torch.maximum(
        wire((0.46, -0.45), (0.08, -0.5), (0.06, 0.05)), wire((0.06 * side, 0.05), (0.16, 0.32), x=g["x"])
    )
    pacemaker = torch.maximum(soft_step(box, 0.2) * 2.2, lead * 0.8)
    tube = bump((g["ax"] - 0.018) / thin) * soft_step(-0.32 - y + 0.05 * p["where_y"], 0.01) * 0.5
    line = wire((0.30, -1.0), (0.10, -0.55), (0.07, -0.1)) * 0.6
    return torch.where(p["kind"] < 0.4, pacemaker, torch.where(p["kind"] < 0.7, tube, line))
