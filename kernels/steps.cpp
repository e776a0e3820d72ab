// The layers of fastsiam/batched.py, compiled: float32, on a CPU. What a step computes, and the
// scales of gates and states, are explained in fastsiam/batched_lstm.py and batched_gru.py.
//
// Sequences do not need each other, so a tile of them, longest first, runs through all of its steps
// before the next tile begins: its states stay in the first cache, the weights in the second. Threads
// take the tiles one by one. A step reads the input gates of its tokens from a table; what a backward
// needs lies in packed rows, tile after tile, and in a tile step after step.

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#define INLINE inline __attribute__((always_inline))

#ifdef __AVX512F__
constexpr int64_t WIDTH = 16;  // floats in a Vector
#else
constexpr int64_t WIDTH = 8;
#endif
constexpr int64_t PANEL = 2 * WIDTH;  // columns of a product that are worked on at a time
// rows: 6 x 2 sums, 2 vectors of columns and a factor, of 16 registers
constexpr int64_t ROWS = 6;
constexpr int64_t DEPTH = 64;         // terms of a sum over rows that are worked on at a time
constexpr int64_t TILE = 24;          // most sequences in a tile
constexpr int64_t WORTH = 1000000;    // multiplications that are worth a thread

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A Float is a Vector of numbers, or a single one.
template <class Float>
INLINE Float load(const float* from) {
    Float x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class Float>
INLINE void store(float* to, Float x) {
    std::memcpy(to, &x, sizeof x);
}

// The right-hand side of a product, [K, N], in panels of PANEL columns, [N / PANEL, K, PANEL]; what
// stands in the last panel behind the last column is multiplied and dropped.
struct Panels {
    const float* data;
    int64_t K, N;
};

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

// out = start + a @ panel, for R rows and C vectors of columns from j on; `a` and `start` point to
// rows, which may be anywhere.
template <int R, int C>
INLINE void multiply_block(const float* const* a, const float* panel, int64_t K,
                           const float* const* start, int64_t j, float* out, int64_t stride_out,
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
    for (int r = 0; r < R; r++) add(&start[r][j], sums[r], columns, &out[r * stride_out + j]);
}

template <int C>
void multiply_panel(const float* const* a, int64_t rows, const float* panel, int64_t K,
                    const float* const* start, int64_t j, float* out, int64_t stride_out,
                    int64_t columns) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS, start += ROWS, out += ROWS * stride_out)
        multiply_block<ROWS, C>(a, panel, K, start, j, out, stride_out, columns);
    switch (rows) {
        case 5: return multiply_block<5, C>(a, panel, K, start, j, out, stride_out, columns);
        case 4: return multiply_block<4, C>(a, panel, K, start, j, out, stride_out, columns);
        case 3: return multiply_block<3, C>(a, panel, K, start, j, out, stride_out, columns);
        case 2: return multiply_block<2, C>(a, panel, K, start, j, out, stride_out, columns);
        case 1: return multiply_block<1, C>(a, panel, K, start, j, out, stride_out, columns);
    }
}

// out = start + a @ right: [rows, K] by [K, N].
void multiply(const float* const* a, int64_t rows, const Panels& right, const float* const* start,
              float* out, int64_t stride_out) {
    for (int64_t j = 0; j < right.N; j += PANEL) {
        const float* panel = &right.data[j * right.K];
        int64_t columns = least(PANEL, right.N - j);
        if (columns > WIDTH)
            multiply_panel<2>(a, rows, panel, right.K, start, j, out, stride_out, columns);
        else
            multiply_panel<1>(a, rows, panel, right.K, start, j, out, stride_out, columns);
    }
}

