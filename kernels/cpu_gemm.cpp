// Linear layers of many rows on CPUs, as a GEMM (https://doi.org/10.1145/1356052.1356053): some of the weights are
// brought into the cache in the form that products take, and stay there while all of x goes by. Products are of floats,
// or of bf16 by the tiles of AMX.

#include "cpu_tiles.h"

namespace brisk {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Of floats. x is packed as [K / DEPTH][rows / ROWS][DEPTH][ROWS], with zeros after the last row.

namespace floats {

constexpr int64_t ROWS = AVX512 ? 12 : 6, COLUMNS = AVX512 ? 32 : 16, DEPTH = 256;
constexpr int64_t MANY_BF16 = 32, MANY_QUANTIZED = 0;
constexpr int VECTORS = 2;  // of columns at once: with all ROWS, as many as there are registers for

int64_t columns(int64_t) { return COLUMNS; }
int64_t packed_bytes(int64_t rows, int64_t k) { return round_up(rows, ROWS) * k * 4; }
int64_t scratch_bytes(int64_t rows) { return (DEPTH + round_up(rows, ROWS)) * COLUMNS * 4; }

void pack(const uint16_t* x, const int64_t* from, int64_t k, int64_t rows, int64_t row, void* packed) {
    const int64_t padded = round_up(rows, ROWS);
    for (int64_t first = 0; first < k; first += DEPTH) {
        const int64_t depth = smaller(DEPTH, k - first);
        float* tile = (float*)packed + first * padded + row * depth;
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t i = 0; i < depth; i += LANES) {
                f32s v = {};
                if (row + r < rows) v = load_lanes({x, BF16}, from[row + r] * k + first + i, depth - i);
                for (int64_t j = 0; j < smaller(LANES, depth - i); j++) tile[(i + j) * ROWS + r] = v[j];
            }
    }
}

// `count` rows of w, `depth` k from w on -> floats [depth][COLUMNS], zeros after the last row.
INLINE void take(const uint16_t* w, int64_t k, int64_t count, int64_t depth, float* panel) {
    for (int64_t i = 0; i < depth; i += LANES)
        for (int64_t first = 0; first < COLUMNS; first += LANES) {
            f32s v[LANES];
            UNROLL for (int j = 0; j < LANES; j++)
                v[j] = first + j < count ? load_lanes({w, BF16}, (first + j) * k + i, depth - i) : f32s{};
            transpose(v);
            for (int j = 0; j < smaller(LANES, depth - i); j++) store(panel + (i + j) * COLUMNS + first, v[j]);
        }
}

// sums [ROWS, COLUMNS] += a tile times a panel.
INLINE void product(const float* tile, const float* panel, int64_t depth, float* sums) {
    for (int64_t column = 0; column < COLUMNS; column += VECTORS * LANES) {
        f32s s[ROWS][VECTORS];
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int j = 0; j < VECTORS; j++)
            s[r][j] = load<f32s>(sums + r * COLUMNS + column + j * LANES);
        for (int64_t i = 0; i < depth; i++) {
            f32s w[VECTORS];
            UNROLL for (int j = 0; j < VECTORS; j++) w[j] = load<f32s>(panel + i * COLUMNS + column + j * LANES);
            UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int j = 0; j < VECTORS; j++)
                s[r][j] += w[j] * tile[i * ROWS + r];
        }
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int j = 0; j < VECTORS; j++)
            store(sums + r * COLUMNS + column + j * LANES, s[r][j]);
    }
}

