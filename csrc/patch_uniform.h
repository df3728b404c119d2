// The number of one patch, shared by csrc/cpu and csrc/cuda.
//
// Eq.: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the words as in
// METHOD.md, 4.3.

#pragma once

#include <cmath>
#include <cstdint>

#ifndef LBDT_INLINE
#ifdef __CUDACC__
#define LBDT_INLINE __host__ __device__ __forceinline__
#else
#define LBDT_INLINE inline
#endif
#endif

namespace lbdt {

// Uniform in [0, 1): the upper 24 bits of the first word with key `seed` and counter (patch, timestep, half, 0).
LBDT_INLINE float patch_number(uint64_t seed, uint32_t timestep, uint32_t half, uint32_t patch) {
  uint32_t c0 = patch, c1 = timestep, c2 = half, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u, b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<float>(c0 >> 8) * 0x1p-24f;
}

// The counter word of a timestep: its floor, negative ones in two's complement; 0 where it is not an int64 (NaN).
LBDT_INLINE uint32_t timestep_word(int64_t timestep) { return static_cast<uint32_t>(timestep); }
LBDT_INLINE uint32_t timestep_word(double timestep) {
  const bool fits = timestep >= -0x1p63 && timestep < 0x1p63;
  return static_cast<uint32_t>(fits ? static_cast<int64_t>(floor(timestep)) : 0);
}

}  // namespace lbdt
