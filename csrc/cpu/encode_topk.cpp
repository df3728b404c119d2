// encode_topk on CPU tensors: what lbdt/reference/encode_topk.py computes, in float32.
// Schema, checks and fake: lbdt/ops/encode_topk.py.
//
// Eq.: METHOD.md, 2.4; arXiv 2501.18052. With h = weight x + bias: the k
// largest h of a patch, largest first, with 0 for negative ones, and their latents. Of equal values the
// smaller latent comes first, and NaN before all others, as in torch.topk. Neither the number of threads nor
// the order in which they finish has a say: a product is always summed in the order of d, and the k largest
// of distinct keys (value, latent) are kept.
// 2 N L d flops. Reads x and the dictionary once, writes N k (size + 8) bytes. Holds N d floats and, for each
// patch, 2 k keys of 8 bytes.

#include "checks.h"
#include "feature_map.h"
#include "tiles.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <vector>

namespace {

using lbdt::divide_up;
using lbdt::FeatureMap;
using lbdt::Floats;
using lbdt::floats;
using lbdt::kBlock;
using lbdt::kernels;
using lbdt::kGrain;
using lbdt::kMostLanes;
using lbdt::Panel;
using lbdt::product;
using lbdt::Rows;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kNone = std::numeric_limits<int64_t>::min();  // below every key
constexpr int64_t kFew = 128;  // keys that are ordered faster by comparing each with all others

// Keys are ordered as the latents are: by value, then the smaller latent first.
int64_t key(float value, int64_t latent) {
  const int32_t bits = std::bit_cast<int32_t>(value + 0.0f);  // -0 becomes 0: they are equal
  const int64_t ordered = value != value ? 0x7fffffff : bits ^ (bits >> 31 & 0x7fffffff);
  return ordered << 32 | static_cast<uint32_t>(~latent);
}

float value(int64_t key) {
  const int32_t ordered = static_cast<int32_t>(key >> 32);
  return std::bit_cast<float>(ordered ^ (ordered >> 31 & 0x7fffffff));
}

int64_t latent(int64_t key) { return static_cast<uint32_t>(~key); }

// The largest `most` of `count` distinct keys, a multiple of 8 and at most kFew, largest first.
LBDT_CLONES void order(int64_t* keys, int64_t count, int64_t most) {
  typedef int64_t Eight __attribute__((vector_size(64)));
  int64_t given[kFew], rank[kFew];
  std::copy_n(keys, count, given);
  for (int64_t i = 0; i < count; i += 8) {
    Eight own, larger = {};
    __builtin_memcpy(&own, given + i, sizeof own);
    for (int64_t j = 0; j < count; ++j) larger -= given[j] > own;
    __builtin_memcpy(rank + i, &larger, sizeof larger);
  }
  for (int64_t i = 0; i < count; ++i)
    if (rank[i] < most) keys[rank[i]] = given[i];
}

#if defined(__x86_64__)
__attribute__((target("avx512f,popcnt"))) int64_t find_above_avx512(
    const float* h, int64_t rows, int64_t lanes, const float* floor, int32_t* where) {
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t found = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < lanes; i += 16) {
      const __m512 own = _mm512_loadu_ps(h + r * lanes + i), least = _mm512_loadu_ps(floor + i);
      const __mmask16 above = _mm512_cmp_ps_mask(own, least, _CMP_NLE_UQ);
      const __m512i at = _mm512_add_epi32(steps, _mm512_set1_epi32(static_cast<int>(r * kMostLanes + i)));
      _mm512_storeu_si512(where + found, _mm512_maskz_compress_epi32(above, at));
      found += __builtin_popcount(above);
    }
  return found;
}
#endif

