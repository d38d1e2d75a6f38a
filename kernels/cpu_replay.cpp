// Recordings for replay.py: ops and kernels of a compiled program are done again as they were, one after another.

#include <array>

#include "cpu_ops.h"

namespace brisk {
namespace {

constexpr size_t MOST_ARGUMENTS = 128;

// Calls a kernel of Inductor's, whose arguments are addresses and whole numbers.
template <size_t... I>
void call(const void* kernel, const int64_t* arguments, std::index_sequence<I...>) {
    ((void (*)(decltype(int64_t(I))...))kernel)(arguments[I]...);
}

typedef void (*Call)(const void* kernel, const int64_t* arguments);
template <size_t... N>
constexpr std::array<Call, sizeof...(N)> calls(std::index_sequence<N...>) {
    return {[](const void* kernel, const int64_t* arguments) {
        call(kernel, arguments, std::make_index_sequence<N>());
    }...};
}
constexpr auto CALLS = calls(std::make_index_sequence<MOST_ARGUMENTS + 1>());

}  // namespace
}  // namespace brisk

using brisk::Recording;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT Recording* brisk_new_recording() { return new Recording(); }

EXPORT void brisk_delete_recording(Recording* recording) { delete recording; }

// The next op of this thread is recorded, if it can be done again, and has its result at an address.
EXPORT void brisk_begin_op(Recording* recording, void* result) {
    recording->result = result;
    brisk::recording = recording;
}

// -> how much has been recorded by now.
EXPORT int64_t brisk_end_op(const Recording* recording) {
    brisk::recording = nullptr;
    return recording->work.size();
}

// Whether a kernel of so many arguments can be recorded, which then has been.
EXPORT bool brisk_record_kernel(Recording* recording, const void* kernel, const int64_t* arguments, int64_t count) {
    if (count > (int64_t)brisk::MOST_ARGUMENTS) return false;
    recording->work.push_back([call = brisk::CALLS[count], kernel, given = std::vector(arguments, arguments + count)] {
        call(kernel, given.data());
    });
    return true;
}

// Does all of it -> what went wrong, or null.
EXPORT const char* brisk_replay(Recording* recording) {
    try {
        for (const auto& work : recording->work) work();
        return nullptr;
    } catch (const std::exception& error) {
        recording->problem = error.what();
        return recording->problem.c_str();
    }
}