void multiply(const Weight& w, const void* packed, int64_t rows, int64_t begin, int64_t end, Vector bias,
              char* const* y, void* scratch) {
    float *panel = (float*)scratch, *sums = panel + DEPTH * COLUMNS;
    const int64_t count = end - begin, padded = round_up(rows, ROWS);
    memset(sums, 0, padded * COLUMNS * sizeof(float));
    for (int64_t first = 0; first < w.k; first += DEPTH) {
        const int64_t depth = smaller(DEPTH, w.k - first);
        take((const uint16_t*)w.packed + begin * w.k + first, w.k, count, depth, panel);
        for (int64_t row = 0; row < rows; row += ROWS)
            product((const float*)packed + first * padded + row * depth, panel, depth, sums + row * COLUMNS);
    }
    for (int64_t i = 0; i < count; i += LANES) {
        const f32s add = bias.data ? load_lanes(bias, begin + i, count - i) : f32s{};
        for (int64_t row = 0; row < rows; row++)
            store_lanes(y[row], BF16, begin + i, load<f32s>(sums + row * COLUMNS + i) + add, count - i);
    }
}

}  // namespace floats

// ---------------------------------------------------------------------------------------------------------------------
// Of bf16, by tiles. x is packed as [K / DEPTH][rows / ROWS][DEPTH / 2][ROWS][2], with zeros after the last row and
// after K.

