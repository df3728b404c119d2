// replace_patches on CUDA tensors: dilation, donor choice and copy in one launch, without a host read.
// Schema, checks and fake: lbdt/ops/replace_patches.py.
//
// Eq.: METHOD.md, 4.1, 4.2 and 4.4; arXiv 2606.31699.
// In place it reads and writes 2 * replaced * d * sizeof(element) bytes (6 * replaced * d for the mean of 5); the
// functional op reads x and writes out once, 2 * B * N * d * sizeof(element); a block reads its image's N mask bytes
// besides, and N of the patches to avoid where some are given.
//
// Every block builds its image's dilated mask in shared memory (8 bytes per 32 patches, 12 with patches to avoid)
// rather than wait for another launch to do it; what it then takes of the image is a range of channels (planes) or of
// patches (rows, channels last).
// Donors lie outside of the mask, so no block reads what another one writes, in place too.

#include "checks.h"
#include "cuda_launch.h"
#include "cuda_mask.h"
#include "cuda_values.h"
#include "replace_patches.h"

#include <algorithm>
#include <optional>

namespace {

using lbdt::Grid;
using lbdt::Mask;
using lbdt::Strides;
using lbdt::to_sum;
using lbdt::Vector;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kTile = kThreads;  // patches whose donors a block holds at once, one a thread
constexpr int kBlocksPerUnit = 4;  // blocks to aim at per multiprocessor
constexpr int kPlainShared = 48 << 10;  // beyond it a kernel must ask for its shared memory

struct Call {
  const void* x;     // [B, d, H, W]
  void* out;         // like x, or x itself
  const bool* mask;  // [B, N]
  const float* u;    // [B, N]
  const void* bank;  // [B, M, d] or null
  const bool* avoid;  // [B, N] or null
  bool* replaced;    // [B, N]
  Strides in, to;
  Grid grid;
  int channels, bank_rows, padding, source;
  bool in_place;
  // Blocks an image: chunks of channels times splits of the tiles of patches (planes), or chunks of patches (rows).
  int chunks = 1, splits = 1, step = 1;  // step: channels or patches of a chunk
};

__device__ Mask mask_of(const Call& call, int64_t image, uint32_t* shared) {
  const int64_t first = image * call.grid.patches();
  const bool* avoid = call.avoid == nullptr ? nullptr : call.avoid + first;
  return lbdt::build_mask<kThreads>(call.mask + first, avoid, call.grid, call.padding, shared);
}

// Where the masked `patch` takes its values: offsets in its image of x, or in its image's bank when there is no free
// patch. The k-th donor goes to donors[k * kTile].
template <int K>
__device__ void find_donors(const Call& call, const Mask& mask, int64_t image, int patch, int64_t* donors) {
  const Grid grid = call.grid;
  const float u = call.u[image * grid.patches() + patch];
  if (mask.free == 0) {
    donors[0] = static_cast<int64_t>(lbdt::pick(u, call.bank_rows)) * call.channels;
  } else if (K == 1 && call.source == lbdt::kRandom) {
    const int rank = lbdt::pick(u, mask.free);
    donors[0] = call.in.at(lbdt::select_free(mask.closed, mask.before, grid.words(), rank), grid);
  } else {
    if (K == 1 && call.source == lbdt::kRow) {
      const int beside = lbdt::nearest_in_row(mask.closed, grid, patch);
      if (beside >= 0) {
        donors[0] = call.in.at(beside, grid);
        return;
      }
    }
    int64_t best[K];
    lbdt::nearest_free(mask.closed, grid, mask.free, patch, best);
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (best[k] != lbdt::kNever) donors[k * kTile] = call.in.at(static_cast<int>(best[k] % grid.patches()), grid);
  }
}

// The mean of `count` elements, nearest first, in float32 (float64 for float64).
template <typename T, typename At>
__device__ T mean(int count, At at) {
  auto total = to_sum(at(0));
#pragma unroll
  for (int k = 1; k < lbdt::kMeanOf; ++k)
    if (k < count) total += to_sum(at(k));
  T result;
  lbdt::from_sum(total / static_cast<decltype(total)>(count), result);
  return result;
}

// Each thread owns V neighbouring patches of a tile and walks over its share of the chunk's channels. V > 1: the planes
// are dense and aligned, and whole vectors move at once.
template <typename T, int V, int K>
__global__ void __launch_bounds__(kThreads, K == 1 ? 4 : 2) replace_planes_kernel(const __grid_constant__ Call call) {
  extern __shared__ uint32_t shared[];
  __shared__ int64_t donors[K * kTile];
  const int chunk = blockIdx.x % call.chunks, split = blockIdx.x / call.chunks % call.splits;
  const int64_t image = blockIdx.x / call.chunks / call.splits;
  const int patches = call.grid.patches();
  const Mask mask = mask_of(call, image, shared);
  const bool served = mask.free > 0 || call.bank != nullptr;
  const int count = min(K, max(1, mask.free));

  const T* x = static_cast<const T*>(call.x) + image * call.in.image;
  T* out = static_cast<T*>(call.out) + image * call.to.image;
  const bool from_bank = mask.free == 0 && served;
  const T* from = from_bank ? static_cast<const T*>(call.bank) + image * call.bank_rows * call.channels : x;
  const int64_t from_step = from_bank ? 1 : call.in.channel;
  const int begin = chunk * call.step, end = min(call.channels, begin + call.step);

  for (int tile = split * kTile; tile < patches; tile += call.splits * kTile) {
    const int patch = tile + threadIdx.x;
    if (patch < patches) {
      const bool taken = served && lbdt::get_bit(mask.masked, patch);
      if (chunk == 0) call.replaced[image * patches + patch] = taken;
      if (taken) find_donors<K>(call, mask, image, patch, donors + threadIdx.x);
    }
    __syncthreads();

    const int columns = (min(kTile, patches - tile) + V - 1) / V, lanes = kThreads / columns;
    const int column = threadIdx.x % columns, lane = threadIdx.x / columns;
    const int first = tile + column * V;
    constexpr uint32_t kAll = (1u << V) - 1;
    const uint32_t taken = served ? mask.masked[first / 32] >> (first % 32) & kAll : 0;
    if (lane < lanes && (taken != 0 || !call.in_place)) {
      const int64_t in_at = call.in.at(first, call.grid), to_at = call.to.at(first, call.grid);
      int64_t donor[V];
#pragma unroll
      for (int j = 0; j < V; ++j) donor[j] = K == 1 && taken >> j & 1 ? donors[column * V + j] : 0;
      for (int c = begin + lane; c < end; c += lanes) {
        const T* source = from + c * from_step;
        T* to = out + c * call.to.channel + to_at;
        Vector<T, V> value{};
        if (!call.in_place && taken != kAll)
          value = *reinterpret_cast<const Vector<T, V>*>(x + c * call.in.channel + in_at);
        if (count == 1) {
#pragma unroll
          for (int j = 0; j < V; ++j)
            if (taken >> j & 1) value.at[j] = source[K == 1 ? donor[j] : donors[column * V + j]];
        } else if constexpr (K > 1) {
#pragma unroll
          for (int j = 0; j < V; ++j)
            if (taken >> j & 1)
              value.at[j] = mean<T>(count, [&](int k) { return source[donors[k * kTile + column * V + j]]; });
        }
        if (!call.in_place || taken == kAll) {
          *reinterpret_cast<Vector<T, V>*>(to) = value;
        } else {
#pragma unroll
          for (int j = 0; j < V; ++j)
            if (taken >> j & 1) to[j] = value.at[j];
        }
      }
    }
    __syncthreads();
  }
}

// Channels last: a patch is one run of memory, which neighbouring threads copy. V > 1: the runs are aligned.
template <typename T, int V, int K>
__global__ void __launch_bounds__(kThreads) replace_rows_kernel(const __grid_constant__ Call call) {
  extern __shared__ uint32_t shared[];
  __shared__ int64_t donors[K * kTile], in_at[kTile], to_at[kTile];
  __shared__ int listed[kTile], taken_rows;
  const int chunk = blockIdx.x % call.chunks;
  const int64_t image = blockIdx.x / call.chunks;
  const int patches = call.grid.patches();
  const int first = chunk * call.step, rows = min(call.step, patches - first);
  if (threadIdx.x == 0) taken_rows = 0;
  const Mask mask = mask_of(call, image, shared);
  const bool served = mask.free > 0 || call.bank != nullptr;
  const int count = min(K, max(1, mask.free));

  if (threadIdx.x < rows) {
    const int patch = first + threadIdx.x;
    const bool taken = served && lbdt::get_bit(mask.masked, patch);
    call.replaced[image * patches + patch] = taken;
    in_at[threadIdx.x] = taken ? -1 : call.in.at(patch, call.grid);
    to_at[threadIdx.x] = call.to.at(patch, call.grid);
    if (taken) find_donors<K>(call, mask, image, patch, donors + threadIdx.x);
    if (!call.in_place) {
      listed[threadIdx.x] = threadIdx.x;
    } else if (taken) {  // in any order: the rows are independent
      listed[atomicAdd(&taken_rows, 1)] = threadIdx.x;
    }
  }
  __syncthreads();

  const T* x = static_cast<const T*>(call.x) + image * call.in.image;
  T* out = static_cast<T*>(call.out) + image * call.to.image;
  const T* from =
      mask.free == 0 ? static_cast<const T*>(call.bank) + image * call.bank_rows * call.channels : x;
  const unsigned vectors = call.channels / V, moved = (call.in_place ? taken_rows : rows) * vectors;
  for (unsigned i = threadIdx.x; i < moved; i += kThreads) {
    const int row = listed[i / vectors], c = static_cast<int>(i % vectors) * V;
    auto& to = *reinterpret_cast<Vector<T, V>*>(out + to_at[row] + c);
    if (in_at[row] >= 0) {
      to = *reinterpret_cast<const Vector<T, V>*>(x + in_at[row] + c);
    } else if (count == 1) {
      to = *reinterpret_cast<const Vector<T, V>*>(from + donors[row] + c);
    } else if constexpr (K > 1) {
      Vector<T, V> donor[K], value;
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k < count) donor[k] = *reinterpret_cast<const Vector<T, V>*>(from + donors[k * kTile + row] + c);
#pragma unroll
      for (int j = 0; j < V; ++j) value.at[j] = mean<T>(count, [&](int k) { return donor[k].at[j]; });
      to = value;
    }
  }
}

