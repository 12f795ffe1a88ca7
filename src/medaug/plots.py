"""One look for every figure: a colour-blind-safe palette, the same colour for the same arm on every page."""

import json

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from medaug.runtime import Run, replace_when_done

# Okabe & Ito's palette (Color Universal Design, 2008); controls are grey, the question's arm is vermilion.
ARM_COLOURS = {
    "real": "#4d4d4d",
    "real+duplicates": "#999999",
    "real+classical": "#56b4e9",
    "real+untuned": "#e69f00",
    "real+synthetic": "#d55e00",
    "real+selected": "#cc79a7",
    "oracle": "#009e73",
    "real-weighted": "#0072b2",
    "real-oversampled": "#66a9d8",
    "real-downsampled": "#b3cde3",
    "synthetic->real": "#a6522b",
    "synthetic": "#f0a37c",
    "real+dct1": "#bdb76b",
    "real+dct1-corrected": "#7d7a2e",
    "real+dct2": "#d8d4a0",
    "real+dct2-corrected": "#a89f5b",
}
GENERATOR_COLOURS = {
    "real-floor": "#4d4d4d",
    "duplicates": "#999999",
    "noise": "#bbbbbb",
    "autoencoder": "#0072b2",
    "untuned": ARM_COLOURS["real+untuned"],
    "lora": ARM_COLOURS["real+synthetic"],
    "full": "#332288",
    "textual-inversion": "#009e73",
    "dreambooth": "#cc79a7",
    "lcm": "#56b4e9",
    "reward": "#a6522b",
    "decoder": "#882255",
}
IN_A_ROW = 3  # panels side by side: more of them cannot be read on a page
CLASS_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#f0e442"]


def set_style() -> None:
    """Set seaborn's theme for all figures; hashsalt makes the SVG files the same bytes each time."""
    sns.set_theme(context="notebook", style="whitegrid", palette=CLASS_COLOURS, rc={
        "figure.dpi": 110, "savefig.dpi": 160, "figure.constrained_layout.use": True, "svg.hashsalt": "medaug",
        "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white",
    })


def save_figure(run: Run, figure: plt.Figure, name: str, alt: str) -> None:
    """Save `figure` as PNG and SVG under `runs/<study>/figures/`, with its alt text beside it.

    `alt` says in one sentence what a reader who cannot see the figure should know. Nothing is returned: a path at the
    end of a cell would be printed above the figure.
    """
    folder = run.dir / "figures"
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        with replace_when_done(folder / f"{name}{suffix}") as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
    with replace_when_done(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps({"alt": alt, "notebook": run.notebook}, indent=2) + "\n", encoding="utf-8")


def make_panels(count: int, width: float, height: float, stacked: int = 1) -> tuple[plt.Figure, np.ndarray]:
    """Return a figure and its axes (stacked, count): one panel a model, `width` x `height` inches, in rows of `IN_A_ROW`.

    `stacked` axes share a panel, one above the other.
    """
    columns, rows = min(count, IN_A_ROW), -(-count // IN_A_ROW)
    figure, grid = plt.subplots(rows * stacked, columns, figsize=(width * columns, height * rows), squeeze=False)
    axes = grid.reshape(rows, stacked, columns).swapaxes(0, 1).reshape(stacked, rows * columns)
    for unused in axes[:, count:].flat:
        unused.remove()
    return figure, axes[:, :count]


def put_legend_beside(axes: np.ndarray) -> None:
    """Put the legend of the first of `axes` (count,) to the right of their first row, where it covers nothing."""
    last = axes[min(len(axes), IN_A_ROW) - 1]
    last.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))


def show_images(images_u8: np.ndarray, titles: list[str] | None = None, columns: int = 8, width: float = 9.0,
                suptitle: str = "") -> plt.Figure:
    """Return a figure with a grid of images (N, H, W) grey or (N, H, W, 3) RGB, uint8 0-255."""
    rows = -(-len(images_u8) // columns)
    height = width / columns * rows + (0.25 * rows if titles else 0) + (0.4 if suptitle else 0)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (axis, image_u8) in enumerate(zip(axes.flat, images_u8, strict=False)):
        axis.imshow(image_u8, cmap="gray" if image_u8.ndim == 2 else None, vmin=0, vmax=255)
        if titles:
            axis.set_title(titles[index], fontsize=8)
    if suptitle:
        figure.suptitle(suptitle)
    return figure