// out += a.T @ panel, for R columns of `a`, [K, M], and C vectors of columns.
template <int R, int C>
INLINE void accumulate_block(const float* a, int64_t M, const float* panel, int64_t K, float* out,
                             int64_t stride_out, int64_t columns) {
    Vector sums[R][C] = {};
    for (int64_t k = 0; k < K; k++) {
        Vector right[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) right[c] = load<Vector>(&panel[k * PANEL + c * WIDTH]);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sums[r][c] += a[k * M + r] * right[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        add(&out[r * stride_out], sums[r], columns, &out[r * stride_out]);
}

template <int C>
void accumulate_panel(const float* a, int64_t M, const float* panel, int64_t K, float* out,
                      int64_t stride_out, int64_t columns) {
    int64_t m = M;
    for (; m >= ROWS; m -= ROWS, a += ROWS, out += ROWS * stride_out)
        accumulate_block<ROWS, C>(a, M, panel, K, out, stride_out, columns);
    switch (m) {
        case 5: return accumulate_block<5, C>(a, M, panel, K, out, stride_out, columns);
        case 4: return accumulate_block<4, C>(a, M, panel, K, out, stride_out, columns);
        case 3: return accumulate_block<3, C>(a, M, panel, K, out, stride_out, columns);
        case 2: return accumulate_block<2, C>(a, M, panel, K, out, stride_out, columns);
        case 1: return accumulate_block<1, C>(a, M, panel, K, out, stride_out, columns);
    }
}

// a < b ? a : b, and so b where one is a NaN. GCC makes of that two instructions where one will do.
INLINE Vector lower(Vector a, Vector b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX__)
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}
INLINE Vector higher(Vector a, Vector b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
INLINE float lower(float a, float b) { return a < b ? a : b; }
INLINE float higher(float a, float b) { return a > b ? a : b; }

template <class Float>
struct BitsOf {
    typedef Bits type;
};
template <>
struct BitsOf<float> {
    typedef uint32_t type;
};

// 1 / (1 + exp(-x)): a power of two, times a polynomial for 2^f, f between -1/2 and 1/2, whose
// relative error is at most 2e-9.
template <class Float>
INLINE Float sigmoid(Float x) {
    // past these, exp leaves float32's range; a NaN passes
    x = higher(Float{} - 87.0f, lower(Float{} + 87.0f, x));
    // of a number near 3 * 2^22 the lowest bits are the nearest integer
    Float shifted = x * -1.44269504f + 12582912.0f;
    Float rest = x * -1.44269504f - (shifted - 12582912.0f);
    Float series = rest * 1.53458118e-4f + 1.33999314e-3f;
    series = series * rest + 9.61848896e-3f;
    series = series * rest + 5.55032878e-2f;
    series = series * rest + 0.240226469f;
    series = series * rest + 0.693147206f;
    series = series * rest + 1.0f;
    typename BitsOf<Float>::type bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23u;
    Float power;
    std::memcpy(&power, &bits, sizeof power);
    return 1.0f / (series * power + 1.0f);
}

// Does Work for all H units of a row, a Vector at a time; the last Vector overlaps the one before, and
// reads what it needs before any is written.
template <template <class> class Work, class... Rows>
INLINE void for_units(int64_t H, Rows... rows) {
    if (H < WIDTH) {
        for (int64_t j = 0; j < H; j++) Work<float>(H, j, rows...).write(H, j, rows...);
        return;
    }
    const int64_t end = H - WIDTH;
    const Work<Vector> last(H, end, rows...);
    for (int64_t j = 0; j < end; j += WIDTH) Work<Vector>(H, j, rows...).write(H, j, rows...);
    last.write(H, end, rows...);
}

struct Lstm {
    static constexpr int64_t SKIPPED = 0;  // gates before those that h has a part in

    template <class Float>
    struct Forward {
        Float i, f, g, o, c, h;

        INLINE Forward(int64_t H, int64_t j, float* gates, float* /* h */, float* before)
            : i(sigmoid(load<Float>(&gates[j]))),
              f(sigmoid(load<Float>(&gates[H + j]))),
              g(sigmoid(load<Float>(&gates[2 * H + j])) - 0.5f),
              o(sigmoid(load<Float>(&gates[3 * H + j]))) {
            c = f * load<Float>(&before[j]) + 4.0f * i * g;
            h = o * (sigmoid(c) - 0.5f);
        }

        INLINE void write(int64_t H, int64_t j, float* gates, float* to_h, float* to_c) const {
            store(&gates[j], i);
            store(&gates[H + j], f);
            store(&gates[2 * H + j], g);
            store(&gates[3 * H + j], o);
            store(&to_c[j], c);
            store(&to_h[j], h);
        }
    };

    template <class Float>
    struct Backward {
        Float di, df, dg, d_o, dc;

        INLINE Backward(int64_t H, int64_t j, const float* gates, const float* /* h */,
                        const float* before, const float*, const float* of_h, const float* of_c) {
            const Float i = load<Float>(&gates[j]), f = load<Float>(&gates[H + j]),
                        g = load<Float>(&gates[2 * H + j]), o = load<Float>(&gates[3 * H + j]),
                        c = load<Float>(&before[j]), dh = load<Float>(&of_h[j]);
            const Float s = sigmoid<Float>(f * c + 4.0f * i * g);
            const Float d = load<Float>(&of_c[j]) + dh * (s - s * s) * o;
            di = (i - i * i) * g * d;
            df = (f - f * f) * c * d;
            dg = (0.25f - g * g) * i * d;
            d_o = (o - o * o) * (s - 0.5f) * dh;
            dc = d * f;
        }

        INLINE void write(int64_t H, int64_t j, const float*, const float*, const float*,
                          float* dgates, float* to_h, float* to_c) const {
            store(&dgates[j], di);
            store(&dgates[H + j], df);
            store(&dgates[2 * H + j], dg);
            store(&dgates[3 * H + j], d_o);
            store(&to_c[j], dc);
            store(&to_h[j], Float{});
        }
    };
};

struct Gru {
    static constexpr int64_t SKIPPED = 1;

    template <class Float>
    struct Forward {
        Float n, r, z, h;

        INLINE Forward(int64_t H, int64_t j, float* gates, float* before, float* /* c */)
            : r(sigmoid(load<Float>(&gates[H + j]))), z(sigmoid(load<Float>(&gates[2 * H + j]))) {
            const Float y = load<Float>(&gates[3 * H + j]);
            n = sigmoid<Float>(load<Float>(&gates[j]) + r * y) - 0.5f;
            h = n + z * (load<Float>(&before[j]) - n);
        }

        INLINE void write(int64_t H, int64_t j, float* gates, float* to_h, float* /* c */) const {
            store(&gates[j], n);
            store(&gates[H + j], r);
            store(&gates[2 * H + j], z);
            store(&to_h[j], h);
        }
    };

    template <class Float>
    struct Backward {
        Float dn, dr, dz, dy, dh;

        INLINE Backward(int64_t H, int64_t j, const float* gates, const float* before,
                        const float* /* c */, const float*, const float* of_h, const float*) {
            const Float n = load<Float>(&gates[j]), r = load<Float>(&gates[H + j]),
                        z = load<Float>(&gates[2 * H + j]), y = load<Float>(&gates[3 * H + j]),
                        h = load<Float>(&before[j]);
            dh = load<Float>(&of_h[j]);
            dn = (0.25f - n * n) * (1.0f - z) * dh;
            dy = dn * r;
            dr = dy * y * (1.0f - r);
            dz = (h - n) * z * (1.0f - z) * dh;
            dh *= z;
        }

        INLINE void write(int64_t H, int64_t j, const float*, const float*, const float*,
                          float* dgates, float* to_h, float*) const {
            store(&dgates[j], dn);
            store(&dgates[H + j], dr);
            store(&dgates[2 * H + j], dz);
            store(&dgates[3 * H + j], dy);
            store(&to_h[j], dh);
        }
    };
};

}  // namespace

// One direction of a layer over a batch; _steps.py has the same fields. What is not wanted is null.
struct Layer {
    int64_t H, N, T;
    int64_t columns;         // from one row of vectors, outputs, peaks or dvectors to the next
    int64_t turned;          // whether sequences are read from their last token to their first
    int64_t pooling;         // a Pooling
    int64_t threads;         // at most
    int64_t tile;            // sequences in a tile, at most TILE
    const int64_t* lengths;  // [N] 0 <= length <= T
    const int64_t* order;    // [N] sequences, longest first
    const int64_t* starts;   // [tiles + 1] packed row where each tile begins and the last one ends
    const float* panels;     // of the recurrent weight
    float* work;             // [threads, tile * 7H] for what a thread keeps of a tile
    // forward
    int64_t R;              // rows of the table
    const float* table;     // [R, 4H]
    const int64_t* ids;     // [N, T]; null: each packed row has a row of its own
    const int64_t* places;  // row of each id; null: the id itself
    const float* mask;      // [N, T]
    float* vectors;         // [N, H]
    float* outputs;         // [N, T, H]
    int32_t* peaks;         // [N, H] step of the maximum, in own time
    // what a backward needs, in packed rows
    float* gates;     // [., 4H]
    float* before_h;  // [., H]
    float* before_c;  // [., H]
    // backward
    int64_t count;          // of blocks, whose gradients of gates are summed up together
    const int64_t* blocks;  // [count + 1] tile where each block begins and the last one ends
    int64_t largest;        // packed rows of a block
    const int64_t* rows;    // [M] row of the table that each packed token has; null: its own
    const float* dvectors;  // [N, H]
    const float* upstream;  // [M, H] what else reaches each h
    float* dgates;          // [2, largest, 4H] of two blocks, where there are `rows`
    float* dtable;          // [R, 4H] out: what the rows of the table get
    float* h_by_gates;      // [H, 4H] out, comes as zeros: product of states and gradients of gates
};

namespace {

enum Pooling { LAST, MAX, MASK };

constexpr float UNIT = 2.0f;  // true size of a unit of h

int64_t tiles(const Layer& layer) { return (layer.N + layer.tile - 1) / layer.tile; }

int threads_for(const Layer& layer) {
    const int64_t count = tiles(layer);
    if (!count) return 1;
    int64_t worth = 1 + layer.starts[count] * layer.H * layer.H * 4 / WORTH;
    return static_cast<int>(least(layer.threads, least(count, worth)));
}

// What a thread of a parallel region has of `layer.work`.
float* own_work(const Layer& layer) {
    int64_t thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    return &layer.work[thread * layer.tile * 7 * layer.H];
}

// Where the token of a sequence stands that is read at a step in own time.
int64_t position(const Layer& layer, int64_t sequence, int64_t step) {
    int64_t column = layer.turned ? layer.lengths[sequence] - 1 - step : step;
    return sequence * layer.T + column;
}

// The sequences of a tile, and how many of them run at a step.
struct Tile {
    const Layer& layer;
    const int64_t* order;
    int64_t count;

    Tile(const Layer& layer, int64_t number)
        : layer(layer),
          order(&layer.order[number * layer.tile]),
          count(least(layer.tile, layer.N - number * layer.tile)) {}

    int64_t length(int64_t n) const { return layer.lengths[order[n]]; }

    int64_t alive(int64_t step) const {
        int64_t n = count;
        while (n && length(n - 1) <= step) n--;
        return n;
    }
};

void pool(const Layer& layer, const float* h, int64_t sequence, int64_t step, float* pooled) {
    const int64_t H = layer.H;
    if (layer.outputs) {
        float* to = &layer.outputs[position(layer, sequence, step) * layer.columns];
        for (int64_t j = 0; j < H; j++) to[j] = h[j] * UNIT;
    }
    if (layer.pooling == MASK) {
        const float weight = layer.mask[position(layer, sequence, step)];
        for (int64_t j = 0; j < H; j++) pooled[j] += weight * h[j];
    } else if (layer.pooling == MAX) {
        int32_t* peaks = layer.peaks ? &layer.peaks[sequence * layer.columns] : nullptr;
        for (int64_t j = 0; j < H; j++) {
            bool higher = h[j] > pooled[j];
            if (peaks && higher) peaks[j] = static_cast<int32_t>(step);
            // a NaN comes in, and stays
            pooled[j] = higher || h[j] != h[j] ? h[j] : pooled[j];
        }
    }
}

// `work` has a tile's states and what is pooled, 3H, and its gates, 4H.
template <class Cell>
void forward_tile(const Layer& layer, int64_t number, float* work) {
    const Tile tile(layer, number);
    const int64_t H = layer.H, size = layer.tile * H;
    const Panels right = {layer.panels, H, (4 - Cell::SKIPPED) * H};
    float *h = work, *c = h + size, *pooled = c + size;
    const float* states[TILE];
    for (int64_t n = 0; n < tile.count; n++) states[n] = &h[n * H];
    for (int64_t i = 0; i < size; i++) {
        h[i] = c[i] = 0.0f;
        pooled[i] = layer.pooling == MAX ? -INFINITY : 0.0f;
    }
    int64_t row = layer.starts[number];
    for (int64_t step = 0, rows; (rows = tile.alive(step)); row += rows, step++) {
        float* gates = layer.gates ? &layer.gates[row * 4 * H] : work + 3 * size;
        const float* start[TILE];
        for (int64_t n = 0; n < rows; n++) {
            int64_t from = row + n;
            if (layer.ids) from = layer.ids[position(layer, tile.order[n], step)];
            if (layer.places) from = layer.places[from];
            start[n] = &layer.table[from * 4 * H];
            // at the first step h is 0
            int64_t copied = step ? Cell::SKIPPED * H : 4 * H;
            std::memcpy(&gates[n * 4 * H], start[n], copied * sizeof(float));
            start[n] += Cell::SKIPPED * H;
        }
        if (layer.before_h) std::memcpy(&layer.before_h[row * H], h, rows * H * sizeof(float));
        if (layer.before_c) std::memcpy(&layer.before_c[row * H], c, rows * H * sizeof(float));
        if (step) multiply(states, rows, right, start, &gates[Cell::SKIPPED * H], 4 * H);
        for (int64_t n = 0; n < rows; n++) {
            for_units<Cell::template Forward>(H, &gates[n * 4 * H], &h[n * H], &c[n * H]);
            pool(layer, &h[n * H], tile.order[n], step, &pooled[n * H]);
        }
    }
    const float* found = layer.pooling == LAST ? h : pooled;
    for (int64_t n = 0; n < tile.count; n++)
        for (int64_t j = 0; j < H; j++) {
            float value = found[n * H + j];
            layer.vectors[tile.order[n] * layer.columns + j] =
                value == -INFINITY ? 0.0f : value * UNIT;
        }
}

// `work` has a tile's gradients of states, 2H; `dgates` begins with the packed row `begin`.
template <class Cell>
void backward_tile(const Layer& layer, int64_t number, int64_t begin, float* dgates, float* work) {
    const Tile tile(layer, number);
    const int64_t H = layer.H, size = layer.tile * H;
    const Panels right = {layer.panels, (4 - Cell::SKIPPED) * H, H};
    float *dh = work, *dc = dh + size;
    for (int64_t n = 0; n < tile.count; n++)
        for (int64_t j = 0; j < H; j++) {
            dc[n * H + j] = 0.0f;
            // waits until the steps, coming from behind, reach the sequence's last one
            dh[n * H + j] =
                layer.dvectors ? layer.dvectors[tile.order[n] * layer.columns + j] : 0.0f;
        }
    int64_t row = layer.starts[number + 1];
    for (int64_t step = tile.length(0); step-- > 0;) {
        const int64_t rows = tile.alive(step);
        row -= rows;
        const float *start[TILE], *left[TILE];
        for (int64_t n = 0; n < rows; n++) {
            start[n] = &dh[n * H];
            float* to = &dgates[(row - begin + n) * 4 * H];
            left[n] = &to[Cell::SKIPPED * H];
            if (layer.upstream)
                for (int64_t j = 0; j < H; j++)
                    dh[n * H + j] += layer.upstream[(row + n) * H + j];
            for_units<Cell::template Backward>(
                H, &layer.gates[(row + n) * 4 * H], &layer.before_h[(row + n) * H],
                layer.before_c ? &layer.before_c[(row + n) * H] : nullptr, to, &dh[n * H],
                &dc[n * H]);
        }
        if (step) multiply(left, rows, right, start, dh, H);
    }
}

// out += a.T @ b[rows], for the columns of one panel, from j on: a [K, M], b [., N], and K at most
// DEPTH. Without `rows`, b in order.
void accumulate_columns(int64_t K, int64_t M, int64_t N, int64_t j, const float* a, const float* b,
                        const int64_t* rows, float* out) {
    float panel[DEPTH * PANEL];
    const int64_t columns = least(PANEL, N - j);
    for (int64_t k = 0; k < K; k++) {
        const float* row = &b[(rows ? rows[k] : k) * N + j];
        if (columns == PANEL)
            std::memcpy(&panel[k * PANEL], row, PANEL * sizeof(float));
        else
            for (int64_t i = 0; i < PANEL; i++)
                panel[k * PANEL + i] = i < columns ? row[i] : 0.0f;
    }
    if (columns > WIDTH)
        accumulate_panel<2>(a, M, panel, K, &out[j], N, columns);
    else
        accumulate_panel<1>(a, M, panel, K, &out[j], N, columns);
}

// out[rows[k]] += a[k] for all K rows of `a`, [K, M], in order: columns from j on.
void scatter_columns(int64_t K, int64_t M, int64_t j, int64_t columns, const float* a,
                     const int64_t* rows, float* out) {
    for (int64_t k = 0; k < K; k++) {
        const float* __restrict from = &a[k * M + j];
        float* __restrict to = &out[rows[k] * M + j];
        for (int64_t i = 0; i < columns; i++) to[i] += from[i];
    }
}

}  // namespace

// What _steps.py asks before it calls anything else: goes up with every change of an argument.
extern "C" int64_t version() { return 3; }
extern "C" int64_t panel() { return PANEL; }

// Lays `weight`, [K, N] with these strides, out as Panels.
extern "C" void lay_out(int64_t K, int64_t N, int64_t stride_k, int64_t stride_n,
                        const float* weight, float* panels) {
    for (int64_t j = 0; j < N; j += PANEL, panels += K * PANEL)
        for (int64_t i = 0; i < PANEL; i++) {
            const float* column = &weight[(j + i) * stride_n];
            for (int64_t k = 0; k < K; k++)
                panels[k * PANEL + i] = j + i < N ? column[k * stride_k] : 0.0f;
        }
}

// Orders the sequences longest first, equal ones as they came, and finds where each tile begins.
// `place` [T + 2] comes as zeros.
extern "C" void order(int64_t N, int64_t T, int64_t tile, const int64_t* lengths, int64_t* place,
                      int64_t* order, int64_t* starts) {
    for (int64_t n = 0; n < N; n++) place[T - lengths[n] + 1]++;
    for (int64_t t = 1; t <= T; t++) place[t] += place[t - 1];
    for (int64_t n = 0; n < N; n++) order[place[T - lengths[n]]++] = n;
    int64_t row = 0;
    for (int64_t n = 0; n < N; n++) {
        if (n % tile == 0) *starts++ = row;
        row += lengths[order[n]];
    }
    *starts = row;
}

// Finds the distinct ids of all tokens, `words` in ascending order, and the `places` [R] that they
// have there. Returns their number, or -1 where an id is not from 0 to R - 1.
extern "C" int64_t distinct(int64_t N, int64_t T, int64_t R, const int64_t* lengths,
                            const int64_t* ids, int64_t* places, int64_t* words) {
    std::memset(places, 0, R * sizeof(int64_t));
    for (int64_t n = 0; n < N; n++)
        for (int64_t t = 0; t < lengths[n]; t++) {
            int64_t id = ids[n * T + t];
            if (id < 0 || id >= R) return -1;
            places[id] = 1;
        }
    int64_t count = 0;
    for (int64_t id = 0; id < R; id++)
        if (places[id]) {
            words[count] = id;
            places[id] = count++;
        }
    return count;
}

// Lists the tokens as packed: their positions n * T + t, and their rows where there are ids.
extern "C" void pack(const Layer* layer, int64_t* tokens, int64_t* rows) {
    for (int64_t number = 0; number < tiles(*layer); number++) {
        const Tile tile(*layer, number);
        for (int64_t step = 0, alive; (alive = tile.alive(step)); step++)
            for (int64_t n = 0; n < alive; n++) {
                *tokens = position(*layer, tile.order[n], step);
                if (rows) *rows++ = layer->places[layer->ids[*tokens]];
                tokens++;
            }
    }
}

// out [W, M] = x[rows] @ right + bias: `right` [D, N] in panels. Of the M columns those behind the
// product's N get the bias alone. Without `rows`, all of x in order.
extern "C" void project(int64_t W, int64_t D, int64_t N, int64_t M, int64_t threads, const float* x,
                        const int64_t* rows, const float* panels, const float* bias, float* out) {
    const Panels right = {panels, D, N};
    const int64_t parts = (W + TILE - 1) / TILE;
    threads = least(threads, least(parts, 1 + W * D * N / WORTH));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t from = part * TILE, count = least(TILE, W - from);
        const float *left[TILE], *start[TILE];
        for (int64_t w = 0; w < count; w++) {
            left[w] = &x[(rows ? rows[from + w] : from + w) * D];
            start[w] = bias;
            for (int64_t j = N; j < M; j++) out[(from + w) * M + j] = bias[j];
        }
        multiply(left, count, right, start, &out[from * M], M);
    }
}

