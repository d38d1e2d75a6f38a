// Linear layers of int8 and int4 weights on CPUs, for any number of rows.

#include "cpu_linear.h"

namespace brisk {
namespace {

#if AVX512
constexpr int TILE_ROWS = 8;  // x 2 halves of a panel: 16 of the 32 registers hold sums
#elif AVX2
constexpr int TILE_ROWS = 5;  // x half a panel: 10 of the 16 registers hold sums
#else
constexpr int TILE_ROWS = 1;
#endif
constexpr int VECTORS = PANEL / LANES;  // a panel's rows are those of so many vectors

// Sums + weights of LANES rows by 4 k, times 4 activations; the weights are meant less 128.
INLINE i32s dot_int8(i32s sums, bytes w, int32_t x) {
#if AVX512
    return (i32s)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));  // less 128: see quantize
#elif AVX2
    // maddubs adds pairs in 16 bits: |w| a stays in them, (w + 128) a would not.
    __m256i less = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8(-128));
    __m256i a = _mm256_sign_epi8(_mm256_set1_epi32(x), less);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(less), a);
    return sums + (i32s)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int j = 0; j < 4; j++)
        sums += ((i32s)((u32s)w >> (8 * j) & 255) - 128) * (int32_t)(int8_t)((uint32_t)x >> (8 * j));
    return sums;
#endif
}

// The same for weights from 0 to 15. On AVX2 a lane of 16 bits adds up 16 of 32 k, starting from -zero times their sum:
// so each counts as -zero * q and then as (w - zero) * q: with zeros from 0 to 16 never more than 16 * 16 * 127 in all.
// The levels of 4-bit floats go up to 24, but their zero is 12.
#if AVX2
typedef int16_t Sums4 __attribute__((vector_size(32)));
INLINE Sums4 dot_int4(Sums4 sums, bytes w, int32_t x) {
    sums += (Sums4)_mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
    keep_in_register(sums);  // otherwise GCC puts off all sums, and runs out of registers
    return sums;
}
INLINE i32s total_of(Sums4 sums) { return (i32s)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
INLINE int32_t total_of(int32_t start) { return (int16_t)start + (start >> 16); }
INLINE Sums4 start_from(int32_t start) { return (Sums4)_mm256_set1_epi32(start); }
INLINE Sums4 start_from(int32_t start, i32s zeros) { return (Sums4)(zeros | zeros << 16) * start_from(start); }
#else
typedef i32s Sums4;
INLINE Sums4 dot_int4(Sums4 sums, bytes w, int32_t x) {
#if AVX512
    return (i32s)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
#else
    for (int j = 0; j < 4; j++)
        sums += (i32s)((u32s)w >> (8 * j) & 255) * (int32_t)(int8_t)((uint32_t)x >> (8 * j));
    return sums;
#endif
}
INLINE i32s total_of(Sums4 sums) { return sums; }
INLINE int32_t total_of(int32_t start) { return start; }
INLINE Sums4 start_from(int32_t start) { return i32s{} + start; }
INLINE Sums4 start_from(int32_t start, i32s zeros) {
#if AVX512
    return (i32s)_mm512_madd_epi16((__m512i)zeros, _mm512_set1_epi32(start));  // both fit 16 bits
#else
    return zeros * start;
#endif
}
#endif

INLINE int32_t load4(const int8_t* from) {
    int32_t v;
    memcpy(&v, from, 4);
    return v;
}

// What is known of a weight at compile time.
enum Kind { INT8, INT8_GROUPED, INT4 };

// P panels [32, K] times R rows of activations -> y, without the scales of int8's rows.
template <int R, int P, bool GROUPED>
void panels_int8(const Weight& w, const uint8_t* at, int64_t panel, Activations x, f32s (&y)[P][R][VECTORS]) {
    constexpr bool FETCH = R > 2;  // with fewer, the hardware's own prefetching is as fast as memory
    constexpr int NV = AVX2 && R <= 2 ? 4 : 2;  // vectors of the panel at once
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < VECTORS; v++)
        y[p][r][v] = f32s{};
    const int64_t padded_k = round_up(w.k, 16);
    for (int64_t g = 0; g < w.groups; g++) {
        const int64_t steps = smaller(w.group, padded_k - g * w.group) / 4;
        UNROLL for (int h = 0; h < VECTORS; h += NV) {
            i32s sums[P][R][NV];
            UNROLL for (int p = 0; p < P; p++) UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++)
                sums[p][r][v] = i32s{} + x.start[r];
            for (int64_t i = 0; i < steps; i++)
                UNROLL for (int p = 0; p < P; p++) {
                    const uint8_t* from = at + p * w.panel_bytes + i * 4 * PANEL + h * 4 * LANES;
                    bytes ws[NV];
                    UNROLL for (int v = 0; v < NV; v++) ws[v] = load<bytes>(from + v * 4 * LANES);
                    if (FETCH)
                        UNROLL for (int b = 0; b < NV * 4 * LANES; b += 64) prefetch(from + AHEAD + b);
                    UNROLL for (int r = 0; r < R; r++) {
                        const int32_t a = load4(x.q + (i * R + r) * 4);
                        UNROLL for (int v = 0; v < NV; v++) sums[p][r][v] = dot_int8(sums[p][r][v], ws[v], a);
                    }
                }
            UNROLL for (int p = 0; p < P; p++) {
                f32s scale[NV];
                if constexpr (GROUPED)
                    UNROLL for (int v = 0; v < NV; v++)
                        scale[v] = load_lanes({w.scales, w.scale_type},
                                              ((panel + p) * w.groups + g) * PANEL + (h + v) * LANES);
                UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++) {
                    if constexpr (GROUPED)
                        y[p][r][h + v] += to_f32(sums[p][r][v]) * (scale[v] * x.scale[r]);
                    else
                        y[p][r][h + v] += to_f32(sums[p][r][v]) * x.scale[r];
                }
            }
        }
        at += steps * 4 * PANEL, x.q += steps * 4 * R, x.scale += R, x.start += R;
    }
}

