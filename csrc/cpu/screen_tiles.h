// Bounds of pre-activations from an int8 matrix product: latents that lie along d, times a panel of patches side by
// side.
//
// A panel is [d / 4, lanes] words of four channels each; a word of a latent is broadcast against it, so codes are used
// where they lie, as the rows of tiles.h are. Of these for AVX-512 VNNI and AVX-VNNI, and AMX, screen_kernels.h chooses
// when the program runs. Without any there is no such product: in AVX2 one of 16-bit integers does as many
// multiply-adds an instruction as float32 does, and one of 8-bit integers saturates.

#pragma once

#include "tiles.h"

#include <cmath>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
// Assemblers before those of GCC 11 do not know the instruction of AVX-VNNI.
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define LBDT_AVXVNNI 1
#endif
#endif

namespace lbdt {

constexpr int64_t kScreenLanes = 32;  // of the widest panel
constexpr int64_t kScreenHalf = 16;   // and of the narrow one
constexpr int64_t kScreenRows = 12;   // latents of a tile in registers at most
constexpr int kWord = 4;              // channels of a word

// What a patch's pre-activations are bounded with.
struct ScreenPatches {
  float scale[kScreenLanes];      // of its codes
  float inner[kScreenLanes];      // of what its codes leave out, with room for rounding: times a latent's `inner`
  float outer[kScreenLanes];      // of all of it, likewise
  float value[kScreenLanes];      // what is exceeded or not
  int32_t owner[kScreenLanes];    // the latent that is left out; -1: none
};

// Of each patch, the latents that exceed its value for certain, of those that are likelier to than not, and of those
// that may.
struct ScreenCounts {
  int32_t certain[kScreenLanes], likely[kScreenLanes], may[kScreenLanes];
};

// The same of each latent: bits of the patches.
struct ScreenBits {
  uint32_t certain, likely, may;
};

// The same of latents, in the order of lbdt/int8_screen.py.
enum ScreenKind : int64_t {
  kScale,
  kStart,  // the bias, and the product with the centre
  kInner,  // the length of the coded row
  kOuter,  // of what its codes leave out
  kSlack,  // what rounding may add
  kSum,    // of its codes
  kScreenKinds
};

// Latents one after the other, `step` apart from one kind to the next.
struct ScreenLatents {
  const float* first;
  int64_t step;
  const float* operator[](ScreenKind kind) const { return first + kind * step; }
  ScreenLatents from(int64_t latent) const { return {first + latent, step}; }
};

// Compares Rows latents, the first of which is `first`, with the patches: writes their bits and adds up the counts. The
// codes of the patches are unsigned, 128 more than they stand for.
using ScreenTile = void (*)(
    const int8_t* codes,
    int64_t code_step,
    const uint32_t* words,
    int64_t word_count,
    const ScreenLatents& latents,
    const ScreenPatches& patches,
    int32_t first,
    ScreenCounts& counts,
    ScreenBits* bits);

// The same of `count` latents; `bits` [count].
using ScreenBlock = void (*)(
    const int8_t* codes,
    int64_t code_step,
    int64_t count,
    const uint32_t* words,
    int64_t word_count,
    const ScreenLatents& latents,
    const ScreenPatches& patches,
    int32_t first,
    ScreenCounts& counts,
    ScreenBits* bits);

// Tiles of kScreenRows, 4 and 1 latents as a block of any number.
template <ScreenTile Full, ScreenTile Four, ScreenTile One>
void screen_in_tiles(
    const int8_t* codes,
    int64_t code_step,
    int64_t count,
    const uint32_t* words,
    int64_t word_count,
    const ScreenLatents& latents,
    const ScreenPatches& patches,
    int32_t first,
    ScreenCounts& counts,
    ScreenBits* bits) {
  for (int64_t r = 0; r < count;) {
    const int64_t left = count - r, some = left >= kScreenRows ? kScreenRows : left >= 4 ? 4 : 1;
    const ScreenTile tile = some == kScreenRows ? Full : some == 4 ? Four : One;
    tile(
        codes + r * code_step, code_step, words, word_count, latents.from(r), patches, first + static_cast<int32_t>(r),
        counts, bits + r);
    r += some;
  }
}

#if defined(__x86_64__)

// What codes of patches that are 128 too large add to a product.
inline int32_t screen_correction(float sum) {
  return std::fabs(sum) < 0x1p23f ? static_cast<int32_t>(sum) * 128 : 0;
}

inline int32_t screen_word(const int8_t* codes) {
  int32_t word;
  __builtin_memcpy(&word, codes, sizeof word);
  return word;
}

__attribute__((target("avx512f"))) inline void add_up(int32_t* counts, __mmask16 some) {
  const __m512i count = _mm512_loadu_si512(counts);
  _mm512_storeu_si512(counts, _mm512_mask_add_epi32(count, some, count, _mm512_set1_epi32(1)));
}

// Compares the r-th latent, whose products these are.
template <int Vectors>
__attribute__((always_inline, target("avx512f,avx512bw,avx512vnni"))) inline void compare_latent(
    const __m512i* sum,
    const ScreenLatents& latents,
    int64_t r,
    const ScreenPatches& patches,
    int32_t first,
    ScreenCounts& counts,
    ScreenBits* bits) {
  const __m512i correction = _mm512_set1_epi32(screen_correction(latents[kSum][r]));
  const __m512 scale = _mm512_set1_ps(latents[kScale][r]), start = _mm512_set1_ps(latents[kStart][r]);
  const __m512 inner = _mm512_set1_ps(latents[kInner][r]), outer = _mm512_set1_ps(latents[kOuter][r]);
  const __m512 slack = _mm512_set1_ps(latents[kSlack][r]);
  const __m512i latent = _mm512_set1_epi32(first + static_cast<int32_t>(r));
  bits[r] = {};
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) {
    const int at = v * 16;
    const __mmask16 other = _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(patches.owner + at), latent);
    const __m512 value = _mm512_loadu_ps(patches.value + at);
    const __m512 units = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[v], correction));
    const __m512 h = _mm512_fmadd_ps(_mm512_mul_ps(units, _mm512_loadu_ps(patches.scale + at)), scale, start);
    const __m512 beside = _mm512_fmadd_ps(outer, _mm512_loadu_ps(patches.outer + at), slack);
    const __m512 error = _mm512_fmadd_ps(inner, _mm512_loadu_ps(patches.inner + at), beside);
    const __mmask16 certain = _mm512_mask_cmp_ps_mask(other, _mm512_sub_ps(h, error), value, _CMP_GT_OQ);
    // A NaN is no bound: it may.
    const __mmask16 likely = _mm512_mask_cmp_ps_mask(other, h, value, _CMP_NLE_UQ);
    const __mmask16 may = _mm512_mask_cmp_ps_mask(other, _mm512_add_ps(h, error), value, _CMP_NLE_UQ);
    add_up(counts.certain + at, certain);
    add_up(counts.likely + at, likely);
    add_up(counts.may + at, may);
    bits[r].certain |= static_cast<uint32_t>(certain) << at;
    bits[r].likely |= static_cast<uint32_t>(likely) << at;
    bits[r].may |= static_cast<uint32_t>(may) << at;
  }
}

