// Intel's AMX: eight tiles of at most 16 rows of 64 bytes, and products of 8-bit integers between them.
//
// Inline assembly: the intrinsics of GCC 12 do not say that they read memory, so what is written before them may be
// written after them, or never.

#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace lbdt::amx {

constexpr int kTiles = 8;
constexpr int kTileRows = 16;   // at most
constexpr int kTileBytes = 64;  // of a row, at most

// What tiles there are, as the instructions have it; all zero: none.
struct alignas(64) Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

}  // namespace lbdt::amx

// A test's emulation has the same functions.
#if defined(LBDT_EMULATED_AMX)
#include "emulate_amx.h"
#else
namespace lbdt::amx {

inline void load_config(const Config& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
inline void store_config(Config& config) { asm volatile("sttilecfg %0" : "=m"(config)); }
inline void release() { asm volatile("tilerelease" : : : "memory"); }

template <int Tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}

// Rows that are `step` bytes apart.
template <int Tile>
inline void load(const void* from, int64_t step) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(step), "i"(Tile) : "memory");
}

template <int Tile>
inline void store(void* to, int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(step), "i"(Tile) : "memory");
}

// sums [m, n] int32 += signed [m, 4 k] int8 x words [k, n] of 4 uint8, without saturation.
template <int Sums, int Signed, int Words>
inline void multiply() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Signed), "i"(Words));
}

// Whether this process may use them; asks the system for it, so once is enough. The permission is the process's: Linux
// keeps it where all threads find it, older ones too, and gives it to a fork. It is refused by kernels before 5.16, by
// sandboxes, and where a thread has a signal stack that is too small for what a signal would then have to save.
inline bool usable() {
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25, kSaved = 1u << 27, kStates = 3u << 17;
  constexpr long kAskForPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kInt8)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaved)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & kStates) != kStates) return false;
  // The first palette: how many tiles there are, and of what size.
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) || b >> 16 < kTiles) return false;
  if ((b & 0xffff) < kTileBytes || (c & 0xffff) < kTileRows) return false;
  return syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
}

}  // namespace lbdt::amx
#endif

namespace lbdt::amx {

// While it lives the thread has tiles as `config` says, and then those that it had, empty. Others may count on theirs:
// oneDNN looks at what is configured before each of its kernels, but PyTorch's brgemm remembers for each thread what it
// configured last, and would go on without tiles.
class Configured {
 public:
  explicit Configured(const Config& config) {
    store_config(before_);
    load_config(config);
  }
  ~Configured() {
    if (before_.palette != 0) {
      load_config(before_);
    } else {
      release();
    }
  }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

 private:
  Config before_;
};

}  // namespace lbdt::amx