#if AMX
namespace tiles {

constexpr int64_t ROWS = Tiles::WIDTH, DEPTH = 256;
constexpr int64_t MANY_BF16 = 7, MANY_QUANTIZED = 64, CACHE_LINE = 64;
static_assert(PANEL == 32);

// x comes from the second level cache, or of many rows from the third: there all of it goes by fewer times.
int64_t columns(int64_t rows) { return rows <= 2 * ROWS ? PANEL : 8 * PANEL; }
int64_t packed_bytes(int64_t rows, int64_t k) { return round_up(rows, ROWS) * round_up(k, 32) * 2; }
int64_t scratch_bytes(int64_t rows) { return columns(rows) * (DEPTH * 2 + round_up(rows, ROWS) * 4); }

// The numbers [k, k + 32) of a row of K.
INLINE f32s pairs_from(const uint16_t* row, int64_t k, int64_t K) {
    if (k + 2 * LANES <= K) return load<f32s>(row + k);
    uint16_t last[2 * LANES] = {};
    if (k < K) memcpy(last, row + k, 2 * (K - k));
    return load<f32s>(last);
}

void pack(const uint16_t* x, const int64_t* from, int64_t k, int64_t rows, int64_t row, void* packed) {
    const int64_t padded = round_up(rows, ROWS), padded_k = round_up(k, 32);
    for (int64_t first = 0; first < padded_k; first += DEPTH) {
        const int64_t depth = smaller(DEPTH, padded_k - first);
        uint16_t* tile = (uint16_t*)packed + first * padded + row * depth;
        for (int64_t i = 0; i < depth; i += 2 * LANES)
            for (int64_t r = 0; r < ROWS; r += LANES) {
                f32s v[LANES];
                for (int64_t j = 0; j < LANES; j++) {
                    v[j] = f32s{};
                    if (row + r + j < rows) v[j] = pairs_from(x + from[row + r + j] * k, first + i, k);
                }
                transpose(v);
                UNROLL for (int j = 0; j < LANES; j++) store(tile + i * ROWS + (j * ROWS + r) * 2, v[j]);
            }
    }
}

// Half a panel, 16 rows of a quantized weight, the 32 k from k on -> pairs of bf16, in the lanes of a row.
INLINE void floats_of(const Weight& w, int64_t panel, int64_t row, int64_t k, f32s (&pairs)[LANES]) {
    const auto pair = [](f32s even, f32s odd) INLINE_LAMBDA {  // rounded; what is halfway goes up
        return (f32s)(((u32s)even + 0x8000) >> 16 | (((u32s)odd + 0x8000) & 0xffff0000u));
    };
    const uint8_t* at = w.packed + panel * w.panel_bytes;
    const int64_t group = k / w.group;
    if (w.bits == 8) {
        f32s scale = all(1.0f);
        if (w.grouped) scale = load_lanes({w.scales, w.scale_type}, (panel * w.groups + group) * PANEL + row);
        at += k * PANEL + row * 4;
        const int64_t steps = smaller(8, (round_up(w.k, 16) - k) / 4);
        for (int64_t i = 0; i < 8; i++) {
            i32s v = {};
            if (i < steps) v = load<i32s>(at + i * 4 * PANEL) ^ (int32_t)0x80808080;
            const auto number = [&](int j) INLINE_LAMBDA { return to_f32((v << (24 - 8 * j)) >> 24) * scale; };
            pairs[2 * i] = pair(number(0), number(1)), pairs[2 * i + 1] = pair(number(2), number(3));
        }
        return;
    }
    static constexpr float LEVELS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static constexpr float FLOATS[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6};
    at += group * w.group_bytes;
    const uint8_t* scales_at = at + PANEL * w.group / 2;
    const uint8_t* zeros_at = scales_at + PANEL * size_of(w.scale_type);
    const f32s table = load<f32s>(w.zero == FP4 ? FLOATS : LEVELS);
    const f32s scale = load_lanes({scales_at, w.scale_type}, row);
    const f32s zero = w.zero == ZERO_BYTES    ? to_f32(widen(load<u8s>(zeros_at + row)))
                      : w.zero == ZERO_FLOATS ? load<f32s>(zeros_at + 4 * row)
                      : w.zero == FP4         ? f32s{}
                                              : all(w.zero);
    const f32s start = zero * scale;
    at += (k % w.group) / 2 * PANEL + row * 4;
    for (int64_t i = 0; i < 4; i++) {
        const u32s v = load<u32s>(at + i * 4 * PANEL);
        UNROLL for (int j = 0; j < 4; j++) {
            const auto number = [&](u32s nibble) INLINE_LAMBDA {  // the instruction looks at the low 4 bits only
                return (f32s)_mm512_permutexvar_ps((__m512i)nibble, (__m512)table) * scale - start;
            };
            pairs[4 * i + j] = pair(number(v >> (8 * j)), number(v >> (8 * j + 4)));
        }
    }
}

// A panel of rows of w, `depth` k from `first` on -> bf16 [PANEL][DEPTH], zeros after the last row and after K.
void take(const Weight& w, int64_t panel, int64_t first, int64_t depth, uint16_t* to) {
    if (w.bits != 16) {
        for (int64_t k = 0; k < depth; k += 32)
            for (int64_t row = 0; row < PANEL; row += LANES) {
                f32s pairs[LANES];
                floats_of(w, panel, row, first + k, pairs);
                transpose(pairs);
                UNROLL for (int i = 0; i < LANES; i++) store(to + (row + i) * DEPTH + k, pairs[i]);
            }
        return;
    }
    for (int64_t r = 0; r < PANEL; r++) {
        const uint16_t* row = (const uint16_t*)w.packed + (panel * PANEL + r) * w.k;
        const int64_t length = panel * PANEL + r < w.n ? w.k : 0;
        for (int64_t k = 0; k < depth; k += 2 * LANES) store(to + r * DEPTH + k, pairs_from(row, first + k, length));
    }
}

// The cache lines of a panel's numbers [k, k + depth), to be fetched while others are worked on.
struct Lines {
    const char* from;
    int64_t count, row_lines, row_bytes;

