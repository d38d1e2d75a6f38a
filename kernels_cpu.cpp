// The kernels of kernels.py on CPUs: linear layers at few rows (bf16, int8, int4) and attention over the KV cache.
//
// Serial functions, each over a part of the work. kernels.py compiles this file once for each instruction set, with
// -DBRISK_ISA=avx512|avx2|portable and that set's flags, and links all into one library with kernels_cpu_ops.cpp, which
// shares the work among threads and chooses the set. A kernel computes each number in one order however the work is
// shared, so results do not depend on the threads.
//
// No standard library here: its templates, compiled for AVX512, could be linked into code for any processor.

#include "kernels_cpu.h"

#define ISA_avx512 2
#define ISA_avx2 1
#define ISA_portable 0
#define ISA_LEVEL_(name) ISA_##name
#define ISA_LEVEL(name) ISA_LEVEL_(name)
#define AVX512 (ISA_LEVEL(BRISK_ISA) == 2)
#define AVX2 (ISA_LEVEL(BRISK_ISA) == 1)
#if AVX512 || AVX2
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace brisk {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of 16 lanes, whatever the registers: GCC and Clang split them where a register has fewer

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

template <class V>
INLINE V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
INLINE void store(void* to, V v) {
    memcpy(to, &v, sizeof v);
}

INLINE f32x16 all(float x) { return f32x16{} + x; }
INLINE f32x16 to_f32(i32x16 v) { return __builtin_convertvector(v, f32x16); }

// GCC makes several steps of the conversions that AVX512 has one instruction for.
#if AVX512
INLINE u32x16 widen(u16x16 v) { return (u32x16)_mm512_cvtepu16_epi32((__m256i)v); }
INLINE i32x16 widen(u8x16 v) { return (i32x16)_mm512_cvtepu8_epi32((__m128i)v); }
INLINE u16x16 to_u16(u32x16 v) { return (u16x16)_mm512_cvtepi32_epi16((__m512i)v); }
INLINE i8x16 to_i8(i32x16 v) { return (i8x16)_mm512_cvtepi32_epi8((__m512i)v); }
#else
INLINE u32x16 widen(u16x16 v) { return __builtin_convertvector(v, u32x16); }
INLINE i32x16 widen(u8x16 v) { return __builtin_convertvector(v, i32x16); }
INLINE u16x16 to_u16(u32x16 v) { return __builtin_convertvector(v, u16x16); }
INLINE i8x16 to_i8(i32x16 v) { return __builtin_convertvector(v, i8x16); }
#endif

INLINE f32x16 from_bf16(u16x16 v) { return (f32x16)(widen(v) << 16); }

INLINE f32x16 from_f16(u16x16 v) {
#if AVX512
    return (f32x16)_mm512_cvtph_ps((__m256i)v);
#elif AVX2
    f32x16 out;
    store(&out, _mm256_cvtph_ps(load<__m128i>(&v)));
    store((float*)&out + 8, _mm256_cvtph_ps(load<__m128i>((uint16_t*)&v + 8)));
    return out;
#else
    u32x16 wide = widen(v), magnitude = (wide & 0x7fff) << 13;
    f32x16 scaled = (f32x16)magnitude * 0x1p112f;  // the exponent's other bias; subnormal numbers come out right
    u32x16 special = (u32x16)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    return (f32x16)((u32x16)scaled | special | (wide & 0x8000) << 16);
#endif
}

INLINE u16x16 to_bf16(f32x16 v) {
    u32x16 bits = (u32x16)v;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return to_u16(v == v ? rounded : bits >> 16 | 0x40);
}

INLINE u16x16 to_f16(f32x16 v) {
#if AVX512
    return (u16x16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif AVX2
    u16x16 out;
    store(&out, _mm256_cvtps_ph(load<__m256>(&v), _MM_FROUND_TO_NEAREST_INT));
    store((uint16_t*)&out + 8, _mm256_cvtps_ph(load<__m256>((float*)&v + 8), _MM_FROUND_TO_NEAREST_INT));
    return out;
#else
    u32x16 bits = (u32x16)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    u32x16 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    u32x16 small = (u32x16)((f32x16)magnitude + 0.5f) - 0x3f000000u;  // the sum's rounding is that of a subnormal
    u32x16 out = magnitude < (113u << 23) ? small : normal;
    out = magnitude >= 0x477ff000u ? u32x16{} + 0x7c00 : out;
    out = magnitude > 0x7f800000u ? u32x16{} + 0x7e00 : out;
    return to_u16(out | sign);
#endif
}

INLINE f32x16 load16(Vector x, int64_t i) {
    if (x.type == F32) return load<f32x16>((const float*)x.data + i);
    u16x16 v = load<u16x16>((const uint16_t*)x.data + i);
    return x.type == BF16 ? from_bf16(v) : from_f16(v);
}

// The first `count` lanes, zeros after them; reads no further.
INLINE f32x16 load16(Vector x, int64_t i, int64_t count) {
    if (count >= 16) return load16(x, i);
    float buffer[16] = {};
    if (count > 0) memcpy(buffer, (const char*)x.data + i * size_of(x.type), count * size_of(x.type));
    return load16({buffer, x.type}, 0);
}

INLINE void store16(void* to, Type type, int64_t i, f32x16 v, int64_t count) {
    char buffer[64];
    char* at = (char*)to + i * size_of(type);
    char* out = count >= 16 ? at : buffer;
    if (type == F32)
        store(out, v);
    else
        store(out, type == BF16 ? to_bf16(v) : to_f16(v));
    if (count < 16) memcpy(at, buffer, count * size_of(type));
}

// Halves the lanes until one is left.
template <class V, class Combine>
INLINE auto fold(V v, Combine combine) {
    v = combine(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = combine(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return v[0];
}

template <class V>
INLINE auto sum_lanes(V v) {
    return fold(v, [](V a, V b) { return a + b; });
}

template <class V>
INLINE V larger(V a, V b) {
    return a > b ? a : b;
}

template <class V>
INLINE auto max_lanes(V v) {
    return fold(v, larger<V>);
}

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23, 0x4b400000: adding it rounds to an integer, left in the low bits

// e^x for x <= 0 to 2 units in the last place (range reduction and polynomial as in Cephes' expf); 0 below -87.
INLINE f32x16 exp_negative(f32x16 x) {
    f32x16 shifted = x * 1.44269504f + MAGIC, n = shifted - MAGIC;
    f32x16 r = x - n * 0.693359375f - n * -2.12194440e-4f;
    f32x16 p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    f32x16 scaled = (f32x16)((i32x16)p + ((i32x16)shifted << 23));  // the low bits of `shifted`, into the exponent
    return x < -87.0f ? f32x16{} : scaled;
}

// ---------------------------------------------------------------------------------------------------------------------
// Quantized linear

#if AVX512
constexpr int TILE_ROWS = 8;  // x 2 halves of a panel: 16 of the 32 registers hold sums
#elif AVX2
constexpr int TILE_ROWS = 2;
#else
constexpr int TILE_ROWS = 1;
#endif

// sums + u8 weights of 16 rows by 4 k, times 4 activations. SIGNED: the weights are meant less 128.
template <bool SIGNED>
INLINE i32x16 dot4(i32x16 sums, u8x64 w, int32_t x) {
#if AVX512
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
#elif AVX2
    for (int half = 0; half < 2; half++) {
        __m256i bytes = load<__m256i>((uint8_t*)&w + 32 * half), a = _mm256_set1_epi32(x);
        if (SIGNED) {  // maddubs adds pairs in 16 bits: |w| a stays in them, (w + 128) a would not
            bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
            a = _mm256_sign_epi8(a, bytes);
            bytes = _mm256_abs_epi8(bytes);
        }
        __m256i products = _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, a), _mm256_set1_epi16(1));
        store((int32_t*)&sums + 8 * half, _mm256_add_epi32(load<__m256i>((int32_t*)&sums + 8 * half), products));
    }
    return sums;
#else
    i32x16 words = (i32x16)w;
    for (int j = 0; j < 4; j++) {
        i32x16 byte = ((i32x16)((u32x16)words >> (8 * j)) & 255) - (SIGNED ? 128 : 0);
        sums += byte * (int32_t)(int8_t)((uint32_t)x >> (8 * j));
    }
    return sums;
#endif
}

// Zeros times the (negative) sum of a group's activations: both fit 16 bits.
INLINE i32x16 zeros_times(i32x16 zeros, int32_t sum) {
#if AVX512
    return (i32x16)_mm512_madd_epi16((__m512i)zeros, _mm512_set1_epi32(sum));
#else
    return zeros * sum;
#endif
}

void quantize(const Weight& w, Vector x, int64_t row, int64_t begin, int64_t end, int R, int r, Activations to) {
    // dpbusd wants unsigned weights: int8 ones have a zero of 128 there.
    const int32_t zero = w.bits == 8 ? (AVX512 ? 128 : 0) : w.zero >= 0 ? w.zero : 1;
    for (int64_t g = begin; g < end; g++) {
        const int64_t first = g * w.group, count = smaller(w.group, round_up(w.k, 16) - first);
        float values[ACT_GROUP];
        i32x16 most = {};
        for (int64_t k = 0; k < count; k += 16) {
            f32x16 v = load16(x, row * w.k + first + k, w.k - first - k);
            store(values + k, v);
            i32x16 magnitude = (i32x16)v & 0x7fffffff;  // as integers floats order alike, and NaN is the largest
            most = larger(most, magnitude);
        }
        const int32_t largest = max_lanes(most);
        float amax;
        memcpy(&amax, &largest, 4);
        const bool tiny = amax < 1e-36f;  // 127 / amax must not overflow
        const float scale = tiny ? 0.0f : amax / 127.0f, inverse = tiny ? 0.0f : 127.0f / amax;
        i32x16 sum = {};
        for (int64_t k = 0; k < w.group; k += 16) {
            i32x16 q = {};
            if (k < count) {
                f32x16 scaled = load<f32x16>(values + k) * inverse;
                asm("" : "+m"(scaled));  // a fused multiply-add would round ties another way than other processors
                q = (i32x16)(scaled + MAGIC) - 0x4b400000;
            } else if (w.bits == 8) {
                break;
            }
            sum += q;
            i8x16 bytes = to_i8(q);
            if (w.bits == 4)  // the low nibbles of 4 bytes are k 0 2 4 6, the high ones 1 3 5 7
                bytes = __builtin_shufflevector(bytes, bytes, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
            for (int j = 0; j < 4; j++) memcpy(to.q + (((first + k) / 4 + j) * R + r) * 4, (int8_t*)&bytes + 4 * j, 4);
        }
        to.scale[g * R + r] = scale;
        to.start[g * R + r] = -zero * sum_lanes(sum);
    }
}

INLINE int32_t load4(const int8_t* from) {
    int32_t v;
    memcpy(&v, from, 4);
    return v;
}

// Into the second level cache: that was faster than into the first, by half for bf16.
INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }
constexpr int64_t AHEAD = 6144;  // bytes

template <int BITS, int R>
void panel_times_rows(const Weight& w, const uint8_t* at, Activations x, f32x16 (&y)[R][2]) {
    // At one or two rows of int8 the hardware's own prefetching is as fast as memory, and more than that disturbs it.
    constexpr bool FETCH = BITS == 4 || R > 2;
    f32x16 total[R][2] = {};
    const int64_t padded_k = round_up(w.k, 16);
    for (int64_t g = 0; g < w.groups; g++) {
        i32x16 sums[R][2];
        const float* scale = x.scale + g * R;
        const int32_t* start = x.start + g * R;
        if constexpr (BITS == 8) {
            UNROLL for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = i32x16{} + start[r];
            const int64_t steps = smaller(w.group, padded_k - g * w.group) / 4;
            for (int64_t i = 0; i < steps; i++) {
                u8x64 w0 = load<u8x64>(at), w1 = load<u8x64>(at + 64);
                if (FETCH) prefetch(at + AHEAD), prefetch(at + AHEAD + 64);
                UNROLL for (int r = 0; r < R; r++) {
                    const int32_t a = load4(x.q + 4 * r);
                    sums[r][0] = dot4<true>(sums[r][0], w0, a);
                    sums[r][1] = dot4<true>(sums[r][1], w1, a);
                }
                at += 4 * PANEL, x.q += 4 * R;
            }
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int h = 0; h < 2; h++)
                total[r][h] += to_f32(sums[r][h]) * scale[r];
        } else {
            const uint8_t* beyond = at + PANEL * w.group / 2;  // scales, then zeros
            const uint8_t* zeros_at = beyond + PANEL * size_of(w.scale_type);
            if (FETCH) prefetch(beyond + AHEAD);
            f32x16 w_scale[2];
            UNROLL for (int h = 0; h < 2; h++) w_scale[h] = load16({beyond, w.scale_type}, 16 * h);
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int h = 0; h < 2; h++) {
                if (w.zero == ZERO_BYTES)
                    sums[r][h] = zeros_times(widen(load<u8x16>(zeros_at + 16 * h)), start[r]);
                else
                    sums[r][h] = i32x16{} + (w.zero == ZERO_FLOATS ? 0 : start[r]);
            }
            for (int64_t i = 0; i < w.group / 8; i++) {
                u8x64 w0 = load<u8x64>(at), w1 = load<u8x64>(at + 64);
                if (FETCH) prefetch(at + AHEAD), prefetch(at + AHEAD + 64);
                u8x64 low0 = w0 & 15, low1 = w1 & 15;
                u8x64 high0 = (u8x64)((u32x16)w0 >> 4) & 15, high1 = (u8x64)((u32x16)w1 >> 4) & 15;
                UNROLL for (int r = 0; r < R; r++) {
                    const int32_t even = load4(x.q + 4 * r), odd = load4(x.q + 4 * (R + r));
                    sums[r][0] = dot4<false>(sums[r][0], low0, even);
                    sums[r][1] = dot4<false>(sums[r][1], low1, even);
                    sums[r][0] = dot4<false>(sums[r][0], high0, odd);
                    sums[r][1] = dot4<false>(sums[r][1], high1, odd);
                }
                at += 4 * PANEL, x.q += 8 * R;
            }
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int h = 0; h < 2; h++)
                total[r][h] += to_f32(sums[r][h]) * (w_scale[h] * scale[r]);
            if (w.zero == ZERO_FLOATS)
                for (int r = 0; r < R; r++)
                    for (int h = 0; h < 2; h++)
                        total[r][h] += load<f32x16>(zeros_at + 64 * h) * w_scale[h] * (scale[r] * (float)start[r]);
            at = beyond - PANEL * w.group / 2 + w.group_bytes;
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int h = 0; h < 2; h++) y[r][h] = total[r][h];
}

