// The int8 screen's blocks of every instruction set behind C functions, for test_amx_emulated.py; AMX is emulated where
// LBDT_EMULATED_AMX is defined, else the processor's own. What is thrown is returned as its words.

#include "cpu/screen_kernels.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

namespace {

using namespace lbdt;

template <typename Body>
const char* words_of_error(const Body& body) {
  static std::string words;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    words = error.what();
    return words.c_str();
  }
}

// A copy of rows that are `step` elements apart, between and around which nothing is to be touched.
template <typename T>
class Fenced {
 public:
  Fenced(const T* from, int64_t rows, int64_t size, int64_t step) : room_(rows * step + 2 * kMargin) {
    T* first = room_.data() + kMargin;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(first + r * step, from + r * size, size * sizeof(T));
#if defined(LBDT_EMULATED_AMX)
    const auto forbid = [](const T* begin, const T* end) {
      amx::emulation::forbidden.push_back({reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(end)});
    };
    forbid(room_.data(), first);
    for (int64_t r = 0; r < rows; ++r)
      forbid(first + r * step + size, r + 1 < rows ? first + (r + 1) * step : room_.data() + room_.size());
#endif
  }
  ~Fenced() {
#if defined(LBDT_EMULATED_AMX)
    amx::emulation::forbidden.clear();
#endif
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;

  const T* get() const { return room_.data() + kMargin; }

 private:
  static constexpr int64_t kMargin = 4096;
  std::vector<T> room_;
};

// Loops over integers, and the bounds with fused multiply-adds one by one.
template <int Vectors>
void plain_block(
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
  constexpr int64_t kLanes = Vectors * kScreenHalf;
  for (int64_t r = 0; r < count; ++r) {
    bits[r] = {};
    for (int64_t i = 0; i < kLanes; ++i) {
      if (patches.owner[i] == first + r) continue;
      int64_t sum = 0;
      for (int64_t c = 0; c < word_count * kWord; ++c)
        sum += codes[r * code_step + c] * static_cast<int64_t>(words[c / kWord * kLanes + i] >> 8 * (c % kWord) & 255);
      const uint32_t units = static_cast<uint32_t>(sum) - static_cast<uint32_t>(screen_correction(latents[kSum][r]));
      const float scaled = static_cast<float>(static_cast<int32_t>(units)) * patches.scale[i];
      const float h = std::fma(scaled, latents[kScale][r], latents[kStart][r]);
      const float beside = std::fma(latents[kOuter][r], patches.outer[i], latents[kSlack][r]);
      const float error = std::fma(latents[kInner][r], patches.inner[i], beside);
      const bool certain = h - error > patches.value[i];
      const bool likely = !(h <= patches.value[i]), may = !(h + error <= patches.value[i]);
      counts.certain[i] += certain;
      counts.likely[i] += likely;
      counts.may[i] += may;
      bits[r].certain |= uint32_t{certain} << i;
      bits[r].likely |= uint32_t{likely} << i;
      bits[r].may |= uint32_t{may} << i;
    }
  }
}

struct Kind {
  std::string_view name;
  bool runs;
  ScreenBlock block[2];
};

// Null for a kind that this compiler does not know.
const Kind* kind_of(std::string_view name) {
  static const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vnni");
  static const std::vector<Kind> kinds{
      {"plain", true, {plain_block<1>, plain_block<2>}},
      {"avx512_vnni", vnni, {screen_vnni<1>, screen_vnni<2>}},
#if defined(LBDT_AVXVNNI)
      {"avx_vnni",
       has_avxvnni() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
       {screen_avxvnni_block<1>, screen_avxvnni_block<2>}},
#endif
#if defined(LBDT_AMX)
      {"amx_int8", vnni && amx::usable(), {screen_amx<1>, screen_amx<2>}},
#endif
  };
  for (const Kind& kind : kinds)
    if (kind.name == name) return &kind;
  return nullptr;
}

template <int Vectors, int Stacks>
bool multiply(
    const int8_t* codes, int64_t code_step, const uint32_t* words, int64_t word_count, int32_t* sums) {
  const LastWords<Vectors> last(words, word_count);
  const amx::Configured configured(kScreenTiles);
  // Twice, as a block goes on with the same tiles.
  multiply_amx<Vectors, Stacks>(codes, code_step, words, word_count, last, sums);
  return multiply_amx<Vectors, Stacks>(codes, code_step, words, word_count, last, sums);
}

}  // namespace

extern "C" {

// Whether blocks of this kind run here.
int runs(const char* kind) {
  const Kind* found = kind_of(kind);
  return found != nullptr && found->runs;
}

// A block of `count` latents, whose codes lie `gap` bytes apart, and `lanes` patches.
const char* compare(
    const char* kind,
    const int8_t* codes,        // [count, words * 4]
    int64_t gap,
    int64_t count,
    const uint32_t* panel,      // [words, lanes]
    int64_t words,
    int64_t lanes,
    const float* bounds,        // [kScreenKinds, count]
    const ScreenPatches* patches,
    int32_t first,
    ScreenCounts* counts,       // zero, out
    ScreenBits* bits) {         // [count], out
  return words_of_error([&] {
    const int64_t step = words * kWord + gap;
    const Fenced<int8_t> rows(codes, count, words * kWord, step);
    const Fenced<uint32_t> columns(panel, 1, words * lanes, words * lanes);
    kind_of(kind)->block[lanes / kScreenHalf - 1](
        rows.get(), step, count, columns.get(), words, {bounds, count}, *patches, first, *counts, bits);
  });
}

#if defined(LBDT_AMX)
// sums [stacks * 16, lanes] of the tiles alone, which need no other instructions; `whole`: whether nothing was lost.
const char* products(
    const int8_t* codes,
    int64_t gap,
    int64_t stacks,
    const uint32_t* panel,
    int64_t words,
    int64_t lanes,
    int32_t* sums,
    int* whole) {
  return words_of_error([&] {
    const int64_t step = words * kWord + gap;
    const Fenced<int8_t> rows(codes, stacks * kTileLatents, words * kWord, step);
    const Fenced<uint32_t> columns(panel, 1, words * lanes, words * lanes);
    const auto tile = lanes == kScreenHalf ? (stacks == 1 ? multiply<1, 1> : multiply<1, kStacks<1>>)
                                           : (stacks == 1 ? multiply<2, 1> : multiply<2, kStacks<2>>);
    *whole = tile(rows.get(), step, columns.get(), words, sums);
  });
}

int64_t stacks_of(int64_t lanes) { return lanes == kScreenHalf ? kStacks<1> : kStacks<2>; }

void get_config(amx::Config* to) { amx::store_config(*to); }
#endif

// The name of the kernels that are chosen, or "".
const char* chosen(const char** name) {
  return words_of_error([&] {
    const ScreenKernels* kernels = choose_screen_kernels();
    *name = kernels == nullptr ? "" : kernels->name;
  });
}

#if defined(LBDT_EMULATED_AMX)
void emulate(int permitted, int adds_one, int64_t fails_after, int64_t empties_after) {
  amx::emulation::permitted = permitted;
  amx::emulation::adds_one = adds_one;
  amx::emulation::fails_after = fails_after;
  amx::emulation::empties_after = empties_after;
  amx::emulation::executed = 0;
}

int64_t executed() { return amx::emulation::executed; }

const char* set_config(const amx::Config* config) {
  return words_of_error([&] { amx::load_config(*config); });
}
#endif

}  // extern "C"
