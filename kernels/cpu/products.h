// Matrix products of float32, whose rows may stand anywhere.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace {

constexpr int64_t PANEL = 2 * WIDTH;  // columns of a product that are worked on at a time
// rows: 6 x 2 sums, 2 vectors of columns and a factor, of 16 registers
constexpr int64_t ROWS = 6;
constexpr int64_t DEPTH = 64;       // terms of a sum over rows that are worked on at a time
constexpr int64_t TILE = 24;        // most rows that are worked on at a time
constexpr int64_t WORTH = 1000000;  // multiplications that are worth a thread

// The right-hand side of a product, [K, N], in panels of PANEL columns, [N / PANEL, K, PANEL]; what
// stands in the last panel behind the last column is multiplied and dropped.
struct Panels {
    const float* data;
    int64_t K, N;
};

int64_t size_of_panels(int64_t K, int64_t N) { return (N + PANEL - 1) / PANEL * PANEL * K; }

// Lays the matrix of rows `row(k)` out as Panels.
template <class Row>
void lay_out_rows(int64_t K, int64_t N, Row row, float* to) {
    for (int64_t j = 0; j < N; j += PANEL)
        for (int64_t k = 0; k < K; k++, to += PANEL)
            for (int64_t i = 0; i < PANEL; i++) to[i] = j + i < N ? row(k)[j + i] : 0.0f;
}

// Lays the matrix of columns `column(n)` out as Panels.
template <class Column>
void lay_out_columns(int64_t K, int64_t N, Column column, float* to) {
    for (int64_t j = 0; j < N; j += PANEL) {
        const float* from[PANEL];
        // behind the last column any will do
        for (int64_t i = 0; i < PANEL; i++) from[i] = column(least(j + i, N - 1));
        for (int64_t k = 0; k < K; k++, to += PANEL)
            for (int64_t i = 0; i < PANEL; i++) to[i] = from[i][k];
    }
}

// Does work(count, first) for blocks of ROWS rows and for the rest; count.value is known when it is
// compiled.
template <class Work>
INLINE void for_blocks(int64_t rows, Work work) {
    int64_t first = 0;
    for (; rows - first >= ROWS; first += ROWS) work(std::integral_constant<int, ROWS>{}, first);
    switch (rows - first) {
        case 5:
            return work(std::integral_constant<int, 5>{}, first);
        case 4:
            return work(std::integral_constant<int, 4>{}, first);
        case 3:
            return work(std::integral_constant<int, 3>{}, first);
        case 2:
            return work(std::integral_constant<int, 2>{}, first);
        case 1:
            return work(std::integral_constant<int, 1>{}, first);
    }
}

// out = start + sum, for the first columns of C vectors.
template <int C>
INLINE void add(const float* start, const Vector (&sum)[C], int64_t columns, float* out) {
    if (columns == C * WIDTH) {
#pragma GCC unroll 8
        for (int c = 0; c < C; c++)
            store(&out[c * WIDTH], load<Vector>(&start[c * WIDTH]) + sum[c]);
        return;
    }
    float sums[C * WIDTH];
    std::memcpy(sums, sum, sizeof sums);
    for (int64_t j = 0; j < columns; j++) out[j] = start[j] + sums[j];
}

// out = start + a @ panel, for R rows and C vectors of columns from j on; `a`, `start` and `out`
// point to rows, which may be anywhere.
template <int R, int C>
INLINE void multiply_block(const float* const* a, const float* panel, int64_t K,
                           const float* const* start, int64_t j, float* const* out,
                           int64_t columns) {
    Vector sums[R][C] = {};
    for (int64_t k = 0; k < K; k++) {
        Vector right[C];
        // unrolled, or the sums would not be in registers
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) right[c] = load<Vector>(&panel[k * PANEL + c * WIDTH]);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sums[r][c] += a[r][k] * right[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) add(&start[r][j], sums[r], columns, &out[r][j]);
}

template <int C>
void multiply_panel(const float* const* a, int64_t rows, const float* panel, int64_t K,
                    const float* const* start, int64_t j, float* const* out, int64_t columns) {
    for_blocks(rows, [=](auto count, int64_t r) {
        multiply_block<count.value, C>(&a[r], panel, K, &start[r], j, &out[r], columns);
    });
}

