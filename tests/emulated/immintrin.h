// AVX512 and AMX as far as the kernels use them, in plain C++: so their tests run on any processor. Results are those of Intel's
// Intrinsics Guide, but for denormal numbers in dpbf16, which processors take as zero.

#pragma once

#include <stdint.h>
#include <string.h>

typedef float __m512 __attribute__((vector_size(64)));
typedef double __m512d __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m128i __attribute__((vector_size(16)));
#define _MM_FROUND_TO_NEAREST_INT 0

namespace emulated {
typedef int32_t i32 __attribute__((vector_size(64)));
typedef uint32_t u32 __attribute__((vector_size(64)));
typedef int16_t i16 __attribute__((vector_size(64)));
typedef int8_t i8 __attribute__((vector_size(64)));
typedef uint8_t u8 __attribute__((vector_size(64)));
typedef uint16_t u16_half __attribute__((vector_size(32)));
typedef int8_t i8_half __attribute__((vector_size(32)));
typedef int8_t i8_quarter __attribute__((vector_size(16)));
typedef uint8_t u8_quarter __attribute__((vector_size(16)));

static inline float from_bf16(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}
}  // namespace emulated

static inline __m512 _mm512_castpd_ps(__m512d a) { return (__m512)a; }
static inline __m512d _mm512_castps_pd(__m512 a) { return (__m512d)a; }
static inline __m512i _mm512_set1_epi32(int32_t a) { return (__m512i)(emulated::i32{} + a); }

static inline __m512i _mm512_loadu_si512(const void* from) {
    __m512i v;
    memcpy(&v, from, 64);
    return v;
}

static inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return (__m512i)__builtin_convertvector((emulated::u16_half)a, emulated::u32);
}
static inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
    return (__m512i)__builtin_convertvector((emulated::u8_quarter)a, emulated::u32);
}
static inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    return (__m512i)__builtin_convertvector((emulated::i8_quarter)a, emulated::i32);
}
static inline __m512i _mm512_cvtepi8_epi16(__m256i a) {
    return (__m512i)__builtin_convertvector((emulated::i8_half)a, emulated::i16);
}
static inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
    return (__m256i)__builtin_convertvector((emulated::u32)a, emulated::u16_half);
}
static inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
    return (__m128i)__builtin_convertvector((emulated::i32)a, emulated::i8_quarter);
}

__attribute__((noinline)) static __m512 _mm512_cvtph_ps(__m256i a) {
    __m512 v;
    for (int i = 0; i < 16; i++) {
        _Float16 x;
        memcpy(&x, (const char*)&a + 2 * i, 2);
        v[i] = (float)x;
    }
    return v;
}

__attribute__((noinline)) static __m256i _mm512_cvtps_ph(__m512 a, int) {
    __m256i v;
    for (int i = 0; i < 16; i++) {
        const _Float16 x = (_Float16)a[i];
        memcpy((char*)&v + 2 * i, &x, 2);
    }
    return v;
}

// Within each 128 bits: the halves of a and b by turns.
static inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
    __m512 v;
    for (int i = 0; i < 16; i++) v[i] = (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2];
    return v;
}
static inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
    __m512 v;
    for (int i = 0; i < 16; i++) v[i] = (i % 2 ? b : a)[i / 4 * 4 + 2 + i % 4 / 2];
    return v;
}
static inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) {
    __m512d v;
    for (int i = 0; i < 8; i++) v[i] = (i % 2 ? b : a)[i / 2 * 2];
    return v;
}
static inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) {
    __m512d v;
    for (int i = 0; i < 8; i++) v[i] = (i % 2 ? b : a)[i / 2 * 2 + 1];
    return v;
}

// Of the 128 bits, two chosen from a, then two from b.
static inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int choice) {
    __m512 v;
    for (int i = 0; i < 16; i++) v[i] = (i < 8 ? a : b)[(choice >> (2 * (i / 4)) & 3) * 4 + i % 4];
    return v;
}

// Within each 128 bits: the byte of a that the low 4 bits of b's byte name, 0 where its highest bit is set.
static inline __m512i _mm512_shuffle_epi8(__m512i a, __m512i b) {
    emulated::u8 v;
    for (int i = 0; i < 64; i++) {
        const uint8_t index = ((emulated::u8)b)[i];
        v[i] = index & 128 ? 0 : ((emulated::u8)a)[i / 16 * 16 + index % 16];
    }
    return (__m512i)v;
}

