// The ops of this folder on CPUs, but for those of cpu_linear_ops.cpp, cpu_lora_ops.cpp and cpu_ranks.cpp. The work
// itself is done by the kernels in cpu_attention.cpp and cpu_prefill.cpp.

#include <cmath>
#include <numeric>
#include <utility>

#include "cpu_ops.h"

namespace brisk {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Attention

// What both ops of attention ask of queries [B, S, H, D] and of their options.
void check_queries(const Tensor& query, const Tensor& input_pos, const std::optional<int64_t>& window,
                   const OptionalTensor& sinks, const std::optional<double>& scale, double softcap) {
    const int64_t B = query.size(0), S = query.size(1), H = query.size(2);
    STD_TORCH_CHECK(input_pos.scalar_type() == ScalarType::Long && input_pos.dim() == 2 && input_pos.size(0) == B &&
                        input_pos.size(1) == S,
                    "input_pos: expected int64 [", B, ", ", S, "], got ", shape_of(input_pos));
    STD_TORCH_CHECK(!window.has_value() || *window > 0, "window: expected 1 or more, got ", window.value_or(0));
    STD_TORCH_CHECK(!sinks.has_value() || (sinks->dim() == 1 && sinks->size(0) == H), "sinks: expected [", H, "]");
    STD_TORCH_CHECK(scale.value_or(1) > 0 && softcap >= 0, "expected scale > 0 and softcap >= 0, got ",
                    scale.value_or(1), " and ", softcap);
}

// An optional int64 [B], for which others stand where it is not given.
std::vector<int64_t> numbers_of(const OptionalTensor& tensor, const char* name, std::vector<int64_t> otherwise) {
    if (!tensor.has_value()) return otherwise;
    const int64_t B = otherwise.size();
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long && tensor->dim() == 1 && tensor->size(0) == B, name,
                    ": expected int64 [", B, "]");
    const Tensor numbers = in_order(*tensor);
    const auto* data = (const int64_t*)numbers.const_data_ptr();
    return {data, data + B};
}

// The rows of the caches, of which there are `count`, that the rows of a batch look at.
std::vector<int64_t> cache_rows_of(const OptionalTensor& rows, int64_t B, int64_t count) {
    std::vector<int64_t> own(B);
    std::iota(own.begin(), own.end(), 0);
    const std::vector<int64_t> found = numbers_of(rows, "rows", own);
    for (const int64_t row : found) STD_TORCH_CHECK(row >= 0 && row < count, "rows: there is no row ", row);
    return found;
}

// Keys or values, whose scale is of the right kind: int8 has one for each position and head, others have none.
Vector cache_of(const Tensor& cache, const OptionalTensor& scale, const char* name) {
    const bool quantized = cache.scalar_type() == ScalarType::Char;
    STD_TORCH_CHECK(quantized == scale.has_value(), name, ": expected scales with a cache in int8, and with no other");
    if (!quantized) return vector_of(cache);
    STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float && scale->dim() == 3 &&
                        scale->sizes().equals(cache.sizes().slice(0, 3)),
                    name, ": expected float32 scales for ", shape_of(cache), ", got ", shape_of(*scale));
    return {cache.const_data_ptr(), I8};
}

const float* floats_of(const OptionalTensor& tensor) {
    return tensor.has_value() ? (const float*)tensor->const_data_ptr() : nullptr;
}

