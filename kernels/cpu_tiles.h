// The tiles of AMX: eight registers of 16 rows of 64 bytes. Here they multiply 32 rows of bf16 by 32 columns of pairs.

#pragma once

#include "cpu_vector.h"

#if AMX
namespace brisk {
namespace {

struct Tiles {  // which a thread has while one of these lives
    static constexpr int64_t WIDTH = 32;  // columns, floats from a row of sums to the next

    Tiles() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm("" : "+m"(config));  // GCC 12 may drop what is stored there, as it does not see that the next line reads it
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }

    // Sums [32][WIDTH], which lie in tiles 0 to 3.
    void clear_sums() const {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    void load_sums(const float* from) const {
        _tile_loadd(0, from, WIDTH * 4);
        _tile_loadd(1, from + 16, WIDTH * 4);
        _tile_loadd(2, from + 16 * WIDTH, WIDTH * 4);
        _tile_loadd(3, from + 16 * WIDTH + 16, WIDTH * 4);
    }
    void store_sums(float* to) const {
        _tile_stored(0, to, WIDTH * 4);
        _tile_stored(1, to + 16, WIDTH * 4);
        _tile_stored(2, to + 16 * WIDTH, WIDTH * 4);
        _tile_stored(3, to + 16 * WIDTH + 16, WIDTH * 4);
    }
    // += 32 numbers of each of 32 rows of x, `step` numbers apart, times pairs [16][WIDTH][2].
    void multiply(const uint16_t* x, int64_t step, const void* pairs) const {
        _tile_loadd(4, x, step * 2);
        _tile_loadd(5, x + 16 * step, step * 2);
        _tile_loadd(6, pairs, WIDTH * 4);
        _tile_loadd(7, (const float*)pairs + 16, WIDTH * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
};

}  // namespace
}  // namespace brisk
#endif
