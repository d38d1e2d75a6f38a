// The ops of this folder on CPUs: checks and threads. The work itself is done by the kernels in cpu_linear.cpp
// and cpu_attention.cpp.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu.h"

// GCC's OpenMP functions, which every OpenMP library has that PyTorch comes with. For `#pragma omp` clang would call
// those of its own library, and the one of GNU, with which most builds of PyTorch come, lacks them.
extern "C" {
int omp_in_parallel();
int omp_get_thread_num();
int omp_get_num_threads();
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier();
}

namespace brisk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Of the instruction set that build.py chose.
const LinearKernels* linear = nullptr;
const AttentionKernels* attention = nullptr;

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

Type type_of(ScalarType type) {
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                    "expected float32, float16 or bfloat16");
    return type == ScalarType::Float ? F32 : type == ScalarType::Half ? F16 : BF16;
}

std::string shape_of(const Tensor& tensor) {
    std::string text = "[";
    for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
    return text + "]";
}

Vector vector_of(const Tensor& tensor) { return {tensor.const_data_ptr(), type_of(tensor.scalar_type())}; }

Vector bias_of(const OptionalTensor& bias, int64_t n) {
    if (!bias.has_value()) return {nullptr, F32};
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n && bias->is_contiguous(), "bias: expected [", n, "], got ",
                    shape_of(*bias));
    return vector_of(*bias);
}

Tensor in_order(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
typedef std::unique_ptr<char, Free> Memory;

Memory allocate(int64_t bytes) {
    Memory memory((char*)std::aligned_alloc(64, round_up(bytes + 1, 64)));
    STD_TORCH_CHECK(memory != nullptr, "not enough memory: ", bytes, " bytes");
    return memory;
}

// Runs work(thread, threads) on PyTorch's own threads.
template <class Work>
void parallel(const Work& work) {
    const bool in_team = omp_in_parallel();  // a team of its own then, of one: its barriers are not those around it
    const int threads = in_team ? 1 : torch::stable::get_num_threads();
    if (threads == 1 && !in_team) return work(0, 1);
    const auto run = [](void* work) { (*(const Work*)work)(omp_get_thread_num(), omp_get_num_threads()); };
    GOMP_parallel(run, (void*)&work, threads, 0);
}

struct Range {
    int64_t begin, end;
};

// Part number `part` of parts of nearly equal size.
Range share(int64_t total, int64_t part, int64_t parts) { return {total * part / parts, total * (part + 1) / parts}; }

// Work for threads to take as they get ready: one that is held up, by another process say, takes less of it. The parts
// get smaller (guided self-scheduling), so that all threads end at nearly the same time.
class Queue {
   public:
    explicit Queue(int64_t total) : total(total), parts(PARTS * torch::stable::get_num_threads()) {}

    // The next part of the work, empty when there is none left.
    Range take() {
        int64_t begin = next.load(std::memory_order_relaxed), end;
        do {
            end = begin + (total - begin + parts - 1) / parts;
        } while (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return {begin, end};
    }

   private:
    static constexpr int64_t PARTS = 2;  // of what is left, for each thread
    const int64_t total, parts;
    std::atomic<int64_t> next{0};
};

// Contiguous, like x but for the last size.
Tensor empty_output(const Tensor& x, int64_t n) {
    constexpr int64_t MOST = 64;
    const int64_t dims = x.dim();
    STD_TORCH_CHECK(dims <= MOST, "expected at most ", MOST, " dimensions");
    int64_t sizes[MOST], strides[MOST], stride = 1;
    for (int64_t i = dims - 1; i >= 0; i--) {
        sizes[i] = i == dims - 1 ? n : x.size(i);
        strides[i] = stride;
        stride *= sizes[i];
    }
    AtenTensorHandle y;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, (int32_t)x.scalar_type(), 0, -1, &y));
    return Tensor(y);
}

// ---------------------------------------------------------------------------------------------------------------------
// Quantized linear

