// The op that adds the low-rank parts of adapters to the output of a linear layer on CPUs. The work itself is done by
// the kernels in cpu_lora.cpp.

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

// The adapters of a layer, in one tensor as kernels/lora.py packs them.
struct Slots {
    int64_t count, part_count, ranks, depth, panels;
    Vector a, b;
    const float* scales;  // [count, part_count]
    std::vector<Part> parts;
};

Slots slots_of(const Tensor& packed, int64_t n) {
    constexpr int64_t HEADER = 6;
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() >= HEADER * 8,
                    "lora: expected packed adapters, got ", shape_of(packed));
    const char* data = (const char*)packed.const_data_ptr();
    const auto* header = (const int64_t*)data;
    Slots all = {header[0], header[1], header[2], header[3], header[4]};
    const Type type = (Type)header[5];
    const int64_t scales = (HEADER + 2 * all.part_count) * 8, a = round_up(scales + all.count * all.part_count * 4, 64);
    const int64_t b = a + all.count * all.part_count * all.ranks * all.depth * size_of(type);
    STD_TORCH_CHECK(packed.numel() == b + all.count * all.panels * all.ranks * LORA_PANEL * size_of(type),
                    "lora: expected packed adapters, got ", packed.numel(), " bytes");
    all.a = {data + a, type}, all.b = {data + b, type}, all.scales = (const float*)(data + scales);
    int64_t next_panel = 0, next_column = 0;
    for (int64_t i = 0; i < all.part_count; i++) {
        const Range range = {header[HEADER + 2 * i], header[HEADER + 2 * i + 1]};
        STD_TORCH_CHECK(next_column <= range.begin && range.begin <= range.end && range.end <= n, "lora: a part from ",
                        range.begin, " to ", range.end, " of ", n, " columns, after ", next_column);
        all.parts.push_back({range, next_panel, (range.end - range.begin + LORA_PANEL - 1) / LORA_PANEL});
        next_panel += all.parts[i].panels, next_column = range.end;
    }
    STD_TORCH_CHECK(next_panel == all.panels, "lora: expected ", next_panel, " panels of B, got ", all.panels);
    return all;
}

}  // namespace

