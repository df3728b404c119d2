// The gate of detect_patches (METHOD.md, 2.5 and 2.6) on the CPU.

#pragma once

#include "../checks.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace lbdt {

constexpr int64_t kQuarters = 4;              // what `least` counts in over the calls of a run
constexpr int64_t kFound = int64_t{1} << 40;  // a sum of a concept that was found
constexpr int64_t kMost = int64_t{1} << 28;   // of a sum that is multiplied

struct Gate {
  using Tensor = torch::stable::Tensor;

  const int64_t* owners;                  // [U], the concept of each watched latent
  const int64_t* least;                   // [T, C]
  int64_t concepts, least_of;             // least_of 0: the map's own patches
  const int64_t* deciding = nullptr;      // [B]; null: each row for itself
  int64_t* gated = nullptr;               // [B], out; null: not asked for
  int64_t* so_far = nullptr;              // [B, C + 1], in and out; null: this call alone counts
  std::tuple<Span, Span, Span, Span, Span> spans;  // of owners, least, deciding, gated and so_far

  // For `x` of B images, with `watched` latents and `bins`; throws on arguments that do not fit.
  Gate(
      const Tensor& x,
      int64_t watched,
      int64_t bins,
      const Tensor& owners_,
      const Tensor& least_,
      int64_t least_of_,
      const std::optional<Tensor>& deciding_,
      const std::optional<Tensor>& gated_,
      const std::optional<Tensor>& so_far_)
      : concepts(least_.dim() == 2 ? least_.size(1) : 0), least_of(least_of_) {
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(concepts > 0, "least: expected [T, C >= 1]");
    STD_TORCH_CHECK(0 <= least_of && least_of <= kMostPatches, "least_of: expected 0 to 2^30, got ", least_of);
    const int64_t batch = x.size(0);
    std::get<0>(spans) = check("owners", owners_, x, ScalarType::Long, {watched});
    std::get<1>(spans) = check("least", least_, x, ScalarType::Long, {bins, concepts});
    check_within("owners", owners_, concepts);
    owners = static_cast<const int64_t*>(owners_.const_data_ptr());
    least = static_cast<const int64_t*>(least_.const_data_ptr());
    if (deciding_) {
      std::get<2>(spans) = check("deciding", *deciding_, x, ScalarType::Long, {batch});
      check_within("deciding", *deciding_, batch);
      deciding = static_cast<const int64_t*>(deciding_->const_data_ptr());
    }
    if (gated_) {
      std::get<3>(spans) = check("gated", *gated_, x, ScalarType::Long, {batch});
      gated = static_cast<int64_t*>(gated_->mutable_data_ptr());
    }
    if (so_far_) {
      std::get<4>(spans) = check("so_far", *so_far_, x, ScalarType::Long, {batch, concepts + 1});
      so_far = static_cast<int64_t*>(so_far_->mutable_data_ptr());
    }
  }

  // Patches of `patches` as of so many as `least` counts on. Divided, as `least` times these may overflow.
  int64_t scaled(int64_t count, int64_t patches) const {
    return count * (least_of > 0 ? least_of : patches) / std::max<int64_t>(patches, 1);
  }

  // Adds a call's `count` to the `sum` of a row, of `calls` by now: whether the row carries the concept.
  bool carried(int64_t& sum, int64_t count, int64_t calls, int64_t needed, int64_t patches) const {
    sum = std::min(sum, kFound) + count;
    const int64_t mean = scaled(std::clamp<int64_t>(sum, 0, kMost), patches) * kQuarters / std::max<int64_t>(calls, 1);
    const bool found = sum >= kFound || needed <= 1 || mean >= needed;
    if (found && sum > 0) sum = kFound;
    return found;
  }

  // Takes from `mask` [B, N] the patches that are evidence for no concept that their deciding row carries. `evidence`
  // [C, B * N]: whether a patch is evidence for a concept, where the mask is set; `bin` [B].
  void close(bool* mask, const uint8_t* evidence, const int64_t* bin, int64_t batch, int64_t patches) const {
    std::vector<uint8_t> kept(patches), carries(concepts), any(batch);
    std::vector<int64_t> counts(batch * concepts);
    for (int64_t b = 0; b < batch; ++b) {
      any[b] = patches > 0 && std::memchr(mask + b * patches, true, patches) != nullptr;
      // Most rows of most calls have nothing to be counted.
      for (int64_t c = 0; any[b] && c < concepts; ++c) {
        const uint8_t* own = evidence + (c * batch + b) * patches;
        int64_t& count = counts[b * concepts + c];
        for (int64_t p = 0; p < patches; ++p) count += mask[b * patches + p] && own[p];
      }
    }
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t row = deciding ? deciding[b] : b;
      int64_t* sums = so_far ? so_far + b * (concepts + 1) : nullptr;
      if (sums) sums[concepts] = std::min(sums[concepts], kFound) + 1;
      for (int64_t c = 0; c < concepts; ++c) {
        const int64_t count = counts[row * concepts + c], needed = least[bin[row] * concepts + c];
        carries[c] = sums ? carried(sums[c], count, sums[concepts], needed, patches)
                          : needed <= 1 || scaled(count, patches) >= needed;
      }
      if (gated) gated[b] = 0;
      if (!any[b]) continue;
      std::fill(kept.begin(), kept.end(), 0);
      for (int64_t c = 0; c < concepts; ++c)
        if (carries[c])
          for (int64_t p = 0; p < patches; ++p) kept[p] |= evidence[(c * batch + b) * patches + p];
      int64_t taken = 0;
      for (int64_t p = 0; p < patches; ++p) {
        bool& set = mask[b * patches + p];
        taken += set && !kept[p];
        set = set && kept[p];
      }
      if (gated) gated[b] = taken;
    }
  }
};

}  // namespace lbdt
