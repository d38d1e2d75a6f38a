// Linear layers of bfloat16 weights on CPUs, for few rows: at the speed of memory. For many there is cpu_gemm.cpp.

#include "cpu_vector.h"

namespace brisk {
namespace {

constexpr int BF16_ROWS = 6, STEP = 2 * LANES;  // rows of x at once, k at once
// A step is read in PARTS. Without products of bf16, these are the numbers at even k, then those at odd k, as floats.
#if AVX512
constexpr bool BF16_PRODUCTS = true;
constexpr int PARTS = 1;
typedef uint16_t Activation;
typedef __m512bh Part;
INLINE Part weights(const uint16_t* w, int) { return (__m512bh)_mm512_loadu_si512(w); }
INLINE Part activations(const uint16_t* x, int) { return weights(x, 0); }
INLINE f32s multiply_add(f32s sum, Part w, Part x) { return (f32s)_mm512_dpbf16_ps((__m512)sum, w, x); }
INLINE int64_t place(int64_t k, int r, int, int64_t row) { return r * row + k; }
constexpr auto to_floats = nullptr;
#else
constexpr bool BF16_PRODUCTS = false;
constexpr int PARTS = 2;
typedef float Activation;
typedef f32s Part;
INLINE Part weights(const uint16_t* w, int part) {
    const Pairs both = pairs_of(w);
    return part ? both.odd : both.even;
}
INLINE Part activations(const float* x, int part) { return load<f32s>(x + part * LANES); }
INLINE f32s multiply_add(f32s sum, Part w, Part x) { return sum + w * x; }
INLINE int64_t place(int64_t k, int r, int R, int64_t) { return k * R + r * STEP; }  // in the order of reading

void to_floats(const uint16_t* x, int64_t k, int R, int r, float* to) {
    for (int64_t i = 0; i < k; i += STEP) {
        const Pairs p = split(load_lanes({x, BF16}, i, k - i), load_lanes({x, BF16}, i + LANES, k - i - LANES));
        store(to + place(i, r, R, 0), p.even), store(to + place(i, r, R, 0) + LANES, p.odd);
    }
}
#endif

// NW rows of w times R rows of x: w is read once from memory and each value used R times. y is [R, 16].
template <int NW, int R>
void bf16_tile(const uint16_t* w, int64_t k, const Activation* x, float* y) {
    f32s sums[R][NW] = {};
    // A step: of weights, and of activations from i on, in rows that are so long.
    const auto add = [&](const uint16_t* w, int64_t row, const Activation* x, int64_t i) INLINE_LAMBDA {
        UNROLL for (int p = 0; p < PARTS; p++) {
            Part ws[NW];
            UNROLL for (int j = 0; j < NW; j++) ws[j] = weights(w + j * row, p);
            UNROLL for (int r = 0; r < R; r++) {
                Part xs = activations(x + place(i, r, R, row), p);
                if constexpr (NW > 1) keep_in_register(xs);
                UNROLL for (int j = 0; j < NW; j++) sums[r][j] = multiply_add(sums[r][j], ws[j], xs);
            }
        }
    };
    int64_t i = 0;
    for (; i + STEP <= k; i += STEP) {
        // What is needed later lies further in these rows, or at the beginning of those after them.
        const int64_t ahead = i + AHEAD / 2 < k ? i + AHEAD / 2 : i + AHEAD / 2 + (NW - 1) * k;
        add(w + i, k, x, i);
        UNROLL for (int j = 0; j < NW; j++) prefetch(w + j * k + ahead);
    }
    if (i < k) {  // with zeros from k on
        uint16_t last_w[NW * STEP] = {};
        for (int j = 0; j < NW; j++) memcpy(last_w + j * STEP, w + j * k + i, 2 * (k - i));
        if constexpr (BF16_PRODUCTS) {
            uint16_t last_x[R * STEP] = {};
            for (int r = 0; r < R; r++) memcpy(last_x + r * STEP, x + r * k + i, 2 * (k - i));
            add(last_w, STEP, last_x, 0);
        } else {
            add(last_w, STEP, x, i);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < NW; j++) y[r * 16 + j] = sum_lanes(sums[r][j]);
}

template <int R>
void bf16_rows(const uint16_t* w, int64_t n, int64_t k, const Activation* x, int64_t begin, int64_t end, Vector bias,
               char* const* out) {
    constexpr int NW = AVX512 ? (R <= 2 ? 8 : 4) : (R == 1 ? 4 : 2);  // as many as there are registers for
    for (int64_t first = begin; first < end; first += 16) {
        const int64_t count = smaller(16, end - first);
        float y[R * 16] = {};
        int64_t j = 0;
        for (; j + NW <= count; j += NW) bf16_tile<NW, R>(w + (first + j) * k, k, x, y + j);
        for (; j < count; j++) bf16_tile<1, R>(w + (first + j) * k, k, x, y + j);
        for (int64_t i = 0; i < count; i += LANES) {
            const f32s add = bias.data ? load_lanes(bias, first + i, count - i) : f32s{};
            for (int r = 0; r < R; r++)
                store_lanes(out[r], BF16, first + i, load<f32s>(y + 16 * r + i) + add, count - i);
        }
    }
}

template <int R>
void bf16_any(const uint16_t* w, int64_t n, int64_t k, const Activation* x, int rows, int64_t begin, int64_t end,
              Vector bias, char* const* y) {
    if (rows == R)
        bf16_rows<R>(w, n, k, x, begin, end, bias, y);
    else if constexpr (R < BF16_ROWS)
        bf16_any<R + 1>(w, n, k, x, rows, begin, end, bias, y);
}

void linear(const uint16_t* w, int64_t n, int64_t k, const void* x, int R, int64_t begin, int64_t end, Vector bias,
            char* const* y) {
    bf16_any<1>(w, n, k, (const Activation*)x, R, begin, end, bias, y);
}

}  // namespace
}  // namespace brisk

extern "C" __attribute__((visibility("default"))) const brisk::Bf16Kernels brisk_bf16 = {
    brisk::BF16_ROWS, brisk::BF16_PRODUCTS, brisk::to_floats, brisk::linear};
