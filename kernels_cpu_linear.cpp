// Linear layers of kernels.py on CPUs: int8 and int4 for any number of rows, bf16.

#include "kernels_cpu_vector.h"

namespace brisk {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Quantized activations

void quantize(const Weight& w, Vector x, int64_t row, int64_t begin, int64_t end, int R, int r, Activations to) {
    // dpbusd wants unsigned weights: int8 ones have a zero of 128 there.
    const int32_t zero = w.bits == 8 ? (AVX512 ? 128 : 0) : w.zero >= 0 ? w.zero : 1;
    for (int64_t g = begin; g < end; g++) {
        const int64_t first = g * w.group, count = smaller(w.group, round_up(w.k, 16) - first);
        float values[ACT_GROUP];
        i32s most = {};
        for (int64_t k = 0; k < count; k += LANES) {
            f32s v = load_lanes(x, row * w.k + first + k, w.k - first - k);
            store(values + k, v);
            i32s magnitude = (i32s)v & 0x7fffffff;  // as integers floats order alike, and NaN is the largest
            most = larger(most, magnitude);
        }
        const int32_t largest = max_lanes(most);
        float amax;
        memcpy(&amax, &largest, 4);
        const bool tiny = amax < 1e-36f;  // 127 / amax must not overflow
        const float scale = tiny ? 0.0f : amax / 127.0f, inverse = tiny ? 0.0f : 127.0f / amax;
        i32s sum = {};
        for (int64_t k = 0; k < (w.bits == 8 ? count : w.group); k += 16) {
            int8_t in_order[16] = {};
            if (k < count)
                for (int i = 0; i < 16; i += LANES) {
                    f32s scaled = load<f32s>(values + k + i) * inverse;
                    asm("" : "+m"(scaled));  // a fused multiply-add would round ties another way than other processors
                    i32s q = (i32s)(scaled + MAGIC) - 0x4b400000;
                    sum += q;
                    store(in_order + i, to_i8(q));
                }
            typedef int8_t i8x16 __attribute__((vector_size(16)));
            i8x16 q = load<i8x16>(in_order);
            if (w.bits == 4)  // the low nibbles of 4 bytes are k 0 2 4 6, the high ones 1 3 5 7
                q = __builtin_shufflevector(q, q, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
            for (int j = 0; j < 4; j++) memcpy(to.q + (((first + k) / 4 + j) * R + r) * 4, (int8_t*)&q + 4 * j, 4);
        }
        to.scale[g * R + r] = scale;
        to.start[g * R + r] = -zero * sum_lanes(sum);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Quantized linear

#if AVX512
constexpr int TILE_ROWS = 8;  // x 2 halves of a panel: 16 of the 32 registers hold sums
#elif AVX2
constexpr int TILE_ROWS = 4;  // x half a panel: 8 of the 16 registers hold sums
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

// The same for weights from 0 to 15, which AVX2 adds up in 16 bits: that is enough for 32 k.
#if AVX2
typedef int16_t Sums4 __attribute__((vector_size(32)));
INLINE Sums4 dot_int4(Sums4 sums, bytes w, int32_t x) {
    sums += (Sums4)_mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
    asm("" : "+x"(sums));  // otherwise GCC puts off all sums, and runs out of registers
    return sums;
}
INLINE i32s add_pairs(Sums4 sums) { return (i32s)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
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
#endif

// Zeros times the (negative) sum of a group's activations: both fit 16 bits.
INLINE i32s zeros_times(i32s zeros, int32_t sum) {
#if AVX512
    return (i32s)_mm512_madd_epi16((__m512i)zeros, _mm512_set1_epi32(sum));
#else
    return zeros * sum;
#endif
}

INLINE int32_t load4(const int8_t* from) {
    int32_t v;
    memcpy(&v, from, 4);
    return v;
}

constexpr int64_t AHEAD = AVX512 ? 6144 : 2048;  // bytes

template <int BITS, int R>
void panel_times_rows(const Weight& w, const uint8_t* at, Activations x, f32s (&y)[R][VECTORS]) {
    // At one or two rows of int8 the hardware's own prefetching is as fast as memory, and more than that disturbs it.
    constexpr bool FETCH = BITS == 4 || R > 2;
    constexpr int NV = AVX2 && BITS == 8 && R <= 2 ? 4 : 2;  // vectors of the panel at once
    f32s total[R][VECTORS] = {};
    const int64_t padded_k = round_up(w.k, 16);
    for (int64_t g = 0; g < w.groups; g++) {
        const float* scale = x.scale + g * R;
        const int32_t* start = x.start + g * R;
        if constexpr (BITS == 8) {
            const int64_t steps = smaller(w.group, padded_k - g * w.group) / 4;
            UNROLL for (int h = 0; h < VECTORS; h += NV) {
                i32s sums[R][NV];
                UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++) sums[r][v] = i32s{} + start[r];
                for (int64_t i = 0; i < steps; i++) {
                    const uint8_t* from = at + i * 4 * PANEL + h * 4 * LANES;
                    bytes ws[NV];
                    UNROLL for (int v = 0; v < NV; v++) ws[v] = load<bytes>(from + v * 4 * LANES);
                    if (FETCH)
                        UNROLL for (int b = 0; b < NV * 4 * LANES; b += 64) prefetch(from + AHEAD + b);
                    UNROLL for (int r = 0; r < R; r++) {
                        const int32_t a = load4(x.q + (i * R + r) * 4);
                        UNROLL for (int v = 0; v < NV; v++) sums[r][v] = dot_int8(sums[r][v], ws[v], a);
                    }
                }
                UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++)
                    total[r][h + v] += to_f32(sums[r][v]) * scale[r];
            }
            at += steps * 4 * PANEL, x.q += steps * 4 * R;
        } else {
            const uint8_t* beyond = at + PANEL * w.group / 2;  // scales, then zeros
            const uint8_t* zeros_at = beyond + PANEL * size_of(w.scale_type);
            if (FETCH) prefetch(beyond + AHEAD);
            UNROLL for (int h = 0; h < VECTORS; h += NV) {
                f32s w_scale[NV];
                i32s sums[R][NV];
                UNROLL for (int v = 0; v < NV; v++) w_scale[v] = load_lanes({beyond, w.scale_type}, LANES * (h + v));
                UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++) {
                    if (w.zero == ZERO_BYTES)
                        sums[r][v] = zeros_times(widen(load<u8s>(zeros_at + LANES * (h + v))), start[r]);
                    else
                        sums[r][v] = i32s{} + (w.zero == ZERO_FLOATS ? 0 : start[r]);
                }
                const auto add = [&](auto& to, int64_t i) INLINE_LAMBDA {
                    const uint8_t* from = at + i * 4 * PANEL + h * 4 * LANES;
                    const int8_t* q = x.q + i * 8 * R;
                    bytes ws[NV];
                    UNROLL for (int v = 0; v < NV; v++) ws[v] = load<bytes>(from + v * 4 * LANES);
                    if (FETCH)
                        UNROLL for (int b = 0; b < NV * 4 * LANES; b += 64) prefetch(from + AHEAD + b);
                    bytes low[NV], high[NV];
                    UNROLL for (int v = 0; v < NV; v++) low[v] = ws[v] & 15, high[v] = (bytes)((u32s)ws[v] >> 4) & 15;
                    UNROLL for (int r = 0; r < R; r++) {
                        const int32_t even = load4(q + 4 * r), odd = load4(q + 4 * (R + r));
                        UNROLL for (int v = 0; v < NV; v++) to[r][v] = dot_int4(to[r][v], low[v], even);
                        UNROLL for (int v = 0; v < NV; v++) to[r][v] = dot_int4(to[r][v], high[v], odd);
                    }
                };
#if AVX2
                for (int64_t i = 0; i < w.group / 8; i += 4) {
                    Sums4 some[R][NV] = {};
                    UNROLL for (int j = 0; j < 4; j++) add(some, i + j);
                    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++)
                        sums[r][v] += add_pairs(some[r][v]);
                }
#else
                for (int64_t i = 0; i < w.group / 8; i++) add(sums, i);
#endif
                UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++)
                    total[r][h + v] += to_f32(sums[r][v]) * (w_scale[v] * scale[r]);
                if (w.zero == ZERO_FLOATS)
                    for (int r = 0; r < R; r++)
                        for (int v = 0; v < NV; v++)
                            total[r][h + v] += load<f32s>(zeros_at + 4 * LANES * (h + v)) * w_scale[v] *
                                               (scale[r] * (float)start[r]);
            }
            at += w.group_bytes, x.q += w.group * R;
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < VECTORS; v++) y[r][v] = total[r][v];
}

template <int BITS, int R>
void linear_rows(const Weight& w, Activations x, int64_t begin, int64_t end, Vector bias, Type type, void* out) {
    for (int64_t panel = begin; panel < end; panel++) {
        f32s y[R][VECTORS];
        panel_times_rows<BITS, R>(w, w.packed + panel * w.panel_bytes, x, y);
        for (int v = 0; v < VECTORS; v++) {
            const int64_t first = panel * PANEL + LANES * v, count = w.n - first;
            if (count <= 0) break;
            f32s scale = BITS == 8 ? load_lanes({w.scales, F32}, first, count) : all(1.0f);
            f32s add = bias.data ? load_lanes(bias, first, count) : f32s{};
            for (int r = 0; r < R; r++) store_lanes(out, type, r * w.n + first, y[r][v] * scale + add, count);
        }
    }
}

template <int BITS, int R>
void linear_tile(const Weight& w, Activations x, int rows, int64_t begin, int64_t end, Vector bias, Type type,
                 void* y) {
    if (rows == R)
        linear_rows<BITS, R>(w, x, begin, end, bias, type, y);
    else if constexpr (R < TILE_ROWS)
        linear_tile<BITS, R + 1>(w, x, rows, begin, end, bias, type, y);
}

void linear_quantized(const Weight& w, Activations x, int R, int64_t begin, int64_t end, Vector bias, Type type,
                      void* y) {
    if (w.bits == 8)
        linear_tile<8, 1>(w, x, R, begin, end, bias, type, y);
    else
        linear_tile<4, 1>(w, x, R, begin, end, bias, type, y);
}

// ---------------------------------------------------------------------------------------------------------------------
// bf16 linear

constexpr int BF16_ROWS = 6, STEP = 2 * LANES;  // rows of x at once, k at once
#if AVX512
constexpr bool BF16_PRODUCTS = true;
typedef uint16_t Activation;
typedef __m512bh Part;
INLINE Part weights(const uint16_t* w) { return (__m512bh)_mm512_loadu_si512(w); }
INLINE Part part(const uint16_t* x) { return weights(x); }
INLINE Part weights(const uint16_t* w, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), w);
}
INLINE Part part(const uint16_t* x, int64_t count) { return weights(x, count); }
INLINE f32s multiply_add(f32s sum, Part w, Part x) { return (f32s)_mm512_dpbf16_ps((__m512)sum, w, x); }
#else
constexpr bool BF16_PRODUCTS = false;
typedef float Activation;
typedef Pairs Part;
INLINE Part weights(const uint16_t* w) { return pairs_of(w); }
INLINE Part weights(const uint16_t* w, int64_t count) {
    uint16_t padded[STEP] = {};
    memcpy(padded, w, count * 2);
    return pairs_of(padded);
}
INLINE Part part(const float* x) { return {load<f32s>(x), load<f32s>(x + LANES)}; }
INLINE Part part(const float* x, int64_t) { return part(x); }  // padded with zeros
INLINE f32s multiply_add(f32s sum, Part w, Part x) { return sum + w.even * x.even + w.odd * x.odd; }
#endif

