// The products of the int8 screen by AMX, with the bounds of screen_tiles.h: sums of codes are exact, so that all bits
// are those of the other instructions.
//
// Codes of latents and words of a panel are used where they lie: 16 latents by 64 bytes of codes are a tile, and so are
// 16 words by 16 lanes. What is left of the channels is copied and filled up with zeros; fewer than 16 latents are
// left to VNNI, which every processor with AMX has.

#pragma once

#include "screen_tiles.h"

// What knows AVX-VNNI knows AMX, and an emulation needs no assembler. Systems other than Linux give permission to use
// it in other ways.
#if defined(__linux__) && (defined(LBDT_AVXVNNI) || defined(LBDT_EMULATED_AMX))
#define LBDT_AMX 1

#include "amx.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace lbdt {

constexpr int64_t kTileLatents = amx::kTileRows;
constexpr int64_t kTileWords = amx::kTileRows;  // of each latent and patch, that a product takes

// The tiles: sums from 0 on, then
constexpr int kLatentTile = 4;   // codes of latents, of one stack after another
constexpr int kPanelTile = 5;    // and one more: words of patches
constexpr int kWitnessTile = 7;

// Tiles of latents that are multiplied side by side: with fewer sums one product would wait for the one before it.
template <int Vectors>
constexpr int kStacks = Vectors == 1 ? 3 : 2;

constexpr amx::Config kScreenTiles = [] {
  amx::Config config{};
  config.palette = 1;
  for (int tile = 0; tile < amx::kTiles; ++tile) {
    config.row_bytes[tile] = amx::kTileBytes;
    config.rows[tile] = tile == kWitnessTile ? 1 : amx::kTileRows;
  }
  return config;
}();

// One product of the stack Stack and those behind it.
template <int Vectors, int Stacks, int Stack = 0>
inline void multiply_stacks(const int8_t* codes, int64_t code_step) {
  if constexpr (Stack < Stacks) {
    amx::load<kLatentTile>(codes + Stack * kTileLatents * code_step, code_step);
    amx::multiply<Stack * Vectors, kLatentTile, kPanelTile>();
    if constexpr (Vectors == 2) amx::multiply<Stack * 2 + 1, kLatentTile, kPanelTile + 1>();
    multiply_stacks<Vectors, Stacks, Stack + 1>(codes, code_step);
  }
}

template <int Vectors, int Stacks>
inline void multiply_step(const int8_t* codes, int64_t code_step, const uint32_t* words) {
  amx::load<kPanelTile>(words, Vectors * amx::kTileBytes);
  if constexpr (Vectors == 2) amx::load<kPanelTile + 1>(words + kScreenHalf, Vectors * amx::kTileBytes);
  multiply_stacks<Vectors, Stacks>(codes, code_step);
}

template <int Tile, int Tiles>
inline void zero_sums() {
  if constexpr (Tile < Tiles) {
    amx::zero<Tile>();
    zero_sums<Tile + 1, Tiles>();
  }
}

template <int Vectors, int Tile, int Tiles>
inline void store_sums(int32_t* sums) {
  if constexpr (Tile < Tiles) {
    int32_t* to = sums + (Tile / Vectors * kTileLatents * Vectors + Tile % Vectors) * kScreenHalf;
    amx::store<Tile>(to, Vectors * amx::kTileBytes);
    store_sums<Vectors, Tile + 1, Tiles>(sums);
  }
}

// The words of a panel that are behind its last whole step.
template <int Vectors>
struct LastWords {
  alignas(64) std::array<uint32_t, kTileWords * Vectors * kScreenHalf> words{};

  LastWords(const uint32_t* panel, int64_t word_count) {
    constexpr int64_t kLanes = Vectors * kScreenHalf;
    std::copy(panel + word_count / kTileWords * kTileWords * kLanes, panel + word_count * kLanes, words.begin());
  }
};

