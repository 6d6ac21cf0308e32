"""One pass over a layer's compact state, compiled by numba: `compact` says what the numbers mean.

LLVM turns each inner loop into 512-bit vectors where the CPU has them. What that takes: rows of 64 (so that the trip
count is known and no index can be negative), at most four arrays a loop that may overlap (it checks at run time, up to
eight pairs), and a cast around every sum of 32-bit integers, which numba would otherwise make 64-bit.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy import float32, int8, int16, int32, uint8, uint32
from numpy.typing import NDArray

GROUP = 64
"""Elements that share their moments' scales."""

# Fixed point with 12 bits behind the point, so that a rounding is: add 12 random bits, shift them out.
_EXP_AVG_CODES = float32(127 << 12)
_EXP_AVG_SQ_CODES = float32(255 << 12)
# x + 1.5 * 2**23 is x rounded to an integer, in the low bits of the float's representation.
_MAGIC = float32(1.5 * 2**23)
_MAGIC_CODE = uint32(0x4B400000 >> 12)  # what the magic number itself leaves behind after the shift; 0 in 8 bits
# No mean square but 0 gets a code below 2: (2/255)**2 is about (1/127)**2, what exp_avg's smallest code means. So an
# element that is small beside its group is not divided by something much smaller than the rounding of its mean.
_SMALLEST_CODE = uint32(_MAGIC_CODE + 2)
_LARGEST = float32(1e18)  # of a gradient: its square is still far from fp32's end


class Step(NamedTuple):
    """What is the same for every element; all fp32 but for the keys and the count."""

    key: uint32
    second_key: uint32
    matrix_numel: int  # elements below it decay by `matrix_decay`, those above by `vector_decay`
    matrix_decay: float32  # factor on the weight, 1 - learning rate * weight decay
    vector_decay: float32
    gradient_scale: float32
    beta1: float32
    beta2: float32
    root_beta2: float32
    size: float32  # learning rate / (1 - beta1**step)
    root_correction: float32  # 1 / sqrt(1 - beta2**step)
    eps: float32


@njit
def _bits(x: float32) -> uint32:
    return float32(x).view(uint32)


@njit
def _real(bits: uint32) -> float32:
    return uint32(bits).view(float32)


@njit
def _random_bits(index: uint32, key: uint32, second_key: uint32) -> uint32:
    """32 bits of a counter: https://github.com/skeeto/hash-prospector's `lowbias32`, with a key also in its middle."""
    x = uint32(index ^ key)
    x = uint32(uint32(x ^ (x >> uint32(16))) * uint32(0x7FEB352D))
    x = uint32(uint32(x ^ (x >> uint32(15)) ^ second_key) * uint32(0x846CA68B))
    return uint32(x ^ (x >> uint32(16)))


# `contract`: a product and a sum may become one operation (FMA).
@njit(nogil=True, cache=True, fastmath={"contract", "arcp"}, error_model="numpy")
def update_groups(
    weight: NDArray[int16],
    correction: NDArray[int8],
    exp_avg: NDArray[int8],
    exp_avg_sq: NDArray[uint8],
    gradient: NDArray[int16],
    exp_avg_scale: NDArray[float32],
    exp_avg_sq_scale: NDArray[float32],
    first: int,
    step: Step,
) -> None:
    """Change the state of some groups in place.

    Args:
        weight, correction, exp_avg, exp_avg_sq, gradient: (groups, 64); bf16 as int16.
        exp_avg_scale, exp_avg_sq_scale: (groups,).
        first: number of the first of these groups in the layer.
    """
    mean = np.empty(GROUP, float32)
    root = np.empty(GROUP, float32)  # of the mean square
    random = np.empty(GROUP, uint32)
    for k in range(weight.shape[0]):
        mean_unit = step.beta1 * exp_avg_scale[k] * float32(1 / 127**2)
        root_unit = step.root_beta2 * exp_avg_sq_scale[k] * float32(1 / 255**2)
        mean_bits = uint32(0)  # maxima over the bits: non-negative floats order like integers, and max is then exact
        root_bits = uint32(0)
        for j in range(GROUP):
            g = _real(uint32(gradient[k, j]) << uint32(16)) * step.gradient_scale
            g = _LARGEST if g > _LARGEST else g  # this way round a NaN stays one
            g = -_LARGEST if g < -_LARGEST else g
            q = float32(exp_avg[k, j])
            p = float32(exp_avg_sq[k, j])
            m = mean_unit * (q * abs(q)) + (float32(1) - step.beta1) * g
            r = root_unit * (p * p)
            r = np.sqrt(r * r + (float32(1) - step.beta2) * g * g)
            mean[j] = m
            root[j] = r
            mean_bits = uint32(max(mean_bits, _bits(abs(m))))
            root_bits = uint32(max(root_bits, _bits(r)))
        mean_max = _real(mean_bits)
        root_max = _real(root_bits)
        exp_avg_scale[k] = mean_max
        exp_avg_sq_scale[k] = root_max
        mean_codes = _EXP_AVG_CODES / np.sqrt(mean_max) if mean_max > 0 else float32(0)
        root_codes = _EXP_AVG_SQ_CODES / np.sqrt(root_max) if root_max > 0 else float32(0)

        index = uint32((first + k) * GROUP)
        matrix = uint32(min(max(step.matrix_numel - (first + k) * GROUP, 0), GROUP))
        for j in range(GROUP):
            x = _random_bits(uint32(index + uint32(j)), step.key, step.second_key)
            random[j] = x
            high = uint32(weight[k, j]) << uint32(16)
            w = _real(uint32(uint32(high) + (int32(correction[k, j]) << int32(8))))
            decay = step.matrix_decay if uint32(j) < matrix else step.vector_decay
            w = w * decay - step.size * (mean[j] / (root[j] * step.root_correction + step.eps))
            b = uint32(_bits(w) + (x & uint32(0xFF)))
            correction[k, j] = int8(b >> uint32(8))
            weight[k, j] = int16(uint32(b + uint32(0x8000)) >> uint32(16))

        for j in range(GROUP):
            x = random[j]
            m = mean[j]
            r = root[j]
            signed_root = _real(_bits(np.sqrt(abs(m))) | (_bits(m) & uint32(0x80000000)))
            b = _bits(signed_root * mean_codes + _MAGIC)
            exp_avg[k, j] = int8(uint32(b + (uint32(x >> uint32(8)) & uint32(0xFFF))) >> uint32(12))
            b = _bits(np.sqrt(r) * root_codes + _MAGIC)
            code = uint32(uint32(b + uint32(x >> uint32(20))) >> uint32(12))
            exp_avg_sq[k, j] = uint8(max(code, _SMALLEST_CODE if r > 0 else _MAGIC_CODE))
