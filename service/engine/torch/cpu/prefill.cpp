// The forward of a decoder over one pack of prompts, in bfloat16 on a CPU with AMX, or with AVX-512's products of
// bfloat16 where AMX is not compiled for. native_decoder.py calls it.
//
// Products take bfloat16 and sum in float32; the residual stream, norms, softmax and activations are float32, each
// rounded where the next product reads it: to P numbers in bfloat16 whose sum it is then. P = 1 is bfloat16; with P = 2,
// and weights that are bfloat16 themselves, what is rounded off is 2^-18 of a number, which is called float32 here.
// Every number of a row is made from that row alone (and, in attention, from the keys of its chain) in an order that
// does not depend on where the row lies or on what lies beside it: a prompt has the same bits in every pack.
//
// Weights and keys lie in panels of 32 outputs: [outputs / 32][depth / 32][2 tiles][16 pairs][16 outputs][2], so that a
// step of 32 along the depth is two tiles, one behind the other. Strides are in elements.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

typedef uint16_t bf16;

namespace {

const int64_t kBlock = 32;       // rows and outputs of one block of a product: two tiles by two
const int64_t kCache = 1 << 20;   // bytes of a product's input that should stay in a core's cache
const int64_t kResident = 512;    // depth of a panel that stays in the first-level cache beside streamed rows: 32 KiB of 48
const int64_t kStates = 10;       // that share a panel in the output layer with AMX, three parts of each
const int64_t kMostDepth = 1024;  // of one product into the residual stream; a deeper one is made in slices

inline int64_t blocks(int64_t rows) { return (rows + kBlock - 1) / kBlock * kBlock; }

// Rows of so many numbers in bfloat16 that a product reads again from the cache: whole blocks, one at least.
inline int64_t rows_in_cache(int64_t width) {
  const int64_t fitting = kCache / (2 * width) / kBlock * kBlock;
  return fitting < kBlock ? kBlock : fitting;
}

#ifdef __AMX_BF16__
struct Tiles {  // what _tile_loadconfig reads; every tile is 16 rows of 64 bytes
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Constant, because GCC's _tile_loadconfig declares only the first 8 of the 64 bytes as read: it removes run-time stores
// to the others, and tiles without rows crash at their first use.
constexpr Tiles kTiles;

// The tile unit, for as long as this is there.
struct Unit {
  Unit() { _tile_loadconfig(&kTiles); }
  ~Unit() { _tile_release(); }
};
#else
struct Unit {
  Unit() {}  // nothing to set up
};
#endif

template <class T>
struct Buffer {  // memory in whole cache lines, zeroed; `stride` keeps rows off each other's cache sets
  T *data;
  int64_t stride;
  Buffer(int64_t rows, int64_t width) : stride((width + 31) / 32 * 32 + 32) {
    size_t bytes = (size_t)(rows * stride * (int64_t)sizeof(T) + 63) / 64 * 64;
    data = (T *)aligned_alloc(64, bytes);
    if (data) memset(data, 0, bytes);
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  T *row(int64_t index) const { return data + index * stride; }
};

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// The sum of P numbers in bfloat16, `apart` from each other.
template <int P>
inline __m512 widen(const bf16 *x, int64_t apart) {
  __m512 sum = widen(_mm256_loadu_si256((const __m256i *)x));
  for (int part = 1; part < P; part++)
    sum = _mm512_add_ps(sum, widen(_mm256_loadu_si256((const __m256i *)(x + part * apart))));
  return sum;
}

// Into P numbers, each what those before it leave, to the nearest, ties to even; NaN stays NaN.
template <int P>
inline void narrow(bf16 *to, int64_t apart, __m512 x) {
  for (int part = 0; part < P; part++) {
    __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
    _mm256_storeu_si256((__m256i *)(to + part * apart), rounded);
    if (part + 1 < P) x = _mm512_sub_ps(x, widen(rounded));
  }
}

// 2^t, to 3e-7 of its value: 2^n 2^r with |r| <= 1/2 and the series of 2^r. Below -150 it is 0; NaN stays NaN.
inline __m512 power_of_two(__m512 t) {
  __m512 n = _mm512_roundscale_ps(t, 0), r = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.33335581e-3f);  // ln(2)^k / k!
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61812911e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55041087e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226507e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147181e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

const float kLog2e = 1.44269504088896341f;

// exp; what is beyond +-87 counts as that.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(87.0f), x));
  return power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(kLog2e)));
}

// 1 / (1 + exp(-x)); the estimate of the quotient, good to 14 bits, is refined once.
inline __m512 sigmoid(__m512 x) {
  __m512 one = _mm512_set1_ps(1.0f);
  __m512 d = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
  __m512 estimate = _mm512_rcp14_ps(d);
  return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(d, estimate, _mm512_set1_ps(2.0f)));
}

inline __m512 hyperbolic_tangent(__m512 x) {
  return _mm512_fmsub_ps(_mm512_set1_ps(2.0f), sigmoid(_mm512_add_ps(x, x)), _mm512_set1_ps(1.0f));
}

// x * sigmoid(x), or the tanh form of GELU, which is x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).
inline __m512 activate(__m512 x, bool gelu) {
  if (!gelu) return _mm512_mul_ps(x, sigmoid(x));
  __m512 cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(0.044715f)));
  return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(_mm512_set1_ps(1.5957691216f), _mm512_add_ps(x, cubed))));
}