void to_floats(const uint16_t* x, int64_t count, int64_t padded, float* to) {
    for (int64_t i = 0; i < padded; i += STEP) {
        const Pairs p = split(load_lanes({x, BF16}, i, count - i), load_lanes({x, BF16}, i + LANES, count - i - LANES));
        store(to + i, p.even), store(to + i + LANES, p.odd);
    }
}

// NW rows of w times R rows of x: w is read once from memory and each value used R times. y is [R, 16].
template <int NW, int R>
void bf16_tile(const uint16_t* w, int64_t k, const Activation* x, int64_t stride, float* y) {
    f32s sums[R][NW] = {};
    int64_t i = 0;
    for (; i + STEP <= k; i += STEP) {
        // What is needed later lies further in these rows, or at the beginning of those after them.
        const int64_t ahead = i + AHEAD / 2 < k ? i + AHEAD / 2 : i + AHEAD / 2 + (NW - 1) * k;
        Part ws[NW];
        UNROLL for (int j = 0; j < NW; j++) {
            ws[j] = weights(w + j * k + i);
            prefetch(w + j * k + ahead);
        }
        UNROLL for (int r = 0; r < R; r++) {
            Part xs = part(x + r * stride + i);
            UNROLL for (int j = 0; j < NW; j++) sums[r][j] = multiply_add(sums[r][j], ws[j], xs);
        }
    }
    if (i < k)
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < NW; j++)
            sums[r][j] = multiply_add(sums[r][j], weights(w + j * k + i, k - i), part(x + r * stride + i, k - i));
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < NW; j++) y[r * 16 + j] = sum_lanes(sums[r][j]);
}

