// The step loops of fastsiam/batched_lstm.py and batched_gru.py, compiled: float32, on a CPU; and the
// order of the tokens that they run through. What a step computes, and the scales of gates and
// states, are explained there.
//
// Sequences do not need each other, so a tile of them runs through all steps of a block before the
// next tile begins: its states stay in the first cache, the weights in the second. Threads take
// the tiles in turn. Rows of 4H gates and of H units lie packed, time-major, longest sequence first;
// `sizes` says how many are alive at each step.

#include <cstdint>
#include <cstring>

namespace {

#define INLINE inline __attribute__((always_inline))

// not `using`: Clang would drop the alignment
typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));

constexpr int64_t WIDTH = 8;        // floats in a Vector
constexpr int64_t PANEL = 16;       // columns of a product that are worked on at a time
constexpr int64_t ROWS = 6;         // rows: 6 x 2 sums, 2 columns and a factor, of 16 registers
constexpr int64_t TILE = 24;        // sequences
constexpr int64_t WORTH = 1000000;  // multiplications that are worth a thread

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The right-hand side of a product, [K, N], in panels of 16 columns, [N / 16, K, 16]; what stands in
// the last panel behind the last column is multiplied and dropped.
struct Panels {
    const float* data;
    int64_t K, N;
};

// out += a @ panel, for R rows and C vectors of columns.
template <int R, int C>
INLINE void multiply_block(const float* a, int64_t stride_a, const float* panel, int64_t K,
                           float* out, int64_t stride_out, int64_t columns) {
    Vector sums[R][C] = {};
    for (int64_t k = 0; k < K; k++) {
        const Vector* right = reinterpret_cast<const Vector*>(&panel[k * PANEL]);
        // unrolled, or the sums would not be in registers
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sums[r][c] += a[r * stride_a + k] * right[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        float* row = &out[r * stride_out];
        if (columns == C * WIDTH) {
#pragma GCC unroll 8
            for (int c = 0; c < C; c++)
                *reinterpret_cast<Vector*>(&row[c * WIDTH]) += sums[r][c];
        } else {
            float sum[C * WIDTH];
            std::memcpy(sum, sums[r], sizeof sum);
            for (int64_t j = 0; j < columns; j++) row[j] += sum[j];
        }
    }
}

template <int C>
void multiply_panel(const float* a, int64_t stride_a, int64_t rows, const float* panel, int64_t K,
                    float* out, int64_t stride_out, int64_t columns) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * stride_a, out += ROWS * stride_out)
        multiply_block<ROWS, C>(a, stride_a, panel, K, out, stride_out, columns);
    switch (rows) {
        case 5: return multiply_block<5, C>(a, stride_a, panel, K, out, stride_out, columns);
        case 4: return multiply_block<4, C>(a, stride_a, panel, K, out, stride_out, columns);
        case 3: return multiply_block<3, C>(a, stride_a, panel, K, out, stride_out, columns);
        case 2: return multiply_block<2, C>(a, stride_a, panel, K, out, stride_out, columns);
        case 1: return multiply_block<1, C>(a, stride_a, panel, K, out, stride_out, columns);
    }
}

// out += a @ right: [rows, K] by [K, N].
void multiply(const float* a, int64_t stride_a, int64_t rows, const Panels& right, float* out,
              int64_t stride_out) {
    for (int64_t j = 0; j < right.N; j += PANEL) {
        const float* panel = &right.data[j * right.K];
        int64_t columns = least(PANEL, right.N - j);
        if (columns > WIDTH)
            multiply_panel<2>(a, stride_a, rows, panel, right.K, out + j, stride_out, columns);
        else
            multiply_panel<1>(a, stride_a, rows, panel, right.K, out + j, stride_out, columns);
    }
}

// 1 / (1 + exp(-x)): a power of two, times the series of exp between -log(2) / 2 and log(2) / 2.
INLINE float sigmoid(float x) {
    // past these, exp leaves float32's range; a NaN passes
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    // of a number near 3 * 2^22 the lowest bits are the nearest integer
    float shifted = x * -1.44269504f + 12582912.0f;
    float power = shifted - 12582912.0f;
    // log(2) in two parts, of which the first has few bits: its multiples are exact
    float rest = -x - power * 0.693359375f + power * 2.12194440e-4f;
    float series = rest * (1.0f / 720) + 1.0f / 120;
    series = series * rest + 1.0f / 24;
    series = series * rest + 1.0f / 6;
    series = series * rest + 0.5f;
    series = series * rest + 1.0f;
    series = series * rest + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    std::memcpy(&power, &bits, sizeof bits);
    return 1.0f / (1.0f + series * power);
}

// What becomes of the hidden states besides: each may be null.
struct Seen {
    float* outputs;        // [m, H] all of them
    float* pooled;         // [n, H] their weighted sum, or else their maximum
    const float* weights;  // [m]
    int32_t* peaks;        // [n, H] step of the maximum
};