// The products are inline assembly: the compiler keeps accumulators of the intrinsic in memory.
template <int Rows, int Vectors>
__attribute__((target("avx512f,avx512bw,avx512vnni"))) void screen_avx512(
    const int8_t* codes,
    int64_t code_step,
    const uint32_t* words,
    int64_t word_count,
    const ScreenLatents& latents,
    const ScreenPatches& patches,
    int32_t first,
    ScreenCounts& counts,
    ScreenBits* bits) {
  __m512i sum[Rows][Vectors];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_setzero_si512();
  for (int64_t c = 0; c < word_count; ++c) {
    __m512i patch[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) patch[v] = _mm512_loadu_si512(words + c * 16 * Vectors + v * 16);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const __m512i row = _mm512_set1_epi32(screen_word(codes + r * code_step + c * kWord));
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][v]) : "v"(patch[v]), "v"(row));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
    compare_latent<Vectors>(sum[r], latents, r, patches, first, counts, bits);
}

// Compares latents whose products lie in memory, `sums` [count, Vectors * 16].
template <int Vectors>
__attribute__((target("avx512f,avx512bw,avx512vnni"))) inline void compare_sums(
    const int32_t* sums,
    int64_t count,
    const ScreenLatents& latents,
    const ScreenPatches& patches,
    int32_t first,
    ScreenCounts& counts,
    ScreenBits* bits) {
  for (int64_t r = 0; r < count; ++r) {
    __m512i sum[Vectors];
    for (int v = 0; v < Vectors; ++v) sum[v] = _mm512_loadu_si512(sums + (r * Vectors + v) * 16);
    compare_latent<Vectors>(sum, latents, r, patches, first, counts, bits);
  }
}

