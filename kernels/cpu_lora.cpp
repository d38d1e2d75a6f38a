// The low-rank parts of linear layers on CPUs: products with A, which has few rows, and with B, which has few columns.

#include "cpu_vector.h"

namespace brisk {
namespace {

constexpr int SHRINK_ROWS = AVX512 ? 3 : 1, EXPAND_ROWS = AVX512 ? 4 : 1;  // rows of x at once, as registers allow

template <Type W>
INLINE f32s weights(const char* from, int64_t i) {
    if constexpr (W == F32) return load<f32s>((const float*)from + i);
    const u16s v = load<u16s>((const uint16_t*)from + i);
    return W == BF16 ? from_bf16(v) : from_f16(v);
}

template <Type W, int R>
void shrink_rows(const char* a, Vector x, int64_t k, Range range, const int64_t* rows, float* u, int64_t stride) {
    f32s sums[R][LORA_RANKS] = {};
    for (int64_t i = range.begin; i < range.end; i += 16, a += LORA_RANKS * 16 * size_of(W)) {
        for (int64_t line = 0; line < LORA_RANKS * 16 * size_of(W); line += 64) prefetch(a + AHEAD + line);
        UNROLL for (int lane = 0; lane < 16; lane += LANES) {
            f32s xs[R];
            UNROLL for (int r = 0; r < R; r++) xs[r] = load_lanes(x, rows[r] * k + i + lane, k - i - lane);
            UNROLL for (int j = 0; j < LORA_RANKS; j++) {
                const f32s w = weights<W>(a, j * 16 + lane);
                UNROLL for (int r = 0; r < R; r++) sums[r][j] += w * xs[r];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < LORA_RANKS; j++) u[rows[r] * stride + j] = sum_lanes(sums[r][j]);
}

template <Type W, int R>
void expand_rows(const char* b, int64_t ranks, const float* u, int64_t stride, Vector y, int64_t n, Range columns,
                 const int64_t* rows) {
    constexpr int VECTORS = LORA_PANEL / LANES;
    f32s sums[R][VECTORS] = {};
    const float* us[R];  // of each row
    for (int r = 0; r < R; r++) us[r] = u + rows[r] * stride;
    for (int64_t j = 0; j < ranks; j++, b += LORA_PANEL * size_of(W)) {
        for (int64_t line = 0; line < LORA_PANEL * size_of(W); line += 64) prefetch(b + AHEAD + line);
        UNROLL for (int i = 0; i < VECTORS; i++) {
            const f32s w = weights<W>(b, i * LANES);
            UNROLL for (int r = 0; r < R; r++) sums[r][i] += w * us[r][j];
        }
    }
    UNROLL for (int i = 0; i < VECTORS; i++) {
        const int64_t at = columns.begin + i * LANES, count = columns.end - at;
        for (int r = 0; r < R && count > 0; r++) {
            const f32s sum = load_lanes(y, rows[r] * n + at, count) + sums[r][i];
            store_lanes((void*)y.data, y.type, rows[r] * n + at, sum, count);
        }
    }
}

template <Type W>
void shrink_any(const char* a, Vector x, int64_t k, Range range, const int64_t* rows, int64_t count, float* u,
                int64_t stride) {
    int64_t i = 0;
    for (; i + SHRINK_ROWS <= count; i += SHRINK_ROWS) shrink_rows<W, SHRINK_ROWS>(a, x, k, range, rows + i, u, stride);
    for (; i < count; i++) shrink_rows<W, 1>(a, x, k, range, rows + i, u, stride);
}

template <Type W>
void expand_any(const char* b, int64_t ranks, const float* u, int64_t stride, Vector y, int64_t n, Range columns,
                const int64_t* rows, int64_t count) {
    for (; columns.begin < columns.end; columns.begin += LORA_PANEL, b += ranks * LORA_PANEL * size_of(W)) {
        int64_t i = 0;
        for (; i + EXPAND_ROWS <= count; i += EXPAND_ROWS)
            expand_rows<W, EXPAND_ROWS>(b, ranks, u, stride, y, n, columns, rows + i);
        for (; i < count; i++) expand_rows<W, 1>(b, ranks, u, stride, y, n, columns, rows + i);
    }
}

void shrink(Vector a, Vector x, int64_t k, Range range, const int64_t* rows, int64_t count, float* u, int64_t stride) {
    const auto work = a.type == F32 ? shrink_any<F32> : a.type == BF16 ? shrink_any<BF16> : shrink_any<F16>;
    work((const char*)a.data, x, k, range, rows, count, u, stride);
}

void expand(Vector b, int64_t ranks, const float* u, int64_t stride, Vector y, int64_t n, Range columns,
            const int64_t* rows, int64_t count) {
    const auto work = b.type == F32 ? expand_any<F32> : b.type == BF16 ? expand_any<BF16> : expand_any<F16>;
    work((const char*)b.data, ranks, u, stride, y, n, columns, rows, count);
}

}  // namespace
}  // namespace brisk

extern "C" __attribute__((visibility("default"))) const brisk::LoraKernels brisk_lora = {brisk::shrink, brisk::expand};