// out [M, N] = a.T @ b[rows]: a [K, M]. Without `rows`, all of b in order. Each sum has one order of
// additions, whatever the number of threads.
extern "C" void sum_products(int64_t K, int64_t M, int64_t N, int64_t threads, const float* a,
                             const float* b, const int64_t* rows, float* out) {
    const int64_t panels = (N + PANEL - 1) / PANEL;
    threads = least(threads, least(panels, 1 + K * M * N / WORTH));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t thread = 0; thread < threads; thread++) {
        const int64_t first = panels * thread / threads, last = panels * (thread + 1) / threads;
        const int64_t columns = least(last * PANEL, N) - first * PANEL;
        for (int64_t m = 0; m < M; m++)
            std::memset(&out[m * N + first * PANEL], 0, columns * sizeof(float));
        for (int64_t from = 0; from < K; from += DEPTH)
            for (int64_t p = first; p < last; p++)
                accumulate_columns(least(DEPTH, K - from), M, N, p * PANEL, &a[from * M],
                                   rows ? b : &b[from * N], rows ? &rows[from] : nullptr, out);
    }
}

// Returns whether all ids were rows of the table; if not, nothing was done.
template <class Cell>
bool forward(const Layer& layer) {
    if (layer.ids && !layer.places)
        for (int64_t n = 0; n < layer.N; n++)
            for (int64_t step = 0; step < layer.lengths[n]; step++) {
                int64_t id = layer.ids[n * layer.T + step];
                if (id < 0 || id >= layer.R) return false;
            }
    [[maybe_unused]] const int threads = threads_for(layer);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* work = own_work(layer);
        // the long ones come first
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < tiles(layer); number++)
            forward_tile<Cell>(layer, number, work);
    }
    return true;
}

