// Attention over the KV cache on CPUs: the online softmax of https://arxiv.org/abs/1805.02867 over blocks
// of keys, in float.

#include "cpu_vector.h"

namespace brisk {
namespace {

void to_float(Vector x, int64_t offset, int64_t count, int64_t padded, float* to) {
    for (int64_t i = 0; i < padded; i += LANES) store(to + i, load_lanes(x, offset + i, count - i));
}

void dequantize(const int8_t* x, float scale, int64_t count, int64_t padded, float* to) {
    for (int64_t i = 0; i < padded; i += LANES) store(to + i, load_lanes(x + i, count - i, scale));
}

// Floats -> the whole numbers up to 32767 that they are next to, in units of what this returns. `to` may be where they
// are.
float quantize(const float* x, int64_t count, int16_t* to) {
    f32s most = {};
    for (int64_t i = 0; i < count; i += LANES) most = larger(most, larger(load<f32s>(x + i), -load<f32s>(x + i)));
    const float largest = larger(max_lanes(most), 1e-30f), inverse = 32767 / largest;
    for (int64_t i = 0; i < count; i += LANES) {
        const u32s numbers = (u32s)(load<f32s>(x + i) * inverse + MAGIC);  // the low bits
        store(to + i, to_u16(numbers & 0xffff));
    }
    return largest / 32767;
}

// Keys that are taken at once. AVX512 is fastest with so few that the processor works on one step of them while it waits
// for the memory of another: one core took a tenth longer than reading alone, and a third with 128.
constexpr int64_t BLOCK = AVX512 ? 32 : 128;
static_assert(BLOCK <= KEYS);  // which scratch memory is for

// A bf16 cache is read as it is: AVX512 has products of bf16, others take pairs of keys' elements as floats, with
// queries in the same order.
#if AVX512
typedef uint16_t Query;
INLINE __m512bh part(const uint16_t* x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE __m512bh query_part(const uint16_t* q, const uint16_t*) { return part(q); }
INLINE f32s multiply_add(f32s sum, __m512bh k, __m512bh q) { return (f32s)_mm512_dpbf16_ps((__m512)sum, k, q); }
#else
typedef float Query;
INLINE Pairs part(const uint16_t* x) { return pairs_of(x); }
INLINE Pairs query_part(const float* q, const uint16_t*) { return {load<f32s>(q), load<f32s>(q + LANES)}; }
INLINE f32s multiply_add(f32s sum, Pairs k, Pairs q) { return sum + k.even * q.even + k.odd * q.odd; }
#endif
INLINE f32s part(const float* x) { return load<f32s>(x); }
INLINE void keep_in_register(Pairs& p) { keep_in_register(p.even), keep_in_register(p.odd); }
INLINE f32s query_part(const float* q, const float*) { return part(q); }
INLINE f32s multiply_add(f32s sum, f32s k, f32s q) { return sum + k * q; }

// Keys of an int8 cache go by queries of 16 bits: products of pairs are added up as integers, which hold those of
// LONGEST elements. The portable version has no such products, and takes them as floats.
constexpr bool READS_INT8 = AVX512 || AVX2;
constexpr int64_t LONGEST = 512;
#if AVX512
INLINE __m512i part(const int8_t* x) { return _mm512_cvtepi8_epi16(load<__m256i>(x)); }
INLINE __m512i query_part(const int16_t* q, const int8_t*) { return _mm512_loadu_si512(q); }
INLINE i32s multiply_add(i32s sum, __m512i k, __m512i q) { return (i32s)_mm512_dpwssd_epi32((__m512i)sum, k, q); }
#elif AVX2
INLINE __m256i part(const int8_t* x) { return _mm256_cvtepi8_epi16(load<__m128i>(x)); }
INLINE __m256i query_part(const int16_t* q, const int8_t*) { return load<__m256i>(q); }
INLINE i32s multiply_add(i32s sum, __m256i k, __m256i q) { return sum + (i32s)_mm256_madd_epi16(k, q); }
#endif

// Elements of a key that are taken at once, and what their products are added up in.
template <class T>
constexpr int STEP = sizeof(T) == 4 ? LANES : 2 * LANES;
template <class T>
struct Sum {
    typedef f32s Type;
};
template <>
struct Sum<int8_t> {
    typedef i32s Type;
};
INLINE f32s as_floats(f32s v) { return v; }
INLINE f32s as_floats(i32s v) { return to_f32(v); }

// Scores, then weights, of BLOCK keys for NQ queries lie as [BLOCK / NK][NQ][NK]: a vector is of NK keys and all queries.
template <int NQ>
constexpr int NK = LANES / NQ;
#if AVX512
#define QUARTER 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3
#elif AVX2
#define QUARTER 0, 1, 0, 1, 0, 1, 0, 1
#else
#define QUARTER 0, 0, 0, 0
#endif

// Scores of `count` keys. Meanwhile the values, which come next, are fetched.
template <int NQ, class Q, class T>
INLINE void scores_of(const Q* q, const T* k, const T* v, int64_t D, int64_t count, float* scores) {
    typedef typename Sum<T>::Type Sums;
    constexpr int N = NK<NQ>, step = STEP<T>, line = 64 / sizeof(T);
    int64_t key = 0;
    for (; key + N <= count; key += N) {
        Sums sums[LANES] = {};
        if constexpr (!AVX512 && N < NQ) {  // the keys stay in registers
            for (int64_t i = 0; i < N * D; i += line) prefetch(v + key * D + i);
            for (int64_t d = 0; d < D; d += step) {
                decltype(part(k)) keys[N];
                UNROLL for (int j = 0; j < N; j++) keys[j] = part(k + (key + j) * D + d);
                UNROLL for (int i = 0; i < NQ; i++) {
                    auto of_query = query_part(q + i * D + d, k);
                    keep_in_register(of_query);
                    UNROLL for (int j = 0; j < N; j++)
                        sums[i * N + j] = multiply_add(sums[i * N + j], keys[j], of_query);
                }
            }
        } else {
            for (int64_t d = 0; d < D; d += step)
                UNROLL for (int j = 0; j < N; j++) {
                    const auto of_key = part(k + (key + j) * D + d);
                    if (d % line == 0) prefetch(v + (key + j) * D + d);
                    UNROLL for (int i = 0; i < NQ; i++)
                        sums[i * N + j] = multiply_add(sums[i * N + j], of_key, query_part(q + i * D + d, k));
                }
        }
        store(scores + key * NQ, as_floats(sum_each(sums)));
    }
    if (key < count) {
        float* to = scores + key * NQ;
        store(to, all(-__builtin_inff()));
        for (int j = 0; key + j < count; j++)
            for (int i = 0; i < NQ; i++) {
                Sums sum = {};
                for (int64_t d = 0; d < D; d += step)
                    sum = multiply_add(sum, part(k + (key + j) * D + d), query_part(q + i * D + d, k));
                to[i * N + j] = sum_lanes(sum);
            }
    }
}

// Scores or weights times the scales of their keys, and of their queries if they are given as one vector.
template <int NQ>
INLINE void multiply_scales(float* scores, int64_t count, const float* of_keys, const float* of_queries) {
    const f32s by_query = of_queries ? load<f32s>(of_queries) : all(1.0f);
    for (int64_t key = 0; key < count; key += NK<NQ>) {
        const f32s keys = load<f32s>(of_keys + key), by_key = NQ == 4 ? SHUFFLE(keys, keys, QUARTER) : keys;
        store(scores + key * NQ, load<f32s>(scores + key * NQ) * (by_key * by_query));
    }
}

// Scores -> exp(score - largest so far); what was summed up before is scaled to the new largest. `largest` and `sum`
// are such vectors too: the same for all keys, and not yet added up over them.
template <int NQ>
INLINE void softmax(float* scores, int64_t count, float scale, float* largest, float* sum, float* out, int64_t D) {
    f32s most = all(-__builtin_inff()), total = {};
    for (int64_t i = 0; i < count * NQ; i += LANES) most = larger(most, load<f32s>(scores + i));
    const f32s before = load<f32s>(largest), now = fold<NK<NQ>>(larger(most * scale, before), larger<f32s>);
    for (int64_t i = 0; i < count * NQ; i += LANES) {
        const f32s weight = exp_negative(load<f32s>(scores + i) * scale - now);
        store(scores + i, weight);
        total += weight;
    }
    float keep[LANES];
    store(keep, exp_negative(before - now));
    store(sum, load<f32s>(sum) * load<f32s>(keep) + total);
    store(largest, now);
    for (int i = 0; i < NQ; i++)
        if (keep[i * NK<NQ>] != 1.0f)
            for (float* at = out + i * D; at < out + (i + 1) * D; at += LANES)
                store(at, load<f32s>(at) * keep[i * NK<NQ>]);
}

// What values are added up in: of bf16 the even columns of a step apart from the odd, which attend puts in order.
INLINE Pairs values_of(const uint16_t* v) { return pairs_of(v); }
INLINE f32s values_of(const float* v) { return load<f32s>(v); }
INLINE f32s values_of(const int8_t* v) { return to_f32(widen(load<i8s>(v))); }
template <class T>
constexpr int COLUMNS = sizeof(T) == 2 ? 2 * LANES : LANES;  // of values that are taken at once
INLINE Pairs add(Pairs sums, Pairs v, float weight) { return {sums.even + v.even * weight, sums.odd + v.odd * weight}; }
INLINE f32s add(f32s sums, f32s v, float weight) { return sums + v * weight; }

// out[NQ, D] += weights times values [count, D], for N steps of columns from d. Meanwhile `next` is fetched.
template <int NQ, int N, class T>
INLINE void add_values(const T* v, const T* next, int64_t D, int64_t d, int64_t count, const float* weights,
                       float* out) {
    constexpr int step = COLUMNS<T>;
    typedef decltype(values_of(v)) Sums;
    Sums sums[NQ][N];
    UNROLL for (int i = 0; i < NQ; i++) UNROLL for (int j = 0; j < N; j++)
        sums[i][j] = load<Sums>(out + i * D + d + step * j);
    const auto add_key = [&](const T* v, const float* weight) INLINE_LAMBDA {
        UNROLL for (int j = 0; j < N; j++) {
            const auto values = values_of(v + d + step * j);
            UNROLL for (int i = 0; i < NQ; i++) sums[i][j] = add(sums[i][j], values, weight[i * NK<NQ>]);
        }
    };
    int64_t key = 0;
    for (; key + NK<NQ> <= count; key += NK<NQ>) {
        const T* fetch = next + d * count + key * N * step;
        UNROLL for (int b = 0; b < NK<NQ> * N * step; b += 64 / sizeof(T)) prefetch(fetch + b);
        UNROLL for (int j = 0; j < NK<NQ>; j++) add_key(v + (key + j) * D, weights + key * NQ + j);
    }
    for (int j = 0; key + j < count; j++) add_key(v + (key + j) * D, weights + key * NQ + j);
    UNROLL for (int i = 0; i < NQ; i++) UNROLL for (int j = 0; j < N; j++)
        store(out + i * D + d + step * j, sums[i][j]);
}

// All columns: as many at once as there are registers for sums, and one step of what remains.
template <int NQ, class T>
INLINE void add_block(const T* v, const T* next, int64_t D, int64_t count, const float* weights, float* out) {
    constexpr int step = COLUMNS<T>, VECTORS = AVX512 ? 4 : NQ == 4 ? 2 : 8;
    constexpr int N = VECTORS * LANES / step;
    int64_t d = 0;
    for (; d + N * step <= D; d += N * step) add_values<NQ, N>(v, next, D, d, count, weights, out);
    for (; d < D; d += step) add_values<NQ, 1>(v, next, D, d, count, weights, out);
}

// Four queries at once, and one by one what remains.
template <class F>
INLINE void for_queries(int64_t G, F f) {
    int64_t g = 0;
    for (; g + 4 <= G; g += 4) f.template operator()<4>(g);
    for (; g < G; g++) f.template operator()<1>(g);
}

struct State {  // of G queries, while their keys go by
    int64_t G;
    float scale;           // of scores
    float cap, cap_scale;  // of scores before that, unless cap is 0
    float* scores;         // [G][BLOCK]
    float *largest, *sum;  // [G][LANES], as softmax has them
    float* out;            // [G][D], as add_values has it
    float* q_scale;        // [G][LANES] like them, of queries in 16 bits
};

// With BLOCK keys of KNOWN_D elements each, known at compile time, it is a fifth faster. Not inlined: the compiler then
// finds registers for each case.
template <int KNOWN_D, class Q, class T>
__attribute__((noinline)) void add_keys(State to, const Q* q, const T* k, const T* v, const T* next, int64_t D,
                                        int64_t count, const float* k_scale, const float* v_scale) {
    constexpr bool QUANTIZED = sizeof(T) == 1;
    if (KNOWN_D) D = KNOWN_D, count = BLOCK;
    float k_scales[BLOCK + LANES], v_scales[BLOCK + LANES];  // those after `count` are of scores of -infinity
    if (QUANTIZED) {
        memcpy(k_scales, k_scale, count * sizeof(float)), memcpy(v_scales, v_scale, count * sizeof(float));
        store(k_scales + count, all(1.0f)), store(v_scales + count, all(1.0f));
    }
    for_queries(to.G, [&]<int NQ>(int64_t g) INLINE_LAMBDA {
        float* scores = to.scores + g * BLOCK;
        scores_of<NQ>(q + g * D, k, v, D, count, scores);
        if (QUANTIZED) multiply_scales<NQ>(scores, count, k_scales, to.q_scale + g * LANES);
        if (to.cap) cap_scores(scores, count * NQ, to.cap_scale, to.cap);
        softmax<NQ>(scores, count, to.scale, to.largest + g * LANES, to.sum + g * LANES, to.out + g * D, D);
        if (QUANTIZED) multiply_scales<NQ>(scores, count, v_scales, nullptr);
    });
    for_queries(to.G, [&]<int NQ>(int64_t g) INLINE_LAMBDA {
        add_block<NQ>(v, next, D, count, to.scores + g * BLOCK, to.out + g * D);
    });
}

void attend(const Attention& a, int64_t q_offset, int64_t kv_offset, int64_t begin, int64_t end, int64_t last,
            float* largest, float* sum, float* out, float* scratch) {
    const auto [q, k, v, k_scale, v_scale, G, D, slots, scale, cap] = a;
    const int64_t padded = round_up(D, 16);
    float* keys = scratch;  // of a block, as floats with zeros after each, where the cache can't be read as it is
    float* values = keys + BLOCK * padded;
    float* queries = values + BLOCK * padded;
    float* scores = queries + G * padded;
    float* lanes = scores + G * BLOCK;
    float* q_scale = lanes + 2 * G * LANES;
    const State to = {G, cap ? 1.0f : scale, cap, scale / cap, scores, lanes, lanes + G * LANES, out, q_scale};
    const bool as_bf16 = k.type == BF16 && D % 32 == 0 && (!AVX512 || q.type == BF16);
    const bool as_float = k.type == F32 && D % 16 == 0;
    const bool as_int8 = READS_INT8 && k.type == I8 && D % (2 * LANES) == 0 && D <= LONGEST;
    for (int64_t g = 0; g < G; g++) {
        to_float(q, q_offset + g * D, D, padded, queries + g * padded);
        if (as_bf16 && !AVX512)
            for (float* at = queries + g * padded; at < queries + (g + 1) * padded; at += 2 * LANES)
                store(at, split(load<f32s>(at), load<f32s>(at + LANES)));
        store(to.largest + g * LANES, all(-__builtin_inff())), store(to.sum + g * LANES, f32s{});
    }
    int16_t* words = (int16_t*)queries;
    if (as_int8)
        for_queries(G, [&]<int NQ>(int64_t g) INLINE_LAMBDA {
            for (int i = 0; i < NQ; i++) {
                const float unit = quantize(queries + (g + i) * D, D, words + (g + i) * D);
                for (int j = 0; j < NK<NQ>; j++) q_scale[g * LANES + i * NK<NQ> + j] = unit;
            }
        });
    const Query* pairs = AVX512 ? (const Query*)q.data + q_offset : (const Query*)queries;
    memset(out, 0, G * padded * sizeof(float));
    int64_t slot = begin % slots;
    for (int64_t first = begin, count; first < end; first += count) {
        count = smaller(smaller(BLOCK, end - first), slots - slot);
        const int64_t offset = kv_offset + slot * D;
        slot = slot + count == slots ? 0 : slot + count;
        // While one of K and V is worked on, memory delivers the other.
        const int64_t next = first + count < last ? kv_offset + slot * D : offset;
        if (as_bf16) {
            const uint16_t *k16 = (const uint16_t*)k.data, *v16 = (const uint16_t*)v.data;
            const int64_t known = count == BLOCK ? D : 0;
            const auto add = known == 64    ? add_keys<64, Query, uint16_t>
                             : known == 128 ? add_keys<128, Query, uint16_t>
                                            : add_keys<0, Query, uint16_t>;
            add(to, pairs, k16 + offset, v16 + offset, k16 + next, D, count, nullptr, nullptr);
        } else if (as_float) {
            const float *k32 = (const float*)k.data, *v32 = (const float*)v.data;
            add_keys<0>(to, queries, k32 + offset, v32 + offset, k32 + next, D, count, nullptr, nullptr);
        } else if (as_int8) {
#if AVX512 || AVX2
            const int8_t *k8 = (const int8_t*)k.data, *v8 = (const int8_t*)v.data;
            const int64_t known = count == BLOCK ? D : 0, at = offset / D;
            const auto add = known == 64    ? add_keys<64, int16_t, int8_t>
                             : known == 128 ? add_keys<128, int16_t, int8_t>
                                            : add_keys<0, int16_t, int8_t>;
            add(to, words, k8 + offset, v8 + offset, k8 + next, D, count, k_scale + at, v_scale + at);
#endif
        } else {
            for (int64_t j = 0; j < count; j++) {
                const int64_t from = offset + j * D;
                if (k.type == I8) {
                    dequantize((const int8_t*)k.data + from, k_scale[from / D], D, padded, keys + j * padded);
                    dequantize((const int8_t*)v.data + from, v_scale[from / D], D, padded, values + j * padded);
                } else {
                    to_float(k, from, D, padded, keys + j * padded);
                    to_float(v, from, D, padded, values + j * padded);
                }
            }
            add_keys<0>(to, queries, keys, values, keys, padded, count, nullptr, nullptr);
        }
    }
    for_queries(G, [&]<int NQ>(int64_t g) INLINE_LAMBDA {
        const f32s sums = fold<NK<NQ>>(load<f32s>(to.sum + g * LANES), plus<f32s>);
        for (int i = 0; i < NQ; i++)
            largest[g + i] = to.largest[g * LANES + i * NK<NQ>], sum[g + i] = sums[i * NK<NQ>];
    });
    if (as_bf16)
        for (float* at = out; at < out + G * D; at += 2 * LANES) join(load<Pairs>(at), at);
}

void combine(const Attention& a, const float* out, int64_t step, int64_t count, int64_t g, float sink, void* y,
             int64_t offset, float* scratch) {
    const int64_t padded = round_up(a.D, 16);
    const float *scores = out + a.G * padded + g, *sums = scores + a.G;  // of the first; -infinity and 0 without keys
    float largest = sink, *values = scratch;
    for (int64_t i = 0; i < count; i++) largest = larger(largest, scores[i * step]);
    if (largest == -__builtin_inff()) largest = 0;
    float total = exp_negative(all(sink - largest))[0];
    memset(values, 0, padded * sizeof(float));
    for (int64_t first = 0; first < count; first += LANES) {
        const int64_t some = smaller(LANES, count - first);
        float shares[LANES] = {};
        for (int64_t i = 0; i < some; i++) shares[i] = scores[(first + i) * step] - largest;
        store(shares, exp_negative(load<f32s>(shares)));
        for (int64_t i = 0; i < some; i++) {
            const float* part = out + (first + i) * step + g * padded;
            total += shares[i] * sums[(first + i) * step];
            for (int64_t d = 0; d < padded; d += LANES)
                store(values + d, load<f32s>(values + d) + load<f32s>(part + d) * shares[i]);
        }
    }
    for (int64_t d = 0; d < a.D; d += LANES) {
        const f32s value = total == 0 ? f32s{} : load<f32s>(values + d) / total;
        store_lanes(y, a.q.type, offset + d, value, a.D - d);
    }
}

}  // namespace
}  // namespace brisk

extern "C" __attribute__((visibility("default"))) const brisk::AttentionKernels brisk_attention = {brisk::attend,
                                                                                                 brisk::combine};