// x [..., K] times a packed weight. All threads quantize the activations together, then each takes its panels.
Tensor linear_quantized(const Tensor& input, Weight w, const OptionalTensor& bias) {
    STD_TORCH_CHECK(w.k > 0, "x: expected at least one column");
    const Tensor x = in_order(input);
    Tensor y = empty_output(x, w.n);
    const int64_t rows = x.numel() / w.k, panels = (w.n + PANEL - 1) / PANEL;
    if (!rows || !w.n) return y;
    const int64_t padded_k = w.bits == 8 ? round_up(w.k, 16) : w.groups * w.group;
    const LinearKernels& kernels = *linear;
    const Vector bias_vector = bias_of(bias, w.n), x_vector = vector_of(x);
    const int64_t starts = round_up(padded_k, 32) / 32;  // of a row, at most
    Memory q = allocate(rows * padded_k), scale = allocate(rows * w.groups * 4), start = allocate(rows * starts * 4);
    const int64_t tiles = (rows + kernels.tile_rows - 1) / kernels.tile_rows;
    const auto activations = [&](Range rows_of_tile) {
        const int64_t first = rows_of_tile.begin;
        return Activations{(int8_t*)q.get() + first * padded_k, (float*)scale.get() + first * w.groups,
                           (int32_t*)start.get() + first * starts};
    };
    char* out = (char*)y.mutable_data_ptr();
    const auto quantize = [&](Range units) {  // groups of all rows, one row after the other
        for (int64_t i = 0; i < tiles; i++) {
            const Range r = share(rows, i, tiles);
            for (int64_t row = r.begin; row < r.end; row++) {
                const int64_t begin = std::max<int64_t>(units.begin - row * w.groups, 0);
                const int64_t end = std::min<int64_t>(units.end - row * w.groups, w.groups);
                if (begin < end)
                    kernels.quantize(w, x_vector, row, begin, end, r.end - r.begin, row - r.begin, activations(r));
            }
        }
    };
    Queue queue(panels);
    parallel([&](int thread, int threads) {
        quantize(share(rows * w.groups, thread, threads));
        GOMP_barrier();
        // Of several tiles all take a panel before the next: it comes from memory once.
        const int64_t step = tiles == 1 ? panels : 1;
        for (Range mine = queue.take(); mine.begin < mine.end; mine = queue.take())
            for (int64_t panel = mine.begin; panel < mine.end; panel += step)
                for (int64_t i = 0; i < tiles; i++) {
                    const Range r = share(rows, i, tiles);
                    kernels.linear_quantized(w, activations(r), r.end - r.begin, panel, smaller(panel + step, mine.end),
                                             bias_vector, x_vector.type,
                                             out + r.begin * w.n * size_of(x_vector.type));
                }
    });
    return y;
}

void check_packed(const Tensor& packed, const Weight& w, int64_t panel_bytes) {
    const int64_t panels = (w.n + PANEL - 1) / PANEL;
    STD_TORCH_CHECK(
        packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == panels * panel_bytes,
        "packed: expected ", panels * panel_bytes, " bytes for [", w.n, ", ", w.k, "], got ", packed.numel());
}

void check_group(int64_t group) {
    STD_TORCH_CHECK(group == 32 || group == 64 || group == 128, "groupsize: expected 32, 64 or 128, got ", group);
}

Tensor linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptionalTensor& bias) {
    STD_TORCH_CHECK(scales.dim() == 1 && scales.scalar_type() == ScalarType::Float && scales.is_contiguous(),
                    "scales: expected float32 [N]");
    const int64_t k = x.size(-1);
    Weight w{};
    w.packed = (const uint8_t*)packed.const_data_ptr(), w.scales = scales.const_data_ptr();
    w.bits = 8, w.n = scales.size(0), w.k = k, w.group = ACT_GROUP, w.groups = (k + ACT_GROUP - 1) / ACT_GROUP;
    w.panel_bytes = PANEL * round_up(k, 16);
    check_packed(packed, w, w.panel_bytes);
    return linear_quantized(x, w, bias);
}

