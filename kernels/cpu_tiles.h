// The tiles of AMX: eight registers of up to 16 rows of 64 bytes, and how they multiply 32 rows of bf16 by 32 columns of
// pairs.

#pragma once

#include "cpu_vector.h"

#if AMX
namespace brisk {
namespace {

// A thread has tiles of these sizes while one of these lives.
struct TileSizes {
    TileSizes(const uint8_t (&rows)[8], const uint16_t (&row_bytes)[8]) {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        memcpy(config.row_bytes, row_bytes, sizeof row_bytes), memcpy(config.rows, rows, sizeof rows);
        asm("" : "+m"(config));  // GCC 12 may drop what is stored there, as it does not see that the next line reads it
        _tile_loadconfig(&config);
    }
    ~TileSizes() { _tile_release(); }
};

struct Tiles : TileSizes {  // products of bf16
    static constexpr int64_t WIDTH = 32;  // columns, floats from a row of sums to the next

    Tiles() : TileSizes({16, 16, 16, 16, 16, 16, 16, 16}, {64, 64, 64, 64, 64, 64, 64, 64}) {}

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