// What is known of an int4 weight at compile time. COMMON is what quantize.py writes by default: a fifth faster so.
enum Form { ANY, COMMON, FLOATS };

// Adds to y what the groups [begin, end) of P panels give, for NV of their vectors. Not inlined: there GCC runs out of
// registers.
template <int R, int P, int NV, Form FORM>
__attribute__((noinline)) void groups_int4(const Weight& w, const uint8_t* panel, Activations x, int64_t begin,
                                           int64_t end, int first, f32s (&y)[P][R][VECTORS]) {
    const int64_t group = FORM == ANY ? w.group : 32, block = AVX2 ? 32 : group;
    const int64_t zero = FORM == ANY ? w.zero : FORM == COMMON ? 8 : FP4_ZERO;
    const Type scale_type = FORM == ANY ? w.scale_type : BF16;
    const auto levels = [](bytes nibbles) INLINE_LAMBDA {
        return FORM == FLOATS ? fp4_levels(nibbles & 15) : nibbles & 15;
    };
    constexpr bool FETCH = P == 1;  // two panels at once are fastest without
    constexpr int64_t ahead = AVX2 && R > 2 ? 8192 : AHEAD;  // arithmetic takes longer than memory: further
    f32s total[P][R][NV];
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++)
        total[p][r][v] = y[p][r][first + v];
    for (int64_t g = begin; g < end; g++)
        UNROLL for (int p = 0; p < P; p++) {
            const uint8_t* from = panel + p * w.panel_bytes + g * w.group_bytes;
            const uint8_t* at = from + first * 4 * LANES;
            const uint8_t* scales_at = from + PANEL * group / 2;
            const uint8_t* zeros_at = scales_at + PANEL * size_of(scale_type);
            const int8_t* q = x.q + g * group * R;
            const int32_t* start = x.start + g * (group / block) * R;
            if (FETCH) prefetch(scales_at + ahead);
            i32s sums[R][NV] = {};
            for (int64_t k = 0; k < group; k += block) {
                Sums4 some[R][NV];
                UNROLL for (int v = 0; v < NV; v++) {
                    const i32s zeros = zero == ZERO_BYTES ? widen(load<u8s>(zeros_at + LANES * (first + v))) : i32s{};
                    UNROLL for (int r = 0; r < R; r++)
                        some[r][v] = zero >= 0 ? start_from(start[r]) : start_from(start[r], zeros);
                }
                _Pragma("GCC unroll 4") for (int64_t i = 0; i < block; i += 8) {
                    bytes ws[NV];
                    UNROLL for (int v = 0; v < NV; v++) ws[v] = levels(load<bytes>(at + v * 4 * LANES));
                    if (FETCH)
                        UNROLL for (int b = 0; b < NV * 4 * LANES; b += 64) prefetch(at + ahead + b);
                    UNROLL for (int r = 0; r < R; r++) {
                        const int32_t even = load4(q + 4 * r);
                        UNROLL for (int v = 0; v < NV; v++) some[r][v] = dot_int4(some[r][v], ws[v], even);
                    }
                    UNROLL for (int v = 0; v < NV; v++) ws[v] = levels((bytes)(load<u32s>(at + v * 4 * LANES) >> 4));
                    UNROLL for (int r = 0; r < R; r++) {
                        const int32_t odd = load4(q + 4 * (R + r));
                        UNROLL for (int v = 0; v < NV; v++) some[r][v] = dot_int4(some[r][v], ws[v], odd);
                    }
                    at += 4 * PANEL, q += 8 * R;
                }
                UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++)
                    sums[r][v] += total_of(some[r][v]);
                if (zero == ZERO_FLOATS)
                    for (int v = 0; v < NV; v++) {
                        const f32s zeros = load<f32s>(zeros_at + 4 * LANES * (first + v)) *
                                           load_lanes({scales_at, scale_type}, LANES * (first + v));
                        for (int r = 0; r < R; r++)
                            total[p][r][v] += zeros * (x.scale[g * R + r] * (float)total_of(start[r]));
                    }
                start += R;
            }
            f32s scale[NV];  // read where it lies, after the weights: hardware prefetches what is read in order
            UNROLL for (int v = 0; v < NV; v++) scale[v] = load_lanes({scales_at, scale_type}, LANES * (first + v));
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++)
                total[p][r][v] += to_f32(sums[r][v]) * (scale[v] * x.scale[g * R + r]);
        }
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++)
        y[p][r][first + v] = total[p][r][v];
}