// 32 rows of x, P parts of each number, `depth` long, times one panel, into out, [32][32], or `added` to what is there.
// `fetch` and `beside` are done depth / 32 times on the way. Of the 32 rows only `rows` need be right.
#ifdef __AMX_BF16__
// Tiles 0 to 3 sum, 4 and 5 hold rows, 6 and 7 the panel. The tile unit works beside the vector unit.
// Four tiles a step from the second-level cache take longer than their products, two do not: rows, which are used once
// for each panel, are loaded past the first-level cache, so that they do not push out the panel's first kResident inputs.
template <int P, class Fetch, class Beside>
inline void multiply(const bf16 *x, int64_t stride, int64_t apart, int64_t, const bf16 *panel, int64_t depth, float *out,
                     int64_t out_stride, bool added, Fetch fetch, Beside beside) {
  const bf16 *lower = x + 16 * stride;
  // GCC's tile loads declare no memory as read; this keeps every earlier store before them. Its tile stores do declare
  // what they write, and nothing that a load reads is stored between here and there.
  asm volatile("" ::: "memory");
  if (added) {
    _tile_loadd(0, out, out_stride * 4);
    _tile_loadd(1, out + 16, out_stride * 4);
    _tile_loadd(2, out + 16 * out_stride, out_stride * 4);
    _tile_loadd(3, out + 16 * out_stride + 16, out_stride * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 32, panel += 1024) {
    _tile_stream_loadd(4, x + k, stride * 2);
    if (k < kResident) {
      _tile_loadd(6, panel, 64);
      _tile_loadd(7, panel + 512, 64);
    } else {
      _tile_stream_loadd(6, panel, 64);
      _tile_stream_loadd(7, panel + 512, 64);
    }
    _tile_stream_loadd(5, lower + k, stride * 2);
#pragma GCC unroll 2
    for (int part = 0; part < P; part++) {
      if (part) {
        _tile_stream_loadd(4, x + k + part * apart, stride * 2);
        _tile_stream_loadd(5, lower + k + part * apart, stride * 2);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    fetch();
    beside();
  }
  _tile_stored(0, out, out_stride * 4);
  _tile_stored(1, out + 16, out_stride * 4);
  _tile_stored(2, out + 16 * out_stride, out_stride * 4);
  _tile_stored(3, out + 16 * out_stride + 16, out_stride * 4);
}
#else
// N rows, whose sums are in registers, two each.
template <int P, int N, class Fetch>
inline void multiply_rows(const bf16 *x, int64_t stride, int64_t apart, const bf16 *panel, int64_t depth, float *out,
                          int64_t out_stride, bool added, Fetch fetch) {
  __m512 left[N], right[N];
#pragma GCC unroll 8
  for (int64_t i = 0; i < N; i++) {
    left[i] = added ? _mm512_loadu_ps(out + i * out_stride) : _mm512_setzero_ps();
    right[i] = added ? _mm512_loadu_ps(out + i * out_stride + 16) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 32, panel += 512) {
    fetch();
    for (int64_t pair = k; pair < k + 32; pair += 2, panel += 32) {
      __m512bh first = (__m512bh)_mm512_loadu_si512(panel), second = (__m512bh)_mm512_loadu_si512(panel + 512);
#pragma GCC unroll 2
      for (int part = 0; part < P; part++) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < N; i++) {
          int32_t both;
          memcpy(&both, x + i * stride + part * apart + pair, 4);
          __m512bh spread = (__m512bh)_mm512_set1_epi32(both);
          left[i] = _mm512_dpbf16_ps(left[i], spread, first);
          right[i] = _mm512_dpbf16_ps(right[i], spread, second);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < N; i++) {
    _mm512_storeu_ps(out + i * out_stride, left[i]);
    _mm512_storeu_ps(out + i * out_stride + 16, right[i]);
  }
}

template <int P, class Fetch, class Beside>
inline void multiply(const bf16 *x, int64_t stride, int64_t apart, int64_t rows, const bf16 *panel, int64_t depth,
                     float *out, int64_t out_stride, bool added, Fetch fetch, Beside beside) {
  for (int64_t k = 0; k < depth; k += 32) beside();
  if (rows <= 2)
    multiply_rows<P, 2>(x, stride, apart, panel, depth, out, out_stride, added, fetch);
  else
    multiply_rows<P, 8>(x, stride, apart, panel, depth, out, out_stride, added, fetch);
  for (int64_t row = 8; row < rows && row < kBlock; row += 8)
    multiply_rows<P, 8>(x + row * stride, stride, apart, panel, depth, out + row * out_stride, out_stride, added, [] {});
}
#endif

// rows x depth times a panelled weight. store(row, output, 16 numbers from `output` on, the 16 after those) takes the
// results, those of a block while the next one is multiplied. `rows` is rounded up to blocks: the input has those rows
// too, and what is stored for them means nothing. A panel is `panel` long, of which depth * 32 are read.
// fetch(row, output) asks for the memory that store will write, while the block is multiplied.
template <int P, class Store, class Fetch>
inline void product(const bf16 *x, int64_t stride, int64_t apart, int64_t rows, const bf16 *weight, int64_t panel,
                    int64_t depth, int64_t outputs, Store store, Fetch fetch) {
  alignas(64) float sums[kBlock][kBlock] = {};
  const int64_t steps = depth / 32, share = (kBlock + steps - 1) / steps;
  const int64_t lines = (kBlock * kBlock + blocks(rows) - 1) / blocks(rows);
  int64_t stored = kBlock, stored_row = 0, stored_output = 0;
  auto store_some = [&](int64_t count) {
    for (int64_t end = stored + count < kBlock ? stored + count : kBlock; stored < end; stored++) {
      const float *left = sums[stored];
      store(stored_row + stored, stored_output, _mm512_load_ps(left), _mm512_load_ps(left + 16));
    }
  };
  for (int64_t output = 0; output < outputs; output += kBlock, weight += panel) {
    const bf16 *next = weight + panel;  // is fetched while this panel is used
    auto fetch_some = [&] {
      for (int64_t line = 0; line < lines; line++, next += 32) _mm_prefetch((const char *)next, _MM_HINT_T1);
    };
    for (int64_t row = 0; row < rows; row += kBlock) {
      int64_t fetched = 0;
      multiply<P>(x + row * stride, stride, apart, rows - row, weight, depth, sums[0], kBlock, false, fetch_some,
                  [&] {
                    for (int64_t end = fetched + share < kBlock ? fetched + share : kBlock; fetched < end; fetched++)
                      fetch(row + fetched, output);
                    store_some(share);
                  });
      stored = 0, stored_row = row, stored_output = output;
    }
  }
  store_some(kBlock);
}

template <int P, class Store>
inline void product(const bf16 *x, int64_t stride, int64_t apart, int64_t rows, const bf16 *weight, int64_t panel,
                    int64_t depth, int64_t outputs, Store store) {
  product<P>(x, stride, apart, rows, weight, panel, depth, outputs, store, [](int64_t, int64_t) {});
}

// At most 32 rows x depth times a panelled weight, as they are, into [32][outputs], or added to what is there.
template <int P>
inline void product_of_block(const bf16 *x, int64_t stride, int64_t apart, int64_t rows, const bf16 *weight, int64_t panel,
                             int64_t depth, int64_t outputs, float *out, int64_t out_stride, bool added) {
  for (int64_t output = 0; output < outputs; output += kBlock, weight += panel, out += kBlock) {
    multiply<P>(x, stride, apart, rows, weight, depth, out, out_stride, added, [] {}, [] {});
  }
}

// weight * x / sqrt(mean(x^2) + eps) for one row; store(at, 16 numbers from `at` on) takes it, and may put it over x.
template <class Store>
inline void rms_norm(const float *x, const float *weight, float eps, int64_t width, Store store) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < width; at += 16) {
    __m512 part = _mm512_loadu_ps(x + at);
    sum = _mm512_fmadd_ps(part, part, sum);
  }
  __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / width + eps));
  for (int64_t at = 0; at < width; at += 16)
    store(at, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + at), scale), _mm512_loadu_ps(weight + at)));
}

