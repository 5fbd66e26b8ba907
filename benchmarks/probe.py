"""Linear probe: multinomial logistic regression on frozen features, in torch (no scikit-learn needed)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Probe:
    """A trained linear classifier.

    Attributes:
        mean: Feature means of the training part.
        scale: Feature deviations of the training part.
        weight: ``[D, classes]``.
        bias: ``[classes]``.
    """

    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]

    def predict(self, features: Features) -> Labels:
        """The most likely class of each row."""
        scores = (features - self.mean) / self.scale @ self.weight + self.bias
        classes: Labels = scores.argmax(axis=1).astype(np.int64)
        return classes

    def accuracy(self, features: Features, labels: Labels) -> float:
        """Share of rows whose class is predicted."""
        return float((self.predict(features) == labels).mean())


def train(features: Features, labels: Labels, *, penalty: float = 0.03, iterations: int = 100) -> Probe:
    """Fit by L-BFGS from zero: the problem is convex, so there is no seed and no early stopping.

    Args:
        features: ``[N, D]``.
        labels: Class indices ``[N]``.
        penalty: L2 weight on standardised features, per sample.
        iterations: At most so many L-BFGS steps.
    """
    mean, scale = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64) + 1e-6
    inputs = torch.from_numpy((features - mean) / scale)
    targets = torch.from_numpy(labels)
    weight = torch.zeros(inputs.shape[1], int(labels.max()) + 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(weight.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weight + bias, targets)
        value = value + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return Probe(mean, scale, weight.detach().numpy(), bias.detach().numpy())


def cosine(left: Features, right: Features) -> npt.NDArray[np.float64]:
    """Cosine of matching rows."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    similarity: npt.NDArray[np.float64] = (a * b).sum(axis=1) / lengths
    return similarity