INLINE void pool(const Seen& seen, const float* h, int64_t row, int64_t sequence, int32_t step,
                 int64_t H) {
    if (seen.outputs) std::memcpy(&seen.outputs[row * H], h, H * sizeof(float));
    if (!seen.pooled) return;
    float* __restrict pooled = &seen.pooled[sequence * H];
    if (seen.weights) {
        for (int64_t j = 0; j < H; j++) pooled[j] += seen.weights[row] * h[j];
        return;
    }
    for (int64_t j = 0; j < H; j++) {
        bool higher = h[j] > pooled[j];
        if (seen.peaks && higher) seen.peaks[sequence * H + j] = step;
        // a NaN comes in, and stays
        pooled[j] = higher || h[j] != h[j] ? h[j] : pooled[j];
    }
}

struct Lstm {
    static constexpr int64_t SKIPPED = 0;  // gates before those that h has a part in

    static void forward(float* __restrict gates, float* __restrict h, float* __restrict c,
                        int64_t H) {
        float *i = gates, *f = i + H, *g = f + H, *o = g + H;
        for (int64_t j = 0; j < 4 * H; j++) gates[j] = sigmoid(gates[j]);
        for (int64_t j = 0; j < H; j++) {
            g[j] -= 0.5f;
            c[j] = f[j] * c[j] + 4.0f * i[j] * g[j];
            h[j] = o[j] * (sigmoid(c[j]) - 0.5f);
        }
    }

    static void backward(const float* __restrict gates, const float* __restrict /* h */,
                         const float* __restrict c, float* __restrict dgates,
                         float* __restrict dh, float* __restrict dc, int64_t H) {
        const float *i = gates, *f = i + H, *g = f + H, *o = g + H;
        float *di = dgates, *df = di + H, *dg = df + H, *d_o = dg + H;
        for (int64_t j = 0; j < H; j++) {
            float s = sigmoid(f[j] * c[j] + 4.0f * i[j] * g[j]);
            float d = dc[j] + dh[j] * (s - s * s) * o[j];
            di[j] = (i[j] - i[j] * i[j]) * g[j] * d;
            df[j] = (f[j] - f[j] * f[j]) * c[j] * d;
            dg[j] = (0.25f - g[j] * g[j]) * i[j] * d;
            d_o[j] = (o[j] - o[j] * o[j]) * (s - 0.5f) * dh[j];
            dc[j] = d * f[j];
            dh[j] = 0.0f;
        }
    }
};

struct Gru {
    static constexpr int64_t SKIPPED = 1;

    static void forward(float* __restrict gates, float* __restrict h, float* /* c */, int64_t H) {
        float *n = gates, *r = n + H, *z = r + H, *y = z + H;
        for (int64_t j = 0; j < H; j++) {
            r[j] = sigmoid(r[j]);
            z[j] = sigmoid(z[j]);
            n[j] = sigmoid(n[j] + r[j] * y[j]) - 0.5f;
            h[j] = n[j] + z[j] * (h[j] - n[j]);
        }
    }

    static void backward(const float* __restrict gates, const float* __restrict h,
                         const float* __restrict /* c */, float* __restrict dgates,
                         float* __restrict dh, float* __restrict /* dc */, int64_t H) {
        const float *n = gates, *r = n + H, *z = r + H, *y = z + H;
        float *dn = dgates, *dr = dn + H, *dz = dr + H, *dy = dz + H;
        for (int64_t j = 0; j < H; j++) {
            dn[j] = (0.25f - n[j] * n[j]) * (1.0f - z[j]) * dh[j];
            dy[j] = dn[j] * r[j];
            dr[j] = dy[j] * y[j] * (1.0f - r[j]);
            dz[j] = (h[j] - n[j]) * z[j] * (1.0f - z[j]) * dh[j];
            dh[j] *= z[j];
        }
    }
};

int64_t sum(int64_t steps, const int64_t* sizes) {
    int64_t tokens = 0;
    for (int64_t t = 0; t < steps; t++) tokens += sizes[t];
    return tokens;
}

int threads_for(int64_t H, int64_t tokens, int64_t sequences, int most) {
    int64_t tiles = (sequences + TILE - 1) / TILE;
    return least(most, least(tiles, 1 + tokens * H * H * 4 / WORTH));
}