template <int P>
void rms_norm(const float *x, const float *weight, float eps, int64_t width, bf16 *out) {
  rms_norm(x, weight, eps, width, [&](int64_t at, __m512 part) { narrow<P>(out + at, width, part); });
}

}  // namespace

extern "C" {

// One decoder layer. Pointers that a family has no use for are null.
struct Layer {
  const float *before_norm, *qkv_bias, *q_norm, *k_norm, *output_bias, *attention_norm, *mlp_norm, *last_norm;
  const bf16 *qkv, *output, *gate_up, *down;
  const float *cos, *sin;  // [positions][head_width]
  int64_t window;          // keys that a query sees, itself included; 0: all before it
  float scaling, cap;      // cap 0: scores are not capped
};

struct Model {
  int64_t layers, width, heads, kv_heads, head_width, mlp_width, gelu;
  float eps;
  const float *final_norm;  // [width]
  const Layer *layer;
};

// Tokens that are read once: rows [row, row + length) of the pack. It sees the segments chain[0] to chain[links - 1], the
// last of which is itself; `position` is the place of its first token in its prompt.
struct Segment {
  int64_t row, length, position, links;
  const int64_t *chain;
};
}

namespace {

// Rotary positions of one head, the first half of which is paired with the second, behind a norm where there is one.
template <int P>
void rotate(bf16 *head, int64_t apart, int64_t width, const float *cos, const float *sin, const float *norm, float eps) {
  alignas(64) float x[1024];
  for (int64_t at = 0; at < width; at += 16) _mm512_store_ps(x + at, widen<P>(head + at, apart));
  if (norm) rms_norm(x, norm, eps, width, [&](int64_t at, __m512 part) { _mm512_store_ps(x + at, part); });
  int64_t half = width / 2;
  for (int64_t at = 0; at < half; at += 16) {
    __m512 first = _mm512_load_ps(x + at), second = _mm512_load_ps(x + half + at);
    __m512 turned = _mm512_mul_ps(second, _mm512_loadu_ps(sin + at));
    narrow<P>(head + at, apart, _mm512_fmsub_ps(first, _mm512_loadu_ps(cos + at), turned));
    turned = _mm512_mul_ps(first, _mm512_loadu_ps(sin + half + at));
    narrow<P>(head + half + at, apart, _mm512_fmadd_ps(second, _mm512_loadu_ps(cos + half + at), turned));
  }
}

// Scratch for the attention of one segment over at most `most_keys` keys, whole blocks; `parts` of each number.
struct AttentionScratch {
  const int64_t most_keys;
  Buffer<bf16> keys, values, shares;  // the parts of keys and values are most_keys * head_width apart, shares' most_keys
  Buffer<float> scores, rest;
  AttentionScratch(int64_t parts, int64_t most_keys, int64_t head_width)
      : most_keys(most_keys), keys(parts * most_keys, head_width), values(parts * most_keys, head_width),
        shares(kBlock, parts * most_keys), scores(kBlock, most_keys), rest(kBlock, head_width) {}
  bool complete() const { return keys.data && values.data && shares.data && scores.data && rest.data; }
};

// Keys (outputs are keys, depth is the head's width) and values (outputs are the head's width, depth is keys) of one
// kv head, one part of their numbers, into panels; what lies behind the last key is zero.
void lay_out(const bf16 *qkv, int64_t stride, const Segment *segments, const Segment &own, int64_t width,
             int64_t key_offset, int64_t value_offset, int64_t padded, bf16 *keys, bf16 *values) {
  const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32((int)(stride / 2)));
  static const bf16 zeros[1024] = {};
  const bf16 *rows[kBlock];
  int64_t link = 0, within = 0;
  for (int64_t key = 0; key < padded; key += kBlock) {
    bool together = true;
    for (int64_t i = 0; i < kBlock; i++) {
      while (link < own.links && within == segments[own.chain[link]].length) link++, within = 0;
      rows[i] = link < own.links ? qkv + (segments[own.chain[link]].row + within++) * stride + key_offset : zeros;
      together = together && rows[i] == rows[0] + i * stride;
    }
    bf16 *panel = keys + key * width;
    for (int64_t pair = 0; pair < width / 2; pair++) {
      uint32_t *to = (uint32_t *)(panel + pair / 16 * 1024 + pair % 16 * 32);
      if (together) {
        _mm512_storeu_si512(to, _mm512_i32gather_epi32(places, (const int *)rows[0] + pair, 4));
        _mm512_storeu_si512(to + 256, _mm512_i32gather_epi32(places, (const int *)rows[16] + pair, 4));
      } else {
        for (int64_t i = 0; i < 16; i++) {
          memcpy(to + i, rows[i] + pair * 2, 4);
          memcpy(to + 256 + i, rows[16 + i] + pair * 2, 4);
        }
      }
    }
    int64_t shift = value_offset - key_offset;
    for (int64_t column = 0; column < width; column += 16) {
      bf16 *to = values + column / 32 * padded * 32 + key * 32 + column % 32 / 16 * 512;
      for (int64_t i = 0; i < kBlock; i += 2, to += 32) {
        const bf16 *even = rows[i] == zeros ? zeros : rows[i] + shift + column;
        const bf16 *odd = rows[i + 1] == zeros ? zeros : rows[i + 1] + shift + column;
        __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)even));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)odd));
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }
}

