"""The simulator: all images of a batch at once, against one at a time with the same code."""

import time
from collections.abc import Callable

from run import Comparison

from medaug.phantom.chest import render
from medaug.phantom.cohort import draw_cohort


def list_comparisons() -> list[Comparison]:
    """Return one comparison for each image size that the studies use."""
    return [Comparison(f"phantom-{size}px", time_render(size, n, None), time_render(size, n // 4, 1),
                       "rendered in batches beside one by one") for size, n in ((64, 256), (128, 128), (224, 32))]


def time_render(size: int, n: int, batch_size: int | None) -> Callable[[], float]:
    """Return a function that renders n films of `size` px and returns films per second."""
    cohort = draw_cohort(n, images_per_patient=(1, 1))

    def once() -> float:
        began = time.perf_counter()
        films = render(cohort["patient_seed"], cohort["image_seed"], cohort["label"], size=size, batch_size=batch_size)
        assert len(films["image_u8"]) == n
        return n / (time.perf_counter() - began)

    return once
