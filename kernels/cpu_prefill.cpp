// Attention of many queries on CPUs: blocks of keys go by tiles of queries, with an online softmax
// (https://arxiv.org/abs/2205.14135). Queries lie in the lanes of vectors, so all that the softmax does is vertical.
// Products are of floats, or of bf16 where the processor has tiles (AMX).

#include "cpu_tiles.h"

namespace brisk {
namespace {

constexpr int NV = 2, W = NV * LANES;  // vectors, queries of a tile
constexpr int ROWS = AVX512 ? 8 : 6;   // of a product at once: as many as there are registers for
constexpr int64_t BLOCK = 128;         // keys that go by the tiles of a task together
constexpr float LEAST = -3e38f;        // below all scores, and no infinity, whose differences are NaN

// A tile's state while the keys go by; [W] is a number for each query.
struct Tile {
    void* queries;        // as the products take them
    float *largest, *sum;  // [W]: the largest score so far, the sum of exp(score - largest)
    float* out;            // [D][W]: the sum of exp(score - largest) * value
    int32_t *begin, *end;  // [W]: the keys that a query sees
    int64_t first, common_first, common_last, last;  // keys that any query sees, and that all do
};

// The keys [begin, end) of the block that begins at `first` are seen by some query; key 0 lies at `offset`, its scales
// at `scale_offset`.
struct Block {
    int64_t first, begin, end, offset, scale_offset;
};

// ---------------------------------------------------------------------------------------------------------------------
// Products of floats

// c [M][W] = or += the sum over k of a(m, k) * b [K][W]; M rounded up to ROWS, of which those after M may be anything.
template <bool ADD>
INLINE void product(const float* a, int64_t m_step, int64_t k_step, int64_t M, int64_t K, const float* b, float* c) {
    for (int64_t m = 0; m < M; m += ROWS) {
        f32s sums[ROWS][NV] = {};
        if (ADD)
            UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int v = 0; v < NV; v++)
                sums[r][v] = load<f32s>(c + (m + r) * W + v * LANES);
        const float* at = a + m * m_step;
        for (int64_t k = 0; k < K; k++, at += k_step) {
            f32s bs[NV];
            UNROLL for (int v = 0; v < NV; v++) bs[v] = load<f32s>(b + k * W + v * LANES);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const f32s x = all(at[r * m_step]);
                UNROLL for (int v = 0; v < NV; v++) sums[r][v] += x * bs[v];
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int v = 0; v < NV; v++)
            store(c + (m + r) * W + v * LANES, sums[r][v]);
    }
}

struct Floats {
    static constexpr int64_t GRAIN = 1;  // keys that weights and values come in
    static constexpr bool PAIRS = false;
    const Prefill& a;
    const int64_t padded;
    float *keys, *values;  // [BLOCK][padded]