    Lines(const Weight& w, int64_t panel, int64_t k, int64_t depth) {
        const int64_t bits = w.bits == 4 ? w.group_bytes * 8 / w.group : PANEL * w.bits;  // of all rows at one k
        count = depth * bits / 8 / CACHE_LINE;
        if (w.bits == 16) {  // rows that lie apart
            from = (const char*)w.packed + 2 * (panel * PANEL * w.k + k);
            row_lines = depth * 2 / CACHE_LINE, row_bytes = 2 * w.k;
        } else {
            from = (const char*)w.packed + panel * w.panel_bytes + k * bits / 8;
            row_lines = count, row_bytes = 0;
        }
    }
    void fetch(int64_t begin, int64_t end) const {
        for (int64_t i = begin; i < end; i++) prefetch(from + i / row_lines * row_bytes + i % row_lines * CACHE_LINE);
    }
};

void multiply(const Weight& w, const void* packed, int64_t rows, int64_t begin, int64_t end, Vector bias,
              char* const* y, void* scratch) {
    const int64_t panels = (end - begin + PANEL - 1) / PANEL, panel = begin / PANEL;
    const int64_t padded = round_up(rows, ROWS), padded_k = round_up(w.k, 32);
    uint16_t* weights = (uint16_t*)scratch;
    float* sums = (float*)(weights + panels * PANEL * DEPTH);  // [rows / ROWS][panels][PANEL][ROWS]
    // Of few rows, the panels are read where they are.
    const bool in_place = w.bits == 16 && rows <= ROWS && w.k == padded_k && end == (panel + panels) * PANEL;
    const Tiles tiles;
    for (int64_t first = 0; first < padded_k; first += DEPTH) {
        const int64_t depth = smaller(DEPTH, padded_k - first), row_steps = depth / 32;
        const int64_t steps = padded / ROWS * row_steps;
        if (!in_place)
            for (int64_t p = 0; p < panels; p++) take(w, panel + p, first, depth, weights + p * PANEL * DEPTH);
        for (int64_t row = 0; row < rows; row += ROWS) {
            const uint16_t* x = (const uint16_t*)packed + first * padded + row * depth;
            for (int64_t p = 0; p < panels; p++) {
                const uint16_t* from = weights + p * PANEL * DEPTH;
                if (in_place) from = (const uint16_t*)w.packed + (panel + p) * PANEL * w.k + first;
                // What comes next of these rows of w, or of those after them.
                const bool last = first + depth >= w.k;
                const Lines next(w, panel + p + (last ? panels : 0), last ? 0 : first + depth, depth);
                float* to = sums + (row * panels + p * ROWS) * PANEL;
                if (first)
                    tiles.load_sums(to);
                else
                    tiles.clear_sums();
                for (int64_t k = 0; k < depth; k += 32) {
                    tiles.multiply(from + k, in_place ? w.k : DEPTH, x + k * ROWS);
                    const int64_t step = row / ROWS * row_steps + k / 32;
                    next.fetch(step * next.count / steps, (step + 1) * next.count / steps);
                }
                tiles.store_sums(to);
            }
        }
    }
    const bool scaled = w.bits == 8 && !w.grouped;
    for (int64_t column = begin; column < end; column += LANES) {
        const int64_t count = smaller(LANES, end - column), p = (column - begin) / PANEL;
        const f32s scale = scaled ? load_lanes({w.scales, F32}, column, count) : all(1.0f);
        const f32s add = bias.data ? load_lanes(bias, column, count) : f32s{};
        for (int64_t row = 0; row < rows; row += LANES) {
            const float* from = sums + (row / ROWS * ROWS * panels + p * ROWS) * PANEL + row % ROWS;
            f32s v[LANES];
            UNROLL for (int i = 0; i < LANES; i++) v[i] = load<f32s>(from + ((column - begin) % PANEL + i) * ROWS);
            transpose(v);
            for (int64_t i = 0; i < smaller(LANES, rows - row); i++)
                store_lanes(y[row + i], BF16, column, v[i] * scale + add, count);
        }
    }
}

}  // namespace tiles
#endif

}  // namespace
}  // namespace brisk

#define KERNELS(name)                                                                                      \
    {brisk::name::MANY_BF16, brisk::name::MANY_QUANTIZED, brisk::name::ROWS, brisk::name::columns,         \
     brisk::name::packed_bytes, brisk::name::scratch_bytes, brisk::name::pack, brisk::name::multiply}
extern "C" __attribute__((visibility("default"))) const brisk::GemmKernels brisk_gemm_floats = KERNELS(floats);
#if AMX
extern "C" __attribute__((visibility("default"))) const brisk::GemmKernels brisk_gemm_tiles = KERNELS(tiles);
#endif
