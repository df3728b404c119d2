// The tile instructions of csrc/cpu/amx.h in plain C++, as Intel's manual (SDM, volume 2) describes them: what is not
// configured, or not as an instruction needs it, is an exception, where the processor has a fault. Numbers of bytes and
// rows are counted as the instructions do it, not as their one user has them. See test_amx_emulated.py.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace lbdt::amx {
namespace emulation {

inline bool permitted = true;       // what usable() says
inline bool adds_one = false;       // whether products are wrong
inline int64_t executed = 0;        // instructions, without release
inline int64_t fails_after = -1;    // until one throws; negative: none does
inline int64_t empties_after = -1;  // until the tiles are empty, as after an interrupt on a machine that forgets them
inline std::vector<std::pair<const char*, const char*>> forbidden;  // memory that is not to be touched

inline Config config;  // all zero: none
inline uint8_t tiles[kTiles][kTileRows][kTileBytes];

inline void demand(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("emulated AMX: " + what);
}

inline void count_one() {
  ++executed;
  demand(fails_after < 0 || fails_after-- > 0, "told to fail");
  if (empties_after >= 0 && empties_after-- == 0) std::memset(tiles, 0, sizeof tiles);
}

inline void empty_all() { std::memset(tiles, 0, sizeof tiles); }

// Instructions on a tile need a configuration that has it.
inline void demand_tile(int tile) {
  demand(config.palette == 1, "no tiles are configured");
  demand(tile >= 0 && tile < kTiles, "there is no such tile");
  demand(config.rows[tile] > 0 && config.row_bytes[tile] > 0, "tile " + std::to_string(tile) + " is not configured");
}

inline void demand_memory(const void* from, int64_t size) {
  const char* first = static_cast<const char*>(from);
  for (const auto& [begin, end] : forbidden)
    demand(first + size <= begin || first >= end, "memory beside an argument is touched");
}

}  // namespace emulation

inline bool usable() { return emulation::permitted; }

inline void load_config(const Config& given) {
  using namespace emulation;
  count_one();
  demand(given.palette <= 1, "there is no such palette");
  if (given.palette == 0) {
    config = {};
    return empty_all();
  }
  demand(given.start_row < kTileRows, "start_row is out of range");
  for (const uint8_t byte : given.reserved) demand(byte == 0, "reserved bytes are to be zero");
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = given.rows[tile], bytes = given.row_bytes[tile];
    demand(tile < kTiles || (rows == 0 && bytes == 0), "there are eight tiles");
    demand(rows <= kTileRows && bytes <= kTileBytes, "a tile is too large");
    demand((rows == 0) == (bytes == 0), "a tile with rows but no bytes, or bytes but no rows");
  }
  config = given;
  empty_all();
}

inline void store_config(Config& to) {
  emulation::count_one();
  to = emulation::config;
}

inline void release() {
  emulation::config = {};
  emulation::empty_all();
}

template <int Tile>
void zero() {
  using namespace emulation;
  count_one();
  demand_tile(Tile);
  std::memset(tiles[Tile], 0, sizeof tiles[Tile]);
}

template <int Tile>
void load(const void* from, int64_t step) {
  using namespace emulation;
  count_one();
  demand_tile(Tile);
  demand(config.start_row == 0, "start_row is for interrupted loads");
  std::memset(tiles[Tile], 0, sizeof tiles[Tile]);
  for (int row = 0; row < config.rows[Tile]; ++row) {
    const char* memory = static_cast<const char*>(from) + row * step;
    demand_memory(memory, config.row_bytes[Tile]);
    std::memcpy(tiles[Tile][row], memory, config.row_bytes[Tile]);
  }
}

template <int Tile>
void store(void* to, int64_t step) {
  using namespace emulation;
  count_one();
  demand_tile(Tile);
  for (int row = 0; row < config.rows[Tile]; ++row) {
    char* memory = static_cast<char*>(to) + row * step;
    demand_memory(memory, config.row_bytes[Tile]);
    std::memcpy(memory, tiles[Tile][row], config.row_bytes[Tile]);
  }
}

// TDPBSUD: of `Signed` bytes are signed, of `Words` they are not; sums wrap around.
template <int Sums, int Signed, int Words>
void multiply() {
  using namespace emulation;
  static_assert(Sums != Signed && Signed != Words && Sums != Words, "a fault of its own");
  count_one();
  for (const int tile : {Sums, Signed, Words}) {
    demand_tile(tile);
    demand(config.row_bytes[tile] % 4 == 0, "rows are not whole words");
  }
  demand(config.rows[Sums] == config.rows[Signed], "sums and signed bytes have other rows");
  demand(config.row_bytes[Sums] == config.row_bytes[Words], "sums and words have other columns");
  demand(config.row_bytes[Signed] / 4 == config.rows[Words], "the factors do not meet");
  for (int m = 0; m < config.rows[Sums]; ++m)
    for (int n = 0; n < config.row_bytes[Sums] / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, tiles[Sums][m] + 4 * n, sizeof sum);
      for (int k = 0; k < config.row_bytes[Signed] / 4; ++k)
        for (int i = 0; i < 4; ++i) {
          const int32_t left = static_cast<int8_t>(tiles[Signed][m][4 * k + i]), right = tiles[Words][k][4 * n + i];
          sum += static_cast<uint32_t>(left * right);
        }
      sum += adds_one;
      std::memcpy(tiles[Sums][m] + 4 * n, &sum, sizeof sum);
    }
  // What is beyond the tile's size is zero after every instruction that writes it.
  for (int m = 0; m < kTileRows; ++m) {
    const int kept = m < config.rows[Sums] ? config.row_bytes[Sums] : 0;
    std::memset(tiles[Sums][m] + kept, 0, kTileBytes - kept);
  }
}

}  // namespace lbdt::amx
