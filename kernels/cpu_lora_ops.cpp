// The op that adds the low-rank parts of adapters to the output of a linear layer on CPUs. The work itself is done by
// the kernels in cpu_lora.cpp.

#include <cstring>

#include "cpu_ops.h"

namespace brisk {
namespace {

struct Part {  // of an adapter, what adds to the columns [begin, end) of y
    Range columns;
    int64_t first_panel, panels;  // of B
};

struct Group {  // rows of x that go through the same part of the same adapter
    int64_t slot, part, first_panel;  // the latter among those of all groups
    float scale;
    const std::vector<int64_t>* rows;
};

std::vector<Part> parts_of(const Tensor& columns, int64_t count, int64_t n, int64_t panels) {
    STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Long && columns.is_contiguous() &&
                        columns.numel() == 2 * count,
                    "lora: expected int64 columns [", count, ", 2], got ", shape_of(columns));
    const auto* ends = (const int64_t*)columns.const_data_ptr();
    std::vector<Part> parts(count);
    int64_t next_panel = 0, next_column = 0;
    for (int64_t i = 0; i < count; i++) {
        const Range range = {ends[2 * i], ends[2 * i + 1]};
        STD_TORCH_CHECK(next_column <= range.begin && range.begin <= range.end && range.end <= n, "lora: a part from ",
                        range.begin, " to ", range.end, " of ", n, " columns, after ", next_column);
        parts[i] = {range, next_panel, (range.end - range.begin + LORA_PANEL - 1) / LORA_PANEL};
        next_panel += parts[i].panels, next_column = range.end;
    }
    STD_TORCH_CHECK(next_panel == panels, "lora: expected ", next_panel, " panels of B, got ", panels);
    return parts;
}

// y [B, ..., N] and x [B, ..., K] of a batch whose row b has the adapter slots[b], or none if that is negative; a, b,
// columns: see kernels/lora.py. A part with a scale of 0 is passed over.
Tensor low_rank(const Tensor& output, const Tensor& input, const Tensor& a, const Tensor& b, const Tensor& scales,
                const Tensor& slots, const Tensor& columns) {
    const Tensor y = in_order(output), x = in_order(input);
    const int64_t batch = x.size(0), k = x.size(-1), n = y.size(-1), count = k ? x.numel() / k : 0;
    STD_TORCH_CHECK(y.size(0) == batch && y.numel() == count * n, "lora: y ", shape_of(y), " does not go with x ",
                    shape_of(x));
    STD_TORCH_CHECK(a.dim() == 6 && b.dim() == 4 && a.is_contiguous() && b.is_contiguous() &&
                        a.scalar_type() == b.scalar_type() && a.size(0) == b.size(0) &&
                        a.size(2) * LORA_RANKS == b.size(2) && a.size(3) * 16 == round_up(k, 16) &&
                        a.size(4) == LORA_RANKS && a.size(5) == 16 && b.size(3) == LORA_PANEL,
                    "lora: A ", shape_of(a), " and B ", shape_of(b), " do not go with x ", shape_of(x));
    const int64_t adapters = a.size(0), part_count = a.size(1), blocks = a.size(2), ranks = b.size(2);
    STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() && scales.dim() == 2 &&
                        scales.size(0) == adapters && scales.size(1) == part_count,
                    "lora: expected scales float32 [", adapters, ", ", part_count, "], got ", shape_of(scales));
    STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Long && slots.is_contiguous() && slots.numel() >= batch,
                    "lora: expected int64 slots of ", batch, " rows, got ", shape_of(slots));
    const std::vector<Part> parts = parts_of(columns, part_count, n, b.size(1));
    const Tensor result = torch::stable::empty_like(y);
    if (!y.numel()) return result;

    const auto* slot_data = (const int64_t*)slots.const_data_ptr();
    const auto* scale_data = (const float*)scales.const_data_ptr();
    const auto slot_of = [&](int64_t row) { return slot_data[row * batch / count]; };
    const auto scale_of = [&](int64_t slot, int64_t part) { return scale_data[slot * part_count + part]; };
    std::vector<std::vector<int64_t>> rows(adapters);
    for (int64_t row = 0; row < count; row++) {
        STD_TORCH_CHECK(slot_of(row) < adapters, "lora: there is no adapter ", slot_of(row));
        if (slot_of(row) >= 0) rows[slot_of(row)].push_back(row);
    }
    std::vector<Group> groups;
    int64_t panels = 0;
    for (int64_t slot = 0; slot < adapters; slot++)
        for (int64_t i = 0; i < part_count && !rows[slot].empty(); i++)
            if (scale_of(slot, i) != 0) {
                groups.push_back({slot, i, panels, scale_of(slot, i), &rows[slot]});
                panels += parts[i].panels;
            }

    const Vector x_vector = vector_of(x), y_vector = vector_of(y);
    const auto numbers = [](const Tensor& of, int64_t i) {
        const Vector all = vector_of(of);
        return Vector{(const char*)all.data + i * size_of(all.type), all.type};
    };
    const auto copy = [&](int64_t row) {  // what no part adds to
        const int64_t slot = slot_of(row), item = size_of(y_vector.type);
        int64_t begin = row * n;
        const auto up_to = [&](int64_t column) {
            const int64_t end = row * n + column;
            memcpy((char*)result.mutable_data_ptr() + begin * item, (const char*)y_vector.data + begin * item,
                   (end - begin) * item);
        };
        for (int64_t i = 0; i < part_count && slot >= 0; i++)
            if (scale_of(slot, i) != 0) up_to(parts[i].columns.begin), begin = row * n + parts[i].columns.end;
        up_to(n);
    };

    // u = A x, of each chunk of K apart [chunks, rows, parts, ranks], so that sums do not depend on the threads.
    const int64_t chunks = (k + LORA_DEPTH - 1) / LORA_DEPTH, stride = part_count * ranks, size = count * stride;
    const Memory memory = allocate(chunks * size * 4);
    float* partial = (float*)memory.get();
    const auto shrink = [&](int64_t unit) {
        const Group& group = groups[unit / (blocks * chunks)];
        const int64_t block = unit / chunks % blocks, chunk = unit % chunks, begin = chunk * LORA_DEPTH;
        const int64_t first = ((group.slot * part_count + group.part) * blocks + block) * a.size(3) * 16 + begin;
        lora->shrink(numbers(a, first * LORA_RANKS), x_vector, k, {begin, smaller(begin + LORA_DEPTH, k)},
                     group.rows->data(), group.rows->size(),
                     partial + chunk * size + group.part * ranks + block * LORA_RANKS, stride);
    };
    const auto sum_up = [&](float* u) {  // [rows, parts, ranks], times the scales
        for (const Group& group : groups)
            for (const int64_t row : *group.rows) {
                const int64_t at = row * stride + group.part * ranks;
                std::fill(u + at, u + at + ranks, 0.0f);
                for (int64_t chunk = 0; chunk < chunks; chunk++)
                    for (int64_t j = 0; j < ranks; j++) u[at + j] += partial[chunk * size + at + j];
                for (int64_t j = 0; j < ranks; j++) u[at + j] *= group.scale;
            }
    };
    const auto expand = [&](const Group& group, int64_t panel, const float* u) {
        const Part& part = parts[group.part];
        const int64_t begin = part.columns.begin + panel * LORA_PANEL;
        const int64_t first = group.slot * b.size(1) + part.first_panel + panel;
        lora->expand(numbers(b, first * ranks * LORA_PANEL), ranks, u + group.part * ranks, stride, y_vector, n,
                     {begin, smaller(begin + LORA_PANEL, part.columns.end)}, group.rows->data(), group.rows->size(),
                     result.mutable_data_ptr());
    };
    Queue shrinking(groups.size() * blocks * chunks), expanding(panels);
    parallel([&](int thread, int threads) {
        const Range mine = share(count, thread, threads);
        for (int64_t row = mine.begin; row < mine.end; row++) copy(row);
        if (groups.empty()) return;
        for (Range part = shrinking.take(); part.begin < part.end; part = shrinking.take())
            for (int64_t unit = part.begin; unit < part.end; unit++) shrink(unit);
        GOMP_barrier();
        Range part = expanding.take();
        if (part.begin == part.end) return;
        const Memory own = allocate(size * 4);
        sum_up((float*)own.get());
        for (size_t i = 0; part.begin < part.end; part = expanding.take())
            for (int64_t panel = part.begin; panel < part.end; panel++) {
                while (panel >= groups[i].first_panel + parts[groups[i].part].panels) i++;
                expand(groups[i], panel - groups[i].first_panel, (const float*)own.get());
            }
    });
    return result;
}

}  // namespace
}  // namespace brisk

STABLE_TORCH_LIBRARY_IMPL(brisk, CPU, m) { m.impl("lora", TORCH_BOX(&brisk::low_rank)); }