// exp(scaling * (score - largest)) over keys [first, last), zero over the rest of [0, padded); returns the sum.
template <int P>
float softmax(float *scores, bf16 *shares, int64_t apart, int64_t first, int64_t last, int64_t padded, float scaling,
              float cap) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  auto seen = [&](int64_t at) {
    return _mm512_cmp_epi32_mask(lanes, _mm512_set1_epi32((int)(first - at)), _MM_CMPINT_NLT) &
           _mm512_cmp_epi32_mask(lanes, _mm512_set1_epi32((int)(last - at)), _MM_CMPINT_LT);
  };
  int64_t start = first / kBlock * kBlock, end = blocks(last);
  for (int64_t at = start; cap != 0 && at < end; at += 16) {
    __m512 score = _mm512_mul_ps(_mm512_load_ps(scores + at), _mm512_set1_ps(scaling / cap));
    _mm512_store_ps(scores + at, _mm512_mul_ps(_mm512_set1_ps(cap), hyperbolic_tangent(score)));
  }
  __m512 largest = _mm512_set1_ps(-__builtin_inff()), factor = _mm512_set1_ps((cap != 0 ? 1.0f : scaling) * kLog2e);
  for (int64_t at = start; at < end; at += 16)
    largest = _mm512_mask_max_ps(largest, seen(at), largest, _mm512_load_ps(scores + at));
  largest = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(largest)), factor);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = start; at < end; at += 16) {
    __m512 share = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + at), factor, largest));
    share = _mm512_maskz_mov_ps(seen(at), share);
    sum = _mm512_add_ps(sum, share);
    narrow<P>(shares + at, apart, share);
  }
  for (int part = 0; part < P; part++) memset(shares + part * apart + end, 0, (size_t)(padded - end) * 2);
  return _mm512_reduce_add_ps(sum);
}

// A part of a segment's attention: the queries [from, to) of all heads that share the keys of one.
struct Share {
  int64_t segment, kv, from, to;
};

