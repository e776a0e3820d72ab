// What is asked of the library, and the batch in the order in which it is worked on.
#pragma once

#include <algorithm>
#include <vector>

#include "products.h"

enum Pooling { LAST, MAX, MASK };

// A layer over a batch; fastsiam/engine/cpu.py has the same fields. What is not wanted, or not there, is null.
// The weights, one set a direction, are PyTorch's: G is 4H, of a GRU 3H.
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

constexpr int64_t BLOCK = 2048;  // packed rows that a block of a backward has at least
// sequences in a tile; of few ones less, so that each thread gets some, unless the weights are too
// many to be read for each tile
constexpr int64_t SMALL_TILE = 6, FEW = 256, NEAR_HIDDEN = 128;

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

// Cuts the tiles into equal parts of about BLOCK packed rows; returns where these begin and the
// last one ends.
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

}  // namespace
