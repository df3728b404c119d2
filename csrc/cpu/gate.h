// The gate of detect_patches (METHOD.md, 2.5) on the CPU.

#pragma once

#include "../checks.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace lbdt {

struct Gate {
  using Tensor = torch::stable::Tensor;

  const int64_t* owners;                  // [U], the concept of each watched latent
  const int64_t* least;                   // [T, C]
  int64_t concepts, least_of;             // least_of 0: the map's own patches
  const int64_t* deciding = nullptr;      // [B]; null: each row for itself
  int64_t* gated = nullptr;               // [B], out; null: not asked for
  std::tuple<Span, Span, Span, Span> spans;  // of owners, least, deciding and gated

  // For `x` of B images, with `watched` latents and `bins`; throws on arguments that do not fit.
  Gate(
      const Tensor& x,
      int64_t watched,
      int64_t bins,
      const Tensor& owners_,
      const Tensor& least_,
      int64_t least_of_,
      const std::optional<Tensor>& deciding_,
      const std::optional<Tensor>& gated_)
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
  }

  // Takes from `mask` [B, N] the patches of the concepts that their deciding row does not carry. `owner` [B, N]: which
  // watched latent a patch is evidence for, where the mask is set; `bin` [B].
  void close(bool* mask, const int32_t* owner, const int64_t* bin, int64_t batch, int64_t patches) const {
    std::vector<int64_t> counts(batch * concepts);
    const auto count_of = [&](int64_t row, int64_t p) -> int64_t& { return counts[row * concepts + owners[owner[p]]]; };
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t p = b * patches; p < (b + 1) * patches; ++p)
        if (mask[p]) ++count_of(b, p);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t row = deciding ? deciding[b] : b;
      int64_t taken = 0;
      for (int64_t p = b * patches; p < (b + 1) * patches; ++p) {
        if (!mask[p]) continue;
        const int64_t needed = least[bin[row] * concepts + owners[owner[p]]];
        // As count * least_of >= needed * patches, which might overflow.
        if (count_of(row, p) * (least_of > 0 ? least_of : patches) / patches >= needed) continue;
        mask[p] = false;
        ++taken;
      }
      if (gated) gated[b] = taken;
    }
  }
};

}  // namespace lbdt