// Attention of some queries to the keys of their segment's chain, from [rows][queries, keys, values] into
// [rows][heads, width].
template <int P>
void attend(const Model &model, const Layer &layer, const Buffer<bf16> &qkv, const Segment *segments, const Share &share,
            const Buffer<bf16> &out, AttentionScratch &scratch) {
  const Segment &own = segments[share.segment];
  const int64_t kv = share.kv;
  int64_t width = model.head_width, group = model.heads / model.kv_heads, keys = 0;
  for (int64_t link = 0; link < own.links; link++) keys += segments[own.chain[link]].length;
  int64_t padded = (keys + kBlock - 1) / kBlock * kBlock, before = keys - own.length;
  float sums[kBlock] = {};
  const int64_t apart = (model.heads + 2 * model.kv_heads) * width, out_apart = model.heads * width;
  const int64_t key_offset = (model.heads + kv) * width, panels_apart = scratch.most_keys * width;
  for (int part = 0; part < P; part++)
    lay_out(qkv.data + part * apart, qkv.stride, segments, own, width, key_offset, key_offset + model.kv_heads * width,
            padded, scratch.keys.data + part * panels_apart, scratch.values.data + part * panels_apart);
  for (int64_t query = share.from; query < share.to; query += kBlock) {
    int64_t rows = own.length - query < kBlock ? own.length - query : kBlock, last = before + query + rows;
    int64_t first = layer.window && last - rows + 1 > layer.window ? last - rows + 1 - layer.window : 0;
    int64_t start = first / kBlock * kBlock, used = (last + kBlock - 1) / kBlock * kBlock;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
      const bf16 *queries = qkv.row(own.row + query) + head * width, *values = scratch.values.data + start * kBlock;
      for (int part = 0; part < P; part++)
        product_of_block<P>(queries, qkv.stride, apart, rows, scratch.keys.data + part * panels_apart + start * width,
                            width * kBlock, width, used - start, scratch.scores.data + start, scratch.scores.stride,
                            part > 0);
      for (int64_t row = 0; row < rows; row++) {
        int64_t end = before + query + row + 1, begin = layer.window && end > layer.window ? end - layer.window : 0;
        bf16 *shares = scratch.shares.row(row);
        for (int part = 0; part < P; part++)
          memset(shares + part * scratch.most_keys + start, 0, (size_t)(begin / 32 * 32 - start) * 2);
        sums[row] = softmax<P>(scratch.scores.row(row), shares, scratch.most_keys, begin, end, used, layer.scaling, layer.cap);
      }
      const bf16 *shares = scratch.shares.data + start;
      for (int part = 1; part < P; part++)
        product_of_block<P>(shares, scratch.shares.stride, scratch.most_keys, rows, values + part * panels_apart,
                            padded * kBlock, used - start, width, scratch.rest.data, scratch.rest.stride, part > 1);
      product<P>(shares, scratch.shares.stride, scratch.most_keys, rows, values, padded * kBlock, used - start, width,
                 [&](int64_t row, int64_t column, __m512 left, __m512 right) {
                   if (row >= rows) return;
                   if (P > 1) {
                     left = _mm512_add_ps(left, _mm512_loadu_ps(scratch.rest.row(row) + column));
                     right = _mm512_add_ps(right, _mm512_loadu_ps(scratch.rest.row(row) + column + 16));
                   }
                   bf16 *to = out.row(own.row + query + row) + head * width + column;
                   narrow<P>(to, out_apart, _mm512_div_ps(left, _mm512_set1_ps(sums[row])));
                   narrow<P>(to + 16, out_apart, _mm512_div_ps(right, _mm512_set1_ps(sums[row])));
                 });
    }
  }
}

inline void add_bias(const float *bias, int64_t output, __m512 &left, __m512 &right) {
  if (!bias) return;
  left = _mm512_add_ps(left, _mm512_loadu_ps(bias + output));
  right = _mm512_add_ps(right, _mm512_loadu_ps(bias + output + 16));
}

// hidden += x times weight; with a norm (Gemma's) in between where there is one.
template <int P>
void add_product(const bf16 *x, int64_t stride, int64_t apart, int64_t rows, const bf16 *weight, const float *bias, const float *norm,
                 float eps, int64_t depth, const Buffer<float> &hidden, int64_t first_row, int64_t width,
                 const Buffer<float> &mixed) {
  for (int64_t row = 0; norm && row < blocks(rows); row++) memset(mixed.row(row), 0, (size_t)width * 4);
  for (int64_t from = 0; from < depth; from += kMostDepth) {
    int64_t some = depth - from < kMostDepth ? depth - from : kMostDepth;
    product<P>(x + from, stride, apart, rows, weight + from * kBlock, depth * kBlock, some, width,
               [&](int64_t row, int64_t output, __m512 left, __m512 right) {
                 if (from == 0) add_bias(bias, output, left, right);
                 float *to = norm ? mixed.row(row) + output : hidden.row(first_row + row) + output;
                 _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), left));
                 _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), right));
               },
               [&](int64_t row, int64_t output) {
                 float *to = norm ? mixed.row(row) + output : hidden.row(first_row + row) + output;
                 __builtin_prefetch(to, 1);
                 __builtin_prefetch(to + 16, 1);
               });
  }
  for (int64_t row = 0; norm && row < rows; row++) {
    float *to = hidden.row(first_row + row);
    rms_norm(mixed.row(row), norm, eps, width, [&](int64_t at, __m512 part) {
      _mm512_storeu_ps(to + at, _mm512_add_ps(_mm512_loadu_ps(to + at), part));
    });
  }
}

