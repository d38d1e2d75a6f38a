// Linear layers of int8 and int4 weights on CPUs with AMX, for several rows at once: tiles add up the products of a
// group of weights, so vectors have no more to do than to unpack nibbles and to scale the sums. Each number is computed
// as cpu_linear.cpp has it, to the bit.

#include "cpu_linear.h"
#include "cpu_tiles.h"

#if AMX
namespace brisk {
namespace {

constexpr int ROWS = 16;
constexpr int64_t DEPTH = 32, BLOCK = 128, STEPS = BLOCK / DEPTH;  // k of a product of tiles, and of STEPS of them
constexpr int64_t STEP_BYTES = DEPTH * PANEL;                      // of weights
// Bytes to what goes on from the second level cache into the first: products keep the processor from looking that far.
constexpr int64_t NEAR = 2048;
static_assert(PANEL == 2 * LANES && ACT_GROUP == BLOCK);

// What is known of a weight at compile time. COMMON is what quantize.py writes by default.
enum Form { INT8, INT8_GROUPED, INT4, COMMON, FLOATS };

struct Place {  // of a block of weights: the panel, which of its blocks, and where it and its sums are meanwhile
    int64_t panel, block;
    bool buffer;
};

// R rows times panels. While tiles are at work on one block of weights, the next is unpacked, and the sums of the one
// before are scaled.
template <Form FORM, int GROUPS>
struct Product {
    static constexpr bool BYTES = FORM == INT8 || FORM == INT8_GROUPED, SIGNED = FORM == COMMON || FORM == FLOATS;

    const Weight& w;
    const Activations x;
    const int R;
    const int64_t padded_k, blocks;  // of a panel
    alignas(64) uint8_t unpacked[2][STEPS][STEP_BYTES];
    alignas(64) int32_t sums[2][GROUPS][2][ROWS][LANES];
    alignas(64) float y[ROWS][PANEL];
    bool odd = false;                         // which tiles the sums of the last group are in,
    int32_t (*to)[ROWS][LANES] = sums[0][0];  // and where they go

    Product(const Weight& w, Activations x, int R)
        : w(w), x(x), R(R), padded_k(BYTES ? round_up(w.k, 16) : w.groups * w.group),
          blocks((padded_k + BLOCK - 1) / BLOCK) {}

    // 32 k of nibbles -> bytes [8][PANEL][4].
    INLINE_LAMBDA void unpack(Place at, int64_t step) {
        const int64_t k = at.block * BLOCK + step * DEPTH;
        if (k >= padded_k || (BYTES && k + DEPTH <= padded_k)) return;  // bytes are read where they are,
        const uint8_t* from = w.packed + at.panel * w.panel_bytes;
        uint8_t* to = unpacked[at.buffer][step];
        if (BYTES) {  // unless no others follow them
            memset(to, 0, STEP_BYTES);
            memcpy(to, from + k * PANEL, (padded_k - k) * PANEL);
            return;
        }
        const int64_t inside = k % (BLOCK / GROUPS);
        from += (at.block * GROUPS + step * GROUPS / STEPS) * w.group_bytes + inside / 2 * PANEL;
        UNROLL for (int i = 0; i < 4; i++) UNROLL for (int half = 0; half < 2; half++) {
            const bytes v = load<bytes>(from + (i * 2 + half) * 4 * LANES);
            prefetch(from + AHEAD + (i * 2 + half) * 4 * LANES);
            __builtin_prefetch(from + NEAR + (i * 2 + half) * 4 * LANES);
            store(to + (i * 4 + half) * 4 * LANES, low_nibbles(v));
            store(to + (i * 4 + 2 + half) * 4 * LANES, high_nibbles(v));
        }
        if (inside + DEPTH == BLOCK / GROUPS) prefetch(from + AHEAD + STEP_BYTES / 2);  // the scales
    }

