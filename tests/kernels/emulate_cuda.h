// Runs a CUDA kernel's source on the CPU, one block after another, each thread a fiber that gives way at barriers.
// test_cuda_emulated.py puts this in place of csrc/cuda_launch.h. Order of the threads: forward or backward, so that a
// missing barrier shows.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static
#undef __global__
#define __global__
#undef __grid_constant__
#define __grid_constant__
#define STD_CUDA_CHECK(call)
#define STD_CUDA_KERNEL_LAUNCH_CHECK()

using std::max;
using std::min;

inline uint3 threadIdx, blockIdx;
inline dim3 gridDim;

namespace emulation {

constexpr int kMost = 1024;
constexpr size_t kStack = 1 << 16;

struct Group {
  int size = 0, arrived = 0, generation = 0;
};

inline int threads, finished, current, progress, units = 1;
inline bool backward = false;
inline size_t launches;
inline ucontext_t scheduler, fibers[kMost];
inline bool done[kMost];
inline Group block_group, warp_groups[kMost / 32];
inline int lanes[kMost];
inline std::function<void()> body;
inline std::vector<uint32_t> dynamic;

inline uint32_t* dynamic_shared() { return dynamic.data(); }

inline void wait(Group& group) {
  const int generation = group.generation;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.generation;
    ++progress;
    return;
  }
  while (group.generation == generation) swapcontext(&fibers[current], &scheduler);
}

inline void enter() {
  body();
  done[current] = true;
  ++finished;
  ++progress;
  swapcontext(&fibers[current], &scheduler);
}

inline void run_block() {
  static std::vector<char> stacks(kMost * kStack);
  finished = 0;
  block_group = {threads, 0, 0};
  for (int w = 0; w < threads / 32; ++w) warp_groups[w] = {32, 0, 0};
  for (int t = 0; t < threads; ++t) {
    done[t] = false;
    getcontext(&fibers[t]);
    fibers[t].uc_stack = {stacks.data() + t * kStack, 0, kStack};
    fibers[t].uc_link = &scheduler;
    makecontext(&fibers[t], enter, 0);
  }
  while (finished < threads) {
    const int before = progress;
    for (int i = 0; i < threads; ++i) {
      current = backward ? threads - 1 - i : i;
      if (done[current]) continue;
      threadIdx = {static_cast<unsigned>(current), 0, 0};
      swapcontext(&scheduler, &fibers[current]);
    }
    if (progress == before) {
      std::fprintf(stderr, "emulation: %d of %d threads wait at a barrier that the others do not reach\n",
                   threads - finished, threads);
      std::abort();
    }
  }
}

template <typename Kernel, typename... Arguments>
void launch(unsigned blocks, int size, size_t shared, Kernel kernel, const Arguments&... arguments) {
  threads = size;
  gridDim = dim3(blocks);
  body = [&] { kernel(arguments...); };
  ++launches;
  for (unsigned b = 0; b < blocks; ++b) {
    // Left-over values must not help.
    dynamic.assign(shared / 4 + 1, 0xA5A5A5A5u);
    blockIdx = {b, 0, 0};
    run_block();
    if (dynamic.back() != 0xA5A5A5A5u) {
      std::fprintf(stderr, "emulation: wrote past the dynamic shared memory\n");
      std::abort();
    }
  }
}

struct NoGuard {
  explicit NoGuard(int) {}
};

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block_group); }

inline int __syncthreads_or(int value) {
  emulation::lanes[emulation::current] = value;
  emulation::wait(emulation::block_group);
  int any = 0;
  for (int t = 0; t < emulation::threads; ++t) any |= emulation::lanes[t] != 0;
  emulation::wait(emulation::block_group);
  return any;
}

inline unsigned __ballot_sync(unsigned, bool bit) {
  const int thread = emulation::current, first = thread / 32 * 32;
  emulation::lanes[thread] = bit;
  emulation::wait(emulation::warp_groups[thread / 32]);
  unsigned word = 0;
  for (int i = 0; i < 32; ++i) word |= static_cast<unsigned>(emulation::lanes[first + i]) << i;
  emulation::wait(emulation::warp_groups[thread / 32]);
  return word;
}

inline int __shfl_up_sync(unsigned, int value, int distance) {
  const int thread = emulation::current;
  emulation::lanes[thread] = value;
  emulation::wait(emulation::warp_groups[thread / 32]);
  const int other = thread % 32 >= distance ? emulation::lanes[thread - distance] : value;
  emulation::wait(emulation::warp_groups[thread / 32]);
  return other;
}

inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

namespace lbdt {

inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }
inline int multiprocessors(const torch::stable::Tensor&) { return emulation::units; }

}  // namespace lbdt

extern "C" {
[[gnu::weak]] void emulation_set(int units, int backward) {
  emulation::units = units;
  emulation::backward = backward;
}
[[gnu::weak]] long emulation_launches() { return static_cast<long>(emulation::launches); }
}