template <int Vectors>
constexpr ScreenBlock screen_vnni =
    screen_in_tiles<screen_avx512<kScreenRows, Vectors>, screen_avx512<4, Vectors>, screen_avx512<1, Vectors>>;

#if defined(LBDT_AVXVNNI)

// Adds one where all bits are set, and returns which these are.
__attribute__((target("avx2"))) inline uint32_t add_up(int32_t* counts, __m256 some) {
  __m256i* count = reinterpret_cast<__m256i*>(counts);
  _mm256_storeu_si256(count, _mm256_sub_epi32(_mm256_loadu_si256(count), _mm256_castps_si256(some)));
  return static_cast<uint32_t>(_mm256_movemask_ps(some));
}

// As above; 16 patches at a time, as there are half as many registers, half as wide.
template <int Rows>
__attribute__((target("avx2,fma"))) inline void screen_avxvnni_half(
    const int8_t* codes,
    int64_t code_step,
    const uint32_t* words,
    int64_t word_count,
    int64_t lanes,
    const ScreenLatents& latents,
    const ScreenPatches& patches,
    int at,
    int32_t first,
    ScreenCounts& counts,
    ScreenBits* bits) {
  __m256i sum[Rows][2];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
  for (int64_t c = 0; c < word_count; ++c) {
    const uint32_t* from = words + c * lanes + at;
    const __m256i near = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i far = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 8));
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const __m256i row = _mm256_set1_epi32(screen_word(codes + r * code_step + c * kWord));
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[r][0]) : "x"(near), "x"(row));
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[r][1]) : "x"(far), "x"(row));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    const __m256i correction = _mm256_set1_epi32(screen_correction(latents[kSum][r]));
    const __m256 scale = _mm256_set1_ps(latents[kScale][r]), start = _mm256_set1_ps(latents[kStart][r]);
    const __m256 inner = _mm256_set1_ps(latents[kInner][r]), outer = _mm256_set1_ps(latents[kOuter][r]);
    const __m256 slack = _mm256_set1_ps(latents[kSlack][r]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int lane = at + v * 8;
      const __m256 value = _mm256_loadu_ps(patches.value + lane);
      const __m256 units = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[r][v], correction));
      const __m256 h = _mm256_fmadd_ps(_mm256_mul_ps(units, _mm256_loadu_ps(patches.scale + lane)), scale, start);
      const __m256 beside = _mm256_fmadd_ps(outer, _mm256_loadu_ps(patches.outer + lane), slack);
      const __m256 error = _mm256_fmadd_ps(inner, _mm256_loadu_ps(patches.inner + lane), beside);
      const __m256 own = _mm256_castsi256_ps(_mm256_cmpeq_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(patches.owner + lane)), _mm256_set1_epi32(first + r)));
      const __m256 certain = _mm256_andnot_ps(own, _mm256_cmp_ps(_mm256_sub_ps(h, error), value, _CMP_GT_OQ));
      const __m256 likely = _mm256_andnot_ps(own, _mm256_cmp_ps(h, value, _CMP_NLE_UQ));
      const __m256 may = _mm256_andnot_ps(own, _mm256_cmp_ps(_mm256_add_ps(h, error), value, _CMP_NLE_UQ));
      bits[r].certain |= add_up(counts.certain + lane, certain) << lane;
      bits[r].likely |= add_up(counts.likely + lane, likely) << lane;
      bits[r].may |= add_up(counts.may + lane, may) << lane;
    }
  }
}

template <int Rows, int Vectors>
__attribute__((target("avx2,fma"))) void screen_avxvnni(
    const int8_t* codes,
    int64_t code_step,
    const uint32_t* words,
    int64_t word_count,
    const ScreenLatents& latents,
    const ScreenPatches& patches,
    int32_t first,
    ScreenCounts& counts,
    ScreenBits* bits) {
  constexpr int kSome = Rows > 6 ? 6 : Rows;
  for (int r = 0; r < Rows; ++r) bits[r] = {};
  for (int r = 0; r < Rows; r += kSome)
    for (int v = 0; v < Vectors; ++v)
      screen_avxvnni_half<kSome>(
          codes + r * code_step, code_step, words, word_count, Vectors * kScreenHalf, latents.from(r), patches,
          v * static_cast<int>(kScreenHalf), first + r, counts, bits + r);
}

template <int Vectors>
constexpr ScreenBlock screen_avxvnni_block =
    screen_in_tiles<screen_avxvnni<kScreenRows, Vectors>, screen_avxvnni<4, Vectors>, screen_avxvnni<1, Vectors>>;

inline bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

#endif
#endif

}  // namespace lbdt
