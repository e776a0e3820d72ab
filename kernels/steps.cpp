// The layers of fastsiam/batched.py, compiled: float32, on a CPU.
//
// Sequences do not need each other, so a tile of them, longest first, runs through all of its steps
// before the next tile begins: its states stay in the first cache, the weights in the second. Threads
// take the tiles one by one. A step reads the input gates of its tokens from a table of all distinct
// words of the batch (in scoring, of the vocabulary), by the row of the word. What a backward needs
// lies in packed rows, tile after tile, and in a tile step after step. The backward goes through the
// tiles in blocks, so that the gradients of the gates, from which those of the weights are made, are
// still in a cache; the next block uses the same memory, or with several threads the one after it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>
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
constexpr int64_t BLOCK = 2048;       // packed rows that a block of a backward has at least
// sequences in a tile; of few ones less, so that each thread gets some, unless the weights are too
// many to be read for each tile
constexpr int64_t TILE = 24, SMALL_TILE = 6, FEW = 256, NEAR_HIDDEN = 128;
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

// out = start + a @ panel, for R rows and C vectors of columns from j on; `a`, `start` and `out` point
// to rows, which may be anywhere.
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
    for (; rows >= ROWS; rows -= ROWS, a += ROWS, start += ROWS, out += ROWS)
        multiply_block<ROWS, C>(a, panel, K, start, j, out, columns);
    switch (rows) {
        case 5: return multiply_block<5, C>(a, panel, K, start, j, out, columns);
        case 4: return multiply_block<4, C>(a, panel, K, start, j, out, columns);
        case 3: return multiply_block<3, C>(a, panel, K, start, j, out, columns);
        case 2: return multiply_block<2, C>(a, panel, K, start, j, out, columns);
        case 1: return multiply_block<1, C>(a, panel, K, start, j, out, columns);
    }
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
    for (int r = 0; r < R; r++)
        add(&out[r * stride_out], sums[r], columns, &out[r * stride_out]);
}

