// The linear ops on CPUs: of one weight, and of experts, where each row of x goes through some of many weights. The
// work itself is done by the kernels in cpu_linear.cpp, cpu_bf16.cpp and cpu_gemm.cpp.

#include <cstring>

#include "cpu_rows.h"

namespace brisk {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Many rows

// Takes the batches of as many rows off the end of all, and gives them to work(batch).
template <class Work>
void take_large(Rows& rows, int64_t many, const Work& work) {
    for (; !rows.batches.empty() && rows.batches.back().size() >= many; rows.batches.pop_back())
        work(rows.batches.back());
}

// The rows of a batch times w. All threads pack the rows together, then take blocks of columns.
void gemm_rows(Vector x, const Weight& w, const Rows& rows, const Batch& batch, Vector bias) {
    const GemmKernels& kernels = *gemm_kernels;
    const int64_t count = batch.size(), tiles = (count + kernels.tile_rows - 1) / kernels.tile_rows;
    // Of few columns less in a block, so that all threads have some.
    const int64_t part = round_up(w.n / (4 * torch::stable::get_num_threads()), PANEL);
    const int64_t columns = smaller(kernels.columns(count), std::max(part, PANEL));
    const Memory packed = allocate(kernels.packed_bytes(count, w.k));
    Queue queue((w.n + columns - 1) / columns);
    parallel([&](int thread, int threads) {
        const Memory scratch = allocate(kernels.scratch_bytes(count));
        const Range mine = share(tiles, thread, threads);
        for (int64_t tile = mine.begin; tile < mine.end; tile++)
            kernels.pack((const uint16_t*)x.data, rows.from.data() + batch.begin, w.k, count,
                         tile * kernels.tile_rows, packed.get());
        GOMP_barrier();
        for (Range part = queue.take(); part.begin < part.end; part = queue.take())
            for (int64_t column = part.begin * columns; column < smaller(w.n, part.end * columns); column += columns)
                kernels.multiply(w, packed.get(), count, column, smaller(w.n, column + columns), bias,
                                 rows.to.data() + batch.begin, scratch.get());
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Quantized weights

// Of experts, one after the other.
struct Weights {
    Weight first;
    int64_t experts, packed_bytes, scales_bytes;  // of one

    Weight operator[](int64_t expert) const {
        Weight w = first;
        w.packed += expert * packed_bytes;
        if (w.scales) w.scales = (const char*)w.scales + expert * scales_bytes;
        return w;
    }
};

constexpr int64_t CACHED = 1 << 18;  // bytes of a weight that stay in the second level cache

// Each row times the weight of its expert. All threads quantize the activations together, then take panels.
void linear_rows(Vector x, const Weights& weights, const Rows& rows, Vector bias) {
    const Weight& w = weights.first;
    const auto kernels_of = [](const Batch& batch) -> const LinearKernels& {
        return linear->those_of_many && batch.size() >= linear->many ? *linear->those_of_many : *linear;
    };
    const int64_t panels = (w.n + PANEL - 1) / PANEL, padded_k = w.bits == 8 ? round_up(w.k, 32) : w.groups * w.group;
    const int64_t starts = padded_k / 32;  // of a row, at most
    const bool one_input = rows.one_input();
    const int64_t inputs = one_input ? 1 : rows.batches.back().end;
    Memory q = allocate(inputs * padded_k), scale = allocate(inputs * w.groups * 4);
    Memory start = allocate(inputs * starts * 4);
    const auto activations = [&](Range tile) {
        const int64_t first = one_input ? 0 : tile.begin;
        return Activations{(int8_t*)q.get() + first * padded_k, (float*)scale.get() + first * w.groups,
                           (int32_t*)start.get() + first * starts};
    };
    const auto quantize = [&](Range units) {  // groups of all inputs, one row after the other
        for (const Batch& batch : rows.batches) {
            const LinearKernels& kernels = kernels_of(batch);
            each_tile(batch, kernels.tile_rows, [&](Range tile) {
                for (int64_t row = tile.begin; row < tile.end; row++) {
                    const int64_t begin = std::max<int64_t>(units.begin - row * w.groups, 0);
                    const int64_t end = std::min<int64_t>(units.end - row * w.groups, w.groups);
                    if (begin < end)
                        kernels.quantize(w, x, rows.from[row], begin, end, tile.end - tile.begin,
                                         row - tile.begin, activations(tile));
                }
            });
        }
    };
    Queue queue(rows.batches.size() * panels);
    parallel([&](int thread, int threads) {
        quantize(share(inputs * w.groups, thread, threads));
        GOMP_barrier();
        take_parts(queue, rows.batches, panels, [&](const Batch& batch, Range mine) {
            const Weight weight = weights[batch.expert];
            const Vector add = bias_of(bias, batch.expert, w.n);
            const LinearKernels& kernels = kernels_of(batch);
            // Of several tiles all take some panels before the next: these come from memory once.
            const int64_t some = std::max<int64_t>(1, CACHED / w.panel_bytes);
            const int64_t step = batch.size() <= kernels.tile_rows ? panels : some;
            for (int64_t panel = mine.begin; panel < mine.end; panel += step)
                each_tile(batch, kernels.tile_rows, [&](Range tile) {
                    kernels.linear_quantized(weight, activations(tile), tile.end - tile.begin, panel,
                                             smaller(panel + step, mine.end), add, x.type,
                                             rows.to.data() + tile.begin);
                });
        });
    });
}

// x [..., K] times one weight, or x [R, 1 or k, K] times those of the chosen experts.
Tensor linear_quantized(const Tensor& input, const Weights& weights, const OptionalTensor& chosen,
                        const OptionalTensor& bias) {
    const Weight& w = weights.first;
    STD_TORCH_CHECK(w.k > 0, "x: expected at least one column");
    const Tensor x = in_order(input);
    const OptionalTensor ids = in_order(chosen);
    const Tensor y = ids.has_value() ? empty_experts_output(x, *ids, w.n) : empty_output(x, w.n);
    const Vector added = bias_of(bias, w.n, ids.has_value() ? weights.experts : 0);
    if (!y.numel()) return y;
    const Places places = places_of(x, ids, y);
    perform(is_itself(x, input) && is_itself(ids, chosen), [=] {
        Rows rows = rows_of(places, weights.experts);
        if (gemm_kernels && gemm_kernels->many_quantized && places.x.type == BF16)
            take_large(rows, gemm_kernels->many_quantized, [&](const Batch& batch) {
                gemm_rows(places.x, weights[batch.expert], rows, batch, bias_of(added, batch.expert, weights.first.n));
            });
        if (!rows.batches.empty()) linear_rows(places.x, weights, rows, added);
    });
    return y;
}

void check_packed(const Tensor& packed, const Weights& weights) {
    const int64_t expected = weights.experts * weights.packed_bytes;
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == expected,
                    "packed: expected ", expected, " bytes for ", weights.experts, " weights [", weights.first.n, ", ",
                    weights.first.k, "], got ", packed.numel());
}

void check_group(int64_t group) {
    STD_TORCH_CHECK(group == 32 || group == 64 || group == 128, "groupsize: expected 32, 64 or 128, got ", group);
}

// Each of the ops is for one weight, and with another dimension before the others for experts.
Tensor int8(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptionalTensor& chosen,
            const OptionalTensor& bias) {
    const int64_t experts = chosen.has_value();
    STD_TORCH_CHECK(
        scales.dim() == 1 + experts && scales.scalar_type() == ScalarType::Float && scales.is_contiguous(),
        "scales: expected float32 ", experts ? "[E, N]" : "[N]");
    Weight w{};
    w.packed = (const uint8_t*)packed.const_data_ptr(), w.scales = scales.const_data_ptr();
    w.bits = 8, w.n = scales.size(-1), w.k = x.size(-1);
    w.group = ACT_GROUP, w.groups = (w.k + ACT_GROUP - 1) / ACT_GROUP, w.panel_bytes = PANEL * round_up(w.k, 16);
    const int64_t panels = (w.n + PANEL - 1) / PANEL;
    const Weights weights{w, experts ? scales.size(0) : 1, panels * w.panel_bytes, w.n * 4};
    check_packed(packed, weights);
    return linear_quantized(x, weights, chosen, bias);
}

Tensor int8_grouped(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptionalTensor& chosen,
                    int64_t n, int64_t group, const OptionalTensor& bias) {
    const int64_t experts = chosen.has_value(), k = x.size(-1), panels = (n + PANEL - 1) / PANEL;
    check_group(group);
    STD_TORCH_CHECK(k % group == 0 && scales.dim() == 3 + experts && scales.size(-3) == panels &&
                        scales.size(-2) == k / group && scales.size(-1) == PANEL && scales.is_contiguous(),
                    "expected whole groups of ", group, " columns and scales [", experts ? "E, " : "", panels, ", ",
                    k / group, ", ", PANEL, "], got ", k, " columns and scales ", shape_of(scales));
    Weight w{};
    w.packed = (const uint8_t*)packed.const_data_ptr(), w.scales = scales.const_data_ptr();
    w.scale_type = type_of(scales.scalar_type()), w.grouped = true;
    w.bits = 8, w.n = n, w.k = k, w.group = group, w.groups = k / group, w.panel_bytes = PANEL * k;
    const Weights weights{w, experts ? scales.size(0) : 1, panels * w.panel_bytes,
                          panels * w.groups * PANEL * size_of(w.scale_type)};
    check_packed(packed, weights);
    return linear_quantized(x, weights, chosen, bias);
}

Tensor int4(const Tensor& x, const Tensor& packed, const OptionalTensor& chosen, int64_t n, int64_t group,
            ScalarType scale_type, int64_t zero, const OptionalTensor& bias) {
    check_group(group);
    STD_TORCH_CHECK(zero >= FP4 && zero <= 16, "zero: expected -3 to 16, got ", zero);
    STD_TORCH_CHECK(zero != FP4 || (group == 32 && scale_type == ScalarType::BFloat16),
                    "expected 4-bit floats in groups of 32 with bfloat16 scales, got groups of ", group);
    Weight w{};
    w.packed = (const uint8_t*)packed.const_data_ptr(), w.bits = 4, w.n = n, w.k = x.size(-1), w.group = group;
    w.groups = (w.k + group - 1) / group, w.scale_type = type_of(scale_type), w.zero = zero;
    const int64_t zero_bytes = zero == ZERO_BYTES ? 1 : zero == ZERO_FLOATS ? 4 : 0;
    w.group_bytes = round_up(PANEL * (group / 2 + size_of(w.scale_type) + zero_bytes), 64);
    w.panel_bytes = w.groups * w.group_bytes;
    const Weights weights{w, chosen.has_value() ? packed.size(0) : 1, (n + PANEL - 1) / PANEL * w.panel_bytes, 0};
    check_packed(packed, weights);
    return linear_quantized(x, weights, chosen, bias);
}

Tensor linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptionalTensor& bias) {
    return int8(x, packed, scales, std::nullopt, bias);
}

Tensor linear_int8_experts(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& chosen,
                           const OptionalTensor& bias) {
    return int8(x, packed, scales, chosen, bias);
}

Tensor linear_int8_grouped(const Tensor& x, const Tensor& packed, const Tensor& scales, int64_t n, int64_t group,
                           const OptionalTensor& bias) {
    return int8_grouped(x, packed, scales, std::nullopt, n, group, bias);
}

Tensor linear_int8_grouped_experts(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& chosen,
                                   int64_t n, int64_t group, const OptionalTensor& bias) {
    return int8_grouped(x, packed, scales, chosen, n, group, bias);
}

Tensor linear_int4(const Tensor& x, const Tensor& packed, int64_t n, int64_t group, ScalarType scale_type,
                   int64_t zero, const OptionalTensor& bias) {
    return int4(x, packed, std::nullopt, n, group, scale_type, zero, bias);
}

Tensor linear_int4_experts(const Tensor& x, const Tensor& packed, const Tensor& chosen, int64_t n, int64_t group,
                           ScalarType scale_type, int64_t zero, const OptionalTensor& bias) {
    return int4(x, packed, chosen, n, group, scale_type, zero, bias);
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights of floats

// Rows from which on a GEMM is faster.
int64_t many_rows(ScalarType type) {
    constexpr int64_t MANY_OF_PYTORCH = 17;
    return type != ScalarType::BFloat16 ? 1 : gemm_kernels ? gemm_kernels->many_bf16 : MANY_OF_PYTORCH;
}

Tensor aten_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
    StableIValue stack[3] = {torch::stable::detail::from(x), torch::stable::detail::from(w),
                             torch::stable::detail::from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

// bf16 [N, K] from w on.
Weight weight_of(const uint16_t* w, int64_t n, int64_t k) {
    Weight weight{};
    weight.packed = (const uint8_t*)w, weight.bits = 16, weight.n = n, weight.k = k;
    return weight;
}

// Batches of few rows each, times weights [N, K] that follow one another at w.
void bf16_rows(Vector input, const uint16_t* w, int64_t n, int64_t k, const Rows& rows, Vector bias) {
    const Bf16Kernels& kernels = *bf16;
    const auto* x = (const uint16_t*)input.data;
    const std::vector<Batch>& batches = rows.batches;
    const bool one_input = rows.one_input();
    const int64_t inputs = one_input ? 1 : batches.back().end;
    const int64_t stride = kernels.products ? k : round_up(k, 32), size = kernels.products ? 2 : 4;
    // With products, rows that follow one another in x are read where they are.
    const auto in_place = [&](Range tile) {
        bool consecutive = kernels.products;
        for (int64_t row = tile.begin; row < tile.end; row++)
            consecutive &= rows.from[row] - rows.from[tile.begin] == row - tile.begin;
        return consecutive;
    };
    bool all_in_place = true;
    for (const Batch& batch : batches)
        each_tile(batch, kernels.tile_rows, [&](Range tile) { all_in_place &= in_place(tile); });
    const Memory memory = all_in_place ? nullptr : allocate(inputs * stride * size);
    const auto activations = [&](Range tile) {
        return in_place(tile) ? (char*)(x + rows.from[tile.begin] * k)
                              : memory.get() + (one_input ? 0 : tile.begin * stride * size);
    };
    const auto prepare = [&](const Batch& batch, Range mine) {
        each_tile(batch, kernels.tile_rows, [&](Range tile) {
            if (in_place(tile)) return;
            for (int64_t row = std::max(tile.begin, mine.begin); row < std::min(tile.end, mine.end); row++) {
                const uint16_t* from = x + rows.from[row] * k;
                const int64_t r = row - tile.begin;
                if (kernels.products)
                    memcpy(activations(tile) + r * stride * size, from, k * size);
                else
                    kernels.to_floats(from, k, tile.end - tile.begin, r, (float*)activations(tile));
            }
        });
    };
    constexpr int64_t BLOCK = 16;  // rows of w for all rows of x before the next: the second time they are in the cache
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    Queue queue(batches.size() * blocks);
    parallel([&](int thread, int threads) {
        if (!all_in_place) {
            for (const Batch& batch : batches) prepare(batch, share(inputs, thread, threads));
            GOMP_barrier();
        }
        take_parts(queue, batches, blocks, [&](const Batch& batch, Range mine) {
            const Vector add = bias_of(bias, batch.expert, n);
            for (int64_t block = mine.begin; block < mine.end; block++)
                each_tile(batch, kernels.tile_rows, [&](Range tile) {
                    kernels.linear(w + batch.expert * n * k, n, k, activations(tile), tile.end - tile.begin,
                                   block * BLOCK, smaller(n, block * BLOCK + BLOCK), add,
                                   rows.to.data() + tile.begin);
                });
        });
    });
}

// The rows of a batch, gathered in one matrix, by PyTorch's GEMM.
void aten_rows(Vector x, const Tensor& w, const Rows& rows, const Batch& batch, const OptionalTensor& bias) {
    const int64_t count = batch.size(), size = size_of(x.type);
    const int64_t in_bytes = w.size(1) * size, out_bytes = w.size(0) * size;
    const Tensor gathered = empty({count, w.size(1)}, w.scalar_type());
    const char* from = (const char*)x.data;
    char* to = (char*)gathered.mutable_data_ptr();
    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            memcpy(to + i * in_bytes, from + rows.from[batch.begin + i] * in_bytes, in_bytes);
    });
    const Tensor y = aten_linear(gathered, w, bias);
    const char* result = (const char*)y.const_data_ptr();
    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) memcpy(rows.to[batch.begin + i], result + i * out_bytes, out_bytes);
    });
}

