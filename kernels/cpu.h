// What the kernels (cpu_linear.cpp, cpu_linear_tiles.cpp, cpu_bf16.cpp, cpu_gemm.cpp, cpu_attention.cpp,
// cpu_prefill.cpp, cpu_lora.cpp) and the ops (cpu_*ops.cpp) share.
//
// Kernels are serial functions, each over a part of the work. build.py compiles them for one instruction set, with
// its flags and -DBRISK_ISA=amx|avx512|avx2|portable, into a library of its own; the ops share the work among threads. A
// kernel computes each number in one order however the work is shared, so results do not depend on the threads.

#pragma once

#include <cstdint>
#include <cstring>

namespace brisk {

enum Type { F32, F16, BF16, I8 };  // the last one of caches, which then have scales

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t size_of(Type type) { return type == F32 ? 4 : type == I8 ? 1 : 2; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Range {  // the numbers from begin on, without end
    int64_t begin, end;
};

struct Vector {  // any tensor's data and its type
    const void* data;
    Type type;
};

constexpr int64_t PANEL = 32;       // rows of a quantized weight that are interleaved
constexpr int64_t ACT_GROUP = 128;  // activations that share a scale, where the weights have no groups; at most, else

// A weight [n, k]: of bf16, `bits` is 16 and `packed` its rows as they are. A quantized one is as packing.py packs it:
// panels of 32 rows, one after another, K padded to whole groups.
//   int8: for each 4 k, 32 rows of 4 bytes (w + 128). `scales` are apart: one float a row, or in groups, of any type,
//         [panels, groups, 32].
//   int4: for each group: for each 8 k, 32 rows of 4 bytes as they are on disk (even k in the low nibble); 32 scales;
//         32 zeros (bytes or floats), unless all zeros are the same integer; up to a whole number of cache lines.
//         FP4: the nibbles are codes of 4-bit floats, which have no zeros; groups of 32, their scales are BF16.
struct Weight {
    const uint8_t* packed;
    const void* scales;  // int8
    int bits;
    bool grouped;  // the scales are those of groups, and not of rows
    int64_t n, k, group, groups;
    Type scale_type;  // of groups
    int64_t zero;     // int4: the zero of all groups, or ZERO_BYTES, ZERO_FLOATS or FP4
    int64_t group_bytes;  // int4
    int64_t panel_bytes;
};
enum { ZERO_BYTES = -1, ZERO_FLOATS = -2, FP4 = -3 };

// Activations quantized to 8 bits. A tile of R rows is laid out as [k / 4][R][4], or as [k / 32][R][32] for AMX, its
// scales and starts as [groups][R]: the order in which the kernel reads them.
struct Activations {
    int8_t* q;
    float* scale;
    // What a group's sum of products starts from: minus the sum of q, times the zero if all share one. int4 on AVX2 has
    // [k / 32][R] of them instead, each two numbers of 16 bits (start_of_pairs).
    int32_t* start;
};

struct LinearKernels {
    int tile_rows;  // linear_quantized takes 1..tile_rows rows

    // `groups` of one row, which is row r of a tile of R rows that begins at `to`.
    void (*quantize)(const Weight& w, Vector x, int64_t row, int64_t begin, int64_t end, int R, int r, Activations to);
    // R rows times the panels [begin, end) -> R rows [N] of type `type`, each at its own place.
    void (*linear_quantized)(const Weight& w, Activations x, int R, int64_t begin, int64_t end, Vector bias, Type type,
                             char* const* y);

    int64_t many;                       // rows from which on
    const LinearKernels* those_of_many;  // are faster, or null
};

struct Bf16Kernels {
    int tile_rows;  // linear takes 1..tile_rows rows
    bool products;  // linear takes bf16 activations, otherwise those of to_floats; oneDNN has products of bf16 as well

    // Without products of bf16: row r of a tile of R rows, bf16 [K] -> its floats as linear wants them. A tile has
    // room for R times K, K rounded up to 32.
    void (*to_floats)(const uint16_t* x, int64_t k, int R, int r, float* to);
    // R rows of bf16 [R, K], or a tile from to_floats, times the rows [begin, end) of w [N, K] -> R bf16 rows [N],
    // each at its own place.
    void (*linear)(const uint16_t* w, int64_t n, int64_t k, const void* x, int R, int64_t begin, int64_t end,
                   Vector bias, char* const* y);
};

// Many rows. x is packed by tiles of rows, which all go by a block of columns of y before the next block.
struct GemmKernels {
    int64_t many_bf16, many_quantized;  // rows from which on it is the fastest way, if it takes such weights
    int64_t tile_rows;
    int64_t (*columns)(int64_t rows);  // of a block, at most
    int64_t (*packed_bytes)(int64_t rows, int64_t k);
    int64_t (*scratch_bytes)(int64_t rows);  // which multiply wants
    // The tile of the rows from `row` on, of the `rows` that are x[from[0]], x[from[1]]...; x is bf16 [., K].
    void (*pack)(const uint16_t* x, const int64_t* from, int64_t k, int64_t rows, int64_t row, void* packed);
    // All tiles times the rows [begin, end) of w, a block or what is left of it -> bf16 rows [N], each at its own place.
    void (*multiply)(const Weight& w, const void* packed, int64_t rows, int64_t begin, int64_t end, Vector bias,
                     char* const* y, void* scratch);
};

struct Attention {  // what all parts of one op share
    Vector q, k, v;
    const float *k_scale, *v_scale;  // of int8 keys and values, one for each D of them
    int64_t G, D;   // queries that share a head of keys, elements of each
    int64_t slots;  // the key at position p lies in slot p % slots
    float scale;    // of the products q k
    float softcap;  // scores are softcap * tanh(scale * q k / softcap), unless this is 0
};

struct AttentionKernels {
    // Queries [G, D] over the keys at positions [begin, end) of one head, at most `slots`: the largest score, the sum
    // of exp(score - largest), and the sum of exp(score - largest) * v, [G, D padded to 16]. `scratch` has
    // attend_scratch(G, D) floats. The next call goes on after `end`, unless that is `last`.
    void (*attend)(const Attention& a, int64_t q_offset, int64_t kv_offset, int64_t begin, int64_t end, int64_t last,
                   float* largest, float* sum, float* out, float* scratch);
    // Query g of G over `count` parts of its keys: `step` floats from one part's `out` to the next one's, and `largest`
    // and `sum` after each. `sink` is the score of what has no value, or -infinity. -> y, of q's type, from `offset` on.
    void (*combine)(const Attention& a, const float* out, int64_t step, int64_t count, int64_t g, float sink, void* y,
                    int64_t offset, float* scratch);
};

struct Prefill {  // what all tasks of an op for many queries share
    Vector q, k, v;
    const float *k_scale, *v_scale;  // of int8 keys and values
    int64_t scale_step;              // from a key's to the next one's
    int64_t G, D;              // queries that share a head of keys, elements of each
    int64_t q_step, key_step;  // elements from a token's queries to the next one's, from a key to the next
    float scale, softcap;      // as above
};

struct PrefillKernels {
    // The queries [tokens, G, D] of one head of keys, of each token the keys that they see, and a score for each of
    // the G that has no value, or null -> y, of q's type, where the queries are. `scratch` is aligned to 64 bytes.
    void (*attend)(const Prefill& a, int64_t q_offset, int64_t kv_offset, int64_t scale_offset, int64_t tokens,
                   const Range* seen, const float* sinks, void* y, float* scratch);
    int64_t (*scratch)(int64_t queries, int64_t D);  // how many floats that takes
};

constexpr int64_t KEYS = 128;  // keys that attention of a few queries takes at once, at most
// Keys, values and queries as floats; of each query the scores, and three vectors of 16 lanes at most.
inline int64_t attend_scratch(int64_t G, int64_t D) { return (2 * KEYS + G) * round_up(D, 16) + G * (KEYS + 48); }

// The low-rank parts of linear layers, y + scale B A x, for rows of x [rows, K] and y [rows, N]: those at the indices
// `rows`. kernels/lora.py packs A and B.
constexpr int64_t LORA_RANKS = 8, LORA_PANEL = 64, LORA_DEPTH = 512;  // of A, of B, of K that are worked on together

struct LoraKernels {
    // LORA_RANKS rows of A, of which the numbers [begin, end) of K follow at `a`, times these of x
    // -> u[row * stride + rank] for each of the rows.
    void (*shrink)(Vector a, Vector x, int64_t k, Range range, const int64_t* rows, int64_t count, float* u,
                   int64_t stride);
    // Panels of B, of LORA_PANEL columns each, times u[row * stride + rank], added to the columns [begin, end) of y.
    void (*expand)(Vector b, int64_t ranks, const float* u, int64_t stride, Vector y, int64_t n, Range columns,
                   const int64_t* rows, int64_t count);
};

}  // namespace brisk