template <int P>
void gated(const bf16 *x, int64_t stride, int64_t apart, int64_t rows, const bf16 *weight, int64_t depth, int64_t width,
           bool gelu, bf16 *out, int64_t out_stride, int64_t out_apart) {
  product<P>(x, stride, apart, rows, weight, depth * kBlock, depth, 2 * width,
             [&](int64_t row, int64_t output, __m512 gate, __m512 up) {
               narrow<P>(out + row * out_stride + output / 2, out_apart, _mm512_mul_ps(activate(gate, gelu), up));
             },
             [&](int64_t row, int64_t output) { __builtin_prefetch(out + row * out_stride + output / 2, 1); });
}

// Threads that do one thing together and wait for each other in between. A thread that waits sleeps: on a busy machine
// one that spins would take the time of the one that it waits for.
class Team {
 public:
  explicit Team(int64_t size) : size_(size) {}

  // Return when all have come here.
  void meet() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (++here_ == size_) {
      here_ = 0;
      round_++;
      all_here_.notify_all();
      return;
    }
    all_here_.wait(lock, [this, round = round_] { return round_ != round; });
  }

  // work(0) here, the others in threads of their own, to the end of all.
  void run(const std::function<void(int64_t)> &work) {
    std::vector<std::thread> others;
    for (int64_t member = 1; member < size_; member++) others.emplace_back(work, member);
    work(0);
    for (std::thread &other : others) other.join();
  }

 private:
  const int64_t size_;
  int64_t here_ = 0, round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

// What one thread needs for itself.
struct Bench {
  Buffer<float> mixed;
  Buffer<bf16> normed, inner;
  AttentionScratch scratch;
  Bench(const Model &model, int64_t parts, int64_t chunk, int64_t most_keys)
      : mixed(chunk, model.width), normed(chunk, parts * model.width), inner(chunk, parts * model.mlp_width),
        scratch(parts, blocks(most_keys), model.head_width) {}
  bool complete() const { return mixed.data && normed.data && inner.data && scratch.complete(); }
};

// All parts of a layer's attention, for so many threads: a segment's queries are divided where there are more threads
// than segments and kv heads to give them.
std::vector<Share> shares_of(const Model &model, const Segment *segments, int64_t count, int64_t rows, int64_t threads) {
  std::vector<Share> found;
  for (int64_t s = 0; s < count; s++) {
    const int64_t length = segments[s].length, whole = (length + kBlock - 1) / kBlock;
    int64_t parts = threads == 1 ? 1 : (2 * threads * length + rows * model.kv_heads - 1) / (rows * model.kv_heads);
    parts = parts < whole ? parts : whole;
    for (int64_t kv = 0; kv < model.kv_heads; kv++)
      for (int64_t part = 0; part < parts; part++) {
        int64_t to = whole * (part + 1) / parts * kBlock;
        found.push_back({s, kv, whole * part / parts * kBlock, to < length ? to : length});
      }
  }
  return found;
}

