"""Exact flows and fixed points, written without shortcut.py, that its tests compare it with."""

import torch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def constant(value):
    """A velocity that is the same everywhere."""
    return lambda x, t, **cond: torch.full_like(x, value)


def to_shifted(u, shift):
    """t = s u / (1 + (s - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def to_grid(t, shift):
    """u of t = s u / (1 + (s - 1) u)."""
    return t / (shift - (shift - 1) * t)


def sampler_time(t, steps, shift, part=1.0):
    """Where an Euler sampler is `part` of a step after t, in float64."""
    u = to_grid(t.double(), shift) - part / steps
    return torch.where(u > 0, to_shifted(u, shift), 0.0)


def required_lookahead(t, steps, shift):
    """L*(t): half of an N-step sampler's next step."""
    return (t.double() - sampler_time(t, steps, shift)) / 2


class Mixture:
    """Flow matching of a Gaussian mixture: the exact velocity E[noise - x_0 | x_t], float64.

    means: (K, D). All components have the same weight and standard deviation.
    """

    def __init__(self, means=((-1.5, 0.0), (1.0, 1.0), (0.5, -1.0)), std=0.3):
        self.means = torch.tensor(means, dtype=torch.float64)
        self.std = std

    def sample(self, count, generator):
        which = torch.randint(0, len(self.means), (count,), generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.std * z

    def posterior(self, x, t):
        """Given x_t = x: weights (B, K), means of x_0 and of noise (B, K, D), std of x_0 (B,)."""
        t = t[:, None, None]
        offset = x[:, None] - (1 - t) * self.means
        variance = (1 - t) ** 2 * self.std**2 + t**2
        weights = (-(offset**2).sum(2) / (2 * variance[:, :, 0])).softmax(1)
        x_0 = self.means + (1 - t) * self.std**2 / variance * offset
        noise = t / variance * offset
        return weights, x_0, noise, (t * self.std / variance.sqrt())[:, 0, 0]

    def __call__(self, x, t, **cond):
        weights, x_0, noise, _ = self.posterior(x, t)
        return (weights[:, :, None] * (noise - x_0)).sum(1)


def runge_kutta(velocity, x, start, end, steps):
    """x at `end`, from x at `start`, by `steps` classical Runge-Kutta steps."""
    h = (end - start) / steps
    for i in range(steps):
        t = torch.full((len(x),), start + i * h, dtype=x.dtype)
        k_1 = velocity(x, t)
        k_2 = velocity(x + h / 2 * k_1, t + h / 2)
        k_3 = velocity(x + h / 2 * k_2, t + h / 2)
        k_4 = velocity(x + h * k_3, t + h)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x


def paper_student(rho, shift, power=1, dual=True, n=32, strides=(2, 4, 8)):
    """The fixed point of the paper's windows for the teacher v(x, t) = t^power, at u = 0 ... n / n.

    One equation for each grid point, solved at once: the student's value is the mean of the targets
    of all windows that start there, weighted by how often Algorithm 1 or 2 draws them. Where none
    starts (u = 0 and 1 / n) the student is the teacher, as it is before training.
    """
    t = to_shifted(torch.arange(n + 1, dtype=torch.float64) / n, shift)
    teacher = t**power
    matrix = torch.eye(n + 1, dtype=torch.float64)
    right = teacher.clone()
    for i in range(2, n + 1):
        windows = [(1, rho / (n - 1), True)]
        for d in strides:
            if 2 * d <= i:
                windows.append((d, (1 - rho) / len(strides) / (n + 1 - 2 * d), False))
        total = sum(probability for _, probability, _ in windows)
        right[i] = 0.0
        for d, probability, of_teacher in windows:
            weight = (t[i] - t[i - d]) / (t[i] - t[i - 2 * d])
            first = probability / total * weight
            second = probability / total * (1 - weight)
            if of_teacher:
                right[i] += first * teacher[i]
            else:
                matrix[i, i] -= first
            if of_teacher and not dual:
                right[i] += second * teacher[i - d]
            else:
                matrix[i, i - d] -= second
    return torch.linalg.solve(matrix, right)