template <class Cell>
void forward(int64_t H, int64_t steps, const int64_t* sizes, int64_t step, int most_threads,
             const float* panels, float* gates, float* h, float* c, float* before_h,
             float* before_c, const Seen& seen) {
    const Panels right = {panels, H, (4 - Cell::SKIPPED) * H};
    [[maybe_unused]] const int threads =
        threads_for(H, sum(steps, sizes), sizes[0], most_threads);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int64_t from = 0; from < sizes[0]; from += TILE) {
        for (int64_t t = 0, first = 0; t < steps && sizes[t] > from; first += sizes[t++]) {
            int64_t rows = least(TILE, sizes[t] - from), row = first + from;
            if (before_h) std::memcpy(&before_h[row * H], &h[from * H], rows * H * sizeof(float));
            if (before_c) std::memcpy(&before_c[row * H], &c[from * H], rows * H * sizeof(float));
            // at the first step of all, h is 0
            if (step + t)
                multiply(&h[from * H], H, rows, right, &gates[(row * 4 + Cell::SKIPPED) * H],
                         4 * H);
            for (int64_t n = from; n < from + rows; n++, row++) {
                Cell::forward(&gates[row * 4 * H], &h[n * H], c ? &c[n * H] : nullptr, H);
                pool(seen, &h[n * H], row, n, step + t, H);
            }
        }
    }
}

template <class Cell>
void backward(int64_t H, int64_t steps, const int64_t* sizes, int64_t step, int most_threads,
              const float* panels, const float* gates, const float* before_h,
              const float* before_c, const float* upstream, float* dgates, float* dh, float* dc) {
    const Panels right = {panels, (4 - Cell::SKIPPED) * H, H};
    const int64_t end = sum(steps, sizes);
    [[maybe_unused]] const int threads = threads_for(H, end, sizes[0], most_threads);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int64_t from = 0; from < sizes[0]; from += TILE) {
        for (int64_t t = steps, first = end; t-- > 0;) {
            first -= sizes[t];
            int64_t rows = least(TILE, sizes[t] - from);
            for (int64_t n = from, row = first + from; n < from + rows; n++, row++) {
                if (upstream)
                    for (int64_t j = 0; j < H; j++) dh[n * H + j] += upstream[row * H + j];
                Cell::backward(&gates[row * 4 * H], &before_h[row * H],
                               before_c ? &before_c[row * H] : nullptr, &dgates[row * 4 * H],
                               &dh[n * H], dc ? &dc[n * H] : nullptr, H);
            }
            if (step + t && rows > 0)
                multiply(&dgates[((first + from) * 4 + Cell::SKIPPED) * H], 4 * H, rows, right,
                         &dh[from * H], H);
        }
    }
}

}  // namespace

// What _steps.py asks before it calls anything else: goes up with every change of an argument.
extern "C" int64_t version() { return 1; }

// Orders the sequences longest first, equal ones as they came, and packs the tokens of each `group`.
//
// lengths [N]; order [N]; tokens, and turned for the other direction or null, [N * steps], of which
// as many are filled as there are tokens; alive [N / group, steps], sequences at each step of a
// group; place [steps + 2], a help. `alive` and `place` come as zeros. Lengths are from 0 to `steps`.
// Returns the number of tokens.
extern "C" int64_t schedule(int64_t N, int64_t steps, int64_t group, const int64_t* lengths,
                            int64_t* order, int64_t* tokens, int64_t* turned, int64_t* place,
                            int64_t* alive) {
    for (int64_t n = 0; n < N; n++) place[steps - lengths[n] + 1]++;
    for (int64_t t = 1; t <= steps; t++) place[t] += place[t - 1];
    for (int64_t n = 0; n < N; n++) order[place[steps - lengths[n]]++] = n;
    int64_t row = 0;
    for (int64_t from = 0; from < N; from += group, alive += steps) {
        int64_t count = least(group, N - from);
        for (int64_t t = 0; t < steps; t++) {
            while (count && lengths[order[from + count - 1]] <= t) count--;
            if (!count) break;
            alive[t] = count;
            for (int64_t n = from; n < from + count; n++, row++) {
                tokens[row] = order[n] * steps + t;
                if (turned) turned[row] = order[n] * steps + lengths[order[n]] - 1 - t;
            }
        }
    }
    return row;
}

#define FORWARD(name, Cell)                                                                       \
    extern "C" void name(int64_t H, int64_t steps, const int64_t* sizes, int64_t step,            \
                         int threads, const float* panels, float* gates, float* h, float* c,      \
                         float* before_h, float* before_c, float* outputs, float* pooled,         \
                         const float* weights, int32_t* peaks) {                                  \
        forward<Cell>(H, steps, sizes, step, threads, panels, gates, h, c, before_h, before_c,    \
                      {outputs, pooled, weights, peaks});                                         \
    }
FORWARD(lstm_forward, Lstm)
FORWARD(gru_forward, Gru)

#define BACKWARD(name, Cell)                                                                      \
    extern "C" void name(int64_t H, int64_t steps, const int64_t* sizes, int64_t step,            \
                         int threads, const float* panels, const float* gates,                    \
                         const float* before_h, const float* before_c, const float* upstream,     \
                         float* dgates, float* dh, float* dc) {                                   \
        backward<Cell>(H, steps, sizes, step, threads, panels, gates, before_h, before_c,         \
                       upstream, dgates, dh, dc);                                                 \
    }
BACKWARD(lstm_backward, Lstm)
BACKWARD(gru_backward, Gru)
