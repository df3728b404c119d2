// Index arithmetic of replace_patches, shared by csrc/cpu and csrc/cuda: a test of one covers the lines of both.
// A mask is kept as one bit a patch, 32 to a word; bits past the last patch are set, so they are never free. Functions
// that look for donors take the bits of all that are none: of the mask, or of it and the patches to avoid.
//
// Eq.: METHOD.md, 4.1, 4.2 and 4.4; arXiv 2606.31699.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LBDT_INLINE __host__ __device__ __forceinline__
#else
#define LBDT_INLINE inline
#endif

namespace lbdt {

enum DonorSource : int { kRandom = 0, kNearest = 1, kMean = 2, kRow = 3 };  // as in lbdt/donors.py
constexpr int kMeanOf = 5;
constexpr int64_t kNever = INT64_MAX;  // the key of a donor that does not exist

struct Grid {
  int height, width;
  LBDT_INLINE int patches() const { return height * width; }
  LBDT_INLINE int words() const { return (patches() + 31) / 32; }
};

// Strides in elements of a feature map [B, d, H, W].
struct Strides {
  int64_t image, channel, row, column;
  LBDT_INLINE int64_t at(int patch, Grid grid) const {
    return patch / grid.width * row + patch % grid.width * column;
  }
};

// Whether the patches of a channel are one run of memory, in patch order.
LBDT_INLINE bool dense(const Strides& s, Grid grid) { return s.column == 1 && s.row == grid.width; }

LBDT_INLINE int smaller(int a, int b) { return a < b ? a : b; }
LBDT_INLINE int larger(int a, int b) { return a < b ? b : a; }

LBDT_INLINE int count_bits(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// Position of the lowest set bit of a word that is not 0.
LBDT_INLINE int lowest_bit(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

LBDT_INLINE bool get_bit(const uint32_t* bits, int at) { return bits[at >> 5] >> (at & 31) & 1; }

// Word `at` of `bits` with only the positions first..last kept; `at` lies between their words.
LBDT_INLINE uint32_t clip_word(uint32_t word, int at, int first, int last) {
  if (at == first >> 5) word &= ~0u << (first & 31);
  if (at == last >> 5) word &= ~0u >> (31 - (last & 31));
  return word;
}

// Whether a set bit lies within `padding` columns of `patch` in its row. Within rows, then columns: Chebyshev distance.
LBDT_INLINE bool near_in_row(const uint32_t* bits, Grid grid, int patch, int padding) {
  const int x = patch % grid.width, start = patch - x;
  const int first = start + larger(0, x - padding), last = start + smaller(grid.width - 1, x + padding);
  for (int at = first >> 5; at <= last >> 5; ++at)
    if (clip_word(bits[at], at, first, last)) return true;
  return false;
}

// Whether a set bit lies within `padding` rows of `patch` in its column.
LBDT_INLINE bool near_in_column(const uint32_t* bits, Grid grid, int patch, int padding) {
  const int y = patch / grid.width, x = patch % grid.width;
  const int last = smaller(grid.height - 1, y + padding);
  for (int i = larger(0, y - padding); i <= last; ++i)
    if (get_bit(bits, i * grid.width + x)) return true;
  return false;
}

// floor(u * count) in float32, as in the reference. The product may round up to count; a u outside of [0, 1) picks an
// end.
LBDT_INLINE int pick(float u, int count) {
  const float size = static_cast<float>(count), scaled = u * size;
  if (!(scaled > 0.0f)) return 0;
  return scaled < size ? smaller(static_cast<int>(scaled), count - 1) : count - 1;
}

// Position of the n-th set bit of a word with more than n of them.
LBDT_INLINE int nth_bit(uint32_t word, int n) {
  int at = 0;
  for (int size = 16; size > 0; size /= 2) {
    const int count = count_bits(word & ((1u << size) - 1));
    if (n >= count) {
      n -= count;
      word >>= size;
      at += size;
    }
  }
  return at;
}

// The r-th free patch in patch order; before[w] free patches lie in the words before w.
LBDT_INLINE int select_free(const uint32_t* closed, const int* before, int words, int r) {
  int low = 0, high = words - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (before[middle] <= r) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low * 32 + nth_bit(~closed[low], r - before[low]);
}

// Offers the free patches among first..last to `best`, the K smallest keys in order. A key is distance^2 * patches +
// index, so it orders by distance and then by index.
template <int K>
LBDT_INLINE void offer_free(
    const uint32_t* closed, Grid grid, int patch, int first, int last, int64_t (&best)[K]) {
  for (int at = first >> 5; at <= last >> 5; ++at) {
    for (uint32_t free = clip_word(~closed[at], at, first, last); free != 0; free &= free - 1) {
      const int donor = at * 32 + lowest_bit(free);
      const int64_t dy = patch / grid.width - donor / grid.width, dx = patch % grid.width - donor % grid.width;
      int64_t key = (dy * dy + dx * dx) * grid.patches() + donor;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
      for (int i = 0; i < K; ++i) {  // fixed positions: `best` stays in registers
        const int64_t low = key < best[i] ? key : best[i];
        key = key < best[i] ? best[i] : key;
        best[i] = low;
      }
    }
  }
}

// Keys of the K free patches nearest to the masked `patch`, kNever where there are fewer; the donor is key % patches.
template <int K>
LBDT_INLINE void nearest_free(const uint32_t* closed, Grid grid, int free, int patch, int64_t (&best)[K]) {
  for (int i = 0; i < K; ++i) best[i] = kNever;
  const int64_t patches = grid.patches();
  const int y = patch / grid.width, x = patch % grid.width;
  int ring = 1, reach = larger(larger(y, grid.height - 1 - y), larger(x, grid.width - 1 - x));
  // With few free patches a walk over all words meets them sooner than growing rings do.
  if (grid.words() + free <= patches / 8) {
    offer_free(closed, grid, patch, 0, grid.patches() - 1, best);
    ring = reach + 1;
  }
  // From ring r on everything is at distance r or more; at equal distance a lower index may still come.
  for (; ring <= reach && best[K - 1] >= static_cast<int64_t>(ring) * ring * patches; ++ring) {
    const int left = x - ring, right = x + ring, bottom = smaller(grid.height - 1, y + ring);
    for (int row = larger(0, y - ring); row <= bottom; ++row) {
      const int start = row * grid.width;
      if (row == y - ring || row == y + ring) {
        offer_free(
            closed, grid, patch, start + larger(0, left), start + smaller(grid.width - 1, right), best);
      } else {
        if (left >= 0) offer_free(closed, grid, patch, start + left, start + left, best);
        if (right < grid.width) offer_free(closed, grid, patch, start + right, start + right, best);
      }
    }
  }
}

// The free patch nearest to the masked `patch` in its row of the grid, of two the left one; -1 where it has none.
LBDT_INLINE int nearest_in_row(const uint32_t* closed, Grid grid, int patch) {
  const int x = patch % grid.width, reach = larger(x, grid.width - 1 - x);
  for (int step = 1; step <= reach; ++step) {
    if (step <= x && !get_bit(closed, patch - step)) return patch - step;
    if (step < grid.width - x && !get_bit(closed, patch + step)) return patch + step;
  }
  return -1;
}

}  // namespace lbdt