// A task is one row, one head of keys and values, and a part of 256 positions; the parts of a row's softmax are put
// together after. Where a part begins depends neither on the threads nor on where a ring wraps around.
Tensor decode_attention(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache, const Tensor& input_pos,
                        std::optional<int64_t> window, const OptionalTensor& sinks, std::optional<double> scale,
                        double softcap, bool ring, const OptionalTensor& rows, const OptionalTensor& k_scale,
                        const OptionalTensor& v_scale) {
    constexpr int64_t PART = 256, FAR = int64_t(1) << 62;
    STD_TORCH_CHECK(query.dim() == 4 && k_cache.dim() == 4 && k_cache.sizes().equals(v_cache.sizes()) &&
                        k_cache.is_contiguous() && v_cache.is_contiguous() &&
                        k_cache.scalar_type() == v_cache.scalar_type(),
                    "expected q [B, S, H, D] and contiguous caches [max_B, KV, T, D] of one type");
    const int64_t B = query.size(0), S = query.size(1), H = query.size(2), D = query.size(3);
    const int64_t KV = k_cache.size(1), T = k_cache.size(2);
    STD_TORCH_CHECK((rows.has_value() || k_cache.size(0) >= B) && k_cache.size(3) == D && KV && H % KV == 0, "q ",
                    shape_of(query), " does not go with caches ", shape_of(k_cache));
    check_queries(query, input_pos, window, sinks, scale, softcap);
    STD_TORCH_CHECK(!ring || (window.has_value() && *window <= T - 1), "ring: expected a window of at most ", T - 1,
                    ", got ", window.value_or(0));
    const Tensor q = in_order(query), pos = in_order(input_pos);
    Tensor y = empty_output(q, D);
    if (!y.numel()) return y;
    const int64_t G = H / KV, padded = round_up(D, 16), row_floats = padded + 2;
    const Vector keys = cache_of(k_cache, k_scale, "k_scale"), values = cache_of(v_cache, v_scale, "v_scale");
    STD_TORCH_CHECK(keys.type != I8 || (k_scale->is_contiguous() && v_scale->is_contiguous()),
                    "expected contiguous scales");
    const Attention work = {vector_of(q), keys, values, floats_of(k_scale), floats_of(v_scale), G, D, ring ? T - 1 : T,
                            float(scale.value_or(1 / std::sqrt(double(D)))), float(softcap)};
    const OptionalTensor sink_floats =
        sinks.has_value() ? OptionalTensor(in_order(torch::stable::to(*sinks, ScalarType::Float))) : std::nullopt;
    const int64_t* at = (const int64_t*)pos.const_data_ptr();
    char* const out = (char*)y.mutable_data_ptr();
    const int64_t cached = k_cache.size(0);
    perform(is_itself(q, query) && is_itself(pos, input_pos), [=] {
        const std::vector<int64_t> cache_rows = cache_rows_of(rows, B, cached);
        const float* sink_data = floats_of(sink_floats);
        // The positions [begin, end) that a query sees.
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
                        attention->attend(work, ((b * S + s) * H + head * G) * D, (cache_rows[b] * KV + head) * T * D,
                                          std::max(begin, keys.begin), std::min(begin + PART, keys.end), keys.end,
                                          out + G * padded, out + G * padded + G, out, (float*)scratch.get());
                    }
                }
            GOMP_barrier();
            const Range rows = share(B * S * H, thread, threads);
            for (int64_t row = rows.begin; row < rows.end; row++) {
                const int64_t rb = row / (S * H), s = row / H % S, head = row % H / G, g = row % G;
                const int64_t count = first_part[rb + 1] - first_part[rb], task = KV * first_part[rb] + head * count;
                attention->combine(work, part_of(task, s), S * G * row_floats, count, g,
                                   sink_data ? sink_data[row % H] : -INFINITY, out, row * D, (float*)scratch.get());
            }
        });
    });
    return y;
}