// sums [Stacks * 16, Vectors * 16] = codes x words, with tiles as of kScreenTiles. False where they lost what was in
// them: in some virtual machines a thread that was interrupted was seen to find its tiles empty, without an error. The
// witness is filled before all sums and read after them.
template <int Vectors, int Stacks>
inline bool multiply_amx(
    const int8_t* codes,
    int64_t code_step,
    const uint32_t* words,
    int64_t word_count,
    const LastWords<Vectors>& last,
    int32_t* sums) {
  constexpr int64_t kLanes = Vectors * kScreenHalf;
  alignas(64) uint32_t given[kScreenHalf], found[kScreenHalf];
  std::fill_n(given, kScreenHalf, 0x5a17c0deu);
  amx::load<kWitnessTile>(given, amx::kTileBytes);
  zero_sums<0, Stacks * Vectors>();
  const int64_t whole = word_count / kTileWords * kTileWords, rest = word_count - whole;
  for (int64_t c = 0; c < whole; c += kTileWords)
    multiply_step<Vectors, Stacks>(codes + c * kWord, code_step, words + c * kLanes);
  if (rest > 0) {
    alignas(64) int8_t padded[Stacks * kTileLatents * amx::kTileBytes] = {};
    for (int64_t r = 0; r < Stacks * kTileLatents; ++r)
      std::copy_n(codes + r * code_step + whole * kWord, rest * kWord, padded + r * amx::kTileBytes);
    multiply_step<Vectors, Stacks>(padded, amx::kTileBytes, last.words.data());
  }
  store_sums<Vectors, 0, Stacks * Vectors>(sums);
  amx::store<kWitnessTile>(found, amx::kTileBytes);
  return std::memcmp(given, found, sizeof given) == 0;
}

template <int Vectors>
void screen_amx(
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
  constexpr int64_t kMany = kStacks<Vectors> * kTileLatents;
  alignas(64) int32_t sums[kMany * Vectors * kScreenHalf];
  int64_t r = 0;
  const auto by_vnni = [&](int64_t some) {
    screen_vnni<Vectors>(codes + r * code_step, code_step, some, words, word_count, latents.from(r), patches,
                         first + static_cast<int32_t>(r), counts, bits + r);
  };
  if (count >= kTileLatents) {
    const LastWords<Vectors> last(words, word_count);
    const amx::Configured configured(kScreenTiles);
    for (int64_t some; count - r >= kTileLatents; r += some) {
      some = count - r >= kMany ? kMany : kTileLatents;
      const auto multiply = some == kMany ? multiply_amx<Vectors, kStacks<Vectors>> : multiply_amx<Vectors, 1>;
      if (multiply(codes + r * code_step, code_step, words, word_count, last, sums)) {
        compare_sums<Vectors>(sums, some, latents.from(r), patches, first + static_cast<int32_t>(r), counts, bits + r);
      } else {
        by_vnni(some);
      }
    }
  }
  by_vnni(count - r);
}

template <int Vectors>
bool multiplies_right() {
  constexpr int kTries = 8;
  constexpr int64_t kRows = kStacks<Vectors> * kTileLatents, kLanes = Vectors * kScreenHalf, kWords = kTileWords + 3;
  int8_t codes[kRows][kWords * kWord];
  uint32_t words[kWords * kLanes];
  uint32_t state = 1;
  const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 24; };
  for (auto& row : codes)
    for (int8_t& code : row) code = static_cast<int8_t>(static_cast<int>(next() % 255) - 127);
  for (uint32_t& word : words) word = next() | next() << 8 | next() << 16 | next() << 24;
  alignas(64) int32_t sums[kRows * kLanes];
  bool whole = false;
  {
    const LastWords<Vectors> last(words, kWords);
    const amx::Configured configured(kScreenTiles);
    for (int i = 0; i < kTries && !whole; ++i)
      whole = multiply_amx<Vectors, kStacks<Vectors>>(codes[0], kWords * kWord, words, kWords, last, sums);
  }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t i = 0; i < kLanes; ++i) {
      int32_t sum = 0;
      for (int64_t c = 0; c < kWords * kWord; ++c)
        sum += codes[r][c] * static_cast<int32_t>(words[c / kWord * kLanes + i] >> 8 * (c % kWord) & 255);
      whole = whole && sum == sums[r * kLanes + i];
    }
  return whole;
}

// Whether products are what integers give. Of a machine that says it has AMX anything else is a fault, of it or its
// hypervisor.
inline bool amx_multiplies_right() { return multiplies_right<1>() && multiplies_right<2>(); }

}  // namespace lbdt

#endif
