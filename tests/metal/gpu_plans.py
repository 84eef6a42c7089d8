"""A GPU backend's operations on numpy arrays: what C++ plans for them, executed by a device.

    run_on(device, rms_norm(x, weight, 1e-6, out))

An operation is a function that asks `_native.GpuPlans` for its plans, given where arrays lie. A
device is the executor on this CPU (shader_executor.py) or a GPU (benchmarks/metal_on_cuda).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from gpu_references import BF16, F32, Array, Attention, Delta, Expert, Weight

from flashmoe import _native

Place = Callable[[Array], int]  # the address of an array
Operation = Callable[[Any, Place], None]  # (GpuPlans, where arrays lie)


class Device(Protocol):
    def allocate(self, size: int) -> int:
        """An address."""

    def upload(self, address: int, array: Array) -> None: ...

    def download(self, address: int, array: Array) -> None: ...

    def free(self, address: int) -> None: ...

    def launch(self, plan: Any, seed: int) -> None: ...

    def synchronize(self) -> None: ...


class Memory:
    """Arrays on a device, each once, by identity."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.arrays: dict[int, tuple[Array, int]] = {}

    def place(self, array: Array) -> int:
        if id(array) not in self.arrays:
            address = self.device.allocate(array.nbytes)
            self.device.upload(address, array)
            self.arrays[id(array)] = array, address
        return self.arrays[id(array)][1]

    def plans(
        self,
        operations: Operation | Sequence[Operation],
        place: Place | None = None,
        tuning: Mapping[str, float] | None = None,
    ) -> list[Any]:
        """What is launched for operations. Scratch has no content, or NaNs."""
        planner = _native.GpuPlans(
            scratch=lambda _, size: self.place(np.full(size // 4, np.nan, np.float32)),
            stage=lambda values: self.place(np.array(values, np.int32)),
            tuning=dict(tuning or {}),
        )
        for operation in [operations] if callable(operations) else operations:
            operation(planner, place or self.place)
        return list(planner.take())

    def download(self) -> None:
        for array, address in self.arrays.values():
            if array.flags.writeable and array.nbytes:
                self.device.download(address, array)

    def free(self) -> None:
        arrays, self.arrays = self.arrays, {}
        for _, address in arrays.values():
            self.device.free(address)


def run_on(
    device: Device,
    operations: Operation | Sequence[Operation],
    seed: int = 1,
    **tuning: float,
) -> list[str]:
    """Runs operations on copies of their arrays, and copies back what was written. The kernels."""
    memory = Memory(device)
    try:
        plans = memory.plans(operations, tuning=tuning)
        for plan in plans:
            device.launch(plan, seed)
        device.synchronize()
        memory.download()
    finally:
        memory.free()
    return [plan.kernel for plan in plans]


def _matrix(weight: Weight, at: Place) -> tuple[int, ...]:
    bits, group, dtype = weight.format
    return weight.rows, weight.columns, dtype, bits, group, *(at(a) for a in weight.arrays)


def embed(ids: Array, table: Weight, out: Array) -> Operation:
    return lambda plans, at: plans.embed(_matrix(table, at), ids.tolist(), at(out))


def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> Operation:
    return lambda plans, at: plans.rms_norm(*x.shape, at(x), at(weight), eps, at(out))


def matmul(
    x: Array, weights: Sequence[Weight], outs: Sequence[Array], add: Sequence[int]
) -> Operation:
    """outs [tokens, rows], added to where add says so."""
    return lambda plans, at: plans.matmul(
        len(x),
        at(x),
        [(_matrix(w, at), at(out), bool(a)) for w, out, a in zip(weights, outs, add, strict=True)],
    )


def causal_conv(x: Array, weight: Array, state_in: Array, state_out: Array) -> Operation:
    return lambda plans, at: plans.causal_conv(
        *x.shape, len(weight), at(weight), at(state_in), at(state_out), at(x)
    )


def gated_delta(d: Delta, state_out: Array, out: Array) -> Operation:
    shape = (d.key_heads, d.value_heads, d.key_dim, d.value_dim)
    arrays = (d.a_log, d.dt_bias, d.norm, d.qkv, d.z, d.a, d.b, d.state, state_out, out)
    return lambda plans, at: plans.gated_delta(len(d.qkv), shape, d.eps, [at(a) for a in arrays])


def attention(call: Attention, out: Array) -> Operation:
    """Writes call.keys and call.values."""
    shape = (call.heads, call.kv_heads, call.head_dim, call.rotary_dim)
    dtype = F32 if call.keys.dtype == np.float32 else BF16
    arrays = (call.q_norm, call.k_norm, call.q_gate, call.k, call.v, call.keys, call.values, out)
    return lambda plans, at: plans.attention(
        len(call.k),
        shape,
        call.theta,
        call.eps,
        call.position,
        call.keys.shape[1],
        dtype,
        [at(a) for a in arrays],
    )


def route(logits: Array, renormalise: bool, ids: Array, weights: Array, finite: Array) -> Operation:
    arrays = (logits, ids, weights, finite)
    return lambda plans, at: plans.route(
        *logits.shape, ids.shape[1], renormalise, *(at(a) for a in arrays)
    )


def all_finite(x: Array, finite: Array) -> Operation:
    return lambda plans, at: plans.all_finite(*x.shape, at(x), at(finite))


def experts(x: Array, calls: Sequence[Expert]) -> Operation:
    return lambda plans, at: plans.experts(
        len(x),
        at(x),
        [
            (
                [_matrix(matrix, at) for matrix in (call.gate, call.up, call.down)],
                list(call.tokens),
                list(call.out_rows),
                at(call.out),
            )
            for call in calls
        ],
    )


def combine(
    x: Array,
    expert_out: Array,
    expert_weights: Array,
    shared_out: Array,
    shared_gate: Array,
    norm: Array | None = None,
    normed: Array | None = None,
    eps: float = 1e-6,
) -> Operation:
    """Adds to x; fills normed where a norm is given."""
    arrays = (expert_out, expert_weights, shared_out, shared_gate, x, norm, normed)
    return lambda plans, at: plans.combine(
        *x.shape, expert_weights.shape[1], [0 if a is None else at(a) for a in arrays], eps
    )
