"""The cells: what a step computes, what it records for the backward, and its gradients.

A kernel's `CELL` is "lstm" or "gru". `_step`, `_store_records` and `_step_gradients` are all that a
recurrence knows of a cell. docs/kernels.md derives them; weight_layout.py has the scaling of gates.
"""

import triton
import triton.language as tl

from fastsiam.kernels.forward_tile import _fwd_units
from fastsiam.kernels.tile import _load_cells, _store_cells, _tanh, _unpack


@triton.jit
def _step(
    p, q, r, s, carried, CELL: tl.constexpr, APPROXIMATE: tl.constexpr, ASSEMBLY: tl.constexpr
):
    # twice the new state; what a sequence carries to the next step, the cell or twice the state;
    # the values of the records
    if CELL == "lstm":
        i, f, g, o, c, tanh_c, h = _lstm_step(p, q, r, s, carried, APPROXIMATE, ASSEMBLY)
        return h, c, (i, f, g, o, carried, tanh_c)
    else:
        r, z, n, n_by_r, h = _gru_step(p, q, r, s, carried, APPROXIMATE, ASSEMBLY)
        return h, h, (r, z, n, n_by_r)


@triton.jit
def _lstm_step(i, f, g, o, c, APPROXIMATE: tl.constexpr, ASSEMBLY: tl.constexpr):
    # tanh values of the gates; the new cell and its tanh; twice the new state
    i = _tanh(i, APPROXIMATE, ASSEMBLY)
    f = _tanh(f, APPROXIMATE, ASSEMBLY)
    g = _tanh(g, APPROXIMATE, ASSEMBLY)
    o = _tanh(o, APPROXIMATE, ASSEMBLY)
    # with sigmoid(x) = (1 + tanh(x / 2)) / 2
    c = 0.5 * (i * g + ((f * c + c) + g))
    tanh_c = _tanh(c, APPROXIMATE, ASSEMBLY)
    return i, f, g, o, c, tanh_c, o * tanh_c + tanh_c


@triton.jit
def _gru_step(r, z, n, y, h, APPROXIMATE: tl.constexpr, ASSEMBLY: tl.constexpr):
    # tanh values of the gates; the derivative of n's by r's gate; twice the new state. h is twice
    # the old state, y half of the product that the reset gate multiplies
    r = _tanh(r, APPROXIMATE, ASSEMBLY)
    z = _tanh(z, APPROXIMATE, ASSEMBLY)
    # with sigmoid(x) = (1 + tanh(x / 2)) / 2
    n = _tanh(r * y + (n + y), APPROXIMATE, ASSEMBLY)
    # of use to the backward alone; further down it costs registers
    n_by_r = y - r * y * r
    return r, z, n, n_by_r, z * (0.5 * h - n) + (0.5 * h + n)


@triton.jit
def _store_records(
    record,
    h,
    gap,
    inside,  # whether a sequence has this step
    gates_ptrs,
    cells_ptrs,
    BLOCK_H: tl.constexpr,
    CELL: tl.constexpr,
):
    # all but the state
    inside = _fwd_units(inside)
    # rows are addressed through 32 bits: one wide multiply-add an address
    at = _fwd_units(gap).to(tl.int64)
    if CELL == "lstm":
        i, f, g, o, c_before, tanh_c = record
        values = tl.join(tl.join(i, g), tl.join(f, h - h * o))
    else:
        r, z, n, n_by_r = record
        values = tl.join(tl.join(r, n), tl.join(z, n_by_r))
    values = tl.reshape(values, h.shape + (4,))
    _store_cells(gates_ptrs + tl.expand_dims(at * (4 * BLOCK_H), 6), values, inside, 6)
    if CELL == "lstm":
        values = tl.join(o - tanh_c * h, c_before)
        _store_cells(cells_ptrs + tl.expand_dims(at * (2 * BLOCK_H), 6), values, inside, 6)


@triton.jit
def _load_before(before_ptrs, row, STRIDE: tl.constexpr, DTYPE: tl.constexpr, CELL: tl.constexpr):
    # the state that a step began with: of an LSTM the cell, beside the derivative by the new one;
    # of a GRU 2h
    if CELL == "lstm" and DTYPE == tl.float32:
        return _load_cells(before_ptrs + tl.expand_dims(row * STRIDE, 7), 7)
    else:
        return _load_cells(before_ptrs + row * STRIDE, 7)


@triton.jit
def _step_gradients(d, carried, p, q, r, s, before, CELL: tl.constexpr, DTYPE: tl.constexpr):
    # gradients of four gates, and of what a sequence carries: twice the cell's gradient, or what d
    # gives to the gradient of the state before, past the product
    if CELL == "lstm":
        if DTYPE == tl.float32:
            h_by_c, c_before = tl.split(before)
        else:
            h_by_c, c_before = _unpack(before, DTYPE)
        return _lstm_gradients(d, carried, p, q, r, s, h_by_c, c_before)
    else:
        return _gru_gradients(d, p, q, r, s, before.to(tl.float32))


@triton.jit
def _lstm_gradients(d, dc, i, f, g, h_by_o, h_by_c, c_before):
    d_c = d * h_by_c + (0.5 * dc + d)
    do = d * h_by_o
    e = d_c * i + d_c
    p = e * g
    di = p - p * i
    dg = e - p * g
    dc = d_c * f + d_c
    r = dc * c_before
    df = r - r * f
    return di, df, dg, do, dc


@triton.jit
def _gru_gradients(d, r, z, n, n_by_r, h):
    # of r, z, n and y. The derivatives of twice the new state by n's gate and by z's come first:
    # all that then waits for the gradient is a multiplication
    h_by_n = 1.0 - n * n
    h_by_n = h_by_n - h_by_n * z
    h_by_z = 0.5 * h - n
    h_by_z = h_by_z - h_by_z * z * z
    dn = d * h_by_n
    passed = d * (0.5 * z + 0.5)
    return dn * n_by_r, d * h_by_z, dn, dn * r + dn, passed
