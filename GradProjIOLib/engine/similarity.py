"""Image similarity losses, each made for the images that do not move.

A loss is made from the target images [N, 1, D, H, W] (intensities in [0, 1]). It is called with the warped images of
the same shape and returns one value per batch entry [N].

Weights [N, 1, D, H, W] say how much each sample counts; those that cannot be seen in both images have none. A sample
without weight counts nowhere, in no window and in no mean (normalized convolution: Knutsson and Westin, CVPR 1993).
Without weights all samples count.

LNCC: Avants et al., "Symmetric diffeomorphic image registration with cross-correlation", Medical Image
Analysis 2008, with the Gaussian window of uniGradICON. MIND-SSC: Heinrich et al., "Towards realtime multimodal
fusion for image-guided interventions using self-similarities", MICCAI 2013.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 5
"""Standard deviation of LNCC's Gaussian window in samples; the window ends at two standard deviations."""
VARIANCE_FLOOR = 1e-5
"""Added to variances, as in uniGradICON."""
MIND_RADIUS = 2
MIND_DILATION = 2
LEAST_STRUCTURE = 1e-4
"""Intensities closer than that are one value."""
LEAST_TOTAL = 1e-6
"""A window or an image with less weight than that has nothing in it."""

Similarity = Callable[..., Tensor]