// Where in h [rows, lanes] a value is not at most its lane's floor, as row * kMostLanes + lane. Returns how
// many; up to 16 places of `where` after them are written too.
LBDT_CLONES int64_t find_above(
    const float* h, int64_t rows, int64_t lanes, const float* floor, int32_t* where) {
#if defined(__x86_64__)
  if (kernels().lanes == 16) return find_above_avx512(h, rows, lanes, floor, where);
#endif
  int64_t found = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = h + r * lanes;
    int32_t any = 0;
    for (int64_t i = 0; i < lanes; ++i) any |= !(row[i] <= floor[i]);
    if (!any) continue;
    for (int64_t i = 0; i < lanes; ++i) {
      where[found] = static_cast<int32_t>(r * kMostLanes + i);
      found += !(row[i] <= floor[i]);
    }
  }
  return found;
}

// The largest keys of every patch.
class Kept {
 public:
  Kept(int64_t patches, int64_t k, int64_t latents)
      : k_(k),
        room_(divide_up(std::min(latents, 2 * k), 8) * 8),
        keys_(std::make_unique_for_overwrite<int64_t[]>(patches * room_)),
        count_(patches),
        least_(patches, kNone) {}

  // A value of this patch that is at most this, of latent `first` or a later one, need not be offered.
  float floor(int64_t patch, int64_t first) const {
    const int64_t least = least_[patch];
    if (least == kNone) return kNaN;
    if (latent(least) < first) return value(least);
    // An equal value of a smaller latent goes before it.
    return value(least) == -kInf ? kNaN : std::nextafter(value(least), -kInf);
  }

  void offer(int64_t patch, int64_t key) {
    if (key <= least_[patch]) return;
    keys_[patch * room_ + count_[patch]++] = key;
    if (count_[patch] == room_ && room_ > k_) cut(patch);
  }

  // The k largest, largest first.
  const int64_t* sorted(int64_t patch) {
    cut(patch);
    int64_t* keys = keys_.get() + patch * room_;
    if (room_ > kFew) std::sort(keys, keys + k_, std::greater<>());
    return keys;
  }

 private:
  void cut(int64_t patch) {
    int64_t* keys = keys_.get() + patch * room_;
    int64_t count = count_[patch];
    if (room_ > kFew) {
      std::nth_element(keys, keys + k_ - 1, keys + count, std::greater<>());
    } else {
      while (count % 8) keys[count++] = kNone;
      order(keys, count, k_);
    }
    count_[patch] = static_cast<int32_t>(k_);
    least_[patch] = keys[k_ - 1];
  }

  int64_t k_, room_;
  std::unique_ptr<int64_t[]> keys_;  // [N, room]
  std::vector<int32_t> count_;
  std::vector<int64_t> least_;  // the k-th largest at the last cut: what is not above it is out
};

// Multiplies blocks of the dictionary by panels of patches, and offers what is above the patches' floors.
template <typename T>
void offer_all(
    const FeatureMap<T>& x,
    const std::vector<Panel>& panels,
    const Tensor& weight,
    const float* bias,
    Kept& kept) {
  const int64_t latents = weight.size(0), count = static_cast<int64_t>(panels.size());
  const int64_t blocks = divide_up(latents, kBlock);
  // The panels are divided too where the blocks alone would not keep the threads busy to the end.
  const int64_t wanted = divide_up(4 * torch::stable::get_num_threads(), blocks);
  const int64_t size = divide_up(count, std::min(count, wanted));  // panels of a task
  const int64_t groups = divide_up(count, size), tasks = blocks * groups;
  std::vector<std::mutex> locks(count);
  std::atomic<int64_t> next{0};  // taken one by one: the cores may be shared, and unequally fast
  const int64_t work = kBlock * x.width * size * panels[0].lanes;
  parallel_for(0, tasks, 1 + kGrain / (1 + work), [&](int64_t, int64_t) {
    const Floats room = floats(kBlock * x.width), h = floats(kBlock * kMostLanes);
    const auto where = std::make_unique_for_overwrite<int32_t[]>(kBlock * kMostLanes + 16);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      const int64_t first = task / groups * kBlock, some = std::min(kBlock, latents - first);
      const int64_t begin = task % groups * size, length = std::min(size, count - begin);
      const Rows w = lbdt::dictionary_rows<T>(weight, nullptr, first, some, room.get());
      for (int64_t i = 0; i < length; ++i) {
        const int64_t at = begin + (i + task) % length;  // not where the other threads are
        const Panel& p = panels[at];
        product(w, bias + first, some, p.data, p.lanes, x.width, h.get(), p.lanes);
        const std::lock_guard<std::mutex> hold(locks[at]);
        float floor[kMostLanes];
        for (int64_t j = 0; j < p.lanes; ++j) floor[j] = j < p.filled ? kept.floor(p.patch[j], first) : kInf;
        const int64_t found = find_above(h.get(), some, p.lanes, floor, where.get());
        for (int64_t f = 0; f < found; ++f) {
          const int64_t row = where[f] / kMostLanes, lane = where[f] % kMostLanes;
          if (lane < p.filled)  // NaN of the bias is above every floor, in the lanes left too
            kept.offer(p.patch[lane], key(h[row * p.lanes + lane], first + row));
        }
      }
    }
  });
}