// A part with a scale of 0 is passed over.
void add_low_rank(const Tensor& y, const Tensor& input, const Tensor& packed, const Tensor& slots) {
    const Tensor x = in_order(input);
    const int64_t batch = x.size(0), k = x.size(-1), n = y.size(-1), count = k ? x.numel() / k : 0;
    STD_TORCH_CHECK(y.size(0) == batch && y.numel() == count * n, "lora: y ", shape_of(y), " does not go with x ",
                    shape_of(x));
    const Slots all = slots_of(packed, n);
    STD_TORCH_CHECK(all.depth == round_up(k, 16), "lora: x ", shape_of(x), " does not go with ", all.depth, " inputs");
    STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Long && slots.is_contiguous() && slots.numel() >= batch,
                    "lora: expected int64 slots of ", batch, " rows, got ", shape_of(slots));
    const int64_t blocks = all.ranks / LORA_RANKS;
    const auto* slot_data = (const int64_t*)slots.const_data_ptr();
    const auto slot_of = [&](int64_t row) { return slot_data[row * batch / count]; };
    const auto scale_of = [&](int64_t slot, int64_t part) { return all.scales[slot * all.part_count + part]; };
    std::vector<std::vector<int64_t>> rows(all.count);
    for (int64_t row = 0; row < count; row++) {
        STD_TORCH_CHECK(slot_of(row) < all.count, "lora: there is no adapter ", slot_of(row));
        if (slot_of(row) >= 0) rows[slot_of(row)].push_back(row);
    }
    std::vector<Group> groups;
    int64_t panels = 0;
    for (int64_t slot = 0; slot < all.count; slot++)
        for (int64_t i = 0; i < all.part_count && !rows[slot].empty(); i++)
            if (scale_of(slot, i) != 0) {
                groups.push_back({slot, i, panels, scale_of(slot, i), &rows[slot]});
                panels += all.parts[i].panels;
            }
    if (!panels) return;

    const Vector x_vector = vector_of(x), y_vector = vector_of(y);
    const auto numbers = [](Vector of, int64_t i) {
        return Vector{(const char*)of.data + i * size_of(of.type), of.type};
    };

    // u = A x, of each chunk of K apart [chunks, rows, parts, ranks], so that sums do not depend on the threads.
    const int64_t chunks = (k + LORA_DEPTH - 1) / LORA_DEPTH;
    const int64_t stride = all.part_count * all.ranks, size = count * stride;
    const Memory memory = allocate(chunks * size * 4);
    float* partial = (float*)memory.get();
    const auto shrink = [&](int64_t unit) {
        const Group& group = groups[unit / (blocks * chunks)];
        const int64_t block = unit / chunks % blocks, chunk = unit % chunks, begin = chunk * LORA_DEPTH;
        const int64_t first = ((group.slot * all.part_count + group.part) * blocks + block) * all.depth + begin;
        lora->shrink(numbers(all.a, first * LORA_RANKS), x_vector, k, {begin, smaller(begin + LORA_DEPTH, k)},
                     group.rows->data(), group.rows->size(),
                     partial + chunk * size + group.part * all.ranks + block * LORA_RANKS, stride);
    };
    const auto sum_up = [&](float* u) {  // [rows, parts, ranks], times the scales
        for (const Group& group : groups)
            for (const int64_t row : *group.rows) {
                const int64_t at = row * stride + group.part * all.ranks;
                std::fill(u + at, u + at + all.ranks, 0.0f);
                for (int64_t chunk = 0; chunk < chunks; chunk++)
                    for (int64_t j = 0; j < all.ranks; j++) u[at + j] += partial[chunk * size + at + j];
                for (int64_t j = 0; j < all.ranks; j++) u[at + j] *= group.scale;
            }
    };
    const auto expand = [&](const Group& group, Range mine, const float* u) {  // these panels of its part
        const Part& part = all.parts[group.part];
        const int64_t first = group.slot * all.panels + part.first_panel + mine.begin;
        const int64_t begin = part.columns.begin, end = smaller(begin + mine.end * LORA_PANEL, part.columns.end);
        lora->expand(numbers(all.b, first * all.ranks * LORA_PANEL), all.ranks, u + group.part * all.ranks, stride,
                     y_vector, n, {begin + mine.begin * LORA_PANEL, end}, group.rows->data(), group.rows->size());
    };
    Queue shrinking(groups.size() * blocks * chunks), expanding(panels);
    Meeting meeting;
    parallel([&](int, int threads) {
        for (Range part = shrinking.take(); part.begin < part.end; part = shrinking.take())
            for (int64_t unit = part.begin; unit < part.end; unit++) shrink(unit);
        meeting.wait(threads);
        Range part = expanding.take();
        if (part.begin == part.end) return;
        const Memory own = allocate(size * 4);
        sum_up((float*)own.get());
        for (; part.begin < part.end; part = expanding.take())
            for (const Group& group : groups) {
                const int64_t end = group.first_panel + all.parts[group.part].panels;
                const Range mine = {std::max(part.begin, group.first_panel), smaller(part.end, end)};
                if (mine.begin < mine.end)
                    expand(group, {mine.begin - group.first_panel, mine.end - group.first_panel}, (float*)own.get());
            }
    });
}

namespace {

Tensor lora_added(const Tensor& y, const Tensor& x, const Tensor& packed, const Tensor& slots) {
    const Tensor result = torch::stable::clone(in_order(y));
    add_low_rank(result, x, packed, slots);
    return result;
}

}  // namespace
}  // namespace brisk

STABLE_TORCH_LIBRARY_IMPL(brisk, CPU, m) { m.impl("lora", TORCH_BOX(&brisk::lora_added)); }
