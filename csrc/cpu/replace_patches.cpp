// replace_patches on CPU tensors: the lines of lbdt/reference/replace_patches.py, bitwise.
// Schema, checks and fake: lbdt/ops/replace_patches.py.
//
// Eq.: METHOD.md, 4.1, 4.2 and 4.4; arXiv 2606.31699.
// In place it reads and writes 2 * replaced * d * sizeof(element) bytes (6 * replaced * d for the mean of 5); the
// functional op reads x and writes out once, 2 * B * N * d * sizeof(element).

#include "checks.h"
#include "replace_patches.h"
#include "replacement.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using lbdt::Grid;
using lbdt::ReplaceCall;
using lbdt::Strides;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements moved per task

// One image's dilated mask, and where its replaced patches begin in the lists of `Plan`.
struct Image {
  std::vector<uint32_t> masked;
  std::vector<uint32_t> avoided;  // the mask and the patches to avoid; empty where the mask alone counts
  std::vector<int> before;
  int free = 0;
  int donors = 0;  // a patch: 1, or up to kMeanOf; 0: the patch takes one row of the bank
  int64_t first = 0, last = 0;
  const uint32_t* closed() const { return (avoided.empty() ? masked : avoided).data(); }  // no donors
};

struct Target {
  int image, patch;
};

// What is replaced, by image and patch, and by what.
struct Plan {
  std::vector<Image> images;
  std::vector<Target> targets;
  std::vector<int64_t> to;                    // [targets] offset of the patch in its image of `out`
  std::vector<int64_t> from[lbdt::kMeanOf];  // [targets] offset of a donor in its image of `x`, or in the bank

  // The replaced patch at or after `patch` of `image`, as a position in `targets`.
  int64_t find(int image, int patch) const {
    const Image& in = images[image];
    const auto begin = targets.begin() + in.first, end = targets.begin() + in.last;
    auto before = [](const Target& t, int p) { return t.patch < p; };
    return std::lower_bound(begin, end, patch, before) - targets.begin();
  }
};

struct Call : ReplaceCall {
  explicit Call(const ReplaceCall& call) : ReplaceCall(call), channels(x.size(1)), in(strides(x)) {}

  Strides strides(const Tensor& t) const {
    if (t.dim() == 4) return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
    return {t.stride(0), t.stride(1), grid.width * t.stride(2), t.stride(2)};
  }
  // The first element of an image's rows of the bank.
  int64_t bank_at(int64_t image) const { return (bank_of ? bank_of[image] : image) * bank_rows * channels; }

  int64_t channels;
  Strides in, to{};
  void* out = nullptr;  // x's own memory in place
  bool in_place = false;
};

template <typename Bit>
std::vector<uint32_t> pack(Grid grid, Bit bit) {
  std::vector<uint32_t> words(grid.words());
  for (int at = 0; at < grid.words(); ++at)
    for (int i = 0; i < 32; ++i) {
      const int patch = at * 32 + i;
      words[at] |= static_cast<uint32_t>(patch >= grid.patches() || bit(patch)) << i;
    }
  return words;
}

// `avoid` may be null.
Image dilate(const uint8_t* mask, const uint8_t* avoid, Grid grid, int padding) {
  Image image;
  image.masked = pack(grid, [&](int p) { return mask[p] != 0; });
  if (padding > 0) {
    const auto marked = std::move(image.masked);
    const auto rows = pack(grid, [&](int p) { return lbdt::near_in_row(marked.data(), grid, p, padding); });
    image.masked = pack(grid, [&](int p) { return lbdt::near_in_column(rows.data(), grid, p, padding); });
  }
  if (avoid != nullptr) {
    image.avoided = pack(grid, [&](int p) { return lbdt::get_bit(image.masked.data(), p) || avoid[p] != 0; });
    const auto full = [](uint32_t word) { return word == ~0u; };
    if (std::all_of(image.avoided.begin(), image.avoided.end(), full)) image.avoided.clear();
  }
  for (int at = 0; at < grid.words(); ++at) {
    image.before.push_back(image.free);
    image.free += lbdt::count_bits(~image.closed()[at]);
  }
  return image;
}

template <int K>
void find_nearest(const Call& call, const Image& image, int patch, int64_t target, Plan& plan) {
  int64_t best[K];
  lbdt::nearest_free(image.closed(), call.grid, image.free, patch, best);
  for (int i = 0; i < K; ++i)
    if (best[i] != lbdt::kNever)
      plan.from[i][target] = call.in.at(static_cast<int>(best[i] % call.grid.patches()), call.grid);
}