int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

template <typename T, int V, int K>
void launch(Call call, int64_t batch, bool rows, int units, cudaStream_t stream) {
  const int64_t wanted = static_cast<int64_t>(units) * kBlocksPerUnit;
  const int patches = call.grid.patches();
  if (rows) {
    // Positions in a block are 32-bit.
    const int most = std::max(1, std::min<int>(kTile, INT32_MAX / call.channels));
    call.step = std::clamp(divide_up(batch * patches, wanted), 1, most);
    call.chunks = divide_up(patches, call.step);
  } else {
    const int lanes = kThreads / divide_up(std::min(kTile, patches), V);  // channels that a block moves at once
    const int groups = divide_up(call.channels, lanes);
    const int chunks = std::clamp(divide_up(wanted, batch), 1, groups);
    call.step = divide_up(groups, chunks) * lanes;
    call.chunks = divide_up(call.channels, call.step);
    call.splits = std::clamp(divide_up(wanted, batch * call.chunks), 1, divide_up(patches, kTile));
  }
  const int64_t blocks = batch * call.chunks * call.splits;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "x: expected fewer images, got ", batch);
  auto kernel = rows ? &replace_rows_kernel<T, V, K> : &replace_planes_kernel<T, V, K>;
  const int shared = call.grid.words() * (call.avoid ? 3 : 2) * static_cast<int>(sizeof(uint32_t));
  const int own = K * kTile * 8 + kTile * 24;  // at least the kernel's static part
  if (shared + own > kPlainShared)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(call);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Strides with those of the axes of size 1 set to what the conditions below hope for: nothing depends on them.