template <int R>
void bf16_rows(const uint16_t* w, int64_t n, int64_t k, const Activation* x, int64_t stride, int64_t begin, int64_t end,
               Vector bias, void* out) {
    constexpr int NW = AVX512 ? (R <= 2 ? 8 : 4) : (R == 1 ? 4 : 2);  // as many as there are registers for
    for (int64_t first = begin; first < end; first += 16) {
        const int64_t count = smaller(16, end - first);
        float y[R * 16] = {};
        int64_t j = 0;
        for (; j + NW <= count; j += NW) bf16_tile<NW, R>(w + (first + j) * k, k, x, stride, y + j);
        for (; j < count; j++) bf16_tile<1, R>(w + (first + j) * k, k, x, stride, y + j);
        for (int64_t i = 0; i < count; i += LANES) {
            const f32s add = bias.data ? load_lanes(bias, first + i, count - i) : f32s{};
            for (int r = 0; r < R; r++)
                store_lanes(out, BF16, r * n + first + i, load<f32s>(y + 16 * r + i) + add, count - i);
        }
    }
}

template <int R>
void bf16_any(const uint16_t* w, int64_t n, int64_t k, const Activation* x, int64_t stride, int rows, int64_t begin,
              int64_t end, Vector bias, void* y) {
    if (rows == R)
        bf16_rows<R>(w, n, k, x, stride, begin, end, bias, y);
    else if constexpr (R < BF16_ROWS)
        bf16_any<R + 1>(w, n, k, x, stride, rows, begin, end, bias, y);
}

void linear_bf16(const uint16_t* w, int64_t n, int64_t k, const void* x, int64_t stride, int R, int64_t begin,
                 int64_t end, Vector bias, void* y) {
    bf16_any<1>(w, n, k, (const Activation*)x, stride, R, begin, end, bias, y);
}

}  // namespace
}  // namespace brisk

extern "C" __attribute__((visibility("default"))) const brisk::LinearKernels brisk_linear = {
    brisk::TILE_ROWS,        brisk::BF16_ROWS, brisk::BF16_PRODUCTS, brisk::quantize,
    brisk::linear_quantized, brisk::to_floats, brisk::linear_bf16};
