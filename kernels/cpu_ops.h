// What the files of ops share: checks of tensors, memory, threads.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Of the instruction set that build.py chose.
inline const LinearKernels* linear = nullptr;
inline const Bf16Kernels* bf16 = nullptr;
inline const AttentionKernels* attention = nullptr;
inline const PrefillKernels* prefill = nullptr;
inline const LoraKernels* lora = nullptr;
inline const GemmKernels* gemm_kernels = nullptr;  // or none: then PyTorch's GEMM is the fastest here

inline Type type_of(ScalarType type) {
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                    "expected float32, float16 or bfloat16");
    return type == ScalarType::Float ? F32 : type == ScalarType::Half ? F16 : BF16;
}

inline std::string shape_of(const Tensor& tensor) {
    std::string text = "[";
    for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
    return text + "]";
}

inline Vector vector_of(const Tensor& tensor) { return {tensor.const_data_ptr(), type_of(tensor.scalar_type())}; }

inline Tensor in_order(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor in_order(const OptionalTensor& tensor) {
    return tensor.has_value() ? OptionalTensor(in_order(*tensor)) : std::nullopt;
}

// Whether `in_order` has made no copy.
inline bool is_itself(const OptionalTensor& ordered, const OptionalTensor& tensor) {
    return !tensor.has_value() || ordered->const_data_ptr() == tensor->const_data_ptr();
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
typedef std::unique_ptr<char, Free> Memory;

inline Memory allocate(int64_t bytes) {
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

// Where the threads of a team wait for each other, once. They arrive at nearly the same time, so none sleeps or pauses:
// GOMP_barrier() took about 8 us longer on a virtual machine with two processors. A thread that waits for one without a
// processor lets it have its own.
class Meeting {
   public:
    void wait(int threads) {
        arrived.fetch_add(1, std::memory_order_acq_rel);
        for (int64_t turns = 0; arrived.load(std::memory_order_acquire) < threads; turns++)
            if (turns > TURNS) std::this_thread::yield();
    }

   private:
    static constexpr int64_t TURNS = 10000;
    std::atomic<int> arrived{0};
};

// Part number `part` of parts of nearly equal size.
inline Range share(int64_t total, int64_t part, int64_t parts) {
    return {total * part / parts, total * (part + 1) / parts};
}

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

// What ops have done, to be done again with the same memory, without a look at their arguments (replay.py).
struct Recording {
    std::vector<std::function<void()>> work;
    void* result = nullptr;  // where the result of the op that is being recorded goes
    std::string problem;     // of the last replay
};
inline thread_local Recording* recording = nullptr;

// Does the work of an op, whose arguments may be in copies of its own: then that can't be done again.
template <class Work>
void perform(bool in_place, const Work& work) {
    if (recording && in_place) recording->work.push_back(work);
    recording = nullptr;
    work();
}

// Contiguous, not initialized.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
    AtenTensorHandle y;
    if (recording) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(recording->result, sizes.size(), sizes.data(),
                                                                  strides.data(), 0, (int32_t)type, 0, -1, &y));
    } else {
        TORCH_ERROR_CODE_CHECK(
            aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), (int32_t)type, 0, -1, &y));
    }
    return Tensor(y);
}

// Contiguous, like x but for the last size.
inline Tensor empty_output(const Tensor& x, int64_t n) {
    std::vector<int64_t> sizes(x.dim());
    for (int64_t i = 0; i < x.dim(); i++) sizes[i] = x.size(i);
    sizes.back() = n;
    return empty(sizes, x.scalar_type());
}

// Adds to y [B, ..., N], in place, what the adapters of the rows make of x [B, ..., K]: row b of the batch has the one
// in slots[b] of those that are packed (kernels/lora.py), or none if that is negative.
void add_low_rank(const Tensor& y, const Tensor& x, const Tensor& packed, const Tensor& slots);

}  // namespace brisk