Tensor linear_bf16(const Tensor& input, const Tensor& w, const OptionalTensor& bias) {
    const int64_t k = input.size(-1);
    STD_TORCH_CHECK(input.scalar_type() == ScalarType::BFloat16 && w.scalar_type() == ScalarType::BFloat16 &&
                        w.dim() == 2 && w.size(1) == k && w.is_contiguous(),
                    "expected bfloat16 x and a contiguous bfloat16 weight [N, ", k, "], got ", shape_of(w));
    const int64_t n = w.size(0), count = k ? input.numel() / k : 0;
    const bool many = count >= many_rows(ScalarType::BFloat16);
    if (!count || !n || (many && !gemm_kernels)) return aten_linear(input, w, bias);
    const Tensor x = in_order(input), y = empty_output(x, n);
    const auto* data = (const uint16_t*)w.const_data_ptr();
    const Vector added = bias_of(bias, n);
    const Places places = places_of(x, std::nullopt, y);
    perform(is_itself(x, input), [=] {
        const Rows rows = rows_of(places, 1);
        if (many)
            gemm_rows(places.x, weight_of(data, n, k), rows, rows.batches[0], added);
        else
            bf16_rows(places.x, data, n, k, rows, added);
    });
    return y;
}

Tensor linear_experts(const Tensor& input, const Tensor& w, const Tensor& chosen, const OptionalTensor& bias) {
    const int64_t k = input.size(-1);
    STD_TORCH_CHECK(input.scalar_type() == w.scalar_type() && w.dim() == 3 && w.size(2) == k && k > 0 &&
                        w.is_contiguous(),
                    "expected x and a contiguous weight [E, N, ", k, "] of one type, got ", shape_of(w));
    const int64_t experts = w.size(0), n = w.size(1);
    const Tensor x = in_order(input), ids = in_order(chosen), y = empty_experts_output(x, ids, n);
    const Vector added = bias_of(bias, n, experts);
    if (!y.numel()) return y;
    const bool is_bf16 = w.scalar_type() == ScalarType::BFloat16;
    const int64_t many = many_rows(w.scalar_type());
    const auto* data = (const uint16_t*)w.const_data_ptr();
    const Places places = places_of(x, ids, y);
    perform(is_itself(x, input) && is_itself(ids, chosen), [=] {
        Rows rows = rows_of(places, experts);
        take_large(rows, many, [&](const Batch& batch) {
            if (is_bf16 && gemm_kernels)
                return gemm_rows(places.x, weight_of(data + batch.expert * n * k, n, k), rows, batch,
                                 bias_of(added, batch.expert, n));
            const auto of_expert = [&](const Tensor& all) { return torch::stable::select(all, 0, batch.expert); };
            aten_rows(places.x, of_expert(w), rows, batch,
                      bias.has_value() ? OptionalTensor(of_expert(*bias)) : std::nullopt);
        });
        if (!rows.batches.empty()) bf16_rows(places.x, data, n, k, rows, added);
    });
    return y;
}