template <typename T>
void encode(
    const Tensor& x,
    const Tensor& weight,
    const float* bias,
    int64_t k,
    const Tensor& values,
    const Tensor& indices) {
  const FeatureMap<T> map(x, std::nullopt);
  const int64_t patches = map.images * map.patches;
  if (patches == 0) return;
  std::vector<int64_t> every(patches);
  std::iota(every.begin(), every.end(), 0);
  Kept kept(patches, k, weight.size(0));
  {
    const lbdt::Columns<float> packed(divide_up(patches, kernels().lanes) * kernels().lanes * map.width);
    offer_all(map, map.panels(every, packed.get()), weight, bias, kept);
  }
  T* out = static_cast<T*>(values.mutable_data_ptr());
  int64_t* where = static_cast<int64_t*>(indices.mutable_data_ptr());
  parallel_for(0, patches, 1 + kGrain / (64 * k), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t* keys = kept.sorted(p);
      for (int64_t i = 0; i < k; ++i) {
        const float h = value(keys[i]);
        out[p * k + i] = static_cast<T>(h < 0.0f ? 0.0f : h);
        where[p * k + i] = latent(keys[i]);
      }
    }
  });
}

void encode_topk_cpp(
    const Tensor x,       // [B, d, H, W] or [B, d, N], any strides
    const Tensor weight,  // [L, d] dtype of x, any strides
    const Tensor bias,    // [L] float32, contiguous
    int64_t k,            // 1 <= k <= L
    Tensor values,        // [B, N, k] dtype of x, contiguous
    Tensor indices) {     // [B, N, k] int64, contiguous
  const auto [map, rows, offsets] = lbdt::check_encoder(x, weight, bias, k, 1);
  const int64_t batch = x.size(0), patches = lbdt::patches(x);
  const lbdt::Span kept = lbdt::check("values", values, x, x.scalar_type(), {batch, patches, k});
  const lbdt::Span where = lbdt::check("indices", indices, x, ScalarType::Long, {batch, patches, k});
  lbdt::check_apart("values", kept, {map, rows, offsets, where});
  lbdt::check_apart("indices", where, {map, rows, offsets});
  const float* start = static_cast<const float*>(bias.const_data_ptr());
  switch (x.scalar_type()) {
    case ScalarType::Float: return encode<float>(x, weight, start, k, values, indices);
    case ScalarType::Half: return encode<torch::headeronly::Half>(x, weight, start, k, values, indices);
    case ScalarType::BFloat16:
      return encode<torch::headeronly::BFloat16>(x, weight, start, k, values, indices);
    default: STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CPU, m) {
  m.impl("encode_topk_cpp", TORCH_BOX(&encode_topk_cpp));
}