// The states behind the rows `last` of a pack, normed, into [lasts, width], by so many threads: each has rows of its own,
// but for attention, which is dealt out as it comes. `embedded` is [rows, width]. Returns 0, or 1 where there is not
// enough memory.
template <int P>
int64_t decode(const Model *model, const float *embedded, int64_t rows, const Segment *segments, int64_t count,
               const int64_t *last, int64_t lasts, int64_t threads, float *out) {
  const int64_t width = model->width, head = model->head_width, heads = model->heads + 2 * model->kv_heads;
  const int64_t mixed_width = model->heads * head, size = threads < (rows + 31) / 32 ? threads : (rows + 31) / 32;
  // Rows that go through a layer's products together.
  const int64_t widest = width < kMostDepth ? kMostDepth : width;
  const int64_t fitting = rows_in_cache(P * widest), least = fitting < 64 ? 64 : fitting;
  const int64_t chunk = rows < least ? blocks(rows) : least;
  int64_t most_keys = 0;
  for (int64_t s = 0; s < count; s++) {
    int64_t keys = segments[s].position + segments[s].length;
    most_keys = keys > most_keys ? keys : most_keys;
  }
  // A last block of queries may begin anywhere: it reads up to 31 rows behind the pack.
  Buffer<float> hidden(blocks(rows), width), ends(blocks(lasts), width);
  Buffer<bf16> qkv(rows + 2 * kBlock, P * heads * head);
  Buffer<bf16> seen(blocks(rows), P * mixed_width), seen_ends(blocks(lasts), P * mixed_width);
  std::vector<std::unique_ptr<Bench>> benches;
  bool complete = hidden.data && ends.data && qkv.data && seen.data && seen_ends.data;
  for (int64_t member = 0; member < size; member++) {
    benches.push_back(std::make_unique<Bench>(*model, P, chunk, most_keys));
    complete = complete && benches.back()->complete();
  }
  if (!complete) return 1;
  const std::vector<Share> shares = shares_of(*model, segments, count, rows, size);
  std::vector<std::atomic<size_t>> dealt(model->layers);
  Team team(size);
  team.run([&](int64_t member) {
    const Unit unit;
    const Bench &own = *benches[member];
    // The first of this thread's rows out of so many, in whole blocks; with the next thread's it is the end.
    auto share = [&](int64_t all, int64_t of) {
      int64_t row = blocks(all) / kBlock * of / size * kBlock;
      return row < all ? row : all;
    };
    const int64_t begin = share(rows, member), end = share(rows, member + 1);
    for (int64_t row = begin; row < end; row++) memcpy(hidden.row(row), embedded + row * width, (size_t)width * 4);
    for (int64_t l = 0; l < model->layers; l++) {
      const Layer &layer = model->layer[l];
      for (int64_t from = begin; from < end; from += chunk) {
        int64_t some = end - from < chunk ? end - from : chunk;
        for (int64_t row = 0; row < some; row++)
          rms_norm<P>(hidden.row(from + row), layer.before_norm, model->eps, width, own.normed.row(row));
        product<P>(own.normed.data, own.normed.stride, width, some, layer.qkv, width * kBlock, width, heads * head,
                   [&](int64_t row, int64_t output, __m512 left, __m512 right) {
                     add_bias(layer.qkv_bias, output, left, right);
                     narrow<P>(qkv.row(from + row) + output, heads * head, left);
                     narrow<P>(qkv.row(from + row) + output + 16, heads * head, right);
                   },
                   [&](int64_t row, int64_t output) { __builtin_prefetch(qkv.row(from + row) + output, 1); });
      }
      for (int64_t s = 0; s < count; s++) {
        const int64_t before = begin - segments[s].row, after = end - segments[s].row;
        for (int64_t token = before < 0 ? 0 : before; token < segments[s].length && token < after; token++) {
          const float *cos = layer.cos + (segments[s].position + token) * head;
          const float *sin = layer.sin + (segments[s].position + token) * head;
          bf16 *row = qkv.row(segments[s].row + token);
          for (int64_t h = 0; h < model->heads + model->kv_heads; h++)
            rotate<P>(row + h * head, heads * head, head, cos, sin, h < model->heads ? layer.q_norm : layer.k_norm, model->eps);
        }
      }
      team.meet();  // queries see the keys of other threads' rows
      for (size_t next; (next = dealt[l]++) < shares.size();)
        attend<P>(*model, layer, qkv, segments, shares[next], seen, benches[member]->scratch);
      team.meet();
      // Nobody reads what the last layer makes of other rows.
      const bool final = l + 1 == model->layers;
      const int64_t all = final ? lasts : rows, first = share(all, member), stop = share(all, member + 1);
      for (int64_t i = first; final && i < stop; i++) {
        memcpy(ends.row(i), hidden.row(last[i]), (size_t)width * 4);
        memcpy(seen_ends.row(i), seen.row(last[i]), (size_t)(P * mixed_width) * 2);
      }
      const Buffer<float> &state = final ? ends : hidden;
      const Buffer<bf16> &read = final ? seen_ends : seen;
      for (int64_t from = first; from < stop; from += chunk) {
        int64_t some = stop - from < chunk ? stop - from : chunk;
        add_product<P>(read.row(from), read.stride, mixed_width, some, layer.output, layer.output_bias, layer.attention_norm,
                       model->eps, mixed_width, state, from, width, own.mixed);
        for (int64_t row = 0; row < some; row++)
          rms_norm<P>(state.row(from + row), layer.mlp_norm, model->eps, width, own.normed.row(row));
        gated<P>(own.normed.data, own.normed.stride, width, some, layer.gate_up, width, model->mlp_width, model->gelu,
                 own.inner.data, own.inner.stride, model->mlp_width);
        add_product<P>(own.inner.data, own.inner.stride, model->mlp_width, some, layer.down, nullptr, layer.last_norm,
                       model->eps, model->mlp_width, state, from, width, own.mixed);
      }
    }
    for (int64_t i = share(lasts, member); i < share(lasts, member + 1); i++)
      rms_norm(ends.row(i), model->final_norm, model->eps, width,
               [&](int64_t at, __m512 part) { _mm512_storeu_ps(out + i * width + at, part); });
  });
  return 0;
}

