"""medaug: do diffusion-made images help a medical image classifier, and how would we know?

The package is thin: it holds what a second notebook or a test needs. The story is told in `notebooks/`.
"""

__version__ = "0.1.0"