def window_means(sigma: float, stride: int, weights: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """What gives the Gaussian means of values [N, 1, D, H, W] around every ``stride``-th sample along each axis.

    weights [N, 1, D, H, W]: the mean is over what they let through. Without them, samples outside the lattice count as
    zero, as in uniGradICON.
    """
    blur = partial(gaussian_blur, sigma=sigma, stride=stride)
    if weights is None:
        return blur
    total = blur(weights).clamp_(min=LEAST_TOTAL)
    return lambda values: blur(values * weights).div_(total)


class LNCC:
    """1 − mean local normalized cross-correlation, in [0, 2].

    sigma: standard deviation of the window in samples. stride: how many samples the windows lie apart; uniGradICON
    has one around every sample. shared_variance: variance of a weak signal that is added to both images. Windows that
    are empty in both images then match, so nothing is gained by drawing structure into them. With 0, as in uniGradICON,
    empty windows match badly and attract structure.
    """

    def __init__(self, targets: Tensor, sigma: float = SIGMA, stride: int = 1, shared_variance: float = 0.0):
        self.targets = targets
        self.sigma, self.stride, self.shared_variance = sigma, stride, shared_variance
        self.window = window_means(sigma, stride)
        self.mean, self.variance = self._moments(targets, self.window)

    def __call__(self, warped: Tensor, weights: Tensor | None = None) -> Tensor:
        return 1 - weighted_mean(self.correlation(warped, weights), weights, self.stride)

    def correlation(self, warped: Tensor, weights: Tensor | None = None) -> Tensor:
        """The correlation of the warped images with the targets in each window."""
        window, target_mean, target_variance = self.window, self.mean, self.variance
        if weights is not None:
            window = window_means(self.sigma, self.stride, weights)
            target_mean, target_variance = self._moments(self.targets, window)
        mean, variance = self._moments(warped, window)
        covariance = window(warped * self.targets) - mean * target_mean + self.shared_variance
        return covariance * torch.rsqrt(variance * target_variance)

    def _moments(self, images: Tensor, window: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Means and variances in the window around every sample."""
        mean = window(images)
        # Rounding can make the difference negative.
        variance = torch.relu(window(images.square()) - mean.square())
        return mean, variance + (self.shared_variance or VARIANCE_FLOOR)


class SquaredLNCC(LNCC):
    """1 − mean squared local normalized cross-correlation, in [0, 1]. The sign of the contrast does not count."""

    def __call__(self, warped: Tensor, weights: Tensor | None = None) -> Tensor:
        return 1 - weighted_mean(self.correlation(warped, weights).square(), weights, self.stride)


class MINDSSC:
    """Mean squared difference of the self-similarity descriptors, for images of different modalities.

    stride: how many samples the descriptors lie apart.
    """

    def __init__(self, targets: Tensor, stride: int = 1):
        self.targets, self.stride = targets, stride
        self.descriptors = mind_ssc(targets, stride=stride)

    def __call__(self, warped: Tensor, weights: Tensor | None = None) -> Tensor:
        descriptors = self.descriptors if weights is None else mind_ssc(self.targets, weights, self.stride)
        difference = (mind_ssc(warped, weights, self.stride) - descriptors).square().mean(dim=1, keepdim=True)
        return weighted_mean(difference, weights, self.stride)


def weighted_mean(values: Tensor, weights: Tensor | None, stride: int) -> Tensor:
    """Means [N] of the values around every ``stride``-th sample, over what weights [N, 1, D, H, W] let through."""
    if weights is None:
        return values.mean(dim=(1, 2, 3, 4))
    d, h, w = (_first(size, stride) for size in weights.shape[2:])
    weights = weights[:, :, d::stride, h::stride, w::stride]
    total = weights.sum(dim=(1, 2, 3, 4)).clamp(min=LEAST_TOTAL)
    return (values * weights).sum(dim=(1, 2, 3, 4)) / total


SIMILARITIES: dict[str, Callable[..., Similarity]] = {"lncc": LNCC, "lncc2": SquaredLNCC, "mind": MINDSSC}


def gaussian_blur(images: Tensor, sigma: float = SIGMA, stride: int = 1) -> Tensor:
    """Gaussian means of [N, C, D, H, W] in windows of 4σ + 1 samples; samples outside count as zero.

    Along one axis the blur is a product with a banded matrix, which costs a fraction of a convolution
    with so long a kernel. The windows are around every ``stride``-th sample.
    """
    return _filter(images, lambda size: _gaussian_matrix(size, sigma, stride, images.dtype, images.device))


def _first(size: int, stride: int) -> int:
    """The first sample of an axis with a window around it, so that both ends are equally far from one."""
    return ((size - 1) % stride) // 2


def mind_ssc(images: Tensor, weights: Tensor | None = None, stride: int = 1) -> Tensor:
    """Descriptors [N, 12, D, H, W] of images [N, 1, D, H, W], at every ``stride``-th sample.

    Each of the twelve channels compares the patches around two neighbors of a sample that lie √2 neighbor distances
    apart. In a patch only samples count that have a weight.
    """
    differences = _patch_differences(images).square_()
    if weights is None:
        distances = _box_mean(differences, stride)
    else:
        seen = _patch_differences(weights, torch.mul)
        distances = _box_mean(differences * seen, stride) / _box_mean(seen, stride).clamp(min=LEAST_TOTAL)
    distances = distances - distances.amin(dim=1, keepdim=True)
    noise = distances.mean(dim=1, keepdim=True)
    level = weighted_mean(noise.detach(), weights, stride).view(-1, 1, 1, 1, 1)
    return torch.exp(-distances / torch.clamp(noise, level * 1e-3, level * 1e3))


def has_structure(images: Tensor) -> Tensor:
    """1 where MIND-SSC says something about images [N, 1, D, H, W], 0 where all its patches are of one value."""
    reach = 2 * (MIND_RADIUS + MIND_DILATION) + 1
    highest = F.max_pool3d(images, reach, 1, reach // 2)
    lowest = -F.max_pool3d(-images, reach, 1, reach // 2)
    return (highest - lowest > LEAST_STRUCTURE).to(images.dtype)


def _patch_differences(images: Tensor, combine: Callable[..., Tensor] = torch.sub) -> Tensor:
    """For each of the twelve pairs of neighbors of every sample, their difference (or what combines them)."""
    padded = F.pad(images, [MIND_DILATION] * 6, mode="replicate")
    d, h, w = images.shape[2:]
    neighbors = []
    for offset in _NEIGHBORS:
        z, y, x = (MIND_DILATION * (1 + step) for step in offset)
        neighbors.append(padded[:, :, z : z + d, y : y + h, x : x + w])
    return torch.cat([combine(neighbors[a], neighbors[b]) for a, b in _NEIGHBOR_PAIRS], dim=1)


def _box_mean(values: Tensor, stride: int) -> Tensor:
    return _filter(values, lambda size: _box_matrix(size, stride, values.dtype, values.device))


_NEIGHBORS = [(0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (-1, 0, 0), (1, 0, 0)]
_NEIGHBOR_PAIRS = [(a, b) for b in range(6) for a in range(b) if a // 2 != b // 2]


def _filter(images: Tensor, matrix: Callable[[int], Tensor]) -> Tensor:
    """Applies a linear filter along D, H and W, given as a matrix [new length, length] for the length of the axis."""
    n, c, d, h, w = images.shape
    along_d, along_h, along_w = matrix(d), matrix(h), matrix(w)
    images = (images.reshape(-1, w) @ along_w.T).view(n * c * d, h, -1)
    images = (along_h @ images).view(n * c, d, -1)
    return (along_d @ images).view(n, c, len(along_d), len(along_h), len(along_w))


@lru_cache(maxsize=32)
def _gaussian_matrix(size: int, sigma: float, stride: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    centers = torch.arange(_first(size, stride), size, stride)
    distance = (centers[:, None] - torch.arange(size)[None, :]).double()
    reach = 2 * sigma
    norm = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).double() / sigma).square()).sum()
    kernel = torch.exp(-0.5 * (distance / sigma).square()) * (distance.abs() <= reach) / norm
    return kernel.to(device, dtype)


@lru_cache(maxsize=32)
def _box_matrix(size: int, stride: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Means of 2 · MIND_RADIUS + 1 samples, around every ``stride``-th; those outside repeat the outermost one."""
    centers = torch.arange(_first(size, stride), size, stride)
    samples = centers[:, None] + torch.arange(-MIND_RADIUS, MIND_RADIUS + 1)
    kernel = F.one_hot(samples.clamp(0, size - 1), size).double().mean(dim=1)
    return kernel.to(device, dtype)