Plan make_plan(const Call& call) {
  const Grid grid = call.grid;
  const int source = call.source;
  const int padding = static_cast<int>(std::min<int64_t>(call.padding, std::max(grid.height, grid.width)));
  const int64_t batch = call.x.size(0), patches = grid.patches();
  Plan plan;
  plan.images.resize(batch);
  // Small grids are not worth waking another thread.
  parallel_for(0, batch, kGrain / patches + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* own = call.avoid == nullptr ? nullptr : call.avoid + b * patches;
      plan.images[b] = dilate(call.mask + b * patches, own, grid, padding);
    }
  });
  const int most = source == lbdt::kMean ? lbdt::kMeanOf : 1;
  for (int64_t b = 0; b < batch; ++b) {
    Image& image = plan.images[b];
    image.donors = std::min(most, image.free);
    image.first = static_cast<int64_t>(plan.targets.size());
    const bool served = image.free > 0 || call.bank_rows > 0;
    for (int p = 0; p < patches; ++p) {
      const bool taken = served && lbdt::get_bit(image.masked.data(), p);
      call.replaced[b * patches + p] = taken;
      if (taken) plan.targets.push_back({static_cast<int>(b), p});
    }
    image.last = static_cast<int64_t>(plan.targets.size());
  }
  const int64_t count = static_cast<int64_t>(plan.targets.size());
  for (int i = 0; i < most; ++i) plan.from[i].resize(count);
  parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [b, p] = plan.targets[i];
      const Image& image = plan.images[b];
      const auto number = [&, row = b, patch = p] { return call.numbers.at(row, patch, patches); };
      if (image.free == 0) {
        plan.from[0][i] = lbdt::pick(number(), static_cast<int>(call.bank_rows)) * call.channels;
      } else if (source == lbdt::kRandom) {
        const int rank = lbdt::pick(number(), image.free);
        plan.from[0][i] =
            call.in.at(lbdt::select_free(image.closed(), image.before.data(), grid.words(), rank), grid);
      } else if (source == lbdt::kMean) {
        find_nearest<lbdt::kMeanOf>(call, image, p, i, plan);
      } else {
        const int beside = source == lbdt::kRow ? lbdt::nearest_in_row(image.closed(), grid, p) : -1;
        if (beside < 0) {
          find_nearest<1>(call, image, p, i, plan);
        } else {
          plan.from[0][i] = call.in.at(beside, grid);
        }
      }
    }
  });
  return plan;
}

// The mean of `donors` elements, in the order of their distance, in float32 (float64 for float64).
template <int donors, typename T, typename At>
T mean(At at) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Sum total = static_cast<Sum>(at(0));
  for (int i = 1; i < donors; ++i) total += static_cast<Sum>(at(i));
  return static_cast<T>(total / static_cast<Sum>(donors));
}

// Runs `body` with the number of donors as a compile-time constant.
template <typename Body>
void with_donors(int donors, Body body) {
  switch (donors) {
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    default: return body(std::integral_constant<int, 1>{});
  }
}

template <typename T>
void copy_plane(const T* from, Strides in, T* to, Strides out, Grid grid) {
  if (lbdt::dense(in, grid) && lbdt::dense(out, grid)) {
    std::memcpy(to, from, grid.patches() * sizeof(T));
    return;
  }
  for (int64_t y = 0; y < grid.height; ++y)
    for (int64_t x = 0; x < grid.width; ++x)
      to[y * out.row + x * out.column] = from[y * in.row + x * in.column];
}

// A channel is a plane that stays in cache.
template <typename T>
void write_planes(const Call& call, const Plan& plan) {
  const T* x = static_cast<const T*>(call.x.const_data_ptr());
  const T* bank = static_cast<const T*>(call.bank);
  T* out = static_cast<T*>(call.out);
  const int64_t planes = call.x.size(0) * call.channels;
  const int64_t moved = call.in_place ? static_cast<int64_t>(plan.targets.size()) / call.x.size(0)
                                      : static_cast<int64_t>(call.grid.patches());
  parallel_for(0, planes, kGrain / std::max<int64_t>(1, moved) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / call.channels, c = plane % call.channels;
      const Image& image = plan.images[b];
      T* to = out + b * call.to.image + c * call.to.channel;
      const T* from = x + b * call.in.image + c * call.in.channel;
      if (!call.in_place) copy_plane(from, call.in, to, call.to, call.grid);
      if (image.donors == 0 && bank) from = bank + call.bank_at(b) + c;
      with_donors(image.donors, [&](auto donors) {
        const int64_t* offset[donors];
        for (int k = 0; k < donors; ++k) offset[k] = plan.from[k].data();
        for (int64_t i = image.first; i < image.last; ++i) {
          if constexpr (donors == 1) {
            to[plan.to[i]] = from[offset[0][i]];
          } else {
            to[plan.to[i]] = mean<donors, T>([&](int k) { return from[offset[k][i]]; });
          }
        }
      });
    }
  });
}