template <int C>
void accumulate_panel(const float* a, int64_t M, int64_t stride_a, const float* panel, int64_t K,
                      float* out, int64_t stride_out, int64_t columns) {
    for (; M >= ROWS; M -= ROWS, a += ROWS, out += ROWS * stride_out)
        accumulate_block<ROWS, C>(a, stride_a, panel, K, out, stride_out, columns);
    switch (M) {
        case 5: return accumulate_block<5, C>(a, stride_a, panel, K, out, stride_out, columns);
        case 4: return accumulate_block<4, C>(a, stride_a, panel, K, out, stride_out, columns);
        case 3: return accumulate_block<3, C>(a, stride_a, panel, K, out, stride_out, columns);
        case 2: return accumulate_block<2, C>(a, stride_a, panel, K, out, stride_out, columns);
        case 1: return accumulate_block<1, C>(a, stride_a, panel, K, out, stride_out, columns);
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

// 1 / (1 + exp(-FACTOR * x)): a power of two, times a polynomial for 2^f, f between -1/2 and 1/2,
// whose relative error is at most 2e-9.
template <int FACTOR = 1, class Float>
INLINE Float sigmoid(Float x) {
    // past these, exp leaves float32's range; a NaN passes
    x = higher(Float{} - 87.0f / FACTOR, lower(Float{} + 87.0f / FACTOR, x));
    // of a number near 3 * 2^22 the lowest bits are the nearest integer
    Float shifted = x * (-1.44269504f * FACTOR) + 12582912.0f;
    Float rest = x * (-1.44269504f * FACTOR) - (shifted - 12582912.0f);
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

// A third of the work of one of its own.
template <class Float>
INLINE Float tanh_of(Float x) {
    return 2.0f * sigmoid<2>(x) - 1.0f;
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
    // Gates before those that h has a part in. In PyTorch's order, which is otherwise the one here,
    // they stand behind these.
    static constexpr int64_t SKIPPED = 0;

    template <class Float>
    struct Forward {
        Float i, f, g, o, c, h;

        INLINE Forward(int64_t H, int64_t j, float* gates, float* /* h */, float* before)
            : i(sigmoid(load<Float>(&gates[j]))),
              f(sigmoid(load<Float>(&gates[H + j]))),
              g(tanh_of(load<Float>(&gates[2 * H + j]))),
              o(sigmoid(load<Float>(&gates[3 * H + j]))) {
            c = f * load<Float>(&before[j]) + i * g;
            h = o * tanh_of(c);
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
            const Float t = tanh_of<Float>(f * c + i * g);
            const Float d = load<Float>(&of_c[j]) + dh * (1.0f - t * t) * o;
            di = (i - i * i) * g * d;
            df = (f - f * f) * c * d;
            dg = (1.0f - g * g) * i * d;
            d_o = (o - o * o) * t * dh;
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

// With y, the state's part of gate n, as a gate of its own: n, r, z, y. What comes from x is the first
// three, what is multiplied with h the last three.
struct Gru {
    static constexpr int64_t SKIPPED = 1;

    template <class Float>
    struct Forward {
        Float n, r, z, h;

        INLINE Forward(int64_t H, int64_t j, float* gates, float* before, float* /* c */)
            : r(sigmoid(load<Float>(&gates[H + j]))), z(sigmoid(load<Float>(&gates[2 * H + j]))) {
            const Float y = load<Float>(&gates[3 * H + j]);
            n = tanh_of<Float>(load<Float>(&gates[j]) + r * y);
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
            dn = (1.0f - n * n) * (1.0f - z) * dh;
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

// Those that a weight has.
template <class Cell>
constexpr int64_t GATES = 4 - Cell::SKIPPED;

enum Pooling { LAST, MAX, MASK };

}  // namespace

// A layer over a batch; _steps.py has the same fields. What is not wanted, or not there, is null. The
// weights, one set a direction, are PyTorch's: G is 4H, of a GRU 3H.
struct Layer {
    int64_t P, N, T, H, D;
    int64_t R;               // rows of x, or of the table
    int64_t pooling;         // a Pooling
    int64_t threads;         // at most
    const int64_t* lengths;  // [N]; one that is not from 0 to T counts as the nearest of these
    const int64_t* ids;      // [N, T] rows of x, or of the table; null: row n * T + t
    const float* mask;       // [N, T]
    const float* x;          // [R, D]
    const float* weight_ih;  // [P, G, D]
    const float* weight_hh;  // [P, G, H]
    const float* bias;       // [P, 4H]
    // what `prepare` makes of x and the weights, and a forward with panels takes in place of them
    float* table;   // [P, R, 4H]
    float* panels;  // [P, ...] of weight_hh
    // out
    float* vectors;  // [N, P * H]
    float* outputs;  // [N, T, P * H], comes as zeros
    int32_t* peaks;  // [N, P * H] step of the maximum, in own time; comes as zeros
    // what a backward needs, in packed rows
    float* gates;     // [P, N * T, 4H]
    float* before_h;  // [P, N * T, H]
    float* before_c;  // [P, N * T, H]
    // backward
    const float* dvectors;  // [N, P * H]
    const float* doutputs;  // [N, T, P * H]
    float* dx;              // [R, D], comes as zeros
    float* dweight_ih;
    float* dweight_hh;
    float* dbias;
};

namespace {

constexpr std::align_val_t CACHE_LINE{64};

struct Release {
    void operator()(void* memory) const { ::operator delete(memory, CACHE_LINE); }
};
using Floats = std::unique_ptr<float[], Release>;

// Memory that is not cleared.
Floats floats(int64_t size) {
    return Floats(static_cast<float*>(::operator new(size * sizeof(float), CACHE_LINE)));
}

// The sequences in tiles, longest first, and their tokens as one direction has them packed.
struct Batch {
    const Layer& layer;
    const int64_t p;
    const int64_t tile;  // sequences in one
    const int64_t tiles;
    std::vector<int64_t> lengths;  // [N]
    std::vector<int64_t> order;    // [N] sequences
    std::vector<int64_t> starts;   // [tiles + 1] packed row where each begins and the last one ends
    std::vector<int64_t> tokens;   // [M] n * T + t

    Batch(const Layer& layer, int64_t p)
        : layer(layer),
          p(p),
          tile(layer.N <= FEW && layer.H <= NEAR_HIDDEN ? SMALL_TILE : TILE),
          tiles((layer.N + tile - 1) / tile),
          lengths(layer.lengths, layer.lengths + layer.N),
          order(layer.N) {
        const int64_t N = layer.N, T = layer.T;
        // equal ones as they came
        std::vector<int64_t> place(T + 2);
        for (int64_t& length : lengths) {
            length = std::clamp<int64_t>(length, 0, T);
            place[T - length + 1]++;
        }
        for (int64_t t = 1; t <= T; t++) place[t] += place[t - 1];
        for (int64_t n = 0; n < N; n++) order[place[T - lengths[n]]++] = n;
        int64_t row = 0;
        for (int64_t n = 0; n < N; n++) {
            if (n % tile == 0) starts.push_back(row);
            row += lengths[order[n]];
        }
        starts.push_back(row);
        tokens.reserve(row);
        for (int64_t number = 0; number < tiles; number++)
            for (int64_t step = 0, count; (count = alive(number, step)); step++)
                for (int64_t n = 0; n < count; n++)
                    tokens.push_back(position(order[number * tile + n], step));
    }

    int64_t size() const { return tokens.size(); }

    // Sequences of a tile.
    int64_t sequences(int64_t number) const { return least(tile, layer.N - number * tile); }

    // Those of them that have a token at a step.
    int64_t alive(int64_t number, int64_t step) const {
        const int64_t* first = &order[number * tile];
        int64_t n = sequences(number);
        while (n && lengths[first[n - 1]] <= step) n--;
        return n;
    }

    // Where the token of a sequence stands that is read at a step in own time.
    int64_t position(int64_t sequence, int64_t step) const {
        return sequence * layer.T + (p ? lengths[sequence] - 1 - step : step);
    }

    int threads() const {
        int64_t worth = 1 + size() * layer.H * layer.H * 4 / WORTH;
        return static_cast<int>(std::max<int64_t>(1, least(layer.threads, least(tiles, worth))));
    }
};

// The rows of x that a batch reads, and which of these each packed token has.
struct Words {
    const int64_t* x = nullptr;     // [count] ascending, or as packed
    const int64_t* rows = nullptr;  // [M]; null: its own
    int64_t count = 0;
    bool exist = true;  // all of them, in x

    explicit Words(const Batch& batch) : x(batch.tokens.data()), count(batch.size()) {
        const int64_t R = batch.layer.R, *ids = batch.layer.ids;
        if (!ids) return;
        of_tokens.reserve(count);
        for (int64_t token : batch.tokens) of_tokens.push_back(ids[token]);
        for (int64_t id : of_tokens) exist = exist && id >= 0 && id < R;
        rows = of_tokens.data();
        if (batch.layer.panels || !exist) return;
        if (R > 64 * count) {
            distinct = of_tokens;
            std::sort(distinct.begin(), distinct.end());
            distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
            for (int64_t& id : of_tokens)
                id = std::lower_bound(distinct.begin(), distinct.end(), id) - distinct.begin();
        } else {
            std::vector<int64_t> place(R);
            for (int64_t id : of_tokens) place[id] = 1;
            for (int64_t id = 0; id < R; id++)
                if (place[id]) {
                    place[id] = distinct.size();
                    distinct.push_back(id);
                }
            for (int64_t& id : of_tokens) id = place[id];
        }
        x = distinct.data();
        count = distinct.size();
    }

   private:
    std::vector<int64_t> of_tokens, distinct;
};

// The row of PyTorch's weights whose gate stands at n here.
template <class Cell>
int64_t theirs(int64_t n, int64_t H) {
    const int64_t G = GATES<Cell> * H, first = Cell::SKIPPED * H;
    return n < first ? n + G - first : n < G ? n - first : n;
}

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

// What a step of direction p multiplies h with.
template <class Cell>
void lay_out_recurrent(const Layer& layer, int64_t p, float* panels) {
    const int64_t H = layer.H, G = GATES<Cell> * H;
    const float* weight = &layer.weight_hh[p * G * H];
    lay_out_columns(H, G, [&](int64_t n) { return &weight[n * H]; }, panels);
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

// out [count, 4H]: what rows of x add to the gates of direction p. Without `rows`, the first ones.
template <class Cell>
void project(const Layer& layer, int64_t p, int64_t count, const int64_t* rows, float* out) {
    const int64_t H = layer.H, D = layer.D, G = GATES<Cell> * H;
    const float* weight = &layer.weight_ih[p * G * D];
    const Floats panels = floats(size_of_panels(D, G)), bias = floats(4 * H);
    lay_out_columns(D, G, [&](int64_t n) { return &weight[theirs<Cell>(n, H) * D]; }, panels.get());
    for (int64_t n = 0; n < 4 * H; n++)
        bias[n] = layer.bias ? layer.bias[p * 4 * H + theirs<Cell>(n, H)] : 0.0f;
    multiply_rows(count, {panels.get(), D, G}, layer.threads, [&](int64_t w) {
        float* to = &out[w * 4 * H];
        for (int64_t n = G; n < 4 * H; n++) to[n] = bias[n];
        return Rows{&layer.x[(rows ? rows[w] : w) * D], bias.get(), to};
    });
}

void pool(const Batch& batch, int64_t sequence, int64_t step, const float* h, float* pooled) {
    const Layer& layer = batch.layer;
    const int64_t H = layer.H, columns = layer.P * H, token = batch.position(sequence, step);
    if (layer.outputs)
        std::memcpy(&layer.outputs[token * columns + batch.p * H], h, H * sizeof(float));
    if (layer.pooling == MASK) {
        const float weight = layer.mask[token];
        for (int64_t j = 0; j < H; j++) pooled[j] += weight * h[j];
    } else if (layer.pooling == MAX) {
        int32_t* peaks = layer.peaks ? &layer.peaks[sequence * columns + batch.p * H] : nullptr;
        for (int64_t j = 0; j < H; j++) {
            bool higher = h[j] > pooled[j];
            if (peaks && higher) peaks[j] = static_cast<int32_t>(step);
            // a NaN comes in, and stays
            pooled[j] = higher || h[j] != h[j] ? h[j] : pooled[j];
        }
    }
}

// Adds what reaches h from outside the recurrence, unless it does so after the last step alone.
void add_upstream(const Batch& batch, int64_t sequence, int64_t step, float* dh) {
    const Layer& layer = batch.layer;
    const int64_t H = layer.H, columns = layer.P * H, token = batch.position(sequence, step);
    const int64_t at = sequence * columns + batch.p * H;
    if (layer.doutputs)
        for (int64_t j = 0; j < H; j++) dh[j] += layer.doutputs[token * columns + batch.p * H + j];
    if (!layer.dvectors) return;
    const float* dv = &layer.dvectors[at];
    if (layer.pooling == MASK) {
        const float weight = layer.mask[token];
        for (int64_t j = 0; j < H; j++) dh[j] += weight * dv[j];
    } else if (layer.pooling == MAX) {
        for (int64_t j = 0; j < H; j++) dh[j] += layer.peaks[at + j] == step ? dv[j] : 0.0f;
    }
}

// What a thread has of memory of so many floats each.
float* own(const Floats& work, int64_t size) {
    int64_t thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    return &work[thread * size];
}

// `work` has a tile's states and what is pooled, 3H, and its gates, 4H.
template <class Cell>
void forward_tile(const Batch& batch, const int64_t* table_rows, const float* table,
                  const Panels& right, int64_t number, float* work) {
    const Layer& layer = batch.layer;
    const int64_t H = layer.H, size = batch.tile * H, kept = batch.p * layer.N * layer.T;
    const int64_t *sequences = &batch.order[number * batch.tile], count = batch.sequences(number);
    float *h = work, *c = h + size, *pooled = c + size;
    for (int64_t i = 0; i < size; i++) {
        h[i] = c[i] = 0.0f;
        pooled[i] = layer.pooling == MAX ? -INFINITY : 0.0f;
    }
    int64_t row = batch.starts[number];
    for (int64_t step = 0, rows; (rows = batch.alive(number, step)); row += rows, step++) {
        float* gates = layer.gates ? &layer.gates[(kept + row) * 4 * H] : work + 3 * size;
        const float *states[TILE], *start[TILE];
        float* to[TILE];
        for (int64_t n = 0; n < rows; n++) {
            const float* from = &table[(table_rows ? table_rows[row + n] : row + n) * 4 * H];
            states[n] = &h[n * H];
            start[n] = &from[Cell::SKIPPED * H];
            to[n] = &gates[(n * 4 + Cell::SKIPPED) * H];
            // at the first step h is 0
            const int64_t copied = step ? Cell::SKIPPED * H : 4 * H;
            std::memcpy(&gates[n * 4 * H], from, copied * sizeof(float));
        }
        if (layer.before_h)
            std::memcpy(&layer.before_h[(kept + row) * H], h, rows * H * sizeof(float));
        if (layer.before_c)
            std::memcpy(&layer.before_c[(kept + row) * H], c, rows * H * sizeof(float));
        if (step) multiply(states, rows, right, start, to);
        for (int64_t n = 0; n < rows; n++) {
            for_units<Cell::template Forward>(H, &gates[n * 4 * H], &h[n * H], &c[n * H]);
            pool(batch, sequences[n], step, &h[n * H], &pooled[n * H]);
        }
    }
    const float* found = layer.pooling == LAST ? h : pooled;
    for (int64_t n = 0; n < count; n++)
        for (int64_t j = 0; j < H; j++) {
            const float value = found[n * H + j];
            layer.vectors[(sequences[n] * layer.P + batch.p) * H + j] =
                value == -INFINITY ? 0.0f : value;
        }
}

// `work` has a tile's gradients of states, 2H; `dgates` begins with the packed row `begin`.
template <class Cell>
void backward_tile(const Batch& batch, const Panels& right, int64_t number, int64_t begin,
                   float* dgates, float* work) {
    const Layer& layer = batch.layer;
    const int64_t H = layer.H, kept = batch.p * layer.N * layer.T;
    const int64_t *sequences = &batch.order[number * batch.tile], count = batch.sequences(number);
    const bool reaches_last = layer.dvectors && layer.pooling == LAST;
    float *dh = work, *dc = dh + batch.tile * H;
    for (int64_t n = 0; n < count; n++)
        for (int64_t j = 0; j < H; j++) {
            dc[n * H + j] = 0.0f;
            // waits until the steps, coming from behind, reach the sequence's last one
            dh[n * H + j] =
                reaches_last ? layer.dvectors[(sequences[n] * layer.P + batch.p) * H + j] : 0.0f;
        }
    int64_t row = batch.starts[number + 1];
    for (int64_t step = batch.lengths[sequences[0]]; step-- > 0;) {
        const int64_t rows = batch.alive(number, step);
        row -= rows;
        const float *start[TILE], *left[TILE];
        float* to[TILE];
        for (int64_t n = 0; n < rows; n++) {
            float* own_dgates = &dgates[(row - begin + n) * 4 * H];
            left[n] = &own_dgates[Cell::SKIPPED * H];
            start[n] = to[n] = &dh[n * H];
            add_upstream(batch, sequences[n], step, to[n]);
            for_units<Cell::template Backward>(
                H, &layer.gates[(kept + row + n) * 4 * H], &layer.before_h[(kept + row + n) * H],
                layer.before_c ? &layer.before_c[(kept + row + n) * H] : nullptr, own_dgates, to[n],
                &dc[n * H]);
        }
        if (step) multiply(left, rows, right, start, to);
    }
}

// out += a.T @ b[rows], for the columns of one panel, from j on: a [K, .], of which M columns count,
// b [., N], and K at most DEPTH. Without `rows`, b in order.
void accumulate_columns(int64_t K, int64_t M, int64_t N, int64_t j, const float* a, int64_t stride_a,
                        const float* b, const int64_t* rows, float* out) {
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
        accumulate_panel<2>(a, M, stride_a, panel, K, &out[j], N, columns);
    else
        accumulate_panel<1>(a, M, stride_a, panel, K, &out[j], N, columns);
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

// Cuts the tiles into equal parts of about BLOCK packed rows; returns where these begin and the last
// one ends.
std::vector<int64_t> blocks_of(const Batch& batch) {
    const int64_t total = batch.size(), count = std::max<int64_t>(1, total / BLOCK);
    std::vector<int64_t> blocks = {0};
    for (int64_t last = 1, part = 0; last <= batch.tiles; last++) {
        const int64_t end = batch.starts[last];
        if (end == batch.starts[blocks.back()] || end * count < total * (part + 1)) continue;
        blocks.push_back(last);
        part = end * count / total;
    }
    return blocks;
}

// Runs the steps back: dtable [count, 4H], what reaches each word's input gates, and h_by_gates
// [H, 4H], the product of the states before the tokens and the gradients of the gates.
//
// Threads wait for each other once a block: while some are still at the sums of one, the others begin
// with the tiles of the next, whose gradients are in the other half of the memory.
template <class Cell>
void backward_steps(const Batch& batch, const Words& words, float* dtable, float* h_by_gates) {
    const Layer& layer = batch.layer;
    const int64_t H = layer.H, G = 4 * H, K = GATES<Cell> * H;
    const float* weight = &layer.weight_hh[batch.p * K * H];
    const Floats panels = floats(size_of_panels(K, H));
    lay_out_rows(K, H, [&](int64_t k) { return &weight[k * H]; }, panels.get());
    const Panels right = {panels.get(), K, H};
    const std::vector<int64_t> blocks = blocks_of(batch);
    int64_t largest = 0;
    for (size_t block = 1; block < blocks.size(); block++)
        largest = std::max(largest,
                           batch.starts[blocks[block]] - batch.starts[blocks[block - 1]]);
    const Floats two_blocks = floats(words.rows ? 2 * largest * G : 0);
    const float* before_h = &layer.before_h[batch.p * layer.N * layer.T * H];
    const int threads = batch.threads();
    const Floats work = floats(threads * batch.tile * 2 * H);
    const int64_t parts = (G + PANEL - 1) / PANEL;
    // columns of a row of the table for which a thread adds the gradients up
    const int64_t share = (G + threads - 1) / threads, shares = words.rows ? threads : 0;
    std::fill_n(h_by_gates, H * G, 0.0f);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (words.rows)
#pragma omp for schedule(static)
            for (int64_t row = 0; row < words.count; row++)
                std::memset(&dtable[row * G], 0, G * sizeof(float));
        for (size_t block = 1; block < blocks.size(); block++) {
            const int64_t first = blocks[block - 1], last = blocks[block];
            const int64_t begin = batch.starts[first], size = batch.starts[last] - begin;
            const int64_t half = threads > 1 ? block % 2 : 0;
            float* dgates =
                words.rows ? &two_blocks[half * largest * G] : &dtable[begin * G];
#pragma omp for schedule(dynamic, 1)
            for (int64_t number = first; number < last; number++)
                backward_tile<Cell>(batch, right, number, begin, dgates,
                                    own(work, batch.tile * 2 * H));
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t part = 0; part < parts + shares; part++)
                if (part < parts)
                    // this way round more of the registers are filled
                    for (int64_t from = 0; from < size; from += DEPTH)
                        accumulate_columns(least(DEPTH, size - from), H, G, part * PANEL,
                                           &before_h[(begin + from) * H], H, &dgates[from * G],
                                           nullptr, h_by_gates);
                else if (int64_t j = (part - parts) * share; j < G)
                    scatter_columns(size, G, j, least(share, G - j), dgates, &words.rows[begin],
                                    dtable);
        }
    }
}

// The gradients of weight_ih and bias. Each sum has one order of additions, whatever the number of
// threads.
template <class Cell>
void gradients_of_input(const Layer& layer, int64_t p, const Words& words, const float* dtable) {
    const int64_t H = layer.H, D = layer.D, M = GATES<Cell> * H, K = words.count;
    float *of_weight = &layer.dweight_ih[p * M * D], *of_bias = &layer.dbias[p * 4 * H];
    std::fill_n(of_weight, M * D, 0.0f);
    std::fill_n(of_bias, 4 * H, 0.0f);
    float ones[DEPTH];
    std::fill_n(ones, DEPTH, 1.0f);
    const int64_t of_x = (D + PANEL - 1) / PANEL, parts = of_x + (4 * H + PANEL - 1) / PANEL;
    [[maybe_unused]] const int threads = least(layer.threads, 1 + K * M * D / WORTH);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t from = 0; from < K; from += DEPTH) {
            const float* rows = &dtable[from * 4 * H];
            const int64_t some = least(DEPTH, K - from);
            if (part < of_x)
                accumulate_columns(some, M, D, part * PANEL, rows, 4 * H, layer.x, &words.x[from],
                                   of_weight);
            else
                accumulate_columns(some, 1, 4 * H, (part - of_x) * PANEL, ones, 1, rows, nullptr,
                                   of_bias);
        }
    // to PyTorch's order
    std::rotate(of_weight, of_weight + Cell::SKIPPED * H * D, of_weight + M * D);
    std::rotate(of_bias, of_bias + Cell::SKIPPED * H, of_bias + M);
}

// Adds to the rows of dx what the direction's `words` get.
template <class Cell>
void gradient_of_x(const Layer& layer, int64_t p, const Words& words, const float* dtable) {
    const int64_t H = layer.H, D = layer.D, K = GATES<Cell> * H;
    const float* weight = &layer.weight_ih[p * K * D];
    const Floats panels = floats(size_of_panels(K, D));
    lay_out_rows(K, D, [&](int64_t k) { return &weight[theirs<Cell>(k, H) * D]; }, panels.get());
    multiply_rows(words.count, {panels.get(), K, D}, layer.threads, [&](int64_t w) {
        float* dx = &layer.dx[words.x[w] * D];
        return Rows{&dtable[w * 4 * H], dx, dx};
    });
}

template <class Cell>
bool prepare(const Layer& layer) {
    for (int64_t p = 0; p < layer.P; p++) {
        project<Cell>(layer, p, layer.R, nullptr, &layer.table[p * layer.R * 4 * layer.H]);
        lay_out_recurrent<Cell>(
            layer, p,
            &layer.panels[p * size_of_panels(layer.H, GATES<Cell> * layer.H)]);
    }
    return true;
}

template <class Cell>
bool forward(const Layer& layer) {
    const int64_t H = layer.H, G = GATES<Cell> * H, of_panels = size_of_panels(H, G);
    for (int64_t p = 0; p < layer.P; p++) {
        const Batch batch(layer, p);
        const Words words(batch);
        if (!words.exist) return false;
        const int64_t* rows = words.rows;
        Floats own_table, own_panels;
        const float *table, *panels;
        if (layer.panels) {
            table = &layer.table[p * layer.R * 4 * H];
            panels = &layer.panels[p * of_panels];
            if (!rows) rows = words.x;
        } else {
            own_table = floats(words.count * 4 * H);
            own_panels = floats(of_panels);
            project<Cell>(layer, p, words.count, words.x, own_table.get());
            lay_out_recurrent<Cell>(layer, p, own_panels.get());
            table = own_table.get();
            panels = own_panels.get();
        }
        const Panels right = {panels, H, G};
        const int threads = batch.threads();
        const Floats work = floats(threads * batch.tile * 7 * H);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            // the long ones come first
#pragma omp for schedule(dynamic, 1)
            for (int64_t number = 0; number < batch.tiles; number++)
                forward_tile<Cell>(batch, rows, table, right, number,
                                   own(work, batch.tile * 7 * H));
        }
    }
    return true;
}

template <class Cell>
bool backward(const Layer& layer) {
    const int64_t H = layer.H, G = 4 * H, K = GATES<Cell> * H;
    for (int64_t p = 0; p < layer.P; p++) {
        const Batch batch(layer, p);
        const Words words(batch);
        if (!words.exist) return false;
        const Floats dtable = floats(words.count * G), h_by_gates = floats(H * G);
        backward_steps<Cell>(batch, words, dtable.get(), h_by_gates.get());
        gradients_of_input<Cell>(layer, p, words, dtable.get());
        for (int64_t k = 0; k < K; k++)
            for (int64_t j = 0; j < H; j++)
                layer.dweight_hh[(p * K + k) * H + j] = h_by_gates[j * G + Cell::SKIPPED * H + k];
        if (layer.dx) gradient_of_x<Cell>(layer, p, words, dtable.get());
    }
    return true;
}

// What _steps.py makes errors of.
enum Outcome : int64_t { DONE, ID_OUT_OF_RANGE, OUT_OF_MEMORY };

Outcome outcome(bool (*work)(const Layer&), const Layer* layer) {
    try {
        return work(*layer) ? DONE : ID_OUT_OF_RANGE;
    } catch (const std::exception&) {  // of new, or of a vector past what an address can count
        return OUT_OF_MEMORY;
    }
}

}  // namespace

// What _steps.py asks before it calls anything else: goes up with every change of an argument.
extern "C" int64_t version() { return 4; }
extern "C" int64_t panel() { return PANEL; }

extern "C" int64_t lstm_prepare(const Layer* layer) { return outcome(prepare<Lstm>, layer); }
extern "C" int64_t lstm_forward(const Layer* layer) { return outcome(forward<Lstm>, layer); }
extern "C" int64_t lstm_backward(const Layer* layer) { return outcome(backward<Lstm>, layer); }
extern "C" int64_t gru_prepare(const Layer* layer) { return outcome(prepare<Gru>, layer); }
extern "C" int64_t gru_forward(const Layer* layer) { return outcome(forward<Gru>, layer); }
extern "C" int64_t gru_backward(const Layer* layer) { return outcome(backward<Gru>, layer); }