static inline __m512 _mm512_permutexvar_ps(__m512i indices, __m512 a) {
    __m512 v;
    for (int i = 0; i < 16; i++) v[i] = a[((emulated::u32)indices)[i] & 15];
    return v;
}

static inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
    emulated::i32 sums;
    for (int i = 0; i < 16; i++)
        sums[i] = ((emulated::i16)a)[2 * i] * ((emulated::i16)b)[2 * i] +
                  ((emulated::i16)a)[2 * i + 1] * ((emulated::i16)b)[2 * i + 1];
    return (__m512i)sums;
}

static inline __m512i _mm512_dpwssd_epi32(__m512i sums, __m512i a, __m512i b) {
    return (__m512i)((emulated::i32)sums + (emulated::i32)_mm512_madd_epi16(a, b));
}

__attribute__((noinline)) static __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
    emulated::i32 v = (emulated::i32)sums;
    for (int i = 0; i < 64; i++) v[i / 4] += ((emulated::u8)a)[i] * ((emulated::i8)b)[i];
    return (__m512i)v;
}

__attribute__((noinline)) static __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    for (int i = 0; i < 16; i++)
        for (int j = 1; j >= 0; j--)  // the odd ones first, each product added without a rounding between
            sums[i] = __builtin_fmaf(emulated::from_bf16(a[2 * i + j]), emulated::from_bf16(b[2 * i + j]), sums[i]);
    return sums;
}

// Tiles, as the kernels configure them.
namespace emulated {
struct Tile {
    int rows, row_bytes;
    uint8_t at[16][64];
};
static thread_local Tile tiles[8];
}  // namespace emulated

static inline void _tile_loadconfig(const void* config) {
    for (int i = 0; i < 8; i++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, (const char*)config + 16 + 2 * i, 2);
        emulated::tiles[i] = {((const uint8_t*)config)[48 + i], row_bytes, {}};
    }
}
static inline void _tile_release() {}
static inline void _tile_zero(int i) { memset(emulated::tiles[i].at, 0, sizeof emulated::tiles[i].at); }
static inline void _tile_loadd(int i, const void* from, int64_t stride) {
    emulated::Tile& tile = emulated::tiles[i];
    for (int row = 0; row < tile.rows; row++) memcpy(tile.at[row], (const char*)from + row * stride, tile.row_bytes);
}
static inline void _tile_stored(int i, void* to, int64_t stride) {
    const emulated::Tile& tile = emulated::tiles[i];
    for (int row = 0; row < tile.rows; row++) memcpy((char*)to + row * stride, tile.at[row], tile.row_bytes);
}
// [M][16] integers += signed [M][4 K] times unsigned, or signed, [K][16][4].
template <class B>
static inline void _tile_multiply(int sums, int a, int b) {
    for (int i = 0; i < emulated::tiles[a].rows; i++)
        for (int k = 0; k < emulated::tiles[b].rows; k++)
            for (int j = 0; j < 64; j++)
                ((int32_t*)emulated::tiles[sums].at[i])[j / 4] +=
                    (int8_t)emulated::tiles[a].at[i][4 * k + j % 4] * (B)emulated::tiles[b].at[k][j];
}
static inline void _tile_dpbsud(int sums, int a, int b) { _tile_multiply<uint8_t>(sums, a, b); }
static inline void _tile_dpbssd(int sums, int a, int b) { _tile_multiply<int8_t>(sums, a, b); }
static inline void _tile_dpbf16ps(int sums, int a, int b) {  // [16][16] floats += [16][32] times [16][16][2]
    for (int i = 0; i < 16; i++) {
        __m512 row;
        memcpy(&row, emulated::tiles[sums].at[i], 64);
        for (int k = 0; k < 16; k++) {
            __m512bh pair, other;
            for (int j = 0; j < 16; j++) memcpy((char*)&pair + 4 * j, emulated::tiles[a].at[i] + 4 * k, 4);
            memcpy(&other, emulated::tiles[b].at[k], 64);
            row = _mm512_dpbf16_ps(row, pair, other);
        }
        memcpy(emulated::tiles[sums].at[i], &row, 64);
    }
}
