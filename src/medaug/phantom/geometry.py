"""Small shapes on pixel grids: steps, bells, ellipsoids, tubes, random fields, blurs
and splats.

Every function is element-wise (or a sum of shifted copies), so an image's bytes do not depend on its batch.
Shapes return squared chords or squared distances where they can: the caller takes one root of the largest
instead of many.
"""

import numpy as np
import torch
import torch.nn.functional as F


def soft_step(distance, width):
    """Return 0 outside, 1 inside, smooth between; `distance` is positive inside, `width` half the edge's."""
    t = distance * (0.5 / width)
    t.add_(0.5).clamp_(0, 1)
    return (t * -2).add_(3).mul_(t).mul_(t)


def bump(q):
    """Return a bell of half width about 1 in `q`: a cheaper exp(-q^2), exactly 0 beyond |q| = 2."""
    t = (q * q).mul_(-0.25).add_(1).clamp_min_(0)
    return (t * t).mul_(t)


def ellipse(x, y, cx, cy, a, b, tilt=None):
    """Return 1 - (u/a)^2 - (v/b)^2, the squared relative chord of an ellipsoid; `tilt` in radians."""
    u, v = x - cx, y - cy
    if tilt is not None:
        c, s = torch.cos(tilt), torch.sin(tilt)
        u, v = u * c + v * s, v * c - u * s
    u, v = u * (1 / a), v * (1 / b)
    return (u * u).add_(v.mul_(v)).mul_(-1).add_(1)


def root(squared):
    """Return the chord that belongs to a squared chord: 0 where it is negative."""
    return squared.clamp_min(0).sqrt_()


def squared_distance(x, y, x0, y0, x1, y1):
    """Return the squared distance of each pixel from the segment (x0, y0)-(x1, y1)."""
    dx, dy = x1 - x0, y1 - y0
    u, v = x - x0, y - y0
    t = (u * dx + v * dy).mul_(1 / (dx * dx + dy * dy)).clamp_(0, 1)
    u, v = u - t * dx, v - t * dy
    return u.mul_(u).add_(v.mul_(v))


def smooth_field(lattice, size):
    """Upsample random knots (N, C, k, k) to C smooth fields of about unit variance, each (N, size, size)."""
    half = F.interpolate(lattice, (size // 2, size // 2), mode="bicubic", align_corners=False).mul_(1.25)
    fields = F.interpolate(half, (size, size), mode="bilinear", align_corners=False)
    return [field.contiguous() for field in fields.unbind(1)]


def blur(image, sigma):
    """Blur (N, H, W) by a Gaussian of `sigma` pixels, as shifted sums."""
    reach = max(1, int(round(2.3 * sigma)))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).tolist()
    for axis, pad in ((1, (0, 0, reach, reach)), (2, (reach, reach, 0, 0))):
        padded = F.pad(image[:, None], pad, mode="replicate")[:, 0]
        n = image.shape[axis]
        image = padded.narrow(axis, reach, n) * weights[reach]
        for k in range(reach):
            pair = padded.narrow(axis, k, n) + padded.narrow(axis, 2 * reach - k, n)
            image.add_(pair.mul_(weights[k]))
    return image


def splat(px, py, weight, size):
    """Add points (N, P), in pixel coordinates, to an empty image (N, size, size) with bilinear weights."""
    x0, y0 = px.floor(), py.floor()
    fx, fy = px - x0, py - y0
    margin = size + 2  # a border of one pixel takes what falls outside
    x0, y0 = (x0 + 1).clamp_(0, size).long(), (y0 + 1).clamp_(0, size).long()
    image = torch.zeros(px.shape[0] * margin * margin)
    index = torch.arange(px.shape[0])[:, None] * (margin * margin) + y0 * margin + x0
    right, below = weight * fx, fy
    left = weight - right
    for step, share in (
        (0, left * (1 - below)), (1, right * (1 - below)), (margin, left * below), (margin + 1, right * below)
    ):  # fmt: skip
        image.index_add_(0, (index + step).flatten(), share.flatten())
    return image.view(-1, margin, margin)[:, 1:-1, 1:-1].contiguous()


def take(which, *parts):
    """Return each dict of fields with the rows `which` only: what few images show costs only them."""
    return [{k: v[which] if torch.is_tensor(v) else v for k, v in part.items()} for part in parts]


def place_patient(p, size) -> dict:
    """Return coordinates of N posed patients: x, y, distance `ax` from the midline, and the pixel's width."""
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    c, s = torch.cos(p["angle"]) * p["zoom"], torch.sin(p["angle"]) * p["zoom"]
    u, v = u - p["shift_x"], v - p["shift_y"]
    x, y = u * c + v * s, v * c - u * s
    x = x - p["spine_bend"] * torch.sin(2.5 * y)
    return {"x": x, "y": y, "ax": x.abs(), "left": (x > 0).float(), "px": 2 / size, "size": size}


def to_pixels(g, p, x, y):
    """Map anatomical points (N, P) to pixels: the inverse of `place_patient`, less the spine's bend."""
    c, s = (torch.cos(p["angle"]) / p["zoom"])[:, :, 0], (torch.sin(p["angle"]) / p["zoom"])[:, :, 0]
    u = x * c - y * s + p["shift_x"][:, :, 0]
    v = x * s + y * c + p["shift_y"][:, :, 0]
    return (u + 1) * (g["size"] / 2) - 0.5, (v + 1) * (g["size"] / 2) - 0.5
