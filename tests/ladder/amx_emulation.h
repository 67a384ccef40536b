// The tile instructions that prefill.cpp uses, emulated in AVX-512, so that its form for AMX runs on CPUs without it:
// compile it with -include of this file. As in the processor, tiles belong to a thread and must be configured first.
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define __AMX_BF16__ 1

namespace emulated {

struct Tile {
  bool there;
  int rows, bytes;
  alignas(64) uint8_t data[16][64];
};

inline Tile &tile(int number) {
  static thread_local Tile tiles[8] = {};
  return tiles[number];
}

inline Tile &used(int number) {
  if (!tile(number).there) {
    fprintf(stderr, "tile %d is used without being configured in this thread\n", number);
    abort();  // as the processor does, by an illegal instruction
  }
  return tile(number);
}

inline void load_config(const void *config) {
  const uint8_t *read = (const uint8_t *)config;
  for (int number = 0; number < 8; number++) {
    uint16_t bytes;
    memcpy(&bytes, read + 16 + 2 * number, 2);
    tile(number) = {read[0] == 1 && read[48 + number] > 0, read[48 + number], bytes, {}};
  }
}

inline void release() {
  for (int number = 0; number < 8; number++) tile(number).there = false;
}

inline void load(int number, const void *from, long stride) {
  Tile &to = used(number);
  memset(to.data, 0, sizeof to.data);
  for (int row = 0; row < to.rows; row++) memcpy(to.data[row], (const uint8_t *)from + row * stride, (size_t)to.bytes);
}

inline void store(int number, void *to, long stride) {
  const Tile &from = used(number);
  for (int row = 0; row < from.rows; row++) memcpy((uint8_t *)to + row * stride, from.data[row], (size_t)from.bytes);
}

inline void zero(int number) { memset(used(number).data, 0, sizeof(Tile::data)); }

// sums[m][n] += rows[m][k] * columns[k][n] over pairs of k.
inline void dot_products(int sums, int rows, int columns) {
  Tile &to = used(sums);
  for (int row = 0; row < to.rows; row++) {
    __m512 sum = _mm512_load_ps(to.data[row]);
    for (int pair = 0; pair < used(rows).bytes / 4; pair++) {
      int32_t both;
      memcpy(&both, used(rows).data[row] + 4 * pair, 4);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(both), (__m512bh)_mm512_load_si512(used(columns).data[pair]));
    }
    _mm512_store_ps(to.data[row], sum);
  }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_loadd emulated::load
#define _tile_stream_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbf16ps emulated::dot_products
#define syscall(...) 0L  // asks the system for the tile unit