// Threads wait for each other once a block: while some are still at the sums of one, the others
// begin with the tiles of the next, whose gradients are in the other half of `dgates`.
template <class Cell>
void backward(const Layer& layer) {
    const int64_t H = layer.H, G = 4 * H, panels = (G + PANEL - 1) / PANEL;
    const int threads = threads_for(layer);
    // columns of a row of the table for which a thread adds the gradients up
    const int64_t share = (G + threads - 1) / threads, shares = layer.rows ? threads : 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* work = own_work(layer);
        if (layer.rows)
#pragma omp for schedule(static)
            for (int64_t row = 0; row < layer.R; row++)
                std::memset(&layer.dtable[row * G], 0, G * sizeof(float));
        for (int64_t block = 0; block < layer.count; block++) {
            const int64_t first = layer.blocks[block], last = layer.blocks[block + 1];
            const int64_t begin = layer.starts[first], size = layer.starts[last] - begin;
            const int64_t half = threads > 1 ? block % 2 : 0;
            float* dgates = layer.rows ? &layer.dgates[half * layer.largest * G]
                                       : &layer.dtable[begin * G];
#pragma omp for schedule(dynamic, 1)
            for (int64_t number = first; number < last; number++)
                backward_tile<Cell>(layer, number, begin, dgates, work);
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t part = 0; part < panels + shares; part++)
                if (part < panels)
                    // this way round more of the registers are filled
                    for (int64_t from = 0; from < size; from += DEPTH)
                        accumulate_columns(least(DEPTH, size - from), H, G, part * PANEL,
                                           &layer.before_h[(begin + from) * H], &dgates[from * G],
                                           nullptr, layer.h_by_gates);
                else if (int64_t j = (part - panels) * share; j < G)
                    scatter_columns(size, G, j, least(share, G - j), dgates,
                                    &layer.rows[begin], layer.dtable);
        }
    }
}

extern "C" bool lstm_forward(const Layer* layer) { return forward<Lstm>(*layer); }
extern "C" bool gru_forward(const Layer* layer) { return forward<Gru>(*layer); }
extern "C" void lstm_backward(const Layer* layer) { backward<Lstm>(*layer); }
extern "C" void gru_backward(const Layer* layer) { backward<Gru>(*layer); }
