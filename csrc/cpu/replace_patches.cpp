// replace_patches on CPU tensors: the lines of lbdt/reference/replace_patches.py, bitwise.
// Schema, checks and fake: lbdt/ops/_schema.py and lbdt/ops/replace_patches.py.
//
// Eq.: method.md, "Detection mask, padding, replacement"; arXiv 2606.31699, section 3.
// Reads and writes 2 * replaced * d * sizeof(element) bytes (6 * replaced * d for the mean of 5).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMeanOf = 5;
constexpr int64_t kGrain = 1 << 14;  // elements moved per task
enum Source : int64_t { kRandom = 0, kNearest = 1, kMean = 2 };

struct Target {
  int64_t patch;
  int count;  // donors; 0: take the bank's row donor[0]
  std::array<int64_t, kMeanOf> donor;
};

struct Grid {
  int64_t height, width;
  int64_t patches() const { return height * width; }
};

// floor(u * count) in float32, as in the reference; the product may round up to count.
int64_t pick(float u, int64_t count) {
  return std::min(static_cast<int64_t>(u * static_cast<float>(count)), count - 1);
}

void dilate(const bool* mask, Grid grid, int64_t padding, std::vector<uint8_t>& out) {
  std::vector<uint8_t> rows(grid.patches(), 0);
  out.assign(grid.patches(), 0);
  for (int64_t y = 0; y < grid.height; ++y)
    for (int64_t x = 0; x < grid.width; ++x)
      if (mask[y * grid.width + x]) {
        const int64_t last = std::min(grid.width - 1, x + padding);
        for (int64_t i = std::max<int64_t>(0, x - padding); i <= last; ++i) rows[y * grid.width + i] = 1;
      }
  for (int64_t y = 0; y < grid.height; ++y)
    for (int64_t x = 0; x < grid.width; ++x)
      if (rows[y * grid.width + x]) {
        const int64_t last = std::min(grid.height - 1, y + padding);
        for (int64_t i = std::max<int64_t>(0, y - padding); i <= last; ++i) out[i * grid.width + x] = 1;
      }
}

// The `number` free patches nearest to `patch`, nearest first, ties to the lowest index.
int nearest(int64_t patch, const std::vector<int64_t>& free, Grid grid, int number, int64_t* donor) {
  std::array<int64_t, kMeanOf> distance;
  int found = 0;
  for (const int64_t candidate : free) {
    const int64_t dy = patch / grid.width - candidate / grid.width;
    const int64_t dx = patch % grid.width - candidate % grid.width;
    const int64_t d = dy * dy + dx * dx;
    if (found == number && d >= distance[found - 1]) continue;
    int at = found < number ? found++ : found - 1;
    for (; at > 0 && distance[at - 1] > d; --at) {
      distance[at] = distance[at - 1];
      donor[at] = donor[at - 1];
    }
    distance[at] = d;
    donor[at] = candidate;
  }
  return found;
}

std::vector<Target> plan(
    const std::vector<uint8_t>& masked, const float* u, Grid grid, int64_t source, int64_t bank_rows) {
  std::vector<Target> targets;
  std::vector<int64_t> free;
  for (int64_t p = 0; p < grid.patches(); ++p)
    if (!masked[p]) free.push_back(p);
  if (free.empty() && bank_rows == 0) return targets;
  for (int64_t p = 0; p < grid.patches(); ++p) {
    if (!masked[p]) continue;
    Target target{p, 0, {}};
    if (free.empty()) {
      target.donor[0] = pick(u[p], bank_rows);
    } else if (source == kRandom) {
      target.count = 1;
      target.donor[0] = free[pick(u[p], static_cast<int64_t>(free.size()))];
    } else {
      target.count = nearest(p, free, grid, source == kNearest ? 1 : kMeanOf, target.donor.data());
    }
    targets.push_back(target);
  }
  return targets;
}

template <typename T>
T blend(const T* channel, const Target& target, Grid grid, int64_t stride_y, int64_t stride_x) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  auto at = [&](int64_t p) { return channel[p / grid.width * stride_y + p % grid.width * stride_x]; };
  if (target.count == 1) return at(target.donor[0]);
  Sum total = static_cast<Sum>(at(target.donor[0]));
  for (int i = 1; i < target.count; ++i) total += static_cast<Sum>(at(target.donor[i]));
  return static_cast<T>(total / static_cast<Sum>(target.count));
}