// Channels last: a patch is one run of memory.
template <typename T>
void write_rows(const Call& call, const Plan& plan) {
  const T* x = static_cast<const T*>(call.x.const_data_ptr());
  const T* bank = static_cast<const T*>(call.bank);
  T* out = static_cast<T*>(call.out);
  const int64_t channels = call.channels, bytes = channels * static_cast<int64_t>(sizeof(T));
  auto replace = [&](int64_t i) {
    const int b = plan.targets[i].image;
    const Image& image = plan.images[b];
    T* to = out + b * call.to.image + plan.to[i];
    const T* base = image.donors == 0 ? bank + call.bank_at(b) : x + b * call.in.image;
    with_donors(image.donors, [&](auto donors) {
      if constexpr (donors == 1) {
        std::memmove(to, base + plan.from[0][i], bytes);
      } else {
        const T* row[donors];
        for (int k = 0; k < donors; ++k) row[k] = base + plan.from[k][i];
        // A donor is never a target, so the rows do not overlap.
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) to[c] = mean<donors, T>([&](int k) { return row[k][c]; });
      }
    });
  };
  const int64_t grain = kGrain / std::max<int64_t>(1, channels) + 1;
  if (call.in_place) {
    parallel_for(0, static_cast<int64_t>(plan.targets.size()), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) replace(i);
    });
    return;
  }
  const int64_t patches = call.grid.patches();
  parallel_for(0, call.x.size(0) * patches, grain, [&](int64_t begin, int64_t end) {
    int64_t next = plan.find(static_cast<int>(begin / patches), static_cast<int>(begin % patches));
    for (int64_t row = begin; row < end; ++row) {
      const int b = static_cast<int>(row / patches), p = static_cast<int>(row % patches);
      if (next < static_cast<int64_t>(plan.targets.size()) && plan.targets[next].image == b &&
          plan.targets[next].patch == p) {
        replace(next++);
      } else {
        const T* from = x + b * call.in.image + call.in.at(p, call.grid);
        std::memcpy(out + b * call.to.image + call.to.at(p, call.grid), from, bytes);
      }
    }
  });
}

}  // namespace

void lbdt::replace(const ReplaceCall& arguments, bool in_place, const Output& output) {
  if (arguments.x.numel() == 0) return;
  Call call(arguments);
  Plan plan = make_plan(call);
  const std::optional<Tensor> out = output(static_cast<int64_t>(plan.targets.size()));
  if (!out) return;
  call.to = call.strides(*out);
  call.out = out->mutable_data_ptr();
  call.in_place = in_place;
  for (const Target& target : plan.targets) plan.to.push_back(call.to.at(target.patch, call.grid));
  const bool rows = call.in.channel == 1 && call.to.channel == 1;
  auto write = [&](auto element) {
    using T = decltype(element);
    return rows ? write_rows<T>(call, plan) : write_planes<T>(call, plan);
  };
  switch (call.x.scalar_type()) {
    case ScalarType::Float: return write(float{});
    case ScalarType::Double: return write(double{});
    case ScalarType::Half: return write(torch::headeronly::Half{});
    case ScalarType::BFloat16: return write(torch::headeronly::BFloat16{});
    default: STD_TORCH_CHECK(false, "x: expected float32, float64, float16 or bfloat16");
  }
}

namespace {

void run(
    const Tensor x,              // [B, d, H, W], any strides
    const Tensor mask,           // [B, N] bool, contiguous
    const Tensor u,              // [B, N] float32, contiguous
    std::optional<Tensor> bank,  // [B, M, d] dtype of x, contiguous
    std::optional<Tensor> avoid,  // [B, N] bool, contiguous
    int64_t padding,
    int64_t source,
    Tensor out,       // like x; in place x itself
    Tensor replaced,  // [B, N] bool, contiguous
    bool in_place) {
  STD_TORCH_CHECK(source >= lbdt::kRandom && source <= lbdt::kRow, "source: expected 0 to 3, got ", source);
  lbdt::check_replace_patches(x, mask, u, bank, avoid, padding, source != lbdt::kRandom, out, replaced, in_place);
  const ReplaceCall call{
      x,
      Grid{static_cast<int>(x.size(2)), static_cast<int>(x.size(3))},
      static_cast<const uint8_t*>(mask.const_data_ptr()),
      {static_cast<const float*>(u.const_data_ptr())},
      bank ? bank->const_data_ptr() : nullptr,
      bank ? bank->size(1) : 0,
      nullptr,
      avoid ? static_cast<const uint8_t*>(avoid->const_data_ptr()) : nullptr,
      padding,
      static_cast<int>(source),
      static_cast<bool*>(replaced.mutable_data_ptr())};
  lbdt::replace(call, in_place, [&](int64_t) { return out; });
}

void replace_patches_cpp(
    const Tensor x, const Tensor mask, const Tensor u, std::optional<Tensor> bank, std::optional<Tensor> avoid,
    int64_t padding, int64_t source, Tensor out, Tensor replaced) {
  run(x, mask, u, bank, avoid, padding, source, out, replaced, false);
}

void replace_patches_cpp_(
    Tensor x, const Tensor mask, const Tensor u, std::optional<Tensor> bank, std::optional<Tensor> avoid,
    int64_t padding, int64_t source, Tensor replaced) {
  const lbdt::Span written(x);
  if (bank) bank = lbdt::apart(*bank, written);
  if (avoid) avoid = lbdt::apart(*avoid, written);
  run(
      x, lbdt::apart(mask, written), lbdt::apart(u, written), bank, avoid, padding, source, x, replaced, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CPU, m) {
  m.impl("replace_patches_cpp", TORCH_BOX(&replace_patches_cpp));
  m.impl("replace_patches_cpp_", TORCH_BOX(&replace_patches_cpp_));
}
