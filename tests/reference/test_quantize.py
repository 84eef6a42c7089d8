"""The affine quantizer of this package, and that of the tests, against mlx itself, bit for bit."""

import mlx.core as mx
import numpy as np
import pytest
from libraries import MLX_DTYPES
from tensors import Tensor, dequantize, of_bytes, quantize, stored
from test_quantize import DTYPES, FORMATS, adversarial_weights, assert_same_bits, random_weights

from flashmoe import _native


def from_mlx(array: mx.array) -> Tensor:
    names = {dtype: name for name, dtype in MLX_DTYPES.items()} | {mx.uint32: "U32"}
    data = np.array(array.view(mx.uint8)).tobytes()
    return of_bytes(names[array.dtype], data).map(lambda a: a.reshape(array.shape))


@pytest.mark.parametrize("weights", [random_weights, adversarial_weights])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_equals_mlx_bit_for_bit(weights, dtype, bits, group):
    weight = mx.array(weights(group)).astype(MLX_DTYPES[dtype])
    theirs = [from_mlx(part) for part in mx.quantize(weight, group_size=group, bits=bits)]
    assert_same_bits(_native.quantize(from_mlx(weight).array, dtype, bits, group), theirs)
    tests = quantize(stored(weights(group), dtype).floats(), dtype, bits, group)
    assert_same_bits([part.array for part in tests], theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_dequantizes_as_mlx_does_in_float32(dtype, bits, group):
    weight = mx.array(random_weights(group)).astype(MLX_DTYPES[dtype])
    words, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
    parts = [from_mlx(part) for part in (words, scales, biases)]
    ours = _native.dequantize(*(part.array for part in parts), bits, group)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    theirs = np.array(mx.dequantize(words, scales, biases, group_size=group, bits=bits))
    for found in (ours, dequantize(*parts, bits, group)):
        if dtype == "F32":  # the product is rounded too, unless the compiler fuses it
            np.testing.assert_allclose(found, theirs, rtol=1e-6, atol=1e-12)
        else:
            np.testing.assert_array_equal(found, theirs)
