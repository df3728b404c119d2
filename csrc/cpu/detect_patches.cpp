// detect_patches on CPU tensors: what lbdt/reference/detect_patches.py computes, in float32.
// Schema, checks and fake: lbdt/ops/detect_patches.py.
//
// Eq.: METHOD.md, 2.2; arXiv 2606.31699. With h = weight (x - minus) + bias,
// m = max{ h_u : h_u > mu_u } over the watched latents of a patch and u* the latent that has it, the patch is
// detected iff m > -inf and, for k > 0, #{ j != u* : h_j > m } < k.
// With `least`, the gate (METHOD.md, 2.5 and 2.6): patches that are evidence only for concepts of which the deciding
// row has too few are taken away.
// 2 N U d flops for m, then 2 C L d for the C patches with m > -inf (candidates), less where counts reach k
// early. Reads x once and, where there is a candidate, the dictionary once. Holds C d floats; with a screen as many
// bytes, and a bit a latent and candidate of those that are decided together.

#include "checks.h"
#include "detection.h"
#include "feature_map.h"
#include "gate.h"
#include "largest.h"
#include "rank.h"
#include "screened_rank.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using lbdt::DetectCall;
using lbdt::FeatureMap;
using lbdt::Gate;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
class Detection {
 public:
  Detection(const DetectCall& call, const FeatureMap<T>& x)
      : call_(call),
        x_(x),
        largest_(call, x.images * x.patches) {}

  void run() {
    lbdt::FindLargest<T>(call_, x_, largest_).run();
    std::vector<int64_t> alive;
    for (int64_t p = 0; p < x_.images * x_.patches; ++p) {
      call_.mask[p] = largest_.value[p] > -std::numeric_limits<float>::infinity();
      if (call_.mask[p]) alive.push_back(p);
    }
    if (call_.k > 0 && !alive.empty()) {
      const int64_t latents = call_.weight.size(0);
      if (call_.order) lbdt::check_within("order", call_.order, latents, latents);
      if (call_.screened()) {
        lbdt::ScreenedRank<T>::run(call_, x_, largest_, alive);
      } else {
        lbdt::Rank<T>(call_, x_, largest_).run(std::move(alive));
      }
    }
    if (call_.gate) call_.gate->close(call_.mask, largest_.evidence.data(), call_.bins, x_.images, x_.patches);
    if (call_.not_finite) count_not_finite();
  }

 private:
  // Sums of finite values may overflow, so odd patches are read again.
  void count_not_finite() const {
    for (int64_t b = 0; b < x_.images; ++b) {
      call_.not_finite[b] = 0;
      for (int64_t p = 0; p < x_.patches; ++p)
        call_.not_finite[b] += largest_.odd[b * x_.patches + p] && !x_.is_finite(b, p);
    }
  }

  const DetectCall& call_;
  const FeatureMap<T>& x_;
  lbdt::Largest largest_;
};

template <typename T>
void detect_in(const Tensor& x, const std::optional<Tensor>& minus, const DetectCall& call) {
  const FeatureMap<T> map(x, minus);
  Detection<T>(call, map).run();
}

}  // namespace

void lbdt::detect(const Tensor& x, const std::optional<Tensor>& minus, const DetectCall& call) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return detect_in<float>(x, minus, call);
    case ScalarType::Half: return detect_in<torch::headeronly::Half>(x, minus, call);
    case ScalarType::BFloat16: return detect_in<torch::headeronly::BFloat16>(x, minus, call);
    default: STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
  }
}

