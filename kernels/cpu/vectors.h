// Vectors of floats, and memory for them.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#define INLINE inline __attribute__((always_inline))

namespace {

#ifdef __AVX512F__
constexpr int64_t WIDTH = 16;  // floats in a Vector
#else
constexpr int64_t WIDTH = 8;
#endif

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

constexpr std::align_val_t CACHE_LINE{64};

// So many floats and what fills up their last cache line, which two threads should not write to.
int64_t whole_lines(int64_t size) { return (size + 15) / 16 * 16; }

struct Release {
    void operator()(void* memory) const { ::operator delete(memory, CACHE_LINE); }
};
using Floats = std::unique_ptr<float[], Release>;

// Memory that is not cleared.
Floats floats(int64_t size) {
    return Floats(static_cast<float*>(::operator new(size * sizeof(float), CACHE_LINE)));
}

}  // namespace