Tensor linear_int8_grouped(const Tensor& x, const Tensor& packed, const Tensor& scales, int64_t n, int64_t group,
                           const OptionalTensor& bias) {
    const int64_t k = x.size(-1), panels = (n + PANEL - 1) / PANEL;
    check_group(group);
    STD_TORCH_CHECK(k % group == 0 && scales.dim() == 3 && scales.size(0) == panels && scales.size(1) == k / group &&
                        scales.size(2) == PANEL && scales.is_contiguous(),
                    "expected whole groups of ", group, " columns and scales [", panels, ", ", k / group, ", ", PANEL,
                    "], got ", k, " columns and scales ", shape_of(scales));
    Weight w{};
    w.packed = (const uint8_t*)packed.const_data_ptr(), w.scales = scales.const_data_ptr();
    w.scale_type = type_of(scales.scalar_type()), w.grouped = true;
    w.bits = 8, w.n = n, w.k = k, w.group = group, w.groups = k / group, w.panel_bytes = PANEL * k;
    check_packed(packed, w, w.panel_bytes);
    return linear_quantized(x, w, bias);
}

Tensor linear_int4(const Tensor& x, const Tensor& packed, int64_t n, int64_t group, ScalarType scale_type,
                   int64_t zero, const OptionalTensor& bias) {
    check_group(group);
    STD_TORCH_CHECK(zero >= ZERO_FLOATS && zero <= 16, "zero: expected -2 to 16, got ", zero);
    Weight w{};
    w.packed = (const uint8_t*)packed.const_data_ptr(), w.bits = 4, w.n = n, w.k = x.size(-1), w.group = group;
    w.groups = (w.k + group - 1) / group, w.scale_type = type_of(scale_type), w.zero = zero;
    const int64_t zero_bytes = zero == ZERO_BYTES ? 1 : zero == ZERO_FLOATS ? 4 : 0;
    w.group_bytes = round_up(PANEL * (group / 2 + size_of(w.scale_type) + zero_bytes), 64);
    w.panel_bytes = w.groups * w.group_bytes;
    check_packed(packed, w, w.panel_bytes);
    return linear_quantized(x, w, bias);
}

// ---------------------------------------------------------------------------------------------------------------------
// bf16 linear

// Rows from which on a GEMM is faster: oneDNN's, where that has products of bf16, and our own elsewhere.
constexpr int64_t MANY_PRODUCTS = 17, MANY_FLOATS = 32;