namespace {

void detect_patches_cpp(
    const Tensor x,             // [B, d, H, W] or [B, d, N], any strides
    const Tensor weight,        // [L, d] dtype of x, any strides
    const Tensor bias,          // [L] float32, contiguous
    const Tensor latents,       // [U] int64, contiguous, in [0, L)
    const Tensor thresholds,    // [T, U] float32, contiguous
    const Tensor timestep_bin,  // [B] int64, contiguous, in [0, T)
    const Tensor enabled,       // [B, U] bool, contiguous
    int64_t k,
    std::optional<Tensor> minus,     // like x
    std::optional<Tensor> owners,    // [U] int64, contiguous, in [0, C)
    std::optional<Tensor> least,     // [T, C] int64, contiguous
    int64_t least_of,                // in [0, 2^30]
    std::optional<Tensor> deciding,  // [B] int64, contiguous, in [0, B)
    std::optional<Tensor> gated,     // [B] int64, contiguous
    std::optional<Tensor> so_far,    // [B, C + 1] int64, contiguous
    std::optional<Tensor> codes,   // [L, d] int8, contiguous as what follows, d a multiple of 4 by zeros
    std::optional<Tensor> bounds,  // [6, L] float32
    std::optional<Tensor> centre,  // [d] float32
    std::optional<Tensor> order,   // [L] int64, in [0, L)
    Tensor mask) {                   // [B, N] bool, contiguous
  const auto [map, rows, start] = lbdt::check_encoder(x, weight, bias, k, 0);
  const int64_t batch = x.size(0), some = latents.dim() == 1 ? latents.size(0) : 0;
  const int64_t bins = thresholds.dim() == 2 ? thresholds.size(0) : 0;
  const lbdt::Span watched = lbdt::check("latents", latents, x, ScalarType::Long, {some});
  const lbdt::Span floors = lbdt::check("thresholds", thresholds, x, ScalarType::Float, {bins, some});
  const lbdt::Span times = lbdt::check("timestep_bin", timestep_bin, x, ScalarType::Long, {batch});
  const lbdt::Span on = lbdt::check("enabled", enabled, x, ScalarType::Bool, {batch, some});
  const lbdt::Span own = lbdt::check("mask", mask, x, ScalarType::Bool, {batch, lbdt::patches(x)});
  lbdt::check_within("latents", latents, weight.size(0));
  lbdt::check_within("timestep_bin", timestep_bin, bins);
  lbdt::Span less;
  if (minus) {
    const auto sizes = x.sizes();
    const bool same = std::equal(sizes.begin(), sizes.end(), minus->sizes().begin(), minus->sizes().end());
    STD_TORCH_CHECK(same && minus->scalar_type() == x.scalar_type(), "minus: expected the sizes and dtype of x");
    less = lbdt::check_memory("minus", *minus, x);
  }
  const std::optional<lbdt::Screen> screen = lbdt::read_screen(codes, bounds, centre, x, weight.size(0));
  const auto [codes_at, bounds_at, centre_at] = screen ? screen->spans : std::array<lbdt::Span, 3>{};
  const lbdt::Span ordered =
      order ? lbdt::check("order", *order, x, ScalarType::Long, {weight.size(0)}) : lbdt::Span{};
  std::optional<Gate> gate;
  lbdt::Span owned, needed, decided, taken, sums;
  if (least) {
    STD_TORCH_CHECK(owners.has_value(), "owners: expected a tensor, as least is one");
    gate = Gate(x, some, bins, *owners, *least, least_of, deciding, gated, so_far);
    std::tie(owned, needed, decided, taken, sums) = gate->spans;
    lbdt::check_apart(
        "gated", taken, {map, rows, start, watched, floors, times, on, less, own, owned, needed, decided, sums});
    lbdt::check_apart(
        "so_far", sums, {map, rows, start, watched, floors, times, on, less, own, owned, needed, decided});
  }
  lbdt::check_apart("mask", own, {map, rows, start, watched, floors, times, on, less, owned, needed, decided});
  for (const auto& [name, written] : {std::pair{"mask", own}, std::pair{"gated", taken}, std::pair{"so_far", sums}})
    lbdt::check_apart(name, written, {codes_at, bounds_at, centre_at, ordered});
  if (mask.numel() == 0) {
    const auto* bin = static_cast<const int64_t*>(timestep_bin.const_data_ptr());
    if (gate) gate->close(static_cast<bool*>(mask.mutable_data_ptr()), nullptr, bin, batch, lbdt::patches(x));
    return;
  }
  const DetectCall call{
      weight,
      order ? static_cast<const int64_t*>(order->const_data_ptr()) : nullptr,
      static_cast<const float*>(bias.const_data_ptr()),
      static_cast<const int64_t*>(latents.const_data_ptr()),
      static_cast<const float*>(thresholds.const_data_ptr()),
      static_cast<const int64_t*>(timestep_bin.const_data_ptr()),
      static_cast<const uint8_t*>(enabled.const_data_ptr()),
      latents.size(0),
      k,
      static_cast<bool*>(mask.mutable_data_ptr()),
      gate,
      screen};
  lbdt::detect(x, minus, call);
}

std::string screen_instructions_cpp() {
  const lbdt::ScreenKernels* chosen = lbdt::screen_kernels();
  return chosen == nullptr ? "" : chosen->name;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CompositeExplicitAutograd, m) {
  m.impl("screen_instructions_cpp", TORCH_BOX(&screen_instructions_cpp));
}

STABLE_TORCH_LIBRARY_IMPL(lbdt, CPU, m) {
  m.impl("detect_patches_cpp", TORCH_BOX(&detect_patches_cpp));
}