// A task is some tokens of one row and a head of keys. The longest come first, so that all threads end together.
Tensor prefill_attention(const Tensor& query, const Tensor& k, const Tensor& v, const Tensor& input_pos,
                         const OptionalTensor& first_pos, std::optional<int64_t> window, const OptionalTensor& sinks,
                         std::optional<double> scale, double softcap, const OptionalTensor& rows,
                         const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
    // Queries of a task, about: the more, the less often a block of keys is packed; but all threads need tasks.
    constexpr int64_t LEAST = 128, MOST = 512;
    const bool alike = query.dim() == 4 && k.dim() == 4 && k.sizes().equals(v.sizes()) && k.stride(3) == 1 &&
                       k.strides().equals(v.strides()) && k.scalar_type() == v.scalar_type();
    STD_TORCH_CHECK(alike, "expected q [B, S, H, D], k and v [max_B, KV, L, D] of one type and layout, D together");
    const int64_t B = query.size(0), S = query.size(1), H = query.size(2), D = query.size(3);
    const int64_t KV = k.size(1), L = k.size(2);
    STD_TORCH_CHECK((rows.has_value() || k.size(0) >= B) && k.size(3) == D && KV && H % KV == 0, "q ",
                    shape_of(query), " does not go with k ", shape_of(k));
    check_queries(query, input_pos, window, sinks, scale, softcap);
    const std::vector<int64_t> cache_rows = cache_rows_of(rows, B, k.size(0));
    const std::vector<int64_t> starts = numbers_of(first_pos, "first_pos", std::vector<int64_t>(B));
    const Vector key_data = cache_of(k, k_scale, "k_scale"), value_data = cache_of(v, v_scale, "v_scale");
    const bool quantized = key_data.type == I8;
    STD_TORCH_CHECK(!quantized || k_scale->strides().equals(v_scale->strides()), "expected scales of one layout");
    const Tensor q = in_order(query), pos = in_order(input_pos);
    Tensor y = empty_output(q, D);
    if (!y.numel()) return y;
    const Tensor sink_floats = sinks.has_value() ? in_order(torch::stable::to(*sinks, ScalarType::Float)) : q;
    const float* sink_data = sinks.has_value() ? (const float*)sink_floats.const_data_ptr() : nullptr;

    const int64_t* at = (const int64_t*)pos.const_data_ptr();
    std::vector<Range> seen(B * S);
    for (int64_t b = 0; b < B; b++) {
        const int64_t start = starts[b];
        for (int64_t s = 0; s < S; s++) {
            const int64_t from = window.has_value() ? at[b * S + s] - *window + 1 : 0;
            const int64_t end = std::min(std::max<int64_t>(at[b * S + s] - start, -1), L - 1) + 1;
            seen[b * S + s] = {std::clamp<int64_t>(std::max<int64_t>(from, 0) - start, 0, end), end};
        }
    }
    struct Task {
        int64_t b, head, begin, end, keys;
    };
    const int64_t G = H / KV, some = B * S * H / (4 * torch::stable::get_num_threads());
    const int64_t most = std::max<int64_t>(std::clamp(some, LEAST, MOST) / G, 1), blocks = (S + most - 1) / most;
    std::vector<Task> tasks;
    for (int64_t b = 0; b < B; b++)
        for (int64_t block = 0; block < blocks; block++) {
            const Range part = share(S, block, blocks);
            int64_t keys = 0;
            for (int64_t s = part.begin; s < part.end; s++) keys += seen[b * S + s].end - seen[b * S + s].begin;
            for (int64_t head = 0; head < KV; head++) tasks.push_back({b, head, part.begin, part.end, keys});
        }
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.keys > y.keys; });

    const Prefill work = {vector_of(q), key_data, value_data, floats_of(k_scale), floats_of(v_scale),
                          quantized ? k_scale->stride(2) : 0, G, D, H * D, k.stride(2),
                          float(scale.value_or(1 / std::sqrt(double(D)))), float(softcap)};
    std::atomic<size_t> next{0};
    parallel([&](int, int) {
        const Memory scratch = allocate(prefill->scratch(most * G, D) * 4);
        for (size_t i = next++; i < tasks.size(); i = next++) {
            const auto [b, head, begin, end, keys] = tasks[i];
            const auto place = [&, row = cache_rows[b], head = head](const Tensor& x) {
                return row * x.stride(0) + head * x.stride(1);
            };
            prefill->attend(work, ((b * S + begin) * H + head * G) * D, place(k), quantized ? place(*k_scale) : 0,
                            end - begin, seen.data() + b * S + begin, sink_data ? sink_data + head * G : nullptr,
                            y.mutable_data_ptr(), (float*)scratch.get());
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
                                                                 const brisk::Bf16Kernels* bf16,
                                                                 const brisk::AttentionKernels* attention,
                                                                 const brisk::PrefillKernels* prefill,
                                                                 const brisk::LoraKernels* lora,
                                                                 const brisk::GemmKernels* gemm) {
    brisk::linear = linear, brisk::bf16 = bf16, brisk::attention = attention, brisk::prefill = prefill;
    brisk::lora = lora, brisk::gemm_kernels = gemm;
}

STABLE_TORCH_LIBRARY_IMPL(brisk, CPU, m) {
    m.impl("decode_attention", TORCH_BOX(&brisk::decode_attention));
    m.impl("prefill_attention", TORCH_BOX(&brisk::prefill_attention));
    m.impl("reach", TORCH_BOX(&brisk::reach));
}
