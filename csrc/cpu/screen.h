// The int8 screen of detect_patches (METHOD.md, 2.7): a dictionary's codes and bounds, and a panel of patches coded
// likewise.

#pragma once

#include "../checks.h"
#include "screen_kernels.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

namespace lbdt {

// Products of codes stay within int32 up to there: 255 * 127 * d.
constexpr int64_t kMostScreened = 1 << 16;
// Lengths from which on products may overflow: there is no bound.
constexpr float kLarge = 0x1p60f;

struct Screen {
  const int8_t* codes;       // [L, d], d a multiple of 4 by zeros
  const float* bounds;       // [kScreenKinds, L], in the order of ScreenKind
  const float* centre;       // [d]
  int64_t latents, width;    // L and d, as of the dictionary
  std::array<Span, 3> spans;

  int64_t words() const { return divide_up(width, kWord); }
  const int8_t* row(int64_t latent) const { return codes + latent * words() * kWord; }
  ScreenLatents from(int64_t latent) const { return {bounds + latent, latents}; }
};

// What these (lbdt/int8_screen.py) hold for a dictionary [L, d] that `x` is multiplied with. Throws on tensors that do
// not fit.
inline std::optional<Screen> read_screen(
    const std::optional<torch::stable::Tensor>& codes,
    const std::optional<torch::stable::Tensor>& bounds,
    const std::optional<torch::stable::Tensor>& centre,
    const torch::stable::Tensor& x,
    int64_t latents) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(codes.has_value() == bounds.has_value() && codes.has_value() == centre.has_value(),
      "codes, bounds, centre: expected all or none");
  if (!codes) return std::nullopt;
  const int64_t width = x.size(1);
  Screen screen{nullptr, nullptr, nullptr, latents, width, {}};
  screen.spans = {
      check("codes", *codes, x, ScalarType::Char, {latents, screen.words() * kWord}),
      check("bounds", *bounds, x, ScalarType::Float, {kScreenKinds, latents}),
      check("centre", *centre, x, ScalarType::Float, {width})};
  screen.codes = static_cast<const int8_t*>(codes->const_data_ptr());
  screen.bounds = static_cast<const float*>(bounds->const_data_ptr());
  screen.centre = static_cast<const float*>(centre->const_data_ptr());
  return screen;
}

// What rounding may add to a product of d channels, in parts of the product of the lengths: sums in any order and with
// or without fused multiply-adds, of the codes' products with their scales, and of all that bounds are computed from.
inline float screen_rounding(int64_t width) { return static_cast<float>(width + 64) * 0x1p-22f; }

struct ScreenPanel {
  int64_t lanes, filled;
  uint32_t* words;  // [d / 4, lanes]
  ScreenPatches patches;
};

// Codes the patches of `panel` [d, lanes] float32, of which `filled` are some, into `to`; their values are infinite, as
// nothing exceeds it. A patch that is not finite has bounds that are not.
template <int kLanes>
LBDT_CLONES void code_panel(const float* panel, int64_t width, const float* centre, ScreenPanel& to) {
  float most[kLanes] = {}, whole[kLanes] = {}, rest[kLanes] = {}, length[kLanes] = {}, unit[kLanes];
  ScreenPatches& out = to.patches;
  for (int64_t c = 0; c < width; ++c)
    for (int i = 0; i < kLanes; ++i) {
      const float value = panel[c * kLanes + i], off = value - centre[c], size = std::fabs(off);
      most[i] = size > most[i] ? size : most[i];
      whole[i] += value * value;
    }
  for (int i = 0; i < kLanes; ++i) {
    out.scale[i] = most[i] / 127.0f;
    unit[i] = most[i] > 0x1p-100f ? 127.0f / most[i] : 0.0f;
  }
  // Adding it rounds to the nearest integer, which is then in the low bits.
  constexpr float kRound = 0x1.8p23f;
  for (int64_t c = 0; c < width; c += kWord) {
    uint32_t* word = to.words + c / kWord * kLanes;
    for (int i = 0; i < kLanes; ++i) word[i] = 0x80808080u;
    for (int64_t part = 0; part < std::min<int64_t>(kWord, width - c); ++part)
      for (int i = 0; i < kLanes; ++i) {
        const float off = panel[(c + part) * kLanes + i] - centre[c + part];
        const float shifted = off * unit[i] + kRound;
        uint32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        const float left = off - (shifted - kRound) * out.scale[i];
        rest[i] += left * left;
        length[i] += off * off;
        word[i] ^= (bits & 0xffu) << 8 * part;
      }
  }
  // What the sums of squares lack: by rounding, and squares that are too small to be told from zero.
  const float more = 1.0f + static_cast<float>(width + 8) * 0x1p-23f, rounding = screen_rounding(width);
  const float tiny = 0x1p-60f * std::sqrt(static_cast<float>(width));
  for (int i = 0; i < kLanes; ++i) {
    const float off = std::sqrt(length[i]) * more + tiny, all = std::sqrt(whole[i]) * more + tiny;
    const float slack = rounding * (all + off);
    out.inner[i] = off < kLarge && all < kLarge ? std::sqrt(rest[i]) * more + tiny + slack
                                                : std::numeric_limits<float>::infinity();
    out.outer[i] = off + slack;
    out.value[i] = std::numeric_limits<float>::infinity();
    out.owner[i] = -1;
  }
}

inline void code_panel(const float* panel, int64_t width, const float* centre, ScreenPanel& to) {
  to.lanes == kScreenLanes ? code_panel<kScreenLanes>(panel, width, centre, to)
                           : code_panel<kScreenHalf>(panel, width, centre, to);
}

}  // namespace lbdt
