// What a step computes, forward and backward: an LSTM's cell and a GRU's.
#pragma once

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

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

// One of its own would cost three times as much.
template <class Float>
INLINE Float tanh_of(Float x) {
    return 2.0f * sigmoid<2>(x) - 1.0f;
}

// Does Work for all H units of a row, a Vector at a time; the last Vector overlaps the one before,
// and reads what it needs before any is written.
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

// With y, the state's part of gate n, as a gate of its own: n, r, z, y. What comes from x is the
// first three, what is multiplied with h the last three.
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

// The row of PyTorch's weights whose gate stands at n here.
template <class Cell>
int64_t theirs(int64_t n, int64_t H) {
    const int64_t G = GATES<Cell> * H, first = Cell::SKIPPED * H;
    return n < first ? n + G - first : n < G ? n - first : n;
}

}  // namespace