    // One vector of a tile's queries: those at `offsets`.
    void take_queries(const int64_t (&offsets)[LANES], int v, void* to) const {
        for (int64_t d = 0; d < padded; d += LANES) {
            f32s x[LANES];
            for (int i = 0; i < LANES; i++) x[i] = load_lanes(a.q, offsets[i] + d, a.D - d);
            transpose(x);
            UNROLL for (int i = 0; i < LANES; i++) store((float*)to + (d + i) * W + v * LANES, x[i]);
        }
    }
    void take_block(const Block& block) {
        for (int64_t j = block.begin; j < block.end; j++)
            for (int64_t d = 0; d < padded; d += LANES) {
                const int64_t from = block.offset + j * a.key_step + d, to = (j - block.first) * padded + d;
                const int64_t scale = block.scale_offset + j * a.scale_step;
                if (a.k.type == I8) {
                    store(keys + to, load_lanes((const int8_t*)a.k.data + from, a.D - d, a.k_scale[scale]));
                    store(values + to, load_lanes((const int8_t*)a.v.data + from, a.D - d, a.v_scale[scale]));
                } else {
                    store(keys + to, load_lanes(a.k, from, a.D - d));
                    store(values + to, load_lanes(a.v, from, a.D - d));
                }
            }
        // A weight of 0 does not hide NaN.
        memset(values, 0, (block.begin - block.first) * padded * sizeof(float));
    }
    void scores(const Tile& tile, int64_t count, float* to) const {
        product<false>(keys, padded, 1, count, a.D, (const float*)tile.queries, to);
    }
    void add_values(const Tile& tile, int64_t count, const float* weights) const {
        product<true>(values, 1, padded, a.D, count, weights, tile.out);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Products of bf16 by tiles

#if AMX
struct Bf16 {
    static_assert(W == Tiles::WIDTH);
    static constexpr int64_t GRAIN = 32;
    static constexpr bool PAIRS = true;
    const Prefill& a;
    const int64_t padded;     // D, which is a multiple of 16, to one of 32
    uint16_t *copy, *values;  // [2][BLOCK][padded] where the cache can't be read as it is, [padded][BLOCK]
    const uint16_t* keys = nullptr;
    const Tiles tiles = {};

    void take_queries(const int64_t (&offsets)[LANES], int v, void* to) const {
        for (int64_t d = 0; d < a.D; d += 2 * LANES) {
            f32s x[LANES];
            for (int i = 0; i < LANES; i++) {
                uint16_t part[2 * LANES] = {};  // half of it where D ends
                memcpy(part, (const uint16_t*)a.q.data + offsets[i] + d, sizeof(uint16_t) * smaller(a.D - d, 2 * LANES));
                x[i] = load<f32s>(part);
            }
            transpose(x);
            UNROLL for (int i = 0; i < LANES; i++) store((float*)to + (d / 2 + i) * W + v * LANES, x[i]);
        }
    }
    // int8 [a.D] of each key of a block from `from` on -> bf16 [padded].
    void dequantize(const Block& block, const void* from, const float* scales, uint16_t* to) const {
        const int8_t* x = (const int8_t*)from + block.offset;
        for (int64_t j = block.begin; j < block.end; j++) {
            const float scale = scales[block.scale_offset + j * a.scale_step];
            for (int64_t d = 0; d < padded; d += LANES)
                store(to + (j - block.first) * padded + d, to_bf16(load_lanes(x + j * a.key_step + d, a.D - d, scale)));
        }
    }
    void take_block(const Block& block) {
        const uint16_t *k = (const uint16_t*)a.k.data + block.offset, *v = (const uint16_t*)a.v.data + block.offset;
        int64_t step = a.key_step;
        keys = k + block.first * a.key_step;
        if (a.k.type == I8) {
            uint16_t* second = copy + BLOCK * padded;
            dequantize(block, a.k.data, a.k_scale, copy);
            dequantize(block, a.v.data, a.v_scale, second);
            keys = copy, v = second - block.first * padded, step = padded;
        } else if (a.D != padded || a.key_step != a.D || block.end - block.first < BLOCK) {
            for (int64_t j = block.begin; j < block.end; j++) {
                uint16_t* to = copy + (j - block.first) * padded;
                memcpy(to, k + j * a.key_step, a.D * sizeof(uint16_t));
                memset(to + a.D, 0, (padded - a.D) * sizeof(uint16_t));
            }
            keys = copy;
        }
        const auto value = [&](int64_t j, int64_t d) INLINE_LAMBDA {
            return j >= block.begin && j < block.end ? widen(load<u16s>(v + j * step + d)) : u32s{};
        };
        for (int64_t j = block.first; j < block.end; j += 2 * LANES)
            for (int64_t d = 0; d < a.D; d += LANES) {
                f32s x[LANES];
                for (int i = 0; i < LANES; i++) x[i] = (f32s)(value(j + 2 * i, d) | value(j + 2 * i + 1, d) << 16);
                transpose(x);
                UNROLL for (int i = 0; i < LANES; i++) store(values + (d + i) * BLOCK + j - block.first, x[i]);
            }
    }
    void scores(const Tile& tile, int64_t count, float* to) const {
        const float* q = (const float*)tile.queries;
        for (int64_t j = 0; j < count; j += 32, to += 32 * W) {
            tiles.clear_sums();
            for (int64_t d = 0; d < a.D; d += 32) tiles.multiply(keys + j * padded + d, padded, q + d / 2 * W);
            tiles.store_sums(to);
        }
    }
    void add_values(const Tile& tile, int64_t count, const float* weights) const {
        float* out = tile.out;
        for (int64_t d = 0; d < a.D; d += 32, out += 32 * W) {
            tiles.load_sums(out);
            for (int64_t j = 0; j < count; j += 32) tiles.multiply(values + d * BLOCK + j, BLOCK, weights + j / 2 * W);
            tiles.store_sums(out);
        }
    }
};
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The softmax, and the order of things

// Scores [count][W] of keys that a query does not see become -infinity.
void hide(float* scores, int64_t first, int64_t count, const Tile& tile) {
    for (int64_t j = 0; j < count; j++)
        UNROLL for (int v = 0; v < NV; v++) {
            float* at = scores + j * W + v * LANES;
            const i32s key = i32s{} + int32_t(first + j);
            const i32s hidden = (key < load<i32s>(tile.begin + v * LANES)) | (key >= load<i32s>(tile.end + v * LANES));
            store(at, hidden ? all(-__builtin_inff()) : load<f32s>(at));
        }
}

// Scores [count][W] -> exp(score - largest so far), as floats or as pairs of bf16 [count / 2][W][2]; what was summed up
// before is scaled to the new largest.
template <bool PAIRS>
void softmax(float* scores, int64_t count, float scale, const Tile& tile, int64_t D) {
    f32s most[NV], now[NV], keep[NV], total[NV] = {}, growth = {};
    UNROLL for (int v = 0; v < NV; v++) most[v] = all(-__builtin_inff());
    for (int64_t j = 0; j < count; j++)
        UNROLL for (int v = 0; v < NV; v++) most[v] = larger(load<f32s>(scores + j * W + v * LANES), most[v]);
    UNROLL for (int v = 0; v < NV; v++) {
        const f32s before = load<f32s>(tile.largest + v * LANES);
        now[v] = larger(most[v] * scale, before);
        keep[v] = exp_negative(before - now[v]);
        growth = larger(growth, now[v] - before);
        store(tile.largest + v * LANES, now[v]);
    }
    const auto weight = [&](int64_t j, int v) INLINE_LAMBDA {
        const f32s w = exp_negative(load<f32s>(scores + j * W + v * LANES) * scale - now[v]);
        total[v] += w;
        return w;
    };
    for (int64_t j = 0; j < count; j += PAIRS ? 2 : 1)
        UNROLL for (int v = 0; v < NV; v++) {
            if (PAIRS) {
                const u32s even = (u32s)weight(j, v) + 0x8000, odd = (u32s)weight(j + 1, v) + 0x8000;
                store(scores + j / 2 * W + v * LANES, even >> 16 | (odd & 0xffff0000u));
            } else {
                store(scores + j * W + v * LANES, weight(j, v));
            }
        }
    UNROLL for (int v = 0; v < NV; v++)
        store(tile.sum + v * LANES, load<f32s>(tile.sum + v * LANES) * keep[v] + total[v]);
    if (max_lanes(growth) > 0)
        for (int64_t d = 0; d < D; d++)
            UNROLL for (int v = 0; v < NV; v++) {
                float* at = tile.out + d * W + v * LANES;
                store(at, load<f32s>(at) * keep[v]);
            }
}

int64_t tile_floats(int64_t padded) { return (2 * padded + ROWS + 4) * W; }

int64_t scratch_of(int64_t queries, int64_t D) {
    const int64_t padded = round_up(D, 32), rows = BLOCK + ROWS;
    const int64_t tiles = round_up(queries, W) / W;
    return 2 * rows * padded + rows * W + tiles * (tile_floats(padded) + int64_t(sizeof(Tile) / sizeof(float)));
}

template <class Products>
void attend_by(Products& by, const Prefill& a, int64_t q_offset, int64_t kv_offset, int64_t scale_offset,
               int64_t tokens, const Range* seen, const float* sinks, void* y, float* scores, float* memory) {
    const int64_t queries = tokens * a.G, count = round_up(queries, W) / W, padded = round_up(a.D, 32);
    Tile* tiles = (Tile*)(memory + count * tile_floats(padded));
    const auto place = [&](int64_t i) { return q_offset + i / a.G * a.q_step + i % a.G * a.D; };
    int64_t first = INT32_MAX, last = 0;
    for (int64_t t = 0; t < count; t++) {
        float* at = memory + t * tile_floats(padded);
        const auto take = [&](int64_t floats) { return (at += floats) - floats; };
        Tile& tile = tiles[t];
        tile.queries = take(padded * W), tile.out = take((padded + ROWS) * W);
        tile.largest = take(W), tile.sum = take(W), tile.begin = (int32_t*)take(W), tile.end = (int32_t*)take(W);
        tile.first = tile.common_last = INT32_MAX, tile.last = tile.common_first = 0;
        memset(tile.out, 0, (padded + ROWS) * W * sizeof(float));
        int64_t offsets[LANES];
        for (int64_t i = 0; i < W; i++) {
            const int64_t query = smaller(t * W + i, queries - 1);  // the last one again where there are no more
            const Range keys = seen[query / a.G];
            tile.begin[i] = keys.begin, tile.end[i] = keys.end;
            tile.largest[i] = sinks ? sinks[query % a.G] : LEAST, tile.sum[i] = sinks ? 1 : 0;
            if (keys.begin > tile.common_first) tile.common_first = keys.begin;
            if (keys.end < tile.common_last) tile.common_last = keys.end;
            if (keys.begin < keys.end && keys.begin < tile.first) tile.first = keys.begin;
            if (keys.begin < keys.end && keys.end > tile.last) tile.last = keys.end;
            offsets[i % LANES] = place(query);
            if ((i + 1) % LANES == 0) by.take_queries(offsets, i / LANES, tile.queries);
        }
        if (tile.first < first) first = tile.first;
        if (tile.last > last) last = tile.last;
    }
    const float scale = a.softcap ? 1.0f : a.scale;
    for (int64_t block = first / BLOCK * BLOCK; block < last; block += BLOCK) {
        int64_t begin = block + BLOCK, end = block;
        for (int64_t t = 0; t < count; t++)
            if (tiles[t].first < block + BLOCK && tiles[t].last > block) {
                if (tiles[t].first < begin) begin = tiles[t].first < block ? block : tiles[t].first;
                if (tiles[t].last > end) end = smaller(tiles[t].last, block + BLOCK);
            }
        if (begin >= end) continue;
        by.take_block({block, begin, end, kv_offset, scale_offset});
        for (int64_t t = 0; t < count; t++) {
            const Tile& tile = tiles[t];
            if (tile.first >= block + BLOCK || tile.last <= block) continue;
            const int64_t keys = round_up(smaller(tile.last - block, BLOCK), Products::GRAIN);
            by.scores(tile, keys, scores);
            if (a.softcap) cap_scores(scores, keys * W, a.scale / a.softcap, a.softcap);
            if (tile.common_first > block || tile.common_last < block + keys) hide(scores, block, keys, tile);
            softmax<Products::PAIRS>(scores, keys, scale, tile, a.D);
            by.add_values(tile, keys, scores);
        }
    }
    for (int64_t i = 0; i < queries; i += LANES) {
        const Tile& tile = tiles[i / W];
        const f32s sum = load<f32s>(tile.sum + i % W), share = sum == 0.0f ? f32s{} : 1.0f / sum;
        for (int64_t d = 0; d < a.D; d += LANES) {
            f32s x[LANES];
            UNROLL for (int j = 0; j < LANES; j++) x[j] = load<f32s>(tile.out + (d + j) * W + i % W) * share;
            transpose(x);
            for (int64_t j = 0; j < smaller(LANES, queries - i); j++)
                store_lanes(y, a.q.type, place(i + j) + d, x[j], a.D - d);
        }
    }
}

void attend(const Prefill& a, int64_t q_offset, int64_t kv_offset, int64_t scale_offset, int64_t tokens,
            const Range* seen, const float* sinks, void* y, float* scratch) {
    const int64_t padded = round_up(a.D, 32);
    float *keys = scratch, *values = keys + (BLOCK + ROWS) * padded, *scores = values + (BLOCK + ROWS) * padded;
    float* memory = scores + (BLOCK + ROWS) * W;
#if AMX
    if (a.q.type == BF16 && (a.k.type == BF16 || a.k.type == I8) && a.D % 16 == 0) {
        Bf16 by{a, padded, (uint16_t*)keys, (uint16_t*)values};
        return attend_by(by, a, q_offset, kv_offset, scale_offset, tokens, seen, sinks, y, scores, memory);
    }
#endif
    Floats by{a, padded, keys, values};
    attend_by(by, a, q_offset, kv_offset, scale_offset, tokens, seen, sinks, y, scores, memory);
}

}  // namespace
}  // namespace brisk

extern "C" __attribute__((visibility("default"))) const brisk::PrefillKernels brisk_prefill = {brisk::attend,
                                                                                              brisk::scratch_of};