Strides strides(const Tensor& x) {
  Strides s{x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  if (x.size(0) == 1) s.image = 0;
  if (x.size(1) == 1) s.channel = 0;
  if (x.size(3) == 1) s.column = x.size(2) == 1 ? 1 : s.row;
  if (x.size(2) == 1) s.row = s.column * x.size(3);
  return s;
}

template <typename T, int K>
void launch_widest(const Call& call, int64_t batch, int units, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const Grid grid = call.grid;
  const bool rows = call.in.channel == 1 && call.to.channel == 1;
  // Whole vectors: every run of memory begins at a multiple of 16 bytes, and its length is one.
  auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  auto whole = [&](const void* pointer, const Strides& s) {
    const bool runs = rows ? s.row % V == 0 && s.column % V == 0 : s.channel % V == 0 && lbdt::dense(s, grid);
    return aligned(pointer) && s.image % V == 0 && runs;
  };
  const bool divides = rows ? call.channels % V == 0 && aligned(call.bank) : grid.patches() % V == 0;
  if (divides && whole(call.x, call.in) && whole(call.out, call.to)) {
    launch<T, V, K>(call, batch, rows, units, stream);
  } else {
    launch<T, 1, K>(call, batch, rows, units, stream);
  }
}

void replace(
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
  STD_TORCH_CHECK(x.size(1) <= INT32_MAX - kThreads, "x: expected fewer than 2^31 channels");
  if (x.numel() == 0) return;
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Call call{
      .x = x.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .mask = static_cast<const bool*>(mask.const_data_ptr()),
      .u = static_cast<const float*>(u.const_data_ptr()),
      .bank = bank ? bank->const_data_ptr() : nullptr,
      .avoid = avoid ? static_cast<const bool*>(avoid->const_data_ptr()) : nullptr,
      .replaced = static_cast<bool*>(replaced.mutable_data_ptr()),
      .in = strides(x),
      .to = strides(out),
      .grid = {static_cast<int>(height), static_cast<int>(width)},
      .channels = static_cast<int>(x.size(1)),
      .bank_rows = bank ? static_cast<int>(bank->size(1)) : 0,
      .padding = static_cast<int>(std::min(padding, std::max(height, width))),
      .source = static_cast<int>(source),
      .in_place = in_place,
  };
  const int units = lbdt::multiprocessors(x);
  const cudaStream_t stream = lbdt::current_stream(x);
  const ScalarType dtype = x.scalar_type();
  if (source != lbdt::kMean) {  // bits are moved, whatever they mean
    switch (dtype) {
      case ScalarType::Half:
      case ScalarType::BFloat16: return launch_widest<uint16_t, 1>(call, batch, units, stream);
      case ScalarType::Float: return launch_widest<uint32_t, 1>(call, batch, units, stream);
      case ScalarType::Double: return launch_widest<uint64_t, 1>(call, batch, units, stream);
      default: break;
    }
  }
  switch (dtype) {
    case ScalarType::Half: return launch_widest<__half, lbdt::kMeanOf>(call, batch, units, stream);
    case ScalarType::BFloat16: return launch_widest<__nv_bfloat16, lbdt::kMeanOf>(call, batch, units, stream);
    case ScalarType::Float: return launch_widest<float, lbdt::kMeanOf>(call, batch, units, stream);
    case ScalarType::Double: return launch_widest<double, lbdt::kMeanOf>(call, batch, units, stream);
    default: STD_TORCH_CHECK(false, "x: expected float32, float64, float16 or bfloat16");
  }
}

void replace_patches_cuda(
    const Tensor x, const Tensor mask, const Tensor u, std::optional<Tensor> bank, std::optional<Tensor> avoid,
    int64_t padding, int64_t source, Tensor out, Tensor replaced) {
  replace(x, mask, u, bank, avoid, padding, source, out, replaced, false);
}

void replace_patches_cuda_(
    Tensor x, const Tensor mask, const Tensor u, std::optional<Tensor> bank, std::optional<Tensor> avoid,
    int64_t padding, int64_t source, Tensor replaced) {
  const lbdt::Span written(x);
  if (bank) bank = lbdt::apart(*bank, written);
  if (avoid) avoid = lbdt::apart(*avoid, written);
  replace(
      x, lbdt::apart(mask, written), lbdt::apart(u, written), bank, avoid, padding, source, x, replaced, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lbdt, CUDA, m) {
  m.impl("replace_patches_cpp", TORCH_BOX(&replace_patches_cuda));
  m.impl("replace_patches_cpp_", TORCH_BOX(&replace_patches_cuda_));
}