// Rows [from, end) of the output layer times the states, as native_head's; rows that stay in the cache meet all states.
// Returns 0, or 1 without enough memory.
#ifdef __AMX_BF16__
// kStates states to a panel: their first parts, their second ones, their third ones, and two columns of zeros. Here it is
// the weight that lies in rows; a last block that is not whole is copied, as it is read as one.
int64_t outputs_of(const bf16 *weight, int64_t vocabulary, int64_t depth, const bf16 *states, int64_t number, float *out,
                   int64_t from, int64_t end) {
  const int64_t whole = end / kBlock * kBlock, groups = (number + kStates - 1) / kStates;
  Buffer<bf16> rest(kBlock, depth), panels(groups, depth * kBlock);
  if (!rest.data || !panels.data) return 1;
  for (int64_t row = whole; row < end; row++) memcpy(rest.row(row - whole), weight + row * depth, (size_t)depth * 2);
  for (int64_t state = 0; state < number; state++)
    for (int64_t part = 0; part < 3; part++) {
      const int64_t column = part * kStates + state % kStates;
      bf16 *to = panels.row(state / kStates) + column / 16 * 512 + column % 16 * 2;
      const bf16 *x = states + (state * 3 + part) * depth;
      for (int64_t at = 0; at < depth; at += 2) memcpy(to + at / 32 * 1024 + at % 32 * 16, x + at, 4);
    }
  const __m512i states_apart = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i apart = _mm512_mullo_epi32(_mm512_set1_epi32((int)vocabulary), states_apart);
  Unit unit;
  for (int64_t rows; from < end; from += rows) {
    const bool last = from >= whole;
    const int64_t ahead = (last ? end : whole) - from;
    rows = ahead < rows_in_cache(depth) ? ahead : rows_in_cache(depth);
    for (int64_t group = 0; group < groups; group++) {
      const int64_t first = group * kStates, some = number - first < kStates ? number - first : kStates;
      auto store = [&](int64_t row, int64_t, __m512 left, __m512 right) {
        if (from + row >= end) return;
        float found[kBlock + 16] = {};
        _mm512_storeu_ps(found, left);
        _mm512_storeu_ps(found + 16, right);
        __m512 lower = _mm512_add_ps(_mm512_loadu_ps(found + 2 * kStates), _mm512_loadu_ps(found + kStates));
        float *to = out + first * vocabulary + from + row;
        _mm512_mask_i32scatter_ps(to, (__mmask16)((1 << some) - 1), apart, _mm512_add_ps(lower, left), 4);
      };
      product<1>(last ? rest.data : weight + from * depth, last ? rest.stride : depth, 0, rows, panels.row(group),
                 depth * kBlock, depth, kBlock, store);
    }
  }
  return 0;
}
#else
// Four rows times N states, whose sums are in registers; of the rows only `rows` are there.
template <int N>
inline void outputs_of_four(const bf16 *weight, int64_t rows, int64_t depth, const bf16 *states, float *out,
                            int64_t apart) {
  __m512 sums[4][N][3];
#pragma GCC unroll 4
  for (int64_t row = 0; row < 4; row++)
#pragma GCC unroll 2
    for (int64_t state = 0; state < N; state++)
#pragma GCC unroll 3
      for (int64_t part = 0; part < 3; part++) sums[row][state][part] = _mm512_setzero_ps();
  for (int64_t at = 0; at < depth; at += 32) {
    __m512bh read[4];
#pragma GCC unroll 4
    for (int64_t row = 0; row < 4; row++)
      read[row] = (__m512bh)_mm512_loadu_si512(weight + (row < rows ? row : 0) * depth + at);
#pragma GCC unroll 2
    for (int64_t state = 0; state < N; state++)
#pragma GCC unroll 3
      for (int64_t part = 0; part < 3; part++) {
        __m512bh x = (__m512bh)_mm512_loadu_si512(states + (state * 3 + part) * depth + at);
#pragma GCC unroll 4
        for (int64_t row = 0; row < 4; row++)
          sums[row][state][part] = _mm512_dpbf16_ps(sums[row][state][part], read[row], x);
      }
  }
#pragma GCC unroll 4
  for (int64_t row = 0; row < 4; row++)
#pragma GCC unroll 2
    for (int64_t state = 0; state < N; state++) {
      __m512 lower = _mm512_add_ps(sums[row][state][2], sums[row][state][1]);
      if (row < rows) out[state * apart + row] = _mm512_reduce_add_ps(_mm512_add_ps(lower, sums[row][state][0]));
    }
}

int64_t outputs_of(const bf16 *weight, int64_t vocabulary, int64_t depth, const bf16 *states, int64_t number, float *out,
                   int64_t from, int64_t end) {
  for (int64_t rows; from < end; from += rows) {
    rows = end - from < rows_in_cache(depth) ? end - from : rows_in_cache(depth);
    for (int64_t state = 0; state < number; state += 2)
      for (int64_t row = from; row < from + rows; row += 4) {
        const bf16 *read = states + state * 3 * depth;
        float *to = out + state * vocabulary + row;
        (state + 1 < number ? outputs_of_four<2> : outputs_of_four<1>)(weight + row * depth, from + rows - row, depth,
                                                                       read, to, vocabulary);
      }
  }
  return 0;
}
#endif

}  // namespace

extern "C" {

// Ask the system for AMX, once in a process; 0 if it is ours, or not needed.
int64_t native_request() {
#ifdef __AMX_BF16__
  return syscall(SYS_arch_prctl, 0x1023, 18);
#else
  return 0;
#endif
}

// Blocks [first, first + count) of 32 rows of the output layer, [vocabulary, depth], times so many states of three parts,
// [number, 3, depth], into [number, vocabulary]. A state's numbers do not depend on the other states. Returns 0, or 1
// without enough memory.
int64_t native_head(const bf16 *weight, int64_t vocabulary, int64_t depth, const bf16 *states, int64_t number, float *out,
                    int64_t first, int64_t count) {
  const int64_t end = (first + count) * kBlock < vocabulary ? (first + count) * kBlock : vocabulary;
  return outputs_of(weight, vocabulary, depth, states, number, out, first * kBlock, end);
}

// decode, with so many parts of each number that a product reads.
int64_t native_decode(const Model *model, int64_t parts, const float *embedded, int64_t rows, const Segment *segments,
                      int64_t count, const int64_t *last, int64_t lasts, int64_t threads, float *out) {
  return (parts == 1 ? decode<1> : decode<2>)(model, embedded, rows, segments, count, last, lasts, threads, out);
}
}
