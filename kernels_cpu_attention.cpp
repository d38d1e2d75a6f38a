// Attention over the KV cache of kernels.py on CPUs: the online softmax of https://arxiv.org/abs/1805.02867 over blocks
// of keys, in float.

#include "kernels_cpu_vector.h"

namespace brisk {
namespace {

void to_float(Vector x, int64_t offset, int64_t count, int64_t padded, float* to) {
    for (int64_t i = 0; i < padded; i += LANES) store(to + i, load_lanes(x, offset + i, count - i));
}

void from_float(const float* from, int64_t count, Type type, void* to, int64_t offset) {
    for (int64_t i = 0; i < count; i += LANES)
        store_lanes(to, type, offset + i, load_lanes({from, F32}, i, count - i), count - i);
}

// A bf16 cache is read as it is: AVX512 has products of bf16, others take pairs of keys' elements as floats, with
// queries in the same order.
#if AVX512
typedef uint16_t Query;
constexpr int STEP = 32;
INLINE __m512bh part(const uint16_t* x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE __m512bh query_part(const uint16_t* q, const uint16_t*) { return part(q); }
INLINE f32s multiply_add(f32s sum, __m512bh k, __m512bh q) { return (f32s)_mm512_dpbf16_ps((__m512)sum, k, q); }
#else
typedef float Query;
constexpr int STEP = 2 * LANES;
INLINE Pairs part(const uint16_t* x) { return pairs_of(x); }
INLINE Pairs query_part(const float* q, const uint16_t*) { return {load<f32s>(q), load<f32s>(q + LANES)}; }
INLINE f32s multiply_add(f32s sum, Pairs k, Pairs q) { return sum + k.even * q.even + k.odd * q.odd; }
#endif
INLINE f32s part(const float* x) { return load<f32s>(x); }
INLINE void keep_in_register(Pairs& p) { keep_in_register(p.even), keep_in_register(p.odd); }
INLINE f32s query_part(const float* q, const float*) { return part(q); }
INLINE f32s multiply_add(f32s sum, f32s k, f32s q) { return sum + k * q; }

// Scores [NQ, KEYS] of `count` keys, NK at once. Meanwhile the values, which come next, are fetched.
template <int NQ, int NK, class Q, class T>
INLINE void scores_of(const Q* q, const T* k, const T* v, int64_t D, int64_t count, float* scores) {
    constexpr int step = sizeof(T) == 2 ? STEP : LANES;
    int64_t key = 0;
    for (; key + NK <= count; key += NK) {
        f32s sums[NQ * NK] = {};
        if constexpr (!AVX512 && NK < NQ) {  // the keys stay in registers
            for (int64_t i = 0; i < NK * D; i += 64 / sizeof(T)) prefetch(v + key * D + i);
            for (int64_t d = 0; d < D; d += step) {
                decltype(part(k)) keys[NK];
                UNROLL for (int j = 0; j < NK; j++) keys[j] = part(k + (key + j) * D + d);
                UNROLL for (int i = 0; i < NQ; i++) {
                    auto of_query = query_part(q + i * D + d, k);
                    keep_in_register(of_query);
                    UNROLL for (int j = 0; j < NK; j++)
                        sums[i * NK + j] = multiply_add(sums[i * NK + j], keys[j], of_query);
                }
            }
        } else {
            for (int64_t d = 0; d < D; d += step)
                UNROLL for (int j = 0; j < NK; j++) {
                    const auto of_key = part(k + (key + j) * D + d);
                    prefetch(v + (key + j) * D + d);
                    UNROLL for (int i = 0; i < NQ; i++)
                        sums[i * NK + j] = multiply_add(sums[i * NK + j], of_key, query_part(q + i * D + d, k));
                }
        }
        float* to = scores + key;
        if constexpr (NQ * NK == LANES) {
            const f32s each = sum_each(sums);
            UNROLL for (int i = 0; i < NQ; i++) memcpy(to + i * KEYS, (const float*)&each + i * NK, 4 * NK);
        } else {
            for (int i = 0; i < NQ; i++)
                for (int j = 0; j < NK; j++) to[i * KEYS + j] = sum_lanes(sums[i * NK + j]);
        }
    }
    if constexpr (NK > 1)
        if (key < count) scores_of<NQ, 1>(q, k + key * D, v + key * D, D, count - key, scores + key);
}

template <class Q, class T>
INLINE void scores_of_block(const Q* q, int64_t G, const T* k, const T* v, int64_t D, int64_t count, float* scores) {
    int64_t g = 0;
    for (; g + 4 <= G; g += 4) scores_of<4, LANES / 4>(q + g * D, k, v, D, count, scores + g * KEYS);
    for (; g < G; g++) scores_of<1, LANES>(q + g * D, k, v, D, count, scores + g * KEYS);
}

// out[NQ, D] += weights [NQ, KEYS] times values [count, D], for the NV vectors of columns from d.
template <int NQ, int NV>
INLINE void add_values(const float* v, const float* next, int64_t D, int64_t d, int64_t count, const float* p,
                       float* out) {
    f32s sums[NQ][NV];
    UNROLL for (int i = 0; i < NQ; i++) UNROLL for (int j = 0; j < NV; j++)
        sums[i][j] = load<f32s>(out + i * D + d + LANES * j);
    for (int64_t key = 0; key < count; key++) {
        UNROLL for (int j = 0; j < NV; j++) {
            f32s value = load<f32s>(v + key * D + d + LANES * j);
            prefetch(next + d * count + (key * NV + j) * LANES);
            UNROLL for (int i = 0; i < NQ; i++) sums[i][j] += value * p[i * KEYS + key];
        }
    }
    UNROLL for (int i = 0; i < NQ; i++) UNROLL for (int j = 0; j < NV; j++)
        store(out + i * D + d + LANES * j, sums[i][j]);
}

// The same for bf16, in pairs: the sums of the even columns are apart from those of the odd.
template <int NQ, int NV>
INLINE void add_values(const uint16_t* v, const uint16_t* next, int64_t D, int64_t d, int64_t count, const float* p,
                       float* out) {
    constexpr int PAIRS = NV / 2;
    Pairs sums[NQ][PAIRS];
    UNROLL for (int i = 0; i < NQ; i++) UNROLL for (int j = 0; j < PAIRS; j++) {
        const float* at = out + i * D + d + 2 * LANES * j;
        sums[i][j] = split(load<f32s>(at), load<f32s>(at + LANES));
    }
    for (int64_t key = 0; key < count; key++) {
        UNROLL for (int j = 0; j < PAIRS; j++) {
            const Pairs value = pairs_of(v + key * D + d + 2 * LANES * j);
            prefetch(next + d * count + (key * PAIRS + j) * 2 * LANES);
            UNROLL for (int i = 0; i < NQ; i++) {
                sums[i][j].even += value.even * p[i * KEYS + key];
                sums[i][j].odd += value.odd * p[i * KEYS + key];
            }
        }
    }
    UNROLL for (int i = 0; i < NQ; i++) UNROLL for (int j = 0; j < PAIRS; j++)
        join(sums[i][j], out + i * D + d + 2 * LANES * j);
}

// All columns of NQ queries: NV vectors at once, and of what remains as few as may be.
template <int NQ, int NV, class T>
INLINE void add_columns(const T* v, const T* next, int64_t D, int64_t count, const float* p, float* out) {
    constexpr int FEW = sizeof(T) == 2 ? 2 : 1;
    int64_t d = 0;
    for (; d + NV * LANES <= D; d += NV * LANES) add_values<NQ, NV>(v, next, D, d, count, p, out);
    for (; d < D; d += FEW * LANES) add_values<NQ, FEW>(v, next, D, d, count, p, out);
}

template <class T>
INLINE void add_block(const T* v, const T* next, int64_t G, int64_t D, int64_t count, const float* p, float* out) {
    int64_t g = 0;  // as many sums at once as there are registers for
    for (; g + 4 <= G; g += 4) add_columns<4, AVX512 ? 4 : 2>(v, next, D, count, p + g * KEYS, out + g * D);
    for (; g < G; g++) add_columns<1, AVX512 ? 4 : 8>(v, next, D, count, p + g * KEYS, out + g * D);
}

// Scores -> exp(score - largest so far); what was summed up before is scaled to the new largest.
INLINE void softmax_block(float* scores, int64_t count, float scale, float* largest, float* sum, float* out,
                          int64_t D) {
    f32s most = all(-__builtin_inff()), total = {};
    for (int64_t i = count; i < round_up(count, LANES); i++) scores[i] = -__builtin_inff();
    for (int64_t i = 0; i < count; i += LANES) most = larger(most, load<f32s>(scores + i));
    const float before = *largest, now = max_lanes(larger(most * scale, all(before)));
    for (int64_t i = 0; i < count; i += LANES) {
        const f32s weight = exp_negative(load<f32s>(scores + i) * scale - now);
        store(scores + i, weight);
        total += weight;
    }
    const float keep = before == now ? 1.0f : exp_negative(all(before - now))[0];
    *sum = *sum * keep + sum_lanes(total);
    *largest = now;
    if (keep != 1.0f)
        for (int64_t d = 0; d < D; d += LANES) store(out + d, load<f32s>(out + d) * keep);
}

void attend(Vector q, int64_t q_offset, int64_t G, int64_t D, Vector k, Vector v, int64_t kv_offset, int64_t begin,
            int64_t end, int64_t last, float* largest, float* sum, float* out, float* scratch) {
    const int64_t padded = round_up(D, 16);
    float* keys = scratch;  // of a block, as floats with zeros after each, where the cache can't be read as it is
    float* values = keys + KEYS * padded;
    float* queries = values + KEYS * padded;
    float* scores = queries + G * padded;
    const float scale = 1.0f / __builtin_sqrtf((float)D);
    const bool as_bf16 = k.type == BF16 && D % 32 == 0 && (!AVX512 || q.type == BF16);
    const bool as_float = k.type == F32 && D % 16 == 0;
    for (int64_t g = 0; g < G; g++) {
        to_float(q, q_offset + g * D, D, padded, queries + g * padded);
        if (as_bf16 && !AVX512)
            for (float* at = queries + g * padded; at < queries + (g + 1) * padded; at += 2 * LANES) {
                const Pairs p = split(load<f32s>(at), load<f32s>(at + LANES));
                store(at, p.even), store(at + LANES, p.odd);
            }
        largest[g] = -__builtin_inff(), sum[g] = 0;
    }
    const Query* pairs = AVX512 ? (const Query*)q.data + q_offset : (const Query*)queries;
    memset(out, 0, G * padded * sizeof(float));
    for (int64_t first = begin; first < end; first += KEYS) {
        const int64_t count = smaller(KEYS, end - first), offset = kv_offset + first * D;
        // While one of K and V is worked on, memory delivers the other.
        const int64_t next_offset = first + KEYS < last ? offset + KEYS * D : offset;
        const uint16_t *k16 = (const uint16_t*)k.data, *v16 = (const uint16_t*)v.data;
        const float *k32 = (const float*)k.data, *v32 = (const float*)v.data;
        if (as_bf16) {
            scores_of_block(pairs, G, k16 + offset, v16 + offset, D, count, scores);
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
}  // namespace brisk

extern "C" __attribute__((visibility("default"))) const brisk::AttentionKernels brisk_attention = {brisk::from_float,
                                                                                                 brisk::attend};