    // Bytes from 0 to 15; of COMMON weights 16 (q - 8), which takes no more instructions, and of floats their levels.
    static INLINE_LAMBDA bytes low_nibbles(bytes v) {
        if (FORM == COMMON) return ((bytes)((u32s)v << 4) ^ 0x80) & 0xf0;
        return FORM == FLOATS ? fp4_levels(v & 15) - FP4_ZERO : v & 15;
    }
    static INLINE_LAMBDA bytes high_nibbles(bytes v) {
        if (FORM == COMMON) return (v ^ 0x80) & 0xf0;
        return low_nibbles((bytes)((u32s)v >> 4));
    }

    // Products of 32 k: tile 4 has activations, 5 and 6 have weights, 0 to 3 sums of two groups.
    INLINE_LAMBDA void multiply(Place at, int64_t step) {
        const int64_t k = at.block * BLOCK + step * DEPTH;
        if (k >= padded_k) return;
        const uint8_t* weights = unpacked[at.buffer][step];
        if (BYTES && k + DEPTH <= padded_k) {
            weights = w.packed + at.panel * w.panel_bytes + k * PANEL;
            UNROLL for (int i = 0; i < STEP_BYTES; i += 64) prefetch(weights + AHEAD + i);
        }
        const bool begins = step % (STEPS / GROUPS) == 0;
        if (begins) odd = !odd;
        _tile_loadd(4, x.q + k * R, DEPTH);
        _tile_loadd(5, weights, 4 * PANEL);
        _tile_loadd(6, weights + 4 * LANES, 4 * PANEL);
        if (odd) {
            if (begins) {
                _tile_zero(2);
                _tile_zero(3);
            }
            if (SIGNED) {
                _tile_dpbssd(2, 4, 5);
                _tile_dpbssd(3, 4, 6);
            } else {
                _tile_dpbsud(2, 4, 5);
                _tile_dpbsud(3, 4, 6);
            }
        } else {
            if (begins) {
                _tile_zero(0);
                _tile_zero(1);
            }
            if (SIGNED) {
                _tile_dpbssd(0, 4, 5);
                _tile_dpbssd(1, 4, 6);
            } else {
                _tile_dpbsud(0, 4, 5);
                _tile_dpbsud(1, 4, 6);
            }
        }
        if (begins) {
            store_sums(!odd);
            to = sums[at.buffer][step * GROUPS / STEPS];
        }
    }

    // Of the group before: products take a while until they are ready.
    INLINE_LAMBDA void store_sums(bool odd) {
        if (odd) {
            _tile_stored(2, to[0], 4 * LANES);
            _tile_stored(3, to[1], 4 * LANES);
        } else {
            _tile_stored(0, to[0], 4 * LANES);
            _tile_stored(1, to[1], 4 * LANES);
        }
    }

    // Scaled sums of `count` groups, for half the columns of some rows.
    INLINE_LAMBDA void add(Place at, int half, Range rows, int64_t count) {
        const Type scale_type = SIGNED ? BF16 : w.scale_type;
        const int64_t zero = SIGNED ? 0 : BYTES ? 128 : w.zero, column = half * LANES;
        const int64_t first = at.block * GROUPS;  // group
        f32s scale[GROUPS], zeros[GROUPS];
        UNROLL for (int i = 0; i < count; i++) {
            const uint8_t* group = w.packed + at.panel * w.panel_bytes + (first + i) * w.group_bytes;
            const uint8_t* scales_at = group + BLOCK / GROUPS / 2 * PANEL;
            const uint8_t* zeros_at = scales_at + PANEL * size_of(scale_type);
            scale[i] = all(1.0f);
            if (FORM == INT8_GROUPED)
                scale[i] = load_lanes({w.scales, scale_type}, (at.panel * w.groups + first + i) * PANEL + column);
            if (!BYTES) scale[i] = load_lanes({scales_at, scale_type}, column);
            if (FORM == COMMON) scale[i] *= 1.0f / 16;
            if (zero == ZERO_BYTES) zeros[i] = (f32s)widen(load<u8s>(zeros_at + column));
            if (zero == ZERO_FLOATS) zeros[i] = load<f32s>(zeros_at + 4 * column) * scale[i];
        }
        for (int64_t r = rows.begin; r < rows.end; r++) {
            const int32_t* start = x.start + first * R + r;
            const float* x_scale = x.scale + first * R + r;
            f32s total = at.block ? load<f32s>(y[r] + column) : f32s{};
            UNROLL for (int i = 0; i < count; i++) {
                i32s sum = load<i32s>(sums[at.buffer][i][half][r]);
                if (zero > 0) sum += start[i * R];
                if (zero == ZERO_BYTES) sum += (i32s)zeros[i] * start[i * R];
                if (zero == ZERO_FLOATS) total += zeros[i] * (x_scale[i * R] * (float)start[i * R]);
                total += to_f32(sum) * (scale[i] * x_scale[i * R]);
            }
            store(y[r] + column, total);
        }
    }

