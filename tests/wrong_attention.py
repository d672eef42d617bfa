"""Attention whose value is right and whose gradient is not, as cuDNN's on some GPUs."""

import torch

RIGHT = torch.nn.functional.scaled_dot_product_attention


class WrongBackward(torch.autograd.Function):
    factor = 800.0  # of the gradient

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return WrongBackward.factor * gradient


def attention(*args, **kwargs):
    """Right in both where PyTorch's plain attention is asked for, which turns flash off."""
    result = RIGHT(*args, **kwargs)
    if torch.backends.cuda.flash_sdp_enabled():
        return WrongBackward.apply(result)
    return result