template <int BITS, int R>
void linear_rows(const Weight& w, Activations x, int64_t begin, int64_t end, Vector bias, Type type, void* out) {
    for (int64_t panel = begin; panel < end; panel++) {
        f32x16 y[R][2];
        panel_times_rows<BITS, R>(w, w.packed + panel * w.panel_bytes, x, y);
        for (int h = 0; h < 2; h++) {
            const int64_t first = panel * PANEL + 16 * h, count = w.n - first;
            if (count <= 0) break;
            f32x16 scale = BITS == 8 ? load16({w.scales, F32}, first, count) : all(1.0f);
            f32x16 add = bias.data ? load16(bias, first, count) : f32x16{};
            for (int r = 0; r < R; r++) store16(out, type, r * w.n + first, y[r][h] * scale + add, count);
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

void to_float(Vector x, int64_t offset, int64_t count, int64_t padded, float* to) {
    for (int64_t i = 0; i < padded; i += 16) store(to + i, load16(x, offset + i, count - i));
}

void from_float(const float* from, int64_t count, Type type, void* to, int64_t offset) {
    for (int64_t i = 0; i < count; i += 16)
        store16(to, type, offset + i, load16({from, F32}, i, count - i), count - i);
}

#if AVX512
constexpr bool BF16_PRODUCTS = true;
constexpr int BF16_ROWS = 6, BF16_STEP = 32;  // rows of x at once, k at once
typedef uint16_t Activation;
typedef __m512bh Part;
INLINE Part weights(const uint16_t* w) { return (__m512bh)_mm512_loadu_si512(w); }
INLINE Part part(const uint16_t* x) { return weights(x); }
INLINE Part weights(const uint16_t* w, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), w);
}
INLINE Part part(const uint16_t* x, int64_t count) { return weights(x, count); }
INLINE f32x16 multiply_add(f32x16 sum, Part w, Part x) { return (f32x16)_mm512_dpbf16_ps((__m512)sum, w, x); }
#else
constexpr bool BF16_PRODUCTS = false;
constexpr int BF16_ROWS = 2, BF16_STEP = 16;
typedef float Activation;
typedef f32x16 Part;
INLINE Part weights(const uint16_t* w) { return from_bf16(load<u16x16>(w)); }
INLINE Part weights(const uint16_t* w, int64_t count) { return load16({w, BF16}, 0, count); }
INLINE Part part(const float* x) { return load<f32x16>(x); }
INLINE Part part(const float* x, int64_t) { return part(x); }  // padded with zeros
INLINE f32x16 multiply_add(f32x16 sum, Part w, Part x) { return sum + w * x; }
#endif

// NW rows of w times R rows of x: w is read once from memory and each value used R times. y is [R, 16].
template <int NW, int R>
void bf16_tile(const uint16_t* w, int64_t k, const Activation* x, int64_t stride, float* y) {
    f32x16 sums[R][NW] = {};
    int64_t i = 0;
    for (; i + BF16_STEP <= k; i += BF16_STEP) {
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
               Vector bias, Type type, void* out) {
    constexpr int NW = AVX512 ? (R <= 2 ? 8 : 4) : (R == 1 ? 4 : 2);  // as many as there are registers for
    for (int64_t first = begin; first < end; first += 16) {
        const int64_t count = smaller(16, end - first);
        float y[R * 16] = {};
        int64_t j = 0;
        for (; j + NW <= count; j += NW) bf16_tile<NW, R>(w + (first + j) * k, k, x, stride, y + j);
        for (; j < count; j++) bf16_tile<1, R>(w + (first + j) * k, k, x, stride, y + j);
        f32x16 add = bias.data ? load16(bias, first, count) : f32x16{};
        for (int r = 0; r < R; r++) store16(out, type, r * n + first, load<f32x16>(y + 16 * r) + add, count);
    }
}

template <int R>
void bf16_any(const uint16_t* w, int64_t n, int64_t k, const Activation* x, int64_t stride, int rows, int64_t begin,
              int64_t end, Vector bias, Type type, void* y) {
    if (rows == R)
        bf16_rows<R>(w, n, k, x, stride, begin, end, bias, type, y);
    else if constexpr (R < BF16_ROWS)
        bf16_any<R + 1>(w, n, k, x, stride, rows, begin, end, bias, type, y);
}

void linear_bf16(const uint16_t* w, int64_t n, int64_t k, const void* x, int64_t stride, int R, int64_t begin,
                 int64_t end, Vector bias, Type type, void* y) {
    bf16_any<1>(w, n, k, (const Activation*)x, stride, R, begin, end, bias, type, y);
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention: the online softmax of https://arxiv.org/abs/1805.02867 over blocks of keys, in float

INLINE f32x16 load_value(const float* from) { return load<f32x16>(from); }
INLINE f32x16 load_value(const uint16_t* from) { return from_bf16(load<u16x16>(from)); }

#if AVX512
// The lanes of 16 vectors summed up, as the lanes of one.
INLINE f32x16 sum_each(const f32x16 (&v)[16]) {
    __m512 a[8], b[4], c[2];
    UNROLL for (int i = 0; i < 8; i++) {
        __m512 x = (__m512)v[2 * i], y = (__m512)v[2 * i + 1];
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    UNROLL for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    UNROLL for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return (f32x16)_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}
INLINE f32x16 multiply_add(f32x16 sum, f32x16 k, f32x16 q) { return sum + k * q; }
INLINE Part lanes(const uint16_t* x) { return part(x); }
#endif
INLINE f32x16 lanes(const float* x) { return load<f32x16>(x); }

// Scores [NQ, KEYS] of `count` keys, NK at once. Meanwhile the values, which come next, are fetched.
template <int NQ, int NK, class T>
INLINE void scores_of(const T* q, const T* k, const T* v, int64_t D, int64_t count, float* scores) {
    int64_t key = 0;
    for (; key + NK <= count; key += NK) {
        f32x16 sums[NQ * NK] = {};
        for (int64_t d = 0; d < D; d += 64 / (int64_t)sizeof(T))
            UNROLL for (int j = 0; j < NK; j++) {
                const auto of_key = lanes(k + (key + j) * D + d);
                prefetch(v + (key + j) * D + d);
                UNROLL for (int i = 0; i < NQ; i++)
                    sums[i * NK + j] = multiply_add(sums[i * NK + j], of_key, lanes(q + i * D + d));
            }
        float* to = scores + key;
#if AVX512
        if constexpr (NQ * NK == 16) {
            const f32x16 each = sum_each(sums);
            UNROLL for (int i = 0; i < NQ; i++) memcpy(to + i * KEYS, (const float*)&each + i * NK, 4 * NK);
            continue;
        }
#endif
        for (int i = 0; i < NQ; i++)
            for (int j = 0; j < NK; j++) to[i * KEYS + j] = sum_lanes(sums[i * NK + j]);
    }
    if constexpr (NK > 1)
        if (key < count) scores_of<NQ, 1>(q, k + key * D, v + key * D, D, count - key, scores + key);
}

template <class T>
INLINE void scores_of_block(const T* q, int64_t G, const T* k, const T* v, int64_t D, int64_t count, float* scores) {
    int64_t g = 0;
    for (; AVX512 && g + 4 <= G; g += 4) scores_of<4, 4>(q + g * D, k, v, D, count, scores + g * KEYS);
    for (; g < G; g++) scores_of<1, AVX512 ? 16 : 4>(q + g * D, k, v, D, count, scores + g * KEYS);
}

// out[NQ, D] += weights [NQ, KEYS] times values [count, D], for the 16 NV columns from d.
template <int NQ, int NV>
INLINE void add_values(const float* v, const float* next, int64_t D, int64_t d, int64_t count, const float* p,
                       float* out) {
    f32x16 sums[NQ][NV];
    UNROLL for (int i = 0; i < NQ; i++) UNROLL for (int j = 0; j < NV; j++)
        sums[i][j] = load<f32x16>(out + i * D + d + 16 * j);
    for (int64_t key = 0; key < count; key++) {
        UNROLL for (int j = 0; j < NV; j++) {
            f32x16 value = load<f32x16>(v + key * D + d + 16 * j);
            prefetch(next + key * D + d + 16 * j);
            UNROLL for (int i = 0; i < NQ; i++) sums[i][j] += value * p[i * KEYS + key];
        }
    }
    UNROLL for (int i = 0; i < NQ; i++) UNROLL for (int j = 0; j < NV; j++)
        store(out + i * D + d + 16 * j, sums[i][j]);
}

// The same for bf16, two columns of a 32-bit lane at a time: the sums of the even ones are apart from those of the odd.
template <int NQ, int NV>
INLINE void add_values(const uint16_t* v, const uint16_t* next, int64_t D, int64_t d, int64_t count, const float* p,
                       float* out) {
    constexpr int PAIRS = NV / 2;
    f32x16 even[NQ][PAIRS], odd[NQ][PAIRS];
    UNROLL for (int i = 0; i < NQ; i++) UNROLL for (int j = 0; j < PAIRS; j++) {
        const float* at = out + i * D + d + 32 * j;
        f32x16 low = load<f32x16>(at), high = load<f32x16>(at + 16);
        even[i][j] = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        odd[i][j] = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
    for (int64_t key = 0; key < count; key++) {
        UNROLL for (int j = 0; j < PAIRS; j++) {
            u32x16 pair = load<u32x16>(v + key * D + d + 32 * j);
            prefetch(next + key * D + d + 32 * j);
            f32x16 first = (f32x16)(pair << 16), second = (f32x16)(pair & 0xffff0000u);
            UNROLL for (int i = 0; i < NQ; i++) {
                even[i][j] += first * p[i * KEYS + key];
                odd[i][j] += second * p[i * KEYS + key];
            }
        }
    }
    UNROLL for (int i = 0; i < NQ; i++) UNROLL for (int j = 0; j < PAIRS; j++) {
        f32x16 e = even[i][j], o = odd[i][j];
        float* at = out + i * D + d + 32 * j;
        store(at, __builtin_shufflevector(e, o, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
        store(at + 16, __builtin_shufflevector(e, o, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    }
}

template <class T>
INLINE void add_block(const T* v, const T* next, int64_t G, int64_t D, int64_t count, const float* p, float* out) {
    constexpr int STEP = sizeof(T) == 2 ? 32 : 16;  // columns: D is a multiple of it
    for (int64_t g = 0; g < G;) {
        const bool four = AVX512 && g + 4 <= G;
        for (int64_t d = 0; d < D;) {
            const bool wide = d + 64 <= D;
            const float* at = p + g * KEYS;
            float* to = out + g * D;
            if (four && wide)
                add_values<4, 4>(v, next, D, d, count, at, to);
            else if (four)
                add_values<4, STEP / 16>(v, next, D, d, count, at, to);
            else if (wide)
                add_values<1, 4>(v, next, D, d, count, at, to);
            else
                add_values<1, STEP / 16>(v, next, D, d, count, at, to);
            d += wide ? 64 : STEP;
        }
        g += four ? 4 : 1;
    }
}

// Scores -> exp(score - largest so far); what was summed up before is scaled to the new largest.
INLINE void softmax_block(float* scores, int64_t count, float scale, float* largest, float* sum, float* out,
                          int64_t D) {
    f32x16 most = all(-__builtin_inff());
    for (int64_t i = count; i < round_up(count, 16); i++) scores[i] = scores[count - 1];
    for (int64_t i = 0; i < count; i += 16) {
        f32x16 s = load<f32x16>(scores + i) * scale;
        store(scores + i, s);
        most = larger(most, s);
    }
    const float before = *largest, now = max_lanes(larger(most, all(before)));
    f32x16 total = {};
    for (int64_t i = 0; i < count; i += 16) store(scores + i, exp_negative(load<f32x16>(scores + i) - now));
    for (int64_t i = count; i < round_up(count, 16); i++) scores[i] = 0;
    for (int64_t i = 0; i < count; i += 16) total += load<f32x16>(scores + i);
    const float keep = before == now ? 1.0f : exp_negative(all(before - now))[0];
    *sum = *sum * keep + sum_lanes(total);
    *largest = now;
    if (keep != 1.0f)
        for (int64_t d = 0; d < D; d += 16) store(out + d, load<f32x16>(out + d) * keep);
}

void attend(Vector q, int64_t q_offset, int64_t G, int64_t D, Vector k, Vector v, int64_t kv_offset, int64_t begin,
            int64_t end, float* largest, float* sum, float* out, float* scratch) {
    const int64_t padded = round_up(D, 16);
    float* keys = scratch;  // of a block, as floats with zeros after each, where the cache can't be read as it is
    float* values = keys + KEYS * padded;
    float* queries = values + KEYS * padded;
    float* scores = queries + 2 * G * padded;
    const float scale = 1.0f / __builtin_sqrtf((float)D);
    const bool as_bf16 = BF16_PRODUCTS && k.type == BF16 && q.type == BF16 && D % 32 == 0;
    const bool as_float = k.type == F32 && D % 16 == 0;
    for (int64_t g = 0; g < G; g++) {
        to_float(q, q_offset + g * D, D, padded, queries + g * padded);
        largest[g] = -__builtin_inff(), sum[g] = 0;
    }
    memset(out, 0, G * padded * sizeof(float));
    for (int64_t first = begin; first < end; first += KEYS) {
        const int64_t count = smaller(KEYS, end - first), offset = kv_offset + first * D;
        // While one of K and V is worked on, memory delivers the other.
        const int64_t next_offset = first + KEYS < end ? offset + KEYS * D : offset;
        const uint16_t *k16 = (const uint16_t*)k.data, *v16 = (const uint16_t*)v.data;
        const float *k32 = (const float*)k.data, *v32 = (const float*)v.data;
        if (as_bf16) {
#if AVX512
            scores_of_block((const uint16_t*)q.data + q_offset, G, k16 + offset, v16 + offset, D, count, scores);
#endif
        } else if (as_float) {
            scores_of_block(queries, G, k32 + offset, v32 + offset, D, count, scores);
        } else {
            for (int64_t j = 0; j < count; j++) to_float(k, offset + j * D, D, padded, keys + j * padded);
            scores_of_block(queries, G, keys, values, padded, count, scores);
        }
        for (int64_t g = 0; g < G; g++)
            softmax_block(scores + g * KEYS, count, scale, largest + g, sum + g, out + g * padded, padded);
        if (as_bf16) {
            add_block(v16 + offset, k16 + next_offset, G, D, count, scores, out);
        } else if (as_float) {
            add_block(v32 + offset, k32 + next_offset, G, D, count, scores, out);
        } else {
            for (int64_t j = 0; j < count; j++) to_float(v, offset + j * D, D, padded, values + j * padded);
            add_block(values, values, G, padded, count, scores, out);
        }
    }
}

}  // namespace

extern const Kernels BRISK_ISA = {TILE_ROWS,   BF16_ROWS, BF16_PRODUCTS, quantize, linear_quantized,
                                  linear_bf16, to_float,  from_float,    attend};

}  // namespace brisk