// out = start + a @ right: [rows, K] by [K, N].
void multiply(const float* const* a, int64_t rows, const Panels& right, const float* const* start,
              float* const* out) {
    for (int64_t j = 0; j < right.N; j += PANEL) {
        const float* panel = &right.data[j * right.K];
        int64_t columns = least(PANEL, right.N - j);
        if (columns > WIDTH)
            multiply_panel<2>(a, rows, panel, right.K, start, j, out, columns);
        else
            multiply_panel<1>(a, rows, panel, right.K, start, j, out, columns);
    }
}

// out += a.T @ panel, for R columns of `a`, [K, .], and C vectors of columns.
template <int R, int C>
INLINE void accumulate_block(const float* a, int64_t stride_a, const float* panel, int64_t K,
                             float* out, int64_t stride_out, int64_t columns) {
    Vector sums[R][C] = {};
    for (int64_t k = 0; k < K; k++) {
        Vector right[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) right[c] = load<Vector>(&panel[k * PANEL + c * WIDTH]);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sums[r][c] += a[k * stride_a + r] * right[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) add(&out[r * stride_out], sums[r], columns, &out[r * stride_out]);
}

template <int C>
void accumulate_panel(const float* a, int64_t M, int64_t stride_a, const float* panel, int64_t K,
                      float* out, int64_t stride_out, int64_t columns) {
    for_blocks(M, [=](auto count, int64_t m) {
        accumulate_block<count.value, C>(&a[m], stride_a, panel, K, &out[m * stride_out],
                                         stride_out, columns);
    });
}

struct Rows {
    const float *left, *start;
    float* out;
};

// out = start + left @ right, for as many `rows(m)` of these.
template <class RowsOf>
void multiply_rows(int64_t count, const Panels& right, int64_t threads, RowsOf rows) {
    const int64_t parts = (count + TILE - 1) / TILE;
    threads = least(threads, least(parts, 1 + count * right.K * right.N / WORTH));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = part * TILE, some = least(TILE, count - first);
        const float *left[TILE], *start[TILE];
        float* out[TILE];
        for (int64_t m = 0; m < some; m++) {
            const Rows each = rows(first + m);
            left[m] = each.left;
            start[m] = each.start;
            out[m] = each.out;
        }
        multiply(left, some, right, start, out);
    }
}

// out += a.T @ b[rows], for the columns of one panel, from j on: a [K, .], of which M columns
// count, b [., N], and K at most DEPTH. Without `rows`, b in order.
void accumulate_columns(int64_t K, int64_t M, int64_t N, int64_t j, const float* a,
                        int64_t stride_a, const float* b, const int64_t* rows, float* out,
                        int64_t stride_out) {
    float panel[DEPTH * PANEL];
    const int64_t columns = least(PANEL, N - j);
    for (int64_t k = 0; k < K; k++) {
        const float* row = &b[(rows ? rows[k] : k) * N + j];
        if (columns == PANEL)
            std::memcpy(&panel[k * PANEL], row, PANEL * sizeof(float));
        else
            for (int64_t i = 0; i < PANEL; i++) panel[k * PANEL + i] = i < columns ? row[i] : 0.0f;
    }
    if (columns > WIDTH)
        accumulate_panel<2>(a, M, stride_a, panel, K, &out[j], stride_out, columns);
    else
        accumulate_panel<1>(a, M, stride_a, panel, K, &out[j], stride_out, columns);
}

// out[rows[k]] += a[k] for all K rows of `a`, [K, M], in order: one of so many shares of `out`.
void scatter_rows(int64_t K, int64_t M, int64_t share, int64_t shares, const float* a,
                  const int64_t* rows, float* out) {
    for (int64_t k = 0; k < K; k++) {
        if (rows[k] % shares != share) continue;
        const float* __restrict from = &a[k * M];
        float* __restrict to = &out[rows[k] * M];
        for (int64_t i = 0; i < M; i++) to[i] += from[i];
    }
}

}  // namespace