template <typename T>
void write(
    Tensor& x, const std::vector<std::vector<Target>>& targets, const std::optional<Tensor>& bank, Grid grid) {
  T* data = static_cast<T*>(x.mutable_data_ptr());
  const int64_t channels = x.size(1), step = x.stride(1), stride_y = x.stride(2), stride_x = x.stride(3);
  const int64_t bank_rows = bank ? bank->size(1) : 0;
  const T* spare = bank ? static_cast<const T*>(bank->const_data_ptr()) : nullptr;
  auto offset = [&](int64_t p) { return p / grid.width * stride_y + p % grid.width * stride_x; };

  for (int64_t image = 0; image < x.size(0); ++image) {
    const auto& list = targets[image];
    const int64_t size = static_cast<int64_t>(list.size());
    if (size == 0) continue;
    T* base = data + image * x.stride(0);
    auto value = [&](const Target& t, int64_t c) {
      return t.count == 0 ? spare[(image * bank_rows + t.donor[0]) * channels + c]
                          : blend(base + c * step, t, grid, stride_y, stride_x);
    };
    if (step == 1) {  // channels last: a patch is one run of memory
      torch::stable::parallel_for(0, size, std::max<int64_t>(1, kGrain / channels), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          T* to = base + offset(list[i].patch);
          if (list[i].count == 1) {
            std::memcpy(to, base + offset(list[i].donor[0]), channels * sizeof(T));
          } else {
            for (int64_t c = 0; c < channels; ++c) to[c] = value(list[i], c);
          }
        }
      });
    } else {  // a channel is one run of memory, and stays in cache
      torch::stable::parallel_for(0, channels, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c)
          for (const Target& t : list) base[c * step + offset(t.patch)] = value(t, c);
      });
    }
  }
}

void replace_patches_cpp_(
    Tensor x,                    // [B, d, H, W], any strides
    const Tensor mask,           // [B, N] bool, contiguous
    const Tensor u,              // [B, N] float32, contiguous
    std::optional<Tensor> bank,  // [B, M, d] dtype of x, contiguous
    int64_t padding,
    int64_t source,
    Tensor replaced) {  // [B, N] bool, contiguous, all false
  const int64_t batch = x.size(0);
  const Grid grid{x.size(2), x.size(3)};
  const int64_t patches = grid.patches();
  STD_TORCH_CHECK(mask.numel() == batch * patches, "mask: expected [B, H*W] elements");
  STD_TORCH_CHECK(source >= kRandom && source <= kMean, "source: expected 0, 1 or 2");
  if (x.numel() == 0) return;
  const int64_t bank_rows = bank ? bank->size(1) : 0;
  padding = std::min(padding, std::max(grid.height, grid.width));

  const bool* masks = static_cast<const bool*>(mask.const_data_ptr());
  const float* numbers = static_cast<const float*>(u.const_data_ptr());
  bool* flags = static_cast<bool*>(replaced.mutable_data_ptr());
  std::vector<std::vector<Target>> targets(batch);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> masked;
    for (int64_t image = begin; image < end; ++image) {
      dilate(masks + image * patches, grid, padding, masked);
      targets[image] = plan(masked, numbers + image * patches, grid, source, bank_rows);
      for (const Target& t : targets[image]) flags[image * patches + t.patch] = true;
    }
  });
  switch (x.scalar_type()) {
    case ScalarType::Float: return write<float>(x, targets, bank, grid);
    case ScalarType::Double: return write<double>(x, targets, bank, grid);
    case ScalarType::Half: return write<torch::headeronly::Half>(x, targets, bank, grid);
    case ScalarType::BFloat16: return write<torch::headeronly::BFloat16>(x, targets, bank, grid);
    default: STD_TORCH_CHECK(false, "x: expected float32, float64, float16 or bfloat16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CPU, m) {
  m.impl("replace_patches_cpp_", TORCH_BOX(&replace_patches_cpp_));
}
