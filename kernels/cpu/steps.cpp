// The layers of fastsiam/engine/batched, compiled: float32, on a CPU.
//
// Sequences do not need each other, so a tile of them, longest first, runs through all of its steps
// before the next tile begins: its states stay in the first cache, the weights in the second.
// Threads take the tiles one by one. A step reads the input gates of its tokens from a table of all
// distinct words of the batch (in scoring, of the vocabulary), by the row of the word. What a
// backward needs lies in packed rows, tile after tile, and in a tile step after step. The backward
// goes through the tiles in blocks, so that the gradients of the gates, from which those of the
// weights are made, are still in a cache; the next block uses the same memory, or with several
// threads the one after it.

#include <cmath>
#include <exception>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "batch.h"
#include "cells.h"
#include "products.h"

namespace {

// What a step of direction p multiplies h with.
template <class Cell>
void lay_out_recurrent(const Layer& layer, int64_t p, float* panels) {
    const int64_t H = layer.H, G = GATES<Cell> * H;
    const float* weight = &layer.weight_hh[p * G * H];
    lay_out_columns(H, G, [&](int64_t n) { return &weight[n * H]; }, panels);
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

// Memory of so many floats for each thread.
struct Work {
    const int64_t size;
    const Floats all;

    Work(int threads, int64_t size) : size(whole_lines(size)), all(floats(threads * this->size)) {}

    // What the calling thread has of it.
    float* own() const {
        int64_t thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        return &all[thread * size];
    }
};

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

// Runs the steps back: dtable [count, 4H], what reaches each word's input gates, and h_by_gates
// [H, .], in its first 4H columns the product of the states before the tokens and the gradients of
// the gates.
//
// Threads wait for each other once a block: while some are still at the sums of one, the others
// begin with the tiles of the next, whose gradients are in the other half of the memory.
template <class Cell>
void backward_steps(const Batch& batch, const Words& words, float* dtable, float* h_by_gates,
                    int64_t stride) {
    const Layer& layer = batch.layer;
    const int64_t H = layer.H, G = 4 * H, K = GATES<Cell> * H;
    const float* weight = &layer.weight_hh[batch.p * K * H];
    const Floats panels = floats(size_of_panels(K, H));
    lay_out_rows(K, H, [&](int64_t k) { return &weight[k * H]; }, panels.get());
    const Panels right = {panels.get(), K, H};
    const std::vector<int64_t> blocks = blocks_of(batch);
    int64_t largest = 0;
    for (size_t block = 1; block < blocks.size(); block++)
        largest = std::max(largest, batch.starts[blocks[block]] - batch.starts[blocks[block - 1]]);
    const int threads = batch.threads();
    const Work work(threads, batch.tile * 2 * H);
    const Floats two_blocks = floats(words.rows ? (threads > 1 ? 2 : 1) * largest * G : 0);
    const float* before_h = &layer.before_h[batch.p * layer.N * layer.T * H];
    const int64_t parts = (G + PANEL - 1) / PANEL, shares = words.rows ? threads : 0;
    std::fill_n(h_by_gates, H * stride, 0.0f);
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
            float* dgates = words.rows ? &two_blocks[half * largest * G] : &dtable[begin * G];
#pragma omp for schedule(dynamic, 1)
            for (int64_t number = first; number < last; number++)
                backward_tile<Cell>(batch, right, number, begin, dgates, work.own());
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t part = 0; part < parts + shares; part++)
                if (part < parts)
                    // this way round more of the registers are filled
                    for (int64_t from = 0; from < size; from += DEPTH)
                        accumulate_columns(least(DEPTH, size - from), H, G, part * PANEL,
                                           &before_h[(begin + from) * H], H, &dgates[from * G],
                                           nullptr, h_by_gates, stride);
                else
                    scatter_rows(size, G, part - parts, shares, dgates, &words.rows[begin], dtable);
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
                                   of_weight, D);
            else
                accumulate_columns(some, 1, 4 * H, (part - of_x) * PANEL, ones, 1, rows, nullptr,
                                   of_bias, 4 * H);
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
        lay_out_recurrent<Cell>(layer, p,
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
        const Work work(threads, batch.tile * 7 * H);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            // the long ones come first
#pragma omp for schedule(dynamic, 1)
            for (int64_t number = 0; number < batch.tiles; number++)
                forward_tile<Cell>(batch, rows, table, right, number, work.own());
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
        // no cache line has columns of two panels
        const int64_t stride = size_of_panels(1, G);
        const Floats dtable = floats(words.count * G), h_by_gates = floats(H * stride);
        backward_steps<Cell>(batch, words, dtable.get(), h_by_gates.get(), stride);
        gradients_of_input<Cell>(layer, p, words, dtable.get());
        for (int64_t k = 0; k < K; k++)
            for (int64_t j = 0; j < H; j++)
                layer.dweight_hh[(p * K + k) * H + j] =
                    h_by_gates[j * stride + Cell::SKIPPED * H + k];
        if (layer.dx) gradient_of_x<Cell>(layer, p, words, dtable.get());
    }
    return true;
}

// What fastsiam/engine/cpu.py makes errors of.
enum Outcome : int64_t { DONE, ID_OUT_OF_RANGE, OUT_OF_MEMORY };

Outcome outcome(bool (*work)(const Layer&), const Layer* layer) {
    try {
        return work(*layer) ? DONE : ID_OUT_OF_RANGE;
    } catch (const std::exception&) {  // of new, or of a vector past what an address can count
        return OUT_OF_MEMORY;
    }
}

}  // namespace

// What fastsiam/engine/cpu.py asks before it calls anything else: goes up with every change of an argument.
extern "C" int64_t version() { return 4; }
extern "C" int64_t panel() { return PANEL; }

extern "C" int64_t lstm_prepare(const Layer* layer) { return outcome(prepare<Lstm>, layer); }
extern "C" int64_t lstm_forward(const Layer* layer) { return outcome(forward<Lstm>, layer); }
extern "C" int64_t lstm_backward(const Layer* layer) { return outcome(backward<Lstm>, layer); }
extern "C" int64_t gru_prepare(const Layer* layer) { return outcome(prepare<Gru>, layer); }
extern "C" int64_t gru_forward(const Layer* layer) { return outcome(forward<Gru>, layer); }
extern "C" int64_t gru_backward(const Layer* layer) { return outcome(backward<Gru>, layer); }