template <int R, int P>
void panels_int4(const Weight& w, const uint8_t* panel, Activations x, f32s (&y)[P][R][VECTORS]) {
    constexpr int NV = AVX2 && R <= 3 ? 4 : 2;  // vectors of a panel at once: their sums stay in registers
    constexpr int64_t SOME = NV == VECTORS ? 1 << 30 : 256;  // k, then the other vectors: memory is read in order
    const bool common = w.zero == 8 && w.group == 32 && w.scale_type == BF16;
    const auto add = common            ? groups_int4<R, P, NV, COMMON>
                     : w.zero == FP4 ? groups_int4<R, P, NV, FLOATS>
                                       : groups_int4<R, P, NV, ANY>;
    UNROLL for (int p = 0; p < P; p++) UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < VECTORS; v++)
        y[p][r][v] = f32s{};
    const int64_t step = SOME / w.group;
    for (int64_t g = 0; g < w.groups; g += step)
        for (int v = 0; v < VECTORS; v += NV) add(w, panel, x, g, smaller(w.groups, g + step), v, y);
}

template <Kind KIND, int R, int P>
void linear_panels(const Weight& w, Activations x, int64_t panel, Vector bias, Type type, char* const* out) {
    f32s y[P][R][VECTORS];
    const uint8_t* packed = w.packed + panel * w.panel_bytes;
    if constexpr (KIND == INT4)
        panels_int4<R, P>(w, packed, x, y);
    else
        panels_int8<R, P, KIND == INT8_GROUPED>(w, packed, panel, x, y);
    for (int i = 0; i < P * VECTORS; i++) {
        const int64_t first = panel * PANEL + LANES * i, count = w.n - first;
        if (count <= 0) break;
        f32s scale = KIND == INT8 ? load_lanes({w.scales, F32}, first, count) : all(1.0f);
        f32s add = bias.data ? load_lanes(bias, first, count) : f32s{};
        for (int r = 0; r < R; r++)
            store_lanes(out[r], type, first, y[i / VECTORS][r][i % VECTORS] * scale + add, count);
    }
}

template <Kind KIND, int R>
void linear_rows(const Weight& w, Activations x, int64_t begin, int64_t end, Vector bias, Type type,
                 char* const* out) {
    // Two panels at once are two streams from memory, and a sixth faster. Of more rows the sums fill the registers.
    constexpr int AT_ONCE = AVX2 && R <= (KIND == INT4 ? 1 : 2) ? 2 : 1;
    int64_t panel = begin;
    for (; panel + AT_ONCE <= end; panel += AT_ONCE) linear_panels<KIND, R, AT_ONCE>(w, x, panel, bias, type, out);
    for (; panel < end; panel++) linear_panels<KIND, R, 1>(w, x, panel, bias, type, out);
}

template <Kind KIND, int R>
void linear_tile(const Weight& w, Activations x, int rows, int64_t begin, int64_t end, Vector bias, Type type,
                 char* const* y) {
    if (rows == R)
        linear_rows<KIND, R>(w, x, begin, end, bias, type, y);
    else if constexpr (R < TILE_ROWS)
        linear_tile<KIND, R + 1>(w, x, rows, begin, end, bias, type, y);
}

void linear_quantized(const Weight& w, Activations x, int R, int64_t begin, int64_t end, Vector bias, Type type,
                      char* const* y) {
    const auto tile = w.bits == 4 ? linear_tile<INT4, 1> : w.grouped ? linear_tile<INT8_GROUPED, 1> : linear_tile<INT8, 1>;
    tile(w, x, R, begin, end, bias, type, y);
}

constexpr int MANY = 4;  // rows from which on tiles are faster

}  // namespace
}  // namespace brisk

#if AMX
extern "C" __attribute__((visibility("hidden"))) const brisk::LinearKernels brisk_linear_tiles;  // of cpu_linear_tiles.cpp
#endif
extern "C" __attribute__((visibility("default"))) const brisk::LinearKernels brisk_linear = {
    brisk::TILE_ROWS, brisk::quantize<4>, brisk::linear_quantized,
#if AMX
    brisk::MANY, &brisk_linear_tiles};
#else
    0, nullptr};
#endif
