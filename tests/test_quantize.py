"""The affine quantizer is MLX's, bit for bit, and refuses what it cannot represent.

MLX's is written down in tensors.py; tests/reference/test_quantize.py compares both with mlx itself.
"""

import numpy as np
import pytest
from tensors import Tensor, dequantize, quantize, stored

from flashmoe import _native

DTYPES = ("F32", "F16", "BF16")
FORMATS = [(bits, group) for bits in (2, 4, 8) for group in (32, 64, 128)]


def random_weights(group: int) -> np.ndarray:
    """[2000, 2 * group] float32 over 13 decades, each row at a scale of its own."""
    rng = np.random.default_rng(group)
    magnitude = 10.0 ** rng.uniform(-9, 4, (2000, 1))
    return (rng.standard_normal((2000, 2 * group)) * magnitude).astype(np.float32)


def adversarial_weights(group: int) -> np.ndarray:
    """[rows, group]: each row aims at one decision of the quantizer."""
    rng = np.random.default_rng(group)
    ramp = np.linspace(-1, 1, group)
    integers = rng.integers(-8, 8, (64, group))
    rows = [
        np.zeros(group),
        -np.zeros(group),
        *(np.full(group, value) for value in (1, -1, 1e-3, -7.3, 6e4, -6e4, 1e-7, -1e-7, 1e-20)),
        ramp,  # |min| = |max|: which is the edge?
        -ramp,
        ramp + 1,  # one-sided
        ramp - 1,
        np.eye(1, group)[0],  # one weight, the rest zero
        -np.eye(1, group, group - 1)[0],
        np.where(np.arange(group) % 2, 6e4, -6e4),
        *(ramp * 10.0**-power for power in range(1, 44)),  # to the denormals, past the 1e-7 floor
        *integers,  # levels halfway between integers: ties
        *(integers / 2 + 100),
        *(np.arange(group) % levels - levels // 2 for levels in (4, 16, 256)),
        *(rng.standard_normal((64, group)) * 1e-7),  # the floor on the scale decides
        *(rng.standard_normal((64, group)) + 50),  # edge / scale large: bias carries the group
    ]
    return np.array(rows, np.float32)


def assert_same_bits(ours, theirs: list[Tensor]) -> None:
    """As bits, so that 0 and -0 differ."""
    for array, tensor in zip(ours, theirs, strict=True):
        assert array.dtype == tensor.array.dtype
        np.testing.assert_array_equal(array.view(np.uint8), tensor.array.view(np.uint8))


@pytest.mark.parametrize("weights", [random_weights, adversarial_weights])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_equals_mlx_bit_for_bit(weights, dtype, bits, group):
    weight = stored(weights(group), dtype)
    ours = _native.quantize(weight.array, dtype, bits, group)
    assert_same_bits(ours, quantize(weight.floats(), dtype, bits, group))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_dequantizes_as_mlx_does_in_float32(dtype, bits, group):
    parts = quantize(stored(random_weights(group), dtype).floats(), dtype, bits, group)
    ours = _native.dequantize(*(part.array for part in parts), bits, group)
    theirs = dequantize(*parts, bits, group)
    if dtype == "F32":  # the product is rounded too, unless the compiler fuses it
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)
    else:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_at_most_about_a_step(bits):
    # Half a step of rounding, and half a step at the end opposite to the edge, which is exact.
    weight = np.random.default_rng(0).uniform(-1, 1, (512, 64)).astype(np.float32)
    restored = _native.dequantize(*_native.quantize(weight, "F32", bits, 64), bits, 64)
    step = (weight.max(1) - weight.min(1)) / (2**bits - 1)
    assert (np.abs(restored - weight).max(1) <= 1.1 * step).all()


def test_scales_may_be_of_another_type_than_weights():
    weight = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    words, scales, _ = _native.quantize(weight, "F32", 4, 64)
    halves, half_scales, _ = _native.quantize(weight, "F16", 4, 64)
    np.testing.assert_array_equal(halves, words)
    np.testing.assert_array_equal(half_scales, scales.astype(np.float16))


def test_float16_scales_round_as_numpy_does():
    # Groups of one value v give scale ±1e-7 or v exactly, and bias v: every magnitude in turn.
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.uniform(-1, 1, 4000) * 2.0 ** rng.integers(-26, 16, 4000), [65519.9, -65504, 6e-8]]
    ).astype(np.float32)
    weight = np.repeat(values[:, None], 32, axis=1)
    _, scales, biases = _native.quantize(weight, "F32", 4, 32)
    _, half_scales, half_biases = _native.quantize(weight, "F16", 4, 32)
    np.testing.assert_array_equal(half_scales, scales.astype(np.float16))
    np.testing.assert_array_equal(half_biases, biases.astype(np.float16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 63, 64, 130])
def test_weights_that_are_not_finite_are_refused_by_row(value, column):
    weight = np.ones((5, 192), np.float32)
    weight[3, column] = value
    with pytest.raises(ValueError, match="row 3, columns " + str(column // 64 * 64)):
        _native.quantize(weight, "BF16", 4, 64)


def test_a_range_wider_than_float32_is_refused():
    weight = np.tile(np.array([3e38, -3e38], np.float32), (1, 16))
    with pytest.raises(ValueError, match="too large, in row 0"):
        _native.quantize(weight, "F32", 4, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits must be 2, 4 or 8, not 3"),
        ({"group": 16}, "group must be 32, 64 or 128, not 16"),
        ({"group": 128}, "divide by the group of 128"),
        ({"dtype": "F8_E4M3"}, "F8_E4M3"),
        ({"weight": np.zeros((2, 64), np.float64)}, "float32, float16 or uint16"),
    ],
)
def test_bad_arguments_of_quantize_are_named(change, message):
    arguments = {"weight": np.zeros((2, 64), np.float32), "dtype": "F32", "bits": 4, "group": 64}
    with pytest.raises(ValueError, match=message):
        _native.quantize(**arguments | change)


@pytest.mark.parametrize(
    "change",
    [
        {"scales": np.ones((2, 2), np.float32)},
        {"biases": np.ones((2, 1), np.float16)},
        {"words": np.zeros((2, 7), np.uint32)},
        {"words": np.zeros((2, 8), np.int32)},
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change):
    arguments = {
        "words": np.zeros((2, 8), np.uint32),
        "scales": np.ones((2, 1), np.float32),
        "biases": np.ones((2, 1), np.float32),
        "bits": 4,
        "group": 64,
    }
    assert _native.dequantize(**arguments).shape == (2, 64)
    with pytest.raises(ValueError, match="must"):
        _native.dequantize(**arguments | change)