Tensor onednn_gemm(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
    StableIValue stack[3] = {torch::stable::detail::from(x), torch::stable::detail::from(w),
                             torch::stable::detail::from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

// All threads make the tiles of x together, then each takes its columns of y.
void gemm(const uint16_t* x, const uint16_t* w, int64_t n, int64_t k, int64_t rows, Vector bias, void* y) {
    const int64_t tiles = (rows + GEMM_ROWS - 1) / GEMM_ROWS;
    const Memory tiles_memory = allocate(tiles * GEMM_ROWS * k * 4);
    float* floats = (float*)tiles_memory.get();
    Queue queue((n + GEMM_COLUMNS - 1) / GEMM_COLUMNS);
    parallel([&](int thread, int threads) {
        const Memory scratch = allocate(gemm_scratch(rows) * 4);
        const Range mine = share(tiles, thread, threads);
        for (int64_t row = mine.begin * GEMM_ROWS; row < smaller(rows, mine.end * GEMM_ROWS); row += GEMM_ROWS)
            linear->gemm_tile(x, k, rows, row, floats);
        GOMP_barrier();
        for (Range part = queue.take(); part.begin < part.end; part = queue.take())
            for (int64_t block = part.begin; block < part.end; block++)
                linear->gemm(w, n, k, floats, rows, block * GEMM_COLUMNS, bias, y, (float*)scratch.get());
    });
}

Tensor linear_bf16(const Tensor& input, const Tensor& w, const OptionalTensor& bias) {
    const int64_t k = input.size(-1);
    STD_TORCH_CHECK(input.scalar_type() == ScalarType::BFloat16 && w.scalar_type() == ScalarType::BFloat16 &&
                        w.dim() == 2 && w.size(1) == k && w.is_contiguous(),
                    "expected bfloat16 x and a contiguous bfloat16 weight [N, ", k, "], got ", shape_of(w));
    const LinearKernels& kernels = *linear;
    const int64_t n = w.size(0), rows = k ? input.numel() / k : 0;
    const bool many = rows >= (kernels.bf16_products ? MANY_PRODUCTS : MANY_FLOATS);
    if (!rows || !n || (many && kernels.bf16_products)) return onednn_gemm(input, w, bias);
    const Tensor x = in_order(input);
    Tensor y = empty_output(x, n);
    const Vector bias_vector = bias_of(bias, n);
    const auto* x_data = (const uint16_t*)x.const_data_ptr();
    if (many) {
        gemm(x_data, (const uint16_t*)w.const_data_ptr(), n, k, rows, bias_vector, y.mutable_data_ptr());
        return y;
    }
    const int64_t stride = kernels.bf16_products ? k : round_up(k, 32), size = kernels.bf16_products ? 2 : 4;
    const Memory floats = kernels.bf16_products ? nullptr : allocate(rows * stride * size);
    const char* data = floats ? floats.get() : (const char*)x_data;
    const int64_t tiles = (rows + kernels.bf16_tile_rows - 1) / kernels.bf16_tile_rows;
    constexpr int64_t BLOCK = 16;  // rows of w for all rows of x before the next: the second time they are in the cache
    Queue queue((n + BLOCK - 1) / BLOCK);
    parallel([&](int thread, int threads) {
        if (floats) {
            const Range mine = share(rows, thread, threads);
            for (int64_t i = 0; i < tiles; i++) {
                const Range r = share(rows, i, tiles);
                for (int64_t row = std::max(r.begin, mine.begin); row < std::min(r.end, mine.end); row++)
                    kernels.to_floats(x_data + row * k, k, r.end - r.begin, row - r.begin,
                                      (float*)floats.get() + r.begin * stride);
            }
            GOMP_barrier();
        }
        for (Range mine = queue.take(); mine.begin < mine.end; mine = queue.take())
            for (int64_t block = mine.begin; block < mine.end; block++)
                for (int64_t i = 0; i < tiles; i++) {
                    const Range r = share(rows, i, tiles);
                    kernels.linear_bf16((const uint16_t*)w.const_data_ptr(), n, k, data + r.begin * stride * size,
                                        r.end - r.begin, block * BLOCK, smaller(n, block * BLOCK + BLOCK),
                                        bias_vector, (char*)y.mutable_data_ptr() + r.begin * n * 2);
                }
    });
    return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention

// A task is one row, one head of keys and values, and a part of 256 positions; the parts of a row's softmax are put
// together after. Where a part begins depends neither on the threads nor on where a ring wraps around.
Tensor decode_attention(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache, const Tensor& input_pos,
                        std::optional<int64_t> window, const OptionalTensor& sinks, std::optional<double> scale,
                        double softcap, bool ring) {
    constexpr int64_t PART = 256, FAR = int64_t(1) << 62;
    STD_TORCH_CHECK(query.dim() == 4 && k_cache.dim() == 4 && k_cache.sizes().equals(v_cache.sizes()) &&
                        k_cache.is_contiguous() && v_cache.is_contiguous() &&
                        k_cache.scalar_type() == v_cache.scalar_type(),
                    "expected q [B, S, H, D] and contiguous caches [max_B, KV, T, D] of one type");
    const int64_t B = query.size(0), S = query.size(1), H = query.size(2), D = query.size(3);
    const int64_t KV = k_cache.size(1), T = k_cache.size(2);
    STD_TORCH_CHECK(k_cache.size(0) >= B && k_cache.size(3) == D && KV && H % KV == 0, "q ", shape_of(query),
                    " does not go with caches ", shape_of(k_cache));
    STD_TORCH_CHECK(input_pos.scalar_type() == ScalarType::Long && input_pos.dim() == 2 && input_pos.size(0) == B &&
                        input_pos.size(1) == S,
                    "input_pos: expected int64 [", B, ", ", S, "], got ", shape_of(input_pos));
    STD_TORCH_CHECK(!window.has_value() || *window > 0, "window: expected 1 or more, got ", window.value_or(0));
    STD_TORCH_CHECK(!ring || (window.has_value() && *window <= T - 1), "ring: expected a window of at most ", T - 1,
                    ", got ", window.value_or(0));
    STD_TORCH_CHECK(!sinks.has_value() || (sinks->dim() == 1 && sinks->size(0) == H), "sinks: expected [", H, "]");
    STD_TORCH_CHECK(scale.value_or(1) > 0 && softcap >= 0, "expected scale > 0 and softcap >= 0, got ",
                    scale.value_or(1), " and ", softcap);
    const Tensor q = in_order(query), pos = in_order(input_pos);
    Tensor y = empty_output(q, D);
    if (!y.numel()) return y;
    const int64_t G = H / KV, padded = round_up(D, 16), row_floats = padded + 2;
    const Attention work = {vector_of(q), vector_of(k_cache), vector_of(v_cache), G, D, ring ? T - 1 : T,
                            float(scale.value_or(1 / std::sqrt(double(D)))), float(softcap)};
    const Tensor sink_floats = sinks.has_value() ? in_order(torch::stable::to(*sinks, ScalarType::Float)) : q;
    const float* sink_data = sinks.has_value() ? (const float*)sink_floats.const_data_ptr() : nullptr;

    // The positions [begin, end) that a query sees.
    const int64_t* at = (const int64_t*)pos.const_data_ptr();
    const auto keys_of = [&](int64_t b, int64_t s) {
        const int64_t next = std::min(at[b * S + s], FAR) + 1, end = std::max<int64_t>(next, 0);
        return Range{window.has_value() ? std::max<int64_t>(next - *window, 0) : 0, ring ? end : std::min(end, T)};
    };
    // Where the parts begin that any query of a row of the batch sees, row after row. Not all from the first to the
    // last: of a row's queries one may be padding, at any position.
    std::vector<int64_t> parts, first_part(B + 1, 0);
    std::vector<Range> seen(S);
    for (int64_t b = 0; b < B; b++) {
        for (int64_t s = 0; s < S; s++) seen[s] = keys_of(b, s);
        std::sort(seen.begin(), seen.end(), [](Range a, Range b) { return a.begin < b.begin; });
        int64_t begin = 0;
        for (const Range& keys : seen)
            for (begin = std::max(begin, keys.begin / PART * PART); begin < keys.end; begin += PART)
                parts.push_back(begin);
        first_part[b + 1] = parts.size();
    }
    // Of each task and query: the sum of values, the largest score, the sum of weights.
    Memory partial = allocate(KV * first_part[B] * S * G * row_floats * 4);
    const auto part_of = [&](int64_t task, int64_t s) {
        return (float*)partial.get() + (task * S + s) * G * row_floats;
    };
    Queue queue(KV * first_part[B]);
    parallel([&](int thread, int threads) {
        Memory scratch = allocate(attend_scratch(G, D) * 4);
        int64_t b = 0;
        for (Range tasks = queue.take(); tasks.begin < tasks.end; tasks = queue.take())
            for (int64_t task = tasks.begin; task < tasks.end; task++) {
                while (task >= KV * first_part[b + 1]) b++;
                const int64_t count = first_part[b + 1] - first_part[b], i = task - KV * first_part[b];
                const int64_t head = i / count, begin = parts[first_part[b] + i % count];
                for (int64_t s = 0; s < S; s++) {
                    const Range keys = keys_of(b, s);
                    float* out = part_of(task, s);
                    attention->attend(work, ((b * S + s) * H + head * G) * D, (b * KV + head) * T * D,
                                      std::max(begin, keys.begin), std::min(begin + PART, keys.end), keys.end,
                                      out + G * padded, out + G * padded + G, out, (float*)scratch.get());
                }
            }
        GOMP_barrier();
        const Range rows = share(B * S * H, thread, threads);
        for (int64_t row = rows.begin; row < rows.end; row++) {
            const int64_t rb = row / (S * H), s = row / H % S, head = row % H / G, g = row % G;
            const int64_t count = first_part[rb + 1] - first_part[rb], task = KV * first_part[rb] + head * count;
            float* sum = (float*)scratch.get();
            const float sink = sink_data ? sink_data[row % H] : -INFINITY;
            float largest = sink;
            for (int64_t i = 0; i < count; i++) largest = std::max(largest, part_of(task + i, s)[G * padded + g]);
            float weight = sink_data ? std::exp(sink - largest) : 0;
            std::fill(sum, sum + padded, 0.0f);
            for (int64_t i = 0; i < count; i++) {
                const float* part = part_of(task + i, s);
                if (part[G * padded + G + g] == 0) continue;  // this query sees none of these keys
                const float share = std::exp(part[G * padded + g] - largest);
                weight += share * part[G * padded + G + g];
                for (int64_t d = 0; d < padded; d++) sum[d] += share * part[g * padded + d];
            }
            for (int64_t d = 0; d < D; d++) sum[d] = weight == 0 ? 0 : sum[d] / weight;
            attention->from_float(sum, D, work.q.type, y.mutable_data_ptr(), row * D);
        }
    });
    return y;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling: up to where the smallest numbers of a row reach a weight

// Floats that are not negative have the order of their bits, of which the first 12 are a bin.
constexpr int SHIFT = 20, BINS = 1 << 12;

uint32_t bits_of(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

// One pass over all numbers finds the bin in which the weight is reached, and only what is in that is sorted.
float reach_row(const float* numbers, const float* weights, int64_t n, float limit) {
    if (limit == INFINITY) return INFINITY;
    double bins[BINS] = {}, below = 0;
    for (int64_t i = 0; i < n; i++) bins[bits_of(numbers[i]) >> SHIFT] += weights ? weights[i] : 1.0;
    uint32_t bin = 0;
    for (; bin < BINS && (bins[bin] == 0 || below + bins[bin] < limit); bin++) below += bins[bin];
    if (bin == BINS) return INFINITY;
    std::vector<std::pair<float, float>> inside;
    for (int64_t i = 0; i < n; i++)
        if (bits_of(numbers[i]) >> SHIFT == bin) inside.emplace_back(numbers[i], weights ? weights[i] : 1.0f);
    std::sort(inside.begin(), inside.end());
    for (const auto& [number, weight] : inside)
        if ((below += weight) >= limit) return number;
    return inside.back().first;
}

Tensor reach(const Tensor& numbers, const std::optional<Tensor>& weights, const Tensor& limit) {
    const int64_t n = numbers.size(numbers.dim() - 1), rows = n ? numbers.numel() / n : 0;
    const auto is_float = [](const Tensor& x) { return x.scalar_type() == ScalarType::Float; };
    STD_TORCH_CHECK(rows > 0 && is_float(numbers) && is_float(limit) && limit.numel() == rows &&
                        (!weights || (is_float(*weights) && weights->numel() == numbers.numel())),
                    "reach: expected float32 numbers [..., N], weights like them and a limit [..., 1]");
    const Tensor dense = in_order(numbers), limits = in_order(limit);
    const Tensor weighed = in_order(weights.value_or(numbers));
    Tensor found = torch::stable::empty_like(limits);
    const float *from = (const float*)dense.const_data_ptr(), *by = (const float*)weighed.const_data_ptr();
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            ((float*)found.mutable_data_ptr())[row] = reach_row(
                from + row * n, weights ? by + row * n : nullptr, n, ((const float*)limits.const_data_ptr())[row]);
    });
    return found;
}

}  // namespace
}  // namespace brisk

extern "C" __attribute__((visibility("default"))) void brisk_use(const brisk::LinearKernels* linear,
                                                                 const brisk::AttentionKernels* attention) {
    brisk::linear = linear, brisk::attention = attention;
}

STABLE_TORCH_LIBRARY_IMPL(brisk, CPU, m) {
    m.impl("linear_bf16", TORCH_BOX(&brisk::linear_bf16));
    m.impl("linear_int8", TORCH_BOX(&brisk::linear_int8));
    m.impl("linear_int8_grouped", TORCH_BOX(&brisk::linear_int8_grouped));
    m.impl("linear_int4", TORCH_BOX(&brisk::linear_int4));
    m.impl("decode_attention", TORCH_BOX(&brisk::decode_attention));
    m.impl("reach", TORCH_BOX(&brisk::reach));
}
