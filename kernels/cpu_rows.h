// Which rows of x go through which weight: through one, or each through those of the experts that are chosen for it.

#pragma once

#include "cpu_ops.h"

namespace brisk {
namespace {

struct Batch {  // rows [begin, end) of the order that `Rows` gives them
    int64_t expert, begin, end;
    int64_t size() const { return end - begin; }
};

struct Rows {
    std::vector<Batch> batches;  // of the experts that any row goes through, the smallest first
    std::vector<int64_t> from;   // the row of x that each reads,
    std::vector<char*> to;       // and where its result goes
    int64_t inputs;              // rows of x

    // One row of x, which all experts read as it is.
    bool one_input() const { return inputs == 1 && batches.size() == from.size(); }
};

// Where an op finds its rows of x, and the experts chosen for each if there are any, and where its results go.
struct Places {
    Vector x;
    int64_t inputs;         // rows of x
    const int64_t* chosen;  // [R, k], or null
    int64_t R, k;
    bool one_each;  // a row of x for each of R, not for each of the R k that are chosen
    char* y;
    int64_t row_bytes;  // of y
};

Places places_of(const Tensor& x, const OptionalTensor& chosen, const Tensor& y) {
    const int64_t K = x.size(-1), inputs = K ? x.numel() / K : 0;
    Places p{vector_of(x), inputs, nullptr, inputs, 1, true, (char*)y.mutable_data_ptr(),
             y.size(-1) * size_of(type_of(y.scalar_type()))};
    if (chosen.has_value()) {
        p.chosen = (const int64_t*)chosen->const_data_ptr();
        p.R = x.size(0), p.k = chosen->size(1), p.one_each = x.size(1) == 1;
    }
    return p;
}

// All rows, or the choices of all rows, those of one expert together.
Rows rows_of(const Places& p, int64_t experts) {
    const int64_t pairs = p.R * p.k;
    Rows rows{{{0, 0, pairs}}, std::vector<int64_t>(pairs), std::vector<char*>(pairs), p.inputs};
    if (!p.chosen) {
        for (int64_t i = 0; i < pairs; i++) rows.from[i] = i, rows.to[i] = p.y + i * p.row_bytes;
        return rows;
    }
    std::vector<int64_t> next(experts);  // of each expert, first how many rows, then where the next one goes
    for (int64_t i = 0; i < pairs; i++) {
        STD_TORCH_CHECK(p.chosen[i] >= 0 && p.chosen[i] < experts, "chosen: expected experts from 0 to ", experts - 1,
                        ", got ", p.chosen[i]);
        next[p.chosen[i]]++;
    }
    rows.batches.clear();
    for (int64_t expert = 0; expert < experts; expert++)
        if (next[expert]) rows.batches.push_back({expert, 0, next[expert]});
    // Threads take large parts first, small ones last: so those with most work are in small parts.
    std::stable_sort(rows.batches.begin(), rows.batches.end(), [](Batch a, Batch b) { return a.end < b.end; });
    int64_t begin = 0;
    for (Batch& batch : rows.batches) {
        batch = {batch.expert, begin, begin + batch.end};
        next[batch.expert] = begin, begin = batch.end;
    }
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t at = next[p.chosen[i]]++;
        rows.from[at] = p.one_each ? i / p.k : i;
        rows.to[at] = p.y + i * p.row_bytes;
    }
    return rows;
}

// y [R, k, N] for x [R, 1 or k, K] and experts chosen [R, k].
Tensor empty_experts_output(const Tensor& x, const Tensor& chosen, int64_t n) {
    STD_TORCH_CHECK(chosen.scalar_type() == ScalarType::Long && chosen.dim() == 2 && x.dim() == 3 &&
                        x.size(0) == chosen.size(0) && (x.size(1) == 1 || x.size(1) == chosen.size(1)),
                    "expected x [R, 1 or k, K] and int64 chosen [R, k], got ", shape_of(x), " and ", shape_of(chosen));
    return empty({chosen.size(0), chosen.size(1), n}, x.scalar_type());
}

// [N], or of experts [E, N].
Vector bias_of(const OptionalTensor& bias, int64_t n, int64_t experts = 0) {
    if (!bias.has_value()) return {nullptr, F32};
    const bool fits = experts ? bias->dim() == 2 && bias->size(0) == experts && bias->size(1) == n
                              : bias->dim() == 1 && bias->size(0) == n;
    STD_TORCH_CHECK(fits && bias->is_contiguous(), "bias: expected [", experts ? std::to_string(experts) + ", " : "", n,
                    "], got ", shape_of(*bias));
    return vector_of(*bias);
}

Vector bias_of(Vector all, int64_t expert, int64_t n) {
    return all.data ? Vector{(const char*)all.data + expert * n * size_of(all.type), all.type} : all;
}

// The rows of a batch in as few tiles as possible, of nearly equal size.
template <class Work>
void each_tile(const Batch& batch, int64_t tile_rows, const Work& work) {
    const int64_t rows = batch.end - batch.begin, tiles = (rows + tile_rows - 1) / tile_rows;
    for (int64_t i = 0; i < tiles; i++) {
        const Range r = share(rows, i, tiles);
        work(Range{batch.begin + r.begin, batch.begin + r.end});
    }
}

// A thread's share of the weights of all batches, each of them so many parts.
template <class Work>
void take_parts(Queue& queue, const std::vector<Batch>& batches, int64_t parts, const Work& work) {
    for (Range mine = queue.take(); mine.begin < mine.end; mine = queue.take())
        for (int64_t begin = mine.begin, end; begin < mine.end; begin = end) {
            const int64_t batch = begin / parts, first = batch * parts;
            end = std::min(mine.end, first + parts);
            work(batches[batch], Range{begin - first, end - first});
        }
}

}  // namespace
}  // namespace brisk
