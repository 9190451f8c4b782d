"""Image similarity losses, each made for the images that do not move.

A loss is made from the target images [N, 1, D, H, W] (intensities in [0, 1]), whose local statistics never change. It
is called with the warped images of the same shape and returns one value per batch entry [N]. A mask [N, 1, D, H, W]
says which samples of each target count; without one all do.

LNCC: Avants et al., "Symmetric diffeomorphic image registration with cross-correlation", Medical Image
Analysis 2008, with the Gaussian window of uniGradICON. MIND-SSC: Heinrich et al., "Towards realtime multimodal
fusion for image-guided interventions using self-similarities", MICCAI 2013.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

SIGMA = 5
"""Standard deviation of LNCC's Gaussian window in samples; the window ends at two standard deviations."""
VARIANCE_FLOOR = 1e-5
MIND_RADIUS = 2
MIND_DILATION = 2

Similarity = Callable[[Tensor], Tensor]


class LNCC:
    """1 − mean local normalized cross-correlation, in [0, 2]. sigma: standard deviation of the window in samples."""

    def __init__(self, targets: Tensor, masks: Tensor | None = None, sigma: float = SIGMA):
        self.targets = targets
        self.sigma = sigma
        self.weights = _weights(masks, targets)
        self.mean = gaussian_blur(targets, sigma)
        self.variance = self._variance(targets, self.mean)

    def __call__(self, warped: Tensor) -> Tensor:
        return 1 - _mean(self.correlation(warped), self.weights)

    def correlation(self, warped: Tensor) -> Tensor:
        """The correlation of the warped images with the targets in the window around every sample."""
        mean = gaussian_blur(warped, self.sigma)
        covariance = gaussian_blur(warped * self.targets, self.sigma) - mean * self.mean
        return covariance * torch.rsqrt(self._variance(warped, mean) * self.variance)

    def _variance(self, images: Tensor, mean: Tensor) -> Tensor:
        # Rounding can make the difference negative.
        return torch.relu(gaussian_blur(images.square(), self.sigma) - mean.square()) + VARIANCE_FLOOR


class SquaredLNCC(LNCC):
    """1 − mean squared local normalized cross-correlation, in [0, 1]. The sign of the contrast does not count."""

    def __call__(self, warped: Tensor) -> Tensor:
        return 1 - _mean(self.correlation(warped).square(), self.weights)


class MINDSSC:
    """Mean squared difference of the self-similarity descriptors, for images of different modalities."""

    def __init__(self, targets: Tensor, masks: Tensor | None = None):
        self.descriptors = mind_ssc(targets)
        self.weights = _weights(masks, targets)

    def __call__(self, warped: Tensor) -> Tensor:
        difference = (mind_ssc(warped) - self.descriptors).square().mean(dim=1, keepdim=True)
        return _mean(difference, self.weights)


SIMILARITIES: dict[str, Callable[..., Similarity]] = {"lncc": LNCC, "lncc2": SquaredLNCC, "mind": MINDSSC}


def gaussian_blur(images: Tensor, sigma: float = SIGMA) -> Tensor:
    """Gaussian mean of [N, C, D, H, W] in a window of 4σ + 1 samples; samples outside count as zero.

    Along one axis the blur is a product with a banded matrix, which costs a fraction of a convolution
    with so long a kernel.
    """
    return _filter(images, lambda size: _gaussian_matrix(size, sigma, images.dtype, images.device))


def mind_ssc(images: Tensor, radius: int = MIND_RADIUS, dilation: int = MIND_DILATION) -> Tensor:
    """Descriptors [N, 12, D, H, W] of images [N, 1, D, H, W].

    Each of the twelve channels compares the patches around two neighbours of a sample that lie √2
    neighbour distances apart.
    """
    padded = torch.nn.functional.pad(images, [dilation] * 6, mode="replicate")
    neighbors = [_shifted(padded, offset, dilation, images.shape[2:]) for offset in _NEIGHBORS]
    differences = torch.cat([(neighbors[a] - neighbors[b]).square() for a, b in _NEIGHBOR_PAIRS], dim=1)
    distances = _filter(differences, lambda size: _box_matrix(size, radius, images.dtype, images.device))
    distances = distances - distances.amin(dim=1, keepdim=True)
    noise = distances.mean(dim=1, keepdim=True)
    level = noise.detach().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.exp(-distances / torch.clamp(noise, level * 1e-3, level * 1e3))


_NEIGHBORS = [(0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (-1, 0, 0), (1, 0, 0)]
_NEIGHBOR_PAIRS = [(a, b) for b in range(6) for a in range(b) if a // 2 != b // 2]


def _shifted(padded: Tensor, offset: Sequence[int], dilation: int, size: Sequence[int]) -> Tensor:
    for axis, step in enumerate(offset):
        padded = padded.narrow(axis + 2, dilation * (1 + step), size[axis])
    return padded


def _weights(masks: Tensor | None, targets: Tensor) -> Tensor | None:
    """Weights of the samples that sum to one in each batch entry."""
    if masks is None:
        return None
    masks = (masks > 0).to(targets.dtype)
    return masks / masks.sum(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.mean(dim=(1, 2, 3, 4))
    return (values * weights).sum(dim=(1, 2, 3, 4))


def _filter(images: Tensor, matrix: Callable[[int], Tensor]) -> Tensor:
    """Applies a linear filter along D, H and W, given as a matrix for the length of the axis."""
    n, c, d, h, w = images.shape
    images = (images.reshape(-1, w) @ matrix(w).T).view(n * c * d, h, w)
    images = (matrix(h) @ images).view(n * c, d, h * w)
    return (matrix(d) @ images).view(n, c, d, h, w)


@lru_cache(maxsize=32)
def _gaussian_matrix(size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    distance = (torch.arange(size)[:, None] - torch.arange(size)[None, :]).double()
    reach = 2 * sigma
    norm = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).double() / sigma).square()).sum()
    kernel = torch.exp(-0.5 * (distance / sigma).square()) * (distance.abs() <= reach) / norm
    return kernel.to(device, dtype)


@lru_cache(maxsize=32)
def _box_matrix(size: int, radius: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Mean of 2·radius + 1 samples where those outside repeat the outermost one."""
    kernel = torch.zeros(size, size, dtype=torch.float64)
    for shift in range(-radius, radius + 1):
        index = (torch.arange(size) + shift).clamp(0, size - 1)
        kernel[torch.arange(size), index] += 1 / (2 * radius + 1)
    return kernel.to(device, dtype)