    void finish(int64_t panel, Vector bias, Type type, char* const* out) const {
        for (int64_t first = 0; first < PANEL; first += LANES) {
            const int64_t column = panel * PANEL + first, count = w.n - column;
            if (count <= 0) break;
            const f32s scale = FORM == INT8 ? load_lanes({w.scales, F32}, column, count) : all(1.0f);
            const f32s add = bias.data ? load_lanes(bias, column, count) : f32s{};
            for (int r = 0; r < R; r++)
                store_lanes(out[r], type, column, load<f32s>(y[r] + first) * scale + add, count);
        }
    }

    __attribute__((noinline)) void run(int64_t begin, int64_t end, Vector bias, Type type, char* const* out) {
        const uint8_t rows = R, depth = DEPTH / 4;
        const TileSizes tiles({rows, rows, rows, rows, rows, depth, depth, 0}, {64, 64, 64, 64, DEPTH, 64, 64, 0});
        Place next = {begin, 0, false}, now = {end, 0, false}, last = now;
        while (next.panel < end || now.panel < end || last.panel < end) {
            const int64_t groups = smaller(GROUPS, w.groups - last.block * GROUPS);
            UNROLL for (int64_t step = 0; step < STEPS; step++) {
                if (now.panel < end)
                    multiply(now, step);
                else if (step == 0)
                    store_sums(odd);
                if (next.panel < end) unpack(next, step);
                if (last.panel < end) {  // a quarter of them: half the rows, half the columns
                    const Range rows = step / 2 ? Range{R / 2, R} : Range{0, R / 2};
                    groups == GROUPS ? add(last, step % 2, rows, GROUPS) : add(last, step % 2, rows, groups);
                }
            }
            if (last.panel < end && last.block == blocks - 1) finish(last.panel, bias, type, out);
            last = now, now = next;
            next.buffer = !next.buffer;
            if (++next.block == blocks) next.panel++, next.block = 0;
        }
    }
};

void linear_quantized(const Weight& w, Activations x, int R, int64_t begin, int64_t end, Vector bias, Type type,
                      char* const* y) {
    const auto multiply = [&]<Form FORM, int GROUPS>() INLINE_LAMBDA {
        Product<FORM, GROUPS>(w, x, R).run(begin, end, bias, type, y);
    };
    const auto by_group = [&]<Form FORM>() INLINE_LAMBDA {
        w.group == 32   ? multiply.template operator()<FORM, 4>()
        : w.group == 64 ? multiply.template operator()<FORM, 2>()
                        : multiply.template operator()<FORM, 1>();
    };
    if (w.bits == 8)
        w.grouped ? by_group.template operator()<INT8_GROUPED>() : multiply.template operator()<INT8, 1>();
    else if (w.zero == FP4)
        multiply.template operator()<FLOATS, 4>();
    else if (w.zero == 8 && w.group == 32 && w.scale_type == BF16)
        multiply.template operator()<COMMON, 4>();
    else
        by_group.template operator()<INT4>();
}

}  // namespace
}  // namespace brisk

extern "C" __attribute__((visibility("hidden"))) const brisk::LinearKernels brisk_linear_tiles = {
    brisk::ROWS, brisk::quantize<brisk::DEPTH>, brisk::linear_quantized, 0, nullptr};
#endif
