"""LNCC with its gradient by hand, and the similarities by the names that settings have.

Autograd keeps a dozen images for the gradient of LNCC. Here the gradient is computed at once with the value, and
nothing else is kept. Values and gradients are those of the plain formula up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from GradProjIOLib.engine.similarity import LNCC, MINDSSC, VARIANCE_FLOOR, Similarity, _mean, gaussian_blur


class FastLNCC(LNCC):
    """What LNCC computes, with the gradient by hand."""

    def __call__(self, warped: Tensor) -> Tensor:
        needed = torch.is_grad_enabled() and warped.requires_grad
        with torch.no_grad():
            statistics = self._statistics(warped)
            value = 1 - _mean(self._counted(statistics[-1]), self.weights)
            gradient = self._gradient(warped, *statistics) if needed else None
        return _WithGradient.apply(warped, value, gradient) if needed else value

    def _statistics(self, warped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance of the warped images, and the correlation, in the window around every sample."""
        mean = gaussian_blur(warped, self.sigma)
        variance = gaussian_blur(warped.square(), self.sigma).addcmul_(mean, mean, value=-1)
        variance.relu_().add_(VARIANCE_FLOOR)
        covariance = gaussian_blur(warped * self.targets, self.sigma).addcmul_(mean, self.mean, value=-1)
        return mean, variance, covariance.mul_(torch.rsqrt(variance * self.variance))

    def _gradient(self, warped: Tensor, mean: Tensor, variance: Tensor, correlation: Tensor) -> Tensor:
        """The gradient of the loss with respect to the warped images."""
        of_correlation = self._slope(correlation).mul_(1 / warped[0].numel() if self.weights is None else self.weights)
        of_product = of_correlation * torch.rsqrt(variance * self.variance)
        # Where rounding made the variance negative, it is the floor and does not depend on the images.
        varies = variance > VARIANCE_FLOOR
        of_second_moment = of_correlation.mul_(correlation).div_(variance).mul_(varies).mul_(-0.5)
        of_mean = (of_product * self.mean).addcmul_(of_second_moment, mean, value=2).neg_()
        # The blur is symmetric, so it is its own gradient.
        gradient = gaussian_blur(of_second_moment, self.sigma).mul_(warped).mul_(2)
        gradient.addcmul_(gaussian_blur(of_product, self.sigma), self.targets)
        return gradient.add_(gaussian_blur(of_mean, self.sigma)).neg_()

    @staticmethod
    def _counted(correlation: Tensor) -> Tensor:
        """What is averaged."""
        return correlation

    @staticmethod
    def _slope(correlation: Tensor) -> Tensor:
        """The derivative of ``_counted``."""
        return torch.ones_like(correlation)


class FastSquaredLNCC(FastLNCC):
    """What SquaredLNCC computes, with the gradient by hand."""

    @staticmethod
    def _counted(correlation: Tensor) -> Tensor:
        return correlation.square()

    @staticmethod
    def _slope(correlation: Tensor) -> Tensor:
        return 2 * correlation


class _WithGradient(torch.autograd.Function):
    """One value per batch entry of x, and its gradient with respect to x, which is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_value.view(-1, 1, 1, 1, 1), None, None


SIMILARITIES: dict[str, Callable[..., Similarity]] = {
    "lncc": FastLNCC,
    "lncc2": FastSquaredLNCC,
    "mind": MINDSSC,
}