// The layers and what adapters add to them.

Tensor adapted(const Tensor& y, const Tensor& x, const Tensor& adapters, const Tensor& slots) {
    add_low_rank(y, x, adapters, slots);
    return y;
}

Tensor linear_bf16_lora(const Tensor& x, const Tensor& w, const OptionalTensor& bias, const Tensor& adapters,
                        const Tensor& slots) {
    return adapted(linear_bf16(x, w, bias), x, adapters, slots);
}

Tensor linear_int8_lora(const Tensor& x, const Tensor& packed, const Tensor& scales, const OptionalTensor& bias,
                        const Tensor& adapters, const Tensor& slots) {
    return adapted(linear_int8(x, packed, scales, bias), x, adapters, slots);
}

Tensor linear_int8_grouped_lora(const Tensor& x, const Tensor& packed, const Tensor& scales, int64_t n, int64_t group,
                                const OptionalTensor& bias, const Tensor& adapters, const Tensor& slots) {
    return adapted(linear_int8_grouped(x, packed, scales, n, group, bias), x, adapters, slots);
}

Tensor linear_int4_lora(const Tensor& x, const Tensor& packed, int64_t n, int64_t group, ScalarType scale_type,
                        int64_t zero, const OptionalTensor& bias, const Tensor& adapters, const Tensor& slots) {
    return adapted(linear_int4(x, packed, n, group, scale_type, zero, bias), x, adapters, slots);
}

}  // namespace
}  // namespace brisk

STABLE_TORCH_LIBRARY_IMPL(brisk, CPU, m) {
    m.impl("linear_bf16", TORCH_BOX(&brisk::linear_bf16));
    m.impl("linear_int8", TORCH_BOX(&brisk::linear_int8));
    m.impl("linear_int8_grouped", TORCH_BOX(&brisk::linear_int8_grouped));
    m.impl("linear_int4", TORCH_BOX(&brisk::linear_int4));
    m.impl("linear_bf16_lora", TORCH_BOX(&brisk::linear_bf16_lora));
    m.impl("linear_int8_lora", TORCH_BOX(&brisk::linear_int8_lora));
    m.impl("linear_int8_grouped_lora", TORCH_BOX(&brisk::linear_int8_grouped_lora));
    m.impl("linear_int4_lora", TORCH_BOX(&brisk::linear_int4_lora));
    m.impl("linear_experts", TORCH_BOX(&brisk::linear_experts));
    m.impl("linear_int8_experts", TORCH_BOX(&brisk::linear_int8_experts));
    m.impl("linear_int8_grouped_experts", TORCH_BOX(&brisk::linear_int8_grouped_experts));
    m.impl("linear_int4_experts", TORCH_BOX(&brisk::linear_int4_experts));
}
