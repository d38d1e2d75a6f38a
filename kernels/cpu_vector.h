// Vectors as wide as the registers of the instruction set, which -DBRISK_ISA=amx|avx512|avx2|portable names, and what the
// kernels do with them: conversions, sums over the lanes, e^x.
//
// No standard library here: its templates, compiled for AVX512, could be linked into code for any processor.

#pragma once

#include "cpu.h"

#define ISA_amx 3  // and all that AVX512 has
#define ISA_avx512 2
#define ISA_avx2 1
#define ISA_portable 0
#define ISA_LEVEL_(name) ISA_##name
#define ISA_LEVEL(name) ISA_LEVEL_(name)
#define AMX (ISA_LEVEL(BRISK_ISA) == 3)
#define AVX512 (ISA_LEVEL(BRISK_ISA) >= 2)
#define AVX2 (ISA_LEVEL(BRISK_ISA) == 1)
#if AVX512 || AVX2
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (decltype((a) == (b))){__VA_ARGS__})  // the other came with GCC 12
#endif
#define INLINE_LAMBDA __attribute__((always_inline))

namespace brisk {
namespace {

// GCC splits vectors wider than a register into code several times slower.
constexpr int LANES = AVX512 ? 16 : AVX2 ? 8 : 4;
typedef float f32s __attribute__((vector_size(4 * LANES)));
typedef int32_t i32s __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32s __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16s __attribute__((vector_size(2 * LANES)));
typedef int8_t i8s __attribute__((vector_size(LANES)));
typedef uint8_t u8s __attribute__((vector_size(LANES)));
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));

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

// GCC then neither loads it from memory again for every use, which takes AVX2 longer than what is done with it, nor
// puts off what makes it.
template <class V>
INLINE void keep_in_register(V& v) {
#if AVX2
    asm("" : "+x"(v));
#endif
}

// What is computed of it is not fused with how it was: that would round another way than other processors do.
INLINE void keep_rounded(f32s& v) {
#ifdef __AVX__
    asm("" : "+x"(v));
#else
    asm("" : "+m"(v));
#endif
}

INLINE f32s all(float x) { return x - f32s{}; }  // adding 0 would take an instruction, as it changes -0
INLINE f32s to_f32(i32s v) { return __builtin_convertvector(v, f32s); }

