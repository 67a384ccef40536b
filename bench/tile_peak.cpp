// The peak of one core's tile unit: `steps` times four products of tiles, from registers or, with `loads`, from the L1
// cache, with two tiles of rows and two of columns for each step as in prefill.cpp. See bench/amx.py.
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;  // constant for the reason that prefill.cpp gives

extern "C" void tile_peak(int64_t steps, int64_t loads) {
  alignas(64) static thread_local uint16_t tiles[8][4][512];  // 32 KiB of zeros
  syscall(SYS_arch_prctl, 0x1023, 18);
  _tile_loadconfig(&kTileConfig);
  for (int64_t step = 0; step < steps; step++) {
    if (loads) {
      const uint16_t(*from)[512] = tiles[step % 8];
      _tile_loadd(4, from[0], 64);
      _tile_loadd(5, from[1], 64);
      _tile_loadd(6, from[2], 64);
      _tile_loadd(7, from[3], 64);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}
