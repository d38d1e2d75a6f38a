// What the kernels for int8 and int4 weights share: how activations are quantized, and what 4-bit floats stand for.

#pragma once

#include "cpu_vector.h"

namespace brisk {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// 4-bit floats as integers: the levels of a code are twice its value (packing.FP4_VALUES), plus a zero of 12

constexpr int32_t FP4_ZERO = 12;

INLINE bytes fp4_levels(bytes codes) {
#if AVX512 || AVX2
#define LEVELS 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0
    static constexpr uint8_t TABLE[64] = {LEVELS, LEVELS, LEVELS, LEVELS};  // an instruction looks up in 16 bytes each
#if AVX512
    return (bytes)_mm512_shuffle_epi8((__m512i)load<bytes>(TABLE), (__m512i)codes);
#else
    return (bytes)_mm256_shuffle_epi8((__m256i)load<bytes>(TABLE), (__m256i)codes);
#endif
#else
    const bytes magnitude = codes & 7;  // 0 to 4 as they are, then 6, 8, 12
    const bytes twice = magnitude + (magnitude > 4 ? magnitude - 4 : bytes{}) + ((bytes)(magnitude == 7) & 2);
    return codes > 7 ? 12 - twice : 12 + twice;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Quantized activations

#if AVX2
// Of each 32 k dot_int4 keeps two sums in 16 bits: of the k with k % 8 < 4, and of the others. Each starts from -zero
// times the sum of its activations; both are in one number of 32 bits.
int32_t start_of_pairs(i32s sum, int32_t zero) {
    sum += SHUFFLE(sum, sum, 2, 3, 0, 1, 6, 7, 4, 5);
    sum += SHUFFLE(sum, sum, 1, 0, 3, 2, 5, 4, 7, 6);
    return (uint16_t)(-zero * sum[0]) | (uint32_t)(-zero * sum[4]) << 16;
}
#endif

// The order of a tile of activations: of every DEPTH k all rows, DEPTH bytes each.
template <int DEPTH>
void quantize(const Weight& w, Vector x, int64_t row, int64_t begin, int64_t end, int R, int r, Activations to) {
    constexpr int PART = DEPTH < 16 ? DEPTH : 16;
    // dpbusd wants unsigned weights: int8 ones have a zero of 128 there.
    const bool fp4 = w.bits == 4 && w.zero == FP4;
    const int32_t zero = w.bits == 8 ? (AVX512 ? 128 : 0) : fp4 ? FP4_ZERO : w.zero >= 0 ? w.zero : 1;
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
                    keep_rounded(scaled);
                    i32s q = (i32s)(scaled + MAGIC) - 0x4b400000;
                    sum += q;
                    store(in_order + i, to_i8(q));
                }
            typedef int8_t i8x16 __attribute__((vector_size(16)));
            i8x16 q = load<i8x16>(in_order);
            if (w.bits == 4)  // the low nibbles of 4 bytes are k 0 2 4 6, the high ones 1 3 5 7
                q = SHUFFLE(q, q, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
            for (int j = 0; j < 16; j += PART) {
                const uint64_t at = first + k + j;
                memcpy(to.q + (at / DEPTH * R + r) * DEPTH + at % DEPTH, (int8_t*)&q + j, PART);
            }
#if AVX2
            if (w.bits == 4 && k % 32) to.start[(first + k) / 32 * R + r] = start_of_pairs(sum, zero), sum = i32s{};
#endif
        }
        to.scale[g * R + r] = fp4 ? scale / 2 : scale;
        if (!AVX2 || w.bits == 8) to.start[g * R + r] = -zero * sum_lanes(sum);
    }
}

}  // namespace
}  // namespace brisk
