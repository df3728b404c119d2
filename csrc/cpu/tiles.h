// A float32 matrix product for the CPU: rows that lie along d, times a panel of columns side by side.
//
// The panel is read in vectors along its width and each element of a row is broadcast, so the rows are used
// where they lie, without a copy. AVX-512, AVX2 or neither is chosen when the program runs: what includes
// this file is compiled for the oldest processor.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <immintrin.h>
#define LBDT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LBDT_CLONES
#endif

namespace lbdt {

constexpr int kMostVectors = 4;      // of a panel
constexpr int64_t kMostLanes = 64;   // kMostVectors of the widest instruction set
constexpr int64_t kBlock = 96;       // rows of a task: a multiple of the rows of every tile
constexpr int64_t kGrain = 1 << 17;  // multiply-adds for which a thread is worth waking

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// h [Rows, width] += w [Rows, depth] x [depth, width], with h in registers and width = Vectors * LANES.
using Tile = void (*)(
    const float* w, int64_t w_step, const float* x, int64_t x_step, int64_t depth, float* h);

// A macro: a function's target cannot depend on a template parameter, and vectors wider than the target of
// the function that they are written in are taken apart before it is inlined into another.
#define LBDT_TILE(NAME, TARGET, LANES, FMA)                                                      \
  template <int Rows, int Vectors>                                                               \
  TARGET void NAME(                                                                              \
      const float* w, int64_t w_step, const float* x, int64_t x_step, int64_t depth, float* h) { \
    typedef float Lanes __attribute__((vector_size(4 * LANES)));                                 \
    typedef float Memory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));         \
    Memory* out = reinterpret_cast<Memory*>(h);                                                  \
    Lanes sum[Rows][Vectors];                                                                    \
    for (int r = 0; r < Rows; ++r)                                                               \
      for (int v = 0; v < Vectors; ++v) sum[r][v] = out[r * Vectors + v];                        \
    for (int64_t c = 0; c < depth; ++c) {                                                        \
      const Memory* column = reinterpret_cast<const Memory*>(x + c * x_step);                    \
      Lanes patch[Vectors];                                                                      \
      _Pragma("GCC unroll 4") for (int v = 0; v < Vectors; ++v) patch[v] = column[v];            \
      _Pragma("GCC unroll 12") for (int r = 0; r < Rows; ++r) {                                  \
        const Lanes row = w[r * w_step + c] - Lanes{};                                           \
        _Pragma("GCC unroll 4") for (int v = 0; v < Vectors; ++v)                                \
            sum[r][v] = FMA(row, patch[v], sum[r][v]);                                           \
      }                                                                                          \
    }                                                                                            \
    for (int r = 0; r < Rows; ++r)                                                               \
      for (int v = 0; v < Vectors; ++v) out[r * Vectors + v] = sum[r][v];                        \
  }
#define LBDT_MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
LBDT_TILE(tile_portable, , 4, LBDT_MULTIPLY_ADD)
#if defined(__x86_64__)
LBDT_TILE(tile_avx2, __attribute__((target("avx2,fma"))), 8, _mm256_fmadd_ps)
LBDT_TILE(tile_avx512, __attribute__((target("avx512f"))), 16, _mm512_fmadd_ps)
#endif
#undef LBDT_MULTIPLY_ADD
#undef LBDT_TILE

// The tiles for panels of one number of vectors.
struct Tiles {
  // Of `full`: the sums, a column and a broadcast fit the registers. At most 12: where d is a multiple of
  // 1024 the rows share a set of the L1 cache, and it has 12 ways or fewer.
  int64_t rows;
  Tile full, two, one;
};

// The tiles of one instruction set, by the number of vectors.
struct Kernels {
  int64_t lanes;    // of a vector
  int64_t vectors;  // at most, of a panel
  Tiles tiles[kMostVectors + 1];
};

inline const Kernels& kernels() {
#define LBDT_TILES(NAME, ROWS, VECTORS) \
  { ROWS, NAME<ROWS, VECTORS>, NAME<2, VECTORS>, NAME<1, VECTORS> }
  static const Kernels portable{
      4, 2, {{}, LBDT_TILES(tile_portable, 12, 1), LBDT_TILES(tile_portable, 6, 2)}};
#if defined(__x86_64__)
  static const Kernels avx2{8, 2, {{}, LBDT_TILES(tile_avx2, 12, 1), LBDT_TILES(tile_avx2, 6, 2)}};
  static const Kernels avx512{
      16,
      4,
      {{},
       LBDT_TILES(tile_avx512, 12, 1),
       LBDT_TILES(tile_avx512, 12, 2),
       LBDT_TILES(tile_avx512, 8, 3),
       LBDT_TILES(tile_avx512, 6, 4)}};
  // Read once; the variable with which torch itself is held to an older instruction set.
  static const Kernels& chosen = []() -> const Kernels& {
    const char* named = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view most = named ? named : "avx512";
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (most == "default" || !has_avx2) return portable;
    return most == "avx2" || !__builtin_cpu_supports("avx512f") ? avx2 : avx512;
  }();
  return chosen;
#else
  return portable;
#endif
#undef LBDT_TILES
}

// Rows of floats, each one run of memory.
struct Rows {
  const float* data;
  int64_t step;  // from a row to the next
};

// h [count, width] = start [count] + w [count, depth] x [depth, width], with width a multiple of the lanes.
inline void product(
    Rows w,
    const float* start,
    int64_t count,
    const float* x,
    int64_t x_step,
    int64_t depth,
    float* h,
    int64_t width) {
  const Tiles& tiles = kernels().tiles[width / kernels().lanes];
  for (int64_t r = 0; r < count; ++r) std::fill_n(h + r * width, width, start[r]);
  for (int64_t r = 0; r < count;) {
    const int64_t left = count - r;
    const int64_t some = left >= tiles.rows ? tiles.rows : left >= 2 ? 2 : 1;
    const Tile tile = some == tiles.rows ? tiles.full : some == 2 ? tiles.two : tiles.one;
    tile(w.data + r * w.step, w.step, x, x_step, depth, h + r * width);
    r += some;
  }
}

}  // namespace lbdt
