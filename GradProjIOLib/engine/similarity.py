"""Image similarity losses, bound to the images that do not move.

A loss is made from the target images [N, 1, D, H, W] (intensities in [0, 1]), whose local statistics never
change, and called with the warped images of the same shape; it returns one value per batch entry [N]. A
mask [N, 1, D, H, W] says which samples of each target count; without one all do.

LNCC: Avants et al., "Symmetric diffeomorphic image registration with cross-correlation", Medical Image
Analysis 2008, with the Gaussian window of uniGradICON. MIND-SSC: Heinrich et al., "Towards realtime multimodal
fusion for image-guided interventions using self-similarities", MICCAI 2013.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SIGMA = 5
"""Standard deviation of LNCC's Gaussian window in samples; the window ends at two standard deviations."""
VARIANCE_FLOOR = 1e-5
MIND_RADIUS = 2
MIND_DILATION = 2

Similarity = Callable[[Tensor], Tensor]


class LNCC:
    """1 − mean local normalised cross-correlation, in [0, 2]; sigma: standard deviation of the window in samples."""

    def __init__(self, targets: Tensor, masks: Tensor | None = None, sigma: float = SIGMA):
        self.targets = targets
        self.sigma = sigma
        self.weights = _weights(masks, targets)
        self.mean, second_moment = self._blurred(targets), self._blurred(targets.square())
        self.variance = torch.relu(second_moment - self.mean.square()) + VARIANCE_FLOOR

    def __call__(self, warped: Tensor) -> Tensor:
        needed = torch.is_grad_enabled() and warped.requires_grad
        with torch.no_grad():
            statistics = self._statistics(warped)
            value = 1 - _mean(self._counted(statistics[-1]), self.weights)
            gradient = self._gradient(warped, *statistics) if needed else None
        return _WithGradient.apply(warped, value, gradient) if needed else value

    def _statistics(self, warped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance of the warped images, and the correlation, in the window around every sample."""
        mean = self._blurred(warped)
        variance = self._blurred(warped.square()).addcmul_(mean, mean, value=-1).relu_().add_(VARIANCE_FLOOR)
        covariance = self._blurred(warped * self.targets).addcmul_(mean, self.mean, value=-1)
        return mean, variance, covariance.mul_(torch.rsqrt(variance * self.variance))

    def _gradient(self, warped: Tensor, mean: Tensor, variance: Tensor, correlation: Tensor) -> Tensor:
        """Of the loss with respect to the warped images, by hand: autograd would keep a dozen images for it."""
        of_correlation = self._slope(correlation).mul_(1 / warped[0].numel() if self.weights is None else self.weights)
        of_product = of_correlation * torch.rsqrt(variance * self.variance)
        # Where rounding made the variance negative, it is the floor, whatever the images do.
        varies = variance > VARIANCE_FLOOR
        of_second_moment = of_correlation.mul_(correlation).div_(variance).mul_(varies).mul_(-0.5)
        of_mean = (of_product * self.mean).addcmul_(of_second_moment, mean, value=2).neg_()
        # The blur is symmetric, so it is its own gradient.
        gradient = self._blurred(of_second_moment).mul_(warped).mul_(2)
        return gradient.addcmul_(self._blurred(of_product), self.targets).add_(self._blurred(of_mean)).neg_()

    @staticmethod
    def _counted(correlation: Tensor) -> Tensor:
        """What is averaged."""
        return correlation

    @staticmethod
    def _slope(correlation: Tensor) -> Tensor:
        """The derivative of ``_counted``."""
        return torch.ones_like(correlation)

    def _blurred(self, image: Tensor) -> Tensor:
        return gaussian_blur(image, self.sigma)


class SquaredLNCC(LNCC):
    """1 − mean squared local normalised cross-correlation, in [0, 1]: blind to the sign of the contrast."""

    @staticmethod
    def _counted(correlation: Tensor) -> Tensor:
        return correlation.square()

    @staticmethod
    def _slope(correlation: Tensor) -> Tensor:
        return 2 * correlation


class _WithGradient(torch.autograd.Function):
    """One value per batch entry of x, and its gradient with respect to x, which is known already."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, of_value: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_value.view(-1, 1, 1, 1, 1), None, None


class MINDSSC:
    """Mean squared difference of the self-similarity descriptors, for images of different modalities."""

    def __init__(self, targets: Tensor, masks: Tensor | None = None):
        self.descriptors = mind_ssc(targets)
        self.weights = _weights(masks, targets)

    def __call__(self, warped: Tensor) -> Tensor:
        difference = (mind_ssc(warped) - self.descriptors).square().mean(dim=1, keepdim=True)
        return _mean(difference, self.weights)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor | None], Similarity]] = {
    "lncc": LNCC,
    "lncc2": SquaredLNCC,
    "mind": MINDSSC,
}


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