// GCC makes several steps of conversions that have an instruction.
#if AVX512
INLINE u32s widen(u16s v) { return (u32s)_mm512_cvtepu16_epi32((__m256i)v); }
INLINE i32s widen(u8s v) { return (i32s)_mm512_cvtepu8_epi32((__m128i)v); }
INLINE i32s widen(i8s v) { return (i32s)_mm512_cvtepi8_epi32((__m128i)v); }
INLINE u16s to_u16(u32s v) { return (u16s)_mm512_cvtepi32_epi16((__m512i)v); }
INLINE i8s to_i8(i32s v) { return (i8s)_mm512_cvtepi32_epi8((__m512i)v); }
#elif AVX2
INLINE u32s widen(u16s v) { return (u32s)_mm256_cvtepu16_epi32((__m128i)v); }
INLINE i32s widen(u8s v) { return (i32s)_mm256_cvtepu8_epi32(_mm_loadl_epi64((__m128i*)&v)); }
INLINE i32s widen(i8s v) { return (i32s)_mm256_cvtepi8_epi32(_mm_loadl_epi64((__m128i*)&v)); }
INLINE __m128i narrow(i32s v) {  // 16 bits, for numbers that fit
    return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
INLINE u16s to_u16(u32s v) { return (u16s)narrow((i32s)v); }
INLINE i8s to_i8(i32s v) {
    const __m128i words = narrow(v & 0xffff), all_bytes = _mm_packs_epi16(words, words);
    return load<i8s>(&all_bytes);
}
#else
INLINE u32s widen(u16s v) { return __builtin_convertvector(v, u32s); }
INLINE i32s widen(u8s v) { return __builtin_convertvector(v, i32s); }
INLINE i32s widen(i8s v) { return __builtin_convertvector(v, i32s); }
INLINE u16s to_u16(u32s v) { return __builtin_convertvector(v, u16s); }
INLINE i8s to_i8(i32s v) { return __builtin_convertvector(v, i8s); }
#endif

INLINE f32s from_bf16(u16s v) { return (f32s)(widen(v) << 16); }

INLINE f32s from_f16(u16s v) {
#if AVX512
    return (f32s)_mm512_cvtph_ps((__m256i)v);
#elif AVX2
    return (f32s)_mm256_cvtph_ps((__m128i)v);
#else
    u32s wide = widen(v), magnitude = (wide & 0x7fff) << 13;
    f32s scaled = (f32s)magnitude * 0x1p112f;  // the exponent's other bias; subnormal numbers come out right
    u32s special = (u32s)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    return (f32s)((u32s)scaled | special | (wide & 0x8000) << 16);
#endif
}

INLINE u16s to_bf16(f32s v) {
    u32s bits = (u32s)v;
    u32s rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return to_u16(v == v ? rounded : bits >> 16 | 0x40);
}

INLINE u16s to_f16(f32s v) {
#if AVX512
    return (u16s)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif AVX2
    return (u16s)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    u32s bits = (u32s)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    u32s normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    u32s small = (u32s)((f32s)magnitude + 0.5f) - 0x3f000000u;  // the sum's rounding is that of a subnormal
    u32s out = magnitude < (113u << 23) ? small : normal;
    out = magnitude >= 0x477ff000u ? u32s{} + 0x7c00 : out;
    out = magnitude > 0x7f800000u ? u32s{} + 0x7e00 : out;
    return to_u16(out | sign);
#endif
}

INLINE f32s load_lanes(Vector x, int64_t i) {
    if (x.type == F32) return load<f32s>((const float*)x.data + i);
    u16s v = load<u16s>((const uint16_t*)x.data + i);
    return x.type == BF16 ? from_bf16(v) : from_f16(v);
}

// The first `count` lanes, zeros after them; reads no further.
INLINE f32s load_lanes(Vector x, int64_t i, int64_t count) {
    if (count >= LANES) return load_lanes(x, i);
    float buffer[LANES] = {};
    if (count > 0) memcpy(buffer, (const char*)x.data + i * size_of(x.type), count * size_of(x.type));
    return load_lanes({buffer, x.type}, 0);
}

INLINE void store_lanes(void* to, Type type, int64_t i, f32s v, int64_t count) {
    char buffer[4 * LANES];
    char* at = (char*)to + i * size_of(type);
    char* out = count >= LANES ? at : buffer;
    if (type == F32)
        store(out, v);
    else
        store(out, type == BF16 ? to_bf16(v) : to_f16(v));
    if (count < LANES) memcpy(at, buffer, count * size_of(type));
}

// `count` numbers of a cache in int8, times their scale, with zeros after them.
INLINE f32s load_lanes(const int8_t* x, int64_t count, float scale) {
    i8s v = {};
    if (count >= LANES)
        v = load<i8s>(x);
    else if (count > 0)
        memcpy(&v, x, count);
    return to_f32(widen(v)) * scale;
}

// bf16 numbers without shuffling: those in the low halves of 32-bit lanes, and those in the high ones.
struct Pairs {
    f32s even, odd;
};
INLINE Pairs pairs_of(const uint16_t* at) {
    u32s v = load<u32s>(at);
    return {(f32s)(v << 16), (f32s)(v & 0xffff0000u)};
}

#if AVX512
#define EVERY_OTHER(i) i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14, i + 16, i + 18, i + 20, i + 22, i + 24, \
                       i + 26, i + 28, i + 30
#define BY_TURNS(i) i, i + 16, i + 1, i + 17, i + 2, i + 18, i + 3, i + 19, i + 4, i + 20, i + 5, i + 21, i + 6, \
                    i + 22, i + 7, i + 23
#elif AVX2
#define EVERY_OTHER(i) i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14
#define BY_TURNS(i) i, i + 8, i + 1, i + 9, i + 2, i + 10, i + 3, i + 11
#else
#define EVERY_OTHER(i) i, i + 2, i + 4, i + 6
#define BY_TURNS(i) i, i + 4, i + 1, i + 5
#endif

// 2 LANES floats in order <-> those at even places, and those at odd ones.
INLINE Pairs split(f32s low, f32s high) {
    return {SHUFFLE(low, high, EVERY_OTHER(0)), SHUFFLE(low, high, EVERY_OTHER(1))};
}
INLINE void join(Pairs p, float* to) {
    store(to, SHUFFLE(p.even, p.odd, BY_TURNS(0)));
    store(to + LANES, SHUFFLE(p.even, p.odd, BY_TURNS(LANES / 2)));
}

// Each lane becomes what the N around it, a power of 2, combine to.
template <int N, class V, class Combine>
INLINE V fold(V v, Combine combine) {
#define WITH(...) v = combine(v, SHUFFLE(v, v, __VA_ARGS__))
#if AVX512
    if constexpr (N > 8) WITH(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (N > 4) WITH(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    if constexpr (N > 2) WITH(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    if constexpr (N > 1) WITH(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif AVX2
    if constexpr (N > 4) WITH(4, 5, 6, 7, 0, 1, 2, 3);
    if constexpr (N > 2) WITH(2, 3, 0, 1, 6, 7, 4, 5);
    if constexpr (N > 1) WITH(1, 0, 3, 2, 5, 4, 7, 6);
#else
    if constexpr (N > 2) WITH(2, 3, 0, 1);
    if constexpr (N > 1) WITH(1, 0, 3, 2);
#endif
#undef WITH
    return v;
}

template <class V>
INLINE V plus(V a, V b) {
    return a + b;
}

template <class V>
INLINE auto sum_lanes(V v) {
    return fold<LANES>(v, plus<V>)[0];
}

template <class V>
INLINE V larger(V a, V b) {
    return a > b ? a : b;
}

template <class V>
INLINE auto max_lanes(V v) {
    return fold<LANES>(v, larger<V>)[0];
}

// The lanes of as many vectors summed up, as the lanes of one.
template <class V>
INLINE V sum_each(const V (&v)[LANES]) {
#if AVX512
    const auto plus = [](__m512 x, __m512 y) INLINE_LAMBDA { return (__m512)((V)x + (V)y); };
    __m512 a[8], b[4], c[2];
    UNROLL for (int i = 0; i < 8; i++) {
        __m512 x = (__m512)v[2 * i], y = (__m512)v[2 * i + 1];
        a[i] = plus(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    UNROLL for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = plus(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    UNROLL for (int i = 0; i < 2; i++)
        c[i] = plus(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                    _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return (V)plus(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
#elif AVX2
    const auto plus = [](__m256 x, __m256 y) INLINE_LAMBDA { return (__m256)((V)x + (V)y); };
    __m256 a[4], b[2];
    UNROLL for (int i = 0; i < 4; i++) {  // blends, where they do: two shuffles a cycle are what there is
        __m256 x = (__m256)v[2 * i], y = (__m256)v[2 * i + 1];
        a[i] = plus(_mm256_blend_ps(x, y, 0xcc), _mm256_shuffle_ps(x, y, 0x4e));
    }
    UNROLL for (int i = 0; i < 2; i++) {
        __m256 x = a[2 * i], y = a[2 * i + 1];
        b[i] = plus(_mm256_shuffle_ps(x, y, 0x88), _mm256_shuffle_ps(x, y, 0xdd));
    }
    return (V)plus(_mm256_blend_ps(b[0], b[1], 0xf0), _mm256_permute2f128_ps(b[0], b[1], 0x21));
#else
    V sums;
    UNROLL for (int i = 0; i < LANES; i++) sums[i] = sum_lanes(v[i]);
    return sums;
#endif
}

// Lane j of vector i <-> lane i of vector j: of blocks of 1, 2, 4, 8 lanes, those off the diagonal change places.
INLINE void transpose(f32s (&v)[LANES]) {
#define EXCHANGE(size, LOW, HIGH)                             \
    UNROLL for (int i = 0; i < LANES; i++) if (!(i & size)) { \
        const f32s a = v[i], b = v[i + size];                 \
        v[i] = SHUFFLE(a, b, LOW);                            \
        v[i + size] = SHUFFLE(a, b, HIGH);                    \
    }
#define LIST(...) __VA_ARGS__
#if AVX512
    EXCHANGE(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
             LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
    EXCHANGE(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
             LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    EXCHANGE(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
             LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    EXCHANGE(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
             LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#elif AVX2
    EXCHANGE(1, LIST(0, 8, 2, 10, 4, 12, 6, 14), LIST(1, 9, 3, 11, 5, 13, 7, 15))
    EXCHANGE(2, LIST(0, 1, 8, 9, 4, 5, 12, 13), LIST(2, 3, 10, 11, 6, 7, 14, 15))
    EXCHANGE(4, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15))
#else
    EXCHANGE(1, LIST(0, 4, 2, 6), LIST(1, 5, 3, 7))
    EXCHANGE(2, LIST(0, 1, 4, 5), LIST(2, 3, 6, 7))
#endif
#undef EXCHANGE
#undef LIST
}

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23, 0x4b400000: adding it rounds to an integer, left in the low bits

// e^x for x <= 0 to 2 units in the last place (range reduction and polynomial as in Cephes' expf); 0 below -87.
INLINE f32s exp_negative(f32s x) {
    f32s shifted = x * 1.44269504f + MAGIC, n = shifted - MAGIC;
    f32s r = x - n * 0.693359375f - n * -2.12194440e-4f;
    f32s p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    f32s scaled = (f32s)((i32s)p + ((i32s)shifted << 23));  // the low bits of `shifted`, into the exponent
    return x < -87.0f ? f32s{} : scaled;
}

// Scores of attention -> cap * tanh(score * scale). Lanes without a key, -infinity, stay so.
__attribute__((unused, noinline)) void cap_scores(float* scores, int64_t count, float scale, float cap) {
    for (int64_t i = 0; i < count; i += LANES) {
        const f32s score = load<f32s>(scores + i), x = score * scale;
        const f32s e = exp_negative(larger(x, -x) * -2.0f), tanh = (1.0f - e) / (1.0f + e);
        store(scores + i, score == -__builtin_inff() ? score : (x < 0.0f ? -tanh : tanh) * cap);
    }
}

// Into the second level cache: that was faster than into the first, by half for bf16.
constexpr int64_t AHEAD = AVX512 ? 6144 : 2048;  // bytes from what is read to what is prefetched
INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

}  // namespace
}  // namespace brisk
