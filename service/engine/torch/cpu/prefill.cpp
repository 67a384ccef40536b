// Prefill of a decoder over one packed batch of prompts (varlen, no padding), in bf16, on a CPU with AMX or, compiled
// without AMX, with AVX-512's bf16 dot products. kernel.py calls it; packed_forward.py specifies what it computes.
//
// Products take bf16 and accumulate in float32. Residual stream, norms, softmax and activations are float32, so the
// result is more exact than the model's own bf16 forward. A product's input is split into kTerms bf16 terms (bf16, or
// bf16x2) that add up to it. With two terms and bf16 weights the rounding error is 2^-18, which is called float32 here.
// A token's numbers are computed from that token alone (in attention, from the keys of its prefix chain too), in an
// order that depends neither on its place in the batch nor on the other tokens: a prompt has the same bits in every
// batch.
//
// Layouts, all of them in tiles of 16 rows of 64 bytes, strides in elements:
//   weights, keys, values  panels of 32 outputs, [outputs / 32][depth / 32][2 tiles][16 pairs of inputs][16 outputs][2]
//   activations (Blocks)   [tokens / 32][columns / 32][32 tokens][32 columns], so that a product reads and writes long
//                          runs of memory, which the hardware prefetches, instead of a short piece in each row
// A model's sizes (hidden_size, head_dim, intermediate_size) are multiples of 32.
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

extern "C" {

// One decoder layer. Pointers to what its family lacks are null.
struct Layer {
  const float *input_norm, *qkv_bias, *q_norm, *k_norm, *o_bias, *post_attention_norm, *pre_mlp_norm, *post_mlp_norm;
  const bf16 *qkv, *o, *gate_up, *down;  // panels; gate and up alternate, 16 outputs each
  const float *cos, *sin;                // [positions][head_dim]
  int64_t window;                        // keys that a query sees, itself included; 0: all before it
  float scaling, softcap;                // softcap 0: none
};

struct Model {
  int64_t layers, hidden_size, heads, kv_heads, head_dim, intermediate_size, gelu;
  float eps;
  const float *final_norm;  // [hidden_size]
  const Layer *layer;
};

// Tokens that are computed once: [start, start + length) of the batch. They attend to the segments of their prefix
// chain, chain[0] to chain[links - 1], the last of which is this one. `position` is that of the first token in its
// prompt.
struct Segment {
  int64_t start, length, position, links;
  const int64_t *chain;
};
}

namespace {

const int64_t kBlock = 32;         // rows and outputs of one block of a product: two tiles by two
const int64_t kL2 = 1 << 20;       // bytes of a product's input that should stay in a core's L2 cache
const int64_t kResident = 512;     // depth of a panel that stays in the L1 cache: 32 KiB of 48
const int64_t kMaxDepth = 1024;    // of one product into the residual stream; a deeper one is sliced to stay in L2
const int64_t kPanelStates = 10;   // states that share a panel in the output layer with AMX, three terms each
const int64_t kMaxHeadDim = 1024;  // size of rotate's buffer

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t rows) { return (rows + kBlock - 1) / kBlock * kBlock; }

// How many rows of `width` bf16 numbers fit in the L2 cache: whole blocks, at least one.
inline int64_t rows_in_l2(int64_t width) { return max(kBlock, kL2 / (2 * width) / kBlock * kBlock); }

#ifdef __AMX_BF16__
struct TileConfig {  // what _tile_loadconfig reads; every tile is 16 rows of 64 bytes
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Constant, because GCC's _tile_loadconfig declares only the first 8 of the 64 bytes as read: GCC then removes run-time
// stores to the others, and tiles without rows crash at their first use. tests/ladder/test_build.py looks for this.
constexpr TileConfig kTileConfig;

// Configures this thread's tiles during its lifetime.
struct TileUnit {
  TileUnit() { _tile_loadconfig(&kTileConfig); }
  ~TileUnit() { _tile_release(); }
};
#else
struct TileUnit {
  TileUnit() {}  // no tiles to configure
};
#endif

// The left operand of a product, rows of bf16 terms, with the strides of a row in its block of 32, of a block, of 32
// columns, and of a term.
struct Rows {
  const bf16 *data;
  int64_t row, block, columns, term;
  Rows from(int64_t first, int64_t column) const {
    return {data + first / kBlock * block + column / 32 * columns, row, block, columns, term};
  }
};

// Zeroed memory in whole cache lines; null if there is not enough.
template <class T>
struct Memory {
  T *data;
  explicit Memory(int64_t count) {
    size_t bytes = (size_t)(count * (int64_t)sizeof(T) + 63) / 64 * 64;
    data = (T *)aligned_alloc(64, bytes);
    if (data) memset(data, 0, bytes);
  }
  ~Memory() { free(data); }
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
};

// [rows][width], row by row; the padding after each row keeps rows in different cache sets.
template <class T>
struct Matrix : Memory<T> {
  int64_t stride;
  Matrix(int64_t rows, int64_t width) : Memory<T>(rows * (round_up(width) + 32)), stride(round_up(width) + 32) {}
  T *at(int64_t row, int64_t column) const { return this->data + row * stride + column; }
};

// [rows / 32][terms][width / 32][32 rows][32 columns].
template <class T>
struct Blocks : Memory<T> {
  int64_t width, block, term;  // the strides of a block of rows and of a term
  Blocks(int64_t rows, int64_t width, int64_t terms = 1)
      : Memory<T>(round_up(rows) * width * terms), width(width), block(kBlock * width * terms), term(kBlock * width) {}
  T *at(int64_t row, int64_t column) const {
    return this->data + (row >> 5) * block + (column >> 5) * (kBlock * 32) + (row & 31) * 32 + (column & 31);
  }
  Rows rows(int64_t first) const { return {at(first, 0), 32, block, kBlock * 32, term}; }
};

// Copies a row with all its terms.
template <class T>
void copy_row(const Blocks<T> &from, int64_t from_row, const Blocks<T> &to, int64_t to_row) {
  for (int64_t at = 0; at < from.block; at += kBlock * 32)
    memcpy(to.at(to_row, 0) + at, from.at(from_row, 0) + at, 32 * sizeof(T));
}

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// The sum of a number's terms, for 16 numbers.
template <int kTerms>
inline __m512 widen(const bf16 *x, int64_t stride) {
  __m512 sum = widen(_mm256_loadu_si256((const __m256i *)x));
  for (int term = 1; term < kTerms; term++)
    sum = _mm512_add_ps(sum, widen(_mm256_loadu_si256((const __m256i *)(x + term * stride))));
  return sum;
}

// Splits 16 numbers into terms, each the remainder of those before it rounded to nearest, ties to even; NaN stays NaN.
template <int kTerms>
inline void narrow(bf16 *to, int64_t stride, __m512 x) {
  for (int term = 0; term < kTerms; term++) {
    __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
    _mm256_storeu_si256((__m256i *)(to + term * stride), rounded);
    if (term + 1 < kTerms) x = _mm512_sub_ps(x, widen(rounded));
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

// exp, its argument clamped to +-87.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(87.0f), x));
  return power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(kLog2e)));
}

// 1 / (1 + exp(-x)). Instead of a slow division, an estimate good to 14 bits is refined once by Newton's method.
inline __m512 sigmoid(__m512 x) {
  __m512 one = _mm512_set1_ps(1.0f);
  __m512 d = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
  __m512 estimate = _mm512_rcp14_ps(d);
  return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(d, estimate, _mm512_set1_ps(2.0f)));
}

inline __m512 hyperbolic_tangent(__m512 x) {
  return _mm512_fmsub_ps(_mm512_set1_ps(2.0f), sigmoid(_mm512_add_ps(x, x)), _mm512_set1_ps(1.0f));
}

// SiLU, or the tanh form of GELU, which is x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).
inline __m512 activate(__m512 x, bool gelu) {
  if (!gelu) return _mm512_mul_ps(x, sigmoid(x));
  __m512 cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(0.044715f)));
  return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(_mm512_set1_ps(1.5957691216f), _mm512_add_ps(x, cubed))));
}

// A block of 32 rows of x, `depth` long (a multiple of 32), times one panel: into out, [32][out_stride], or `added` to
// it. Calls fetch() and beside() depth / 32 times on the way. Only the first `rows` of the 32 rows have to be right.
#ifdef __AMX_BF16__
// Tiles 0 to 3 accumulate, 4 and 5 hold rows, 6 and 7 the panel; the tile unit works in parallel with the vector unit.
// Loading four tiles from the L2 cache takes longer than their four products; loading two does not. So rows, which meet
// each panel once, are loaded with the hint that keeps them from evicting the panel (_tile_stream_loadd), and so is the
// part of the panel that the L1 cache has no room for: 2.4 to 2.6 TFLOP/s instead of 1.5, where the tile unit can do
// 2.85.
template <int kTerms, class Fetch, class Beside>
inline void multiply(const Rows &x, int64_t, const bf16 *panel, int64_t depth, float *out, int64_t out_stride, bool added,
                     Fetch fetch, Beside beside) {
  const bf16 *upper = x.data, *lower = upper + 16 * x.row;
  // GCC's tile loads declare no memory as read: without this barrier it may move earlier stores behind them, or drop
  // them. Its tile stores do declare what they write, and nothing that a load reads is stored between here and there.
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
  for (int64_t k = 0; k < depth; k += 32, panel += 1024, upper += x.columns, lower += x.columns) {
    _tile_stream_loadd(4, upper, x.row * 2);
    if (k < kResident) {
      _tile_loadd(6, panel, 64);
      _tile_loadd(7, panel + 512, 64);
    } else {
      _tile_stream_loadd(6, panel, 64);
      _tile_stream_loadd(7, panel + 512, 64);
    }
    _tile_stream_loadd(5, lower, x.row * 2);
#pragma GCC unroll 2
    for (int term = 0; term < kTerms; term++) {
      if (term) {
        _tile_stream_loadd(4, upper + term * x.term, x.row * 2);
        _tile_stream_loadd(5, lower + term * x.term, x.row * 2);
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
// N rows; their sums stay in registers, two each.
template <int kTerms, int N, class Fetch>
inline void multiply_rows(const Rows &x, int64_t first, const bf16 *panel, int64_t depth, float *out, int64_t out_stride,
                          bool added, Fetch fetch) {
  const bf16 *rows = x.data + first * x.row;
  out += first * out_stride;
  __m512 left[N], right[N];
#pragma GCC unroll 8
  for (int64_t i = 0; i < N; i++) {
    left[i] = added ? _mm512_loadu_ps(out + i * out_stride) : _mm512_setzero_ps();
    right[i] = added ? _mm512_loadu_ps(out + i * out_stride + 16) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 32, panel += 512, rows += x.columns) {
    fetch();
    for (int64_t pair = 0; pair < 32; pair += 2, panel += 32) {
      __m512bh first_half = (__m512bh)_mm512_loadu_si512(panel), second_half = (__m512bh)_mm512_loadu_si512(panel + 512);
#pragma GCC unroll 2
      for (int term = 0; term < kTerms; term++) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < N; i++) {
          int32_t both;
          memcpy(&both, rows + i * x.row + term * x.term + pair, 4);
          __m512bh spread = (__m512bh)_mm512_set1_epi32(both);
          left[i] = _mm512_dpbf16_ps(left[i], spread, first_half);
          right[i] = _mm512_dpbf16_ps(right[i], spread, second_half);
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

template <int kTerms, class Fetch, class Beside>
inline void multiply(const Rows &x, int64_t rows, const bf16 *panel, int64_t depth, float *out, int64_t out_stride,
                     bool added, Fetch fetch, Beside beside) {
  for (int64_t k = 0; k < depth; k += 32) beside();
  if (rows <= 2)
    multiply_rows<kTerms, 2>(x, 0, panel, depth, out, out_stride, added, fetch);
  else
    multiply_rows<kTerms, 8>(x, 0, panel, depth, out, out_stride, added, fetch);
  for (int64_t row = 8; row < rows && row < kBlock; row += 8)
    multiply_rows<kTerms, 8>(x, row, panel, depth, out, out_stride, added, [] {});
}
#endif

// [rows][depth] times panels of depth * 32 numbers, `panel` apart. store(row, output, 16 outputs, the next 16) takes a
// block's results while the next block is multiplied: one after the other they wait for each other, at half the speed.
// prefetch(row, output) asks for the memory that it will write, one block ahead: a fifth less time for the MLP. `rows`
// is rounded up to blocks: x has those rows too, and what is stored for them is meaningless.
template <int kTerms, class Store, class Prefetch>
inline void product(const Rows &x, int64_t rows, const bf16 *weight, int64_t panel, int64_t depth, int64_t outputs,
                    Store store, Prefetch prefetch) {
  alignas(64) float sums[kBlock][kBlock] = {};
  const int64_t steps = depth / 32, share = (kBlock + steps - 1) / steps;
  const int64_t lines = (kBlock * kBlock + round_up(rows) - 1) / round_up(rows);
  int64_t stored = kBlock, stored_row = 0, stored_output = 0;
  auto store_some = [&](int64_t count) {
    for (int64_t end = min(stored + count, kBlock); stored < end; stored++) {
      const float *left = sums[stored];
      store(stored_row + stored, stored_output, _mm512_load_ps(left), _mm512_load_ps(left + 16));
    }
  };
  for (int64_t output = 0; output < outputs; output += kBlock, weight += panel) {
    const bf16 *next = weight + panel;  // fetched while this panel is used
    auto fetch_some = [&] {
      for (int64_t line = 0; line < lines; line++, next += 32) _mm_prefetch((const char *)next, _MM_HINT_T1);
    };
    for (int64_t row = 0; row < rows; row += kBlock) {
      int64_t fetched = 0;
      multiply<kTerms>(x.from(row, 0), rows - row, weight, depth, sums[0], kBlock, false, fetch_some, [&] {
        for (int64_t end = min(fetched + share, kBlock); fetched < end; fetched++) prefetch(row + fetched, output);
        store_some(share);
      });
      stored = 0, stored_row = row, stored_output = output;
    }
  }
  store_some(kBlock);
}

// One block of rows times panels, into [32][out_stride], or `added` to it.
template <int kTerms>
inline void product_of_block(const Rows &x, int64_t rows, const bf16 *weight, int64_t panel, int64_t depth,
                             int64_t outputs, float *out, int64_t out_stride, bool added) {
  for (int64_t output = 0; output < outputs; output += kBlock, weight += panel, out += kBlock)
    multiply<kTerms>(x, rows, weight, depth, out, out_stride, added, [] {}, [] {});
}

inline void add_bias(const float *bias, int64_t output, __m512 &left, __m512 &right) {
  if (!bias) return;
  left = _mm512_add_ps(left, _mm512_loadu_ps(bias + output));
  right = _mm512_add_ps(right, _mm512_loadu_ps(bias + output + 16));
}

inline __m512 inverse_rms(__m512 squares, int64_t width, float eps) {
  return _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / width + eps));
}

// weight * x / sqrt(mean(x^2) + eps) for rows [first, first + rows), where `first` begins a block; store(row from 0 on,
// column, 16 numbers) takes it. A block of rows at a time, so that memory is read in order.
template <class Store>
inline void rms_norm(const Blocks<float> &x, int64_t first, int64_t rows, const float *weight, float eps, Store store) {
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t block_rows = min(kBlock, rows - row);
    __m512 scale[kBlock] = {};
    for (int64_t column = 0; column < x.width; column += 32)
      for (int64_t i = 0; i < block_rows; i++) {
        const float *at = x.at(first + row + i, column);
        __m512 left = _mm512_load_ps(at), right = _mm512_load_ps(at + 16);
        scale[i] = _mm512_fmadd_ps(right, right, _mm512_fmadd_ps(left, left, scale[i]));
      }
    for (int64_t i = 0; i < block_rows; i++) scale[i] = inverse_rms(scale[i], x.width, eps);
    for (int64_t column = 0; column < x.width; column += 16)
      for (int64_t i = 0; i < block_rows; i++) {
        __m512 scaled = _mm512_mul_ps(_mm512_load_ps(x.at(first + row + i, column)), scale[i]);
        store(row + i, column, _mm512_mul_ps(scaled, _mm512_loadu_ps(weight + column)));
      }
  }
}

template <int kTerms>
void rms_norm(const Blocks<float> &x, int64_t first, int64_t rows, const float *weight, float eps, const Blocks<bf16> &out) {
  rms_norm(x, first, rows, weight, eps,
           [&](int64_t row, int64_t column, __m512 part) { narrow<kTerms>(out.at(row, column), out.term, part); });
}

// Rotary positions of one head, its first half paired with the second, after a norm if there is one. `head` is
// [head_dim] in terms `stride` apart; cos and sin are those of its position.
template <int kTerms>
void rotate(bf16 *head, int64_t stride, int64_t head_dim, const float *cos, const float *sin, const float *norm, float eps) {
  alignas(64) float x[kMaxHeadDim];
  __m512 squares = _mm512_setzero_ps();
  for (int64_t at = 0; at < head_dim; at += 16) {
    __m512 part = widen<kTerms>(head + at, stride);
    squares = _mm512_fmadd_ps(part, part, squares);
    _mm512_store_ps(x + at, part);
  }
  const __m512 scale = norm ? inverse_rms(squares, head_dim, eps) : squares;
  for (int64_t at = 0; norm && at < head_dim; at += 16)
    _mm512_store_ps(x + at, _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(x + at), scale), _mm512_loadu_ps(norm + at)));
  int64_t half = head_dim / 2;
  for (int64_t at = 0; at < half; at += 16) {
    __m512 first = _mm512_load_ps(x + at), second = _mm512_load_ps(x + half + at);
    __m512 turned = _mm512_mul_ps(second, _mm512_loadu_ps(sin + at));
    narrow<kTerms>(head + at, stride, _mm512_fmsub_ps(first, _mm512_loadu_ps(cos + at), turned));
    turned = _mm512_mul_ps(first, _mm512_loadu_ps(sin + half + at));
    narrow<kTerms>(head + half + at, stride, _mm512_fmadd_ps(second, _mm512_loadu_ps(cos + half + at), turned));
  }
}

// One thread's buffers for attention to at most max_keys keys, whole blocks.
struct AttentionScratch {
  const int64_t max_keys, panels;  // elements of one term's panels
  Memory<bf16> keys, values;       // [terms][panels]
  Matrix<bf16> weights;            // [32][terms][max_keys]
  Matrix<float> scores, lower;     // [32][max_keys]; [32][head_dim], the products of all terms but the first
  AttentionScratch(int64_t terms, int64_t max_keys, int64_t head_dim)
      : max_keys(max_keys), panels(max_keys * head_dim), keys(terms * panels), values(terms * panels),
        weights(kBlock, terms * max_keys), scores(kBlock, max_keys), lower(kBlock, head_dim) {}
  bool complete() const { return keys.data && values.data && weights.data && scores.data && lower.data; }
};

// Packs one term of a kv head's keys (outputs are keys, depth is head_dim) and values (outputs are head_dim, depth is
// keys) into panels, for a segment's prefix chain. `padded` is the number of keys in whole blocks; those added are
// zero.
void pack_keys_values(const bf16 *qkv, int64_t stride, const Segment *segments, const Segment &own, int64_t head_dim,
                      int64_t key_offset, int64_t value_offset, int64_t padded, bf16 *keys, bf16 *values) {
  const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32((int)(stride / 2)));
  static const bf16 zeros[kMaxHeadDim] = {};
  const bf16 *rows[kBlock];
  int64_t link = 0, within = 0;
  for (int64_t key = 0; key < padded; key += kBlock) {
    bool together = true;  // the rows are evenly spaced, so they can be gathered
    for (int64_t i = 0; i < kBlock; i++) {
      while (link < own.links && within == segments[own.chain[link]].length) link++, within = 0;
      rows[i] = link < own.links ? qkv + (segments[own.chain[link]].start + within++) * stride + key_offset : zeros;
      together = together && rows[i] == rows[0] + i * stride;
    }
    bf16 *panel = keys + key * head_dim;
    for (int64_t pair = 0; pair < head_dim / 2; pair++) {
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
    for (int64_t column = 0; column < head_dim; column += 16) {
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

// weights = exp(scaling * (score - max)) over keys [first, last), in terms `stride` apart, and zero over the rest of
// [first rounded down to a block, padded); returns their sum. Softcapping overwrites the scores.
template <int kTerms>
float softmax(float *scores, bf16 *weights, int64_t stride, int64_t first, int64_t last, int64_t padded, float scaling,
              float softcap) {
  const int64_t start = first / kBlock * kBlock, end = round_up(last);
  // body(at, mask of the 16 keys): only the blocks at both ends have masked keys, so the others are spared the masks.
  auto over_keys = [&](auto body) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    auto edge = [&](int64_t at, int64_t to) {
      for (; at < to; at += 16)
        body(at, _mm512_cmp_epi32_mask(lanes, _mm512_set1_epi32((int)(first - at)), _MM_CMPINT_NLT) &
                     _mm512_cmp_epi32_mask(lanes, _mm512_set1_epi32((int)(last - at)), _MM_CMPINT_LT));
    };
    const int64_t whole = first > start ? min(start + kBlock, end) : start, tail = max(whole, last / 16 * 16);
    edge(start, whole);
    for (int64_t at = whole; at < tail; at += 16) body(at, (__mmask16)-1);
    edge(tail, end);
  };
  for (int64_t at = start; softcap != 0 && at < end; at += 16) {
    __m512 score = _mm512_mul_ps(_mm512_load_ps(scores + at), _mm512_set1_ps(scaling / softcap));
    _mm512_store_ps(scores + at, _mm512_mul_ps(_mm512_set1_ps(softcap), hyperbolic_tangent(score)));
  }
  const __m512 factor = _mm512_set1_ps((softcap != 0 ? 1.0f : scaling) * kLog2e);
  __m512 largest = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
  over_keys([&](int64_t at, __mmask16 seen) {
    largest = _mm512_mask_max_ps(largest, seen, largest, _mm512_load_ps(scores + at));
  });
  largest = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(largest)), factor);
  over_keys([&](int64_t at, __mmask16 seen) {
    __m512 power = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + at), factor, largest));
    power = _mm512_maskz_mov_ps(seen, power);
    sum = _mm512_add_ps(sum, power);
    narrow<kTerms>(weights + at, stride, power);
  });
  for (int term = 0; term < kTerms; term++) memset(weights + term * stride + end, 0, (size_t)(padded - end) * 2);
  return _mm512_reduce_add_ps(sum);
}

// A part of a segment's attention: queries [from, to) of all heads that share one kv head; `from` begins a block.
struct Share {
  int64_t segment, kv, from, to;
};

// Attention of a share's queries to the keys of their segment's prefix chain: qkv is [tokens][terms][query, key, value
// heads], out [tokens][heads * head_dim].
template <int kTerms>
void attend(const Model &model, const Layer &layer, const Matrix<bf16> &qkv, const Segment *segments, const Share &share,
            const Blocks<bf16> &out, AttentionScratch &scratch) {
  const Segment &own = segments[share.segment];
  const int64_t head_dim = model.head_dim, group = model.heads / model.kv_heads, keys = own.position + own.length;
  const int64_t padded = round_up(keys), qkv_term = (model.heads + 2 * model.kv_heads) * head_dim;
  const int64_t key_offset = (model.heads + share.kv) * head_dim, value_offset = key_offset + model.kv_heads * head_dim;
  float scale[kBlock] = {};
  for (int term = 0; term < kTerms; term++)
    pack_keys_values(qkv.data + term * qkv_term, qkv.stride, segments, own, head_dim, key_offset, value_offset, padded,
                     scratch.keys.data + term * scratch.panels, scratch.values.data + term * scratch.panels);
  for (int64_t query = share.from; query < share.to; query += kBlock) {
    const int64_t rows = min(kBlock, own.length - query), position = own.position + query, last = position + rows;
    const int64_t used = round_up(last);
    const int64_t start = layer.window ? max(0, position + 1 - layer.window) / kBlock * kBlock : 0;
    for (int64_t head = share.kv * group; head < (share.kv + 1) * group; head++) {
      const Rows queries{qkv.at(own.start + query, head * head_dim), qkv.stride, 0, 32, qkv_term};
      for (int term = 0; term < kTerms; term++)
        product_of_block<kTerms>(queries, rows, scratch.keys.data + term * scratch.panels + start * head_dim,
                                 head_dim * kBlock, head_dim, used - start, scratch.scores.at(0, start),
                                 scratch.scores.stride, term > 0);
      for (int64_t row = 0; row < rows; row++) {
        const int64_t end = position + row + 1, begin = layer.window ? max(0, end - layer.window) : 0;
        bf16 *weights = scratch.weights.at(row, 0);
        for (int term = 0; term < kTerms; term++)
          memset(weights + term * scratch.max_keys + start, 0, (size_t)(begin / kBlock * kBlock - start) * 2);
        scale[row] = 1.0f / softmax<kTerms>(scratch.scores.at(row, 0), weights, scratch.max_keys, begin, end, used,
                                            layer.scaling, layer.softcap);
      }
      const Rows weights{scratch.weights.at(0, start), scratch.weights.stride, 0, 32, scratch.max_keys};
      const bf16 *values = scratch.values.data + start * kBlock;
      for (int term = 1; term < kTerms; term++)
        product_of_block<kTerms>(weights, rows, values + term * scratch.panels, padded * kBlock, used - start, head_dim,
                                 scratch.lower.data, scratch.lower.stride, term > 1);
      product<kTerms>(
          weights, rows, values, padded * kBlock, used - start, head_dim,
          [&](int64_t row, int64_t column, __m512 left, __m512 right) {
            if (row >= rows) return;
            if (kTerms > 1) {
              left = _mm512_add_ps(left, _mm512_loadu_ps(scratch.lower.at(row, column)));
              right = _mm512_add_ps(right, _mm512_loadu_ps(scratch.lower.at(row, column + 16)));
            }
            bf16 *to = out.at(own.start + query + row, head * head_dim + column);
            narrow<kTerms>(to, out.term, _mm512_mul_ps(left, _mm512_set1_ps(scale[row])));
            narrow<kTerms>(to + 16, out.term, _mm512_mul_ps(right, _mm512_set1_ps(scale[row])));
          },
          [](int64_t, int64_t) {});
    }
  }
}

// sums' rows [first, first + rows), where `first` begins a block, += x times weight, [depth][columns of sums] in panels
// `panel` apart, plus a bias if there is one. Deep products are made in slices, whose input stays in the L2 cache.
template <int kTerms>
void accumulate(const Rows &x, int64_t rows, int64_t depth, const bf16 *weight, int64_t panel, const float *bias,
                const Blocks<float> &sums, int64_t first) {
  for (int64_t from = 0; from < depth; from += kMaxDepth)
    product<kTerms>(
        x.from(0, from), rows, weight + from * kBlock, panel, min(kMaxDepth, depth - from), sums.width,
        [&](int64_t row, int64_t output, __m512 left, __m512 right) {
          if (from == 0) add_bias(bias, output, left, right);
          float *to = sums.at(first + row, output);
          _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), left));
          _mm512_store_ps(to + 16, _mm512_add_ps(_mm512_load_ps(to + 16), right));
        },
        [&](int64_t row, int64_t output) {
          __builtin_prefetch(sums.at(first + row, output), 1);
          __builtin_prefetch(sums.at(first + row, output + 16), 1);
        });
}

// Where attention and the MLP add their results: rows [first, first + rows) of the residual stream itself, or, for
// families that norm them first (Gemma), `mixed`, from which finish() adds them.
struct Residual {
  const Blocks<float> &hidden, &mixed;
  const int64_t first, rows;
  const float *norm, eps;
  Residual(const Blocks<float> &hidden, const Blocks<float> &mixed, int64_t first, int64_t rows, const float *norm, float eps)
      : hidden(hidden), mixed(mixed), first(first), rows(rows), norm(norm), eps(eps) {
    if (norm) memset(mixed.data, 0, (size_t)(round_up(rows) * mixed.width) * 4);
  }
  template <int kTerms>
  void add(const Rows &x, int64_t depth, const bf16 *weight, int64_t panel, const float *bias) const {
    accumulate<kTerms>(x, rows, depth, weight, panel, bias, norm ? mixed : hidden, norm ? 0 : first);
  }
  void finish() const {
    if (norm)
      rms_norm(mixed, 0, rows, norm, eps, [&](int64_t row, int64_t column, __m512 part) {
        float *to = hidden.at(first + row, column);
        _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), part));
      });
  }
};

// The MLP of `rows` normed rows, in slices of its intermediate size that stay in the L2 cache: `inner` holds one.
template <int kTerms>
void mlp(const Model &model, const Layer &layer, const Blocks<bf16> &normed, int64_t rows, const Blocks<bf16> &inner,
         const Residual &residual) {
  const int64_t hidden_size = model.hidden_size, intermediate_size = model.intermediate_size;
  for (int64_t from = 0; from < intermediate_size; from += inner.width) {
    const int64_t width = min(inner.width, intermediate_size - from);
    product<kTerms>(
        normed.rows(0), rows, layer.gate_up + 2 * from * hidden_size, hidden_size * kBlock, hidden_size, 2 * width,
        [&](int64_t row, int64_t output, __m512 gate, __m512 up) {
          narrow<kTerms>(inner.at(row, output / 2), inner.term, _mm512_mul_ps(activate(gate, model.gelu), up));
        },
        [&](int64_t row, int64_t output) { __builtin_prefetch(inner.at(row, output / 2), 1); });
    residual.add<kTerms>(inner.rows(0), width, layer.down + from * kBlock, intermediate_size * kBlock, nullptr);
  }
  residual.finish();
}

// Threads that work in step. A waiting thread sleeps: on a busy machine a spinning one would take the core from the
// thread that it waits for.
class Team {
 public:
  explicit Team(int64_t size) : size_(size) {}

  // Waits until every thread has called it.
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

  // Runs work(0) here and the others in threads of their own; returns when all have ended.
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

// How much of the intermediate size the MLP computes and consumes at a time: whole blocks, in slices as even as
// possible.
inline int64_t mlp_slice(const Model &model) {
  const int64_t slices = (model.intermediate_size + kMaxDepth - 1) / kMaxDepth;
  return round_up((model.intermediate_size + slices - 1) / slices);
}

// One thread's buffers, for at most `chunk` tokens.
struct Workspace {
  Blocks<float> mixed;
  Blocks<bf16> normed, inner;
  AttentionScratch attention;
  Workspace(const Model &model, int64_t terms, int64_t chunk, int64_t max_keys)
      : mixed(chunk, model.hidden_size), normed(chunk, model.hidden_size, terms),
        inner(chunk, mlp_slice(model), terms), attention(terms, round_up(max_keys), model.head_dim) {}
  bool complete() const { return mixed.data && normed.data && inner.data && attention.complete(); }
};

// A layer's attention divided into shares. A segment's queries are split up if segments and kv heads alone would not
// keep all threads busy.
std::vector<Share> attention_shares(const Model &model, const Segment *segments, int64_t count, int64_t tokens,
                                    int64_t threads) {
  std::vector<Share> shares;
  for (int64_t s = 0; s < count; s++) {
    const int64_t length = segments[s].length, blocks = round_up(length) / kBlock, total = tokens * model.kv_heads;
    const int64_t parts = min(blocks, threads == 1 ? 1 : (2 * threads * length + total - 1) / total);
    for (int64_t kv = 0; kv < model.kv_heads; kv++)
      for (int64_t part = 0; part < parts; part++)
        shares.push_back({s, kv, blocks * part / parts * kBlock, min(length, blocks * (part + 1) / parts * kBlock)});
  }
  return shares;
}

// See prefill. Each thread has its own tokens, except in attention, whose shares go to whichever thread is free.
template <int kTerms>
int64_t prefill_with(const Model &model, const float *embedded, int64_t tokens, const Segment *segments, int64_t count,
                     const int64_t *last, int64_t lasts, int64_t threads, float *out) {
  const int64_t hidden_size = model.hidden_size, head_dim = model.head_dim, heads = model.heads + 2 * model.kv_heads;
  const int64_t attended_size = model.heads * head_dim, team_size = min(threads, round_up(tokens) / kBlock);
  // How many tokens go through a layer's products together.
  const int64_t chunk = min(round_up(tokens), max(64, rows_in_l2(kTerms * max(hidden_size, kMaxDepth))));
  int64_t max_keys = 0;
  for (int64_t s = 0; s < count; s++) max_keys = max(max_keys, segments[s].position + segments[s].length);
  Blocks<float> hidden(tokens, hidden_size), last_hidden(lasts, hidden_size);
  Blocks<bf16> attended(tokens, attended_size, kTerms), last_attended(lasts, attended_size, kTerms);
  // A segment's last block of queries may begin at any row, so it reads up to 31 rows past the batch.
  Matrix<bf16> qkv(tokens + 2 * kBlock, kTerms * heads * head_dim);
  const int64_t qkv_term = heads * head_dim;
  std::vector<std::unique_ptr<Workspace>> workspaces;
  bool complete = hidden.data && last_hidden.data && qkv.data && attended.data && last_attended.data;
  for (int64_t member = 0; member < team_size; member++) {
    workspaces.push_back(std::make_unique<Workspace>(model, kTerms, chunk, max_keys));
    complete = complete && workspaces.back()->complete();
  }
  if (!complete) return 1;
  const std::vector<Share> shares = attention_shares(model, segments, count, tokens, team_size);
  std::vector<std::atomic<size_t>> dealt(model.layers);
  Team team(team_size);
  team.run([&](int64_t member) {
    const TileUnit unit;
    Workspace &own = *workspaces[member];
    // Where thread `of`'s part of so many rows begins, in whole blocks; the next thread's beginning is its end.
    auto share = [&](int64_t rows, int64_t of) { return min(rows, round_up(rows) / kBlock * of / team_size * kBlock); };
    const int64_t begin = share(tokens, member), end = share(tokens, member + 1);
    for (int64_t row = begin; row < end; row++)
      for (int64_t column = 0; column < hidden_size; column += 32)
        memcpy(hidden.at(row, column), embedded + row * hidden_size + column, 32 * sizeof(float));
    for (int64_t l = 0; l < model.layers; l++) {
      const Layer &layer = model.layer[l];
      for (int64_t from = begin; from < end; from += chunk) {
        const int64_t size = min(chunk, end - from);
        rms_norm<kTerms>(hidden, from, size, layer.input_norm, model.eps, own.normed);
        product<kTerms>(
            own.normed.rows(0), size, layer.qkv, hidden_size * kBlock, hidden_size, qkv_term,
            [&](int64_t row, int64_t output, __m512 left, __m512 right) {
              add_bias(layer.qkv_bias, output, left, right);
              narrow<kTerms>(qkv.at(from + row, output), qkv_term, left);
              narrow<kTerms>(qkv.at(from + row, output + 16), qkv_term, right);
            },
            [&](int64_t row, int64_t output) { __builtin_prefetch(qkv.at(from + row, output), 1); });
      }
      for (int64_t s = 0; s < count; s++) {
        const Segment &segment = segments[s];
        for (int64_t row = max(begin, segment.start); row < min(end, segment.start + segment.length); row++) {
          const int64_t position = (segment.position + row - segment.start) * head_dim;
          for (int64_t h = 0; h < model.heads + model.kv_heads; h++)
            rotate<kTerms>(qkv.at(row, h * head_dim), qkv_term, head_dim, layer.cos + position, layer.sin + position,
                           h < model.heads ? layer.q_norm : layer.k_norm, model.eps);
        }
      }
      team.meet();  // queries attend to other threads' tokens
      for (size_t next; (next = dealt[l]++) < shares.size();)
        attend<kTerms>(model, layer, qkv, segments, shares[next], attended, own.attention);
      team.meet();
      // After the last layer's attention only the prompts' last tokens are needed.
      const bool final = l + 1 == model.layers;
      const int64_t total = final ? lasts : tokens, first = share(total, member), stop = share(total, member + 1);
      for (int64_t i = first; final && i < stop; i++) {
        copy_row(hidden, last[i], last_hidden, i);
        copy_row(attended, last[i], last_attended, i);
      }
      const Blocks<float> &residual = final ? last_hidden : hidden;
      const Blocks<bf16> &mixer = final ? last_attended : attended;
      for (int64_t from = first; from < stop; from += chunk) {
        const int64_t size = min(chunk, stop - from);
        const Residual attention(residual, own.mixed, from, size, layer.post_attention_norm, model.eps);
        attention.add<kTerms>(mixer.rows(from), attended_size, layer.o, attended_size * kBlock, layer.o_bias);
        attention.finish();
        rms_norm<kTerms>(residual, from, size, layer.pre_mlp_norm, model.eps, own.normed);
        mlp<kTerms>(model, layer, own.normed, size, own.inner,
                    Residual(residual, own.mixed, from, size, layer.post_mlp_norm, model.eps));
      }
    }
    const int64_t first = share(lasts, member);
    rms_norm(last_hidden, first, share(lasts, member + 1) - first, model.final_norm, model.eps,
             [&](int64_t row, int64_t column, __m512 part) {
               _mm512_storeu_ps(out + (first + row) * hidden_size + column, part);
             });
  });
  return 0;
}

// Rows [from, end) of the output layer times the states; see output_layer. Rows are read once from memory: as many as
// fit in the cache meet all states before the next ones.
#ifdef __AMX_BF16__
// kPanelStates states to a panel: their first terms, their second, their third, and two columns of zeros. Here the
// weight is the left operand; an incomplete last block is copied, as a whole block is read.
int64_t output_rows(const bf16 *weight, int64_t vocabulary, int64_t depth, const bf16 *states, int64_t number, float *out,
                    int64_t from, int64_t end) {
  const int64_t whole = end / kBlock * kBlock, groups = (number + kPanelStates - 1) / kPanelStates;
  Matrix<bf16> rest(kBlock, depth), panels(groups, depth * kBlock);
  if (!rest.data || !panels.data) return 1;
  for (int64_t row = whole; row < end; row++) memcpy(rest.at(row - whole, 0), weight + row * depth, (size_t)depth * 2);
  for (int64_t state = 0; state < number; state++)
    for (int64_t term = 0; term < 3; term++) {
      const int64_t column = term * kPanelStates + state % kPanelStates;
      bf16 *to = panels.at(state / kPanelStates, column / 16 * 512 + column % 16 * 2);
      const bf16 *x = states + (state * 3 + term) * depth;
      for (int64_t at = 0; at < depth; at += 2) memcpy(to + at / 32 * 1024 + at % 32 * 16, x + at, 4);
    }
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(_mm512_set1_epi32((int)vocabulary), lanes);
  const TileUnit unit;
  for (int64_t rows; from < end; from += rows) {
    const bool last = from >= whole;
    rows = min((last ? end : whole) - from, rows_in_l2(depth));
    const int64_t stride = last ? rest.stride : depth;
    const Rows read{last ? rest.data : weight + from * depth, stride, kBlock * stride, 32, 0};
    for (int64_t group = 0; group < groups; group++) {
      const int64_t first = group * kPanelStates, in_group = min(kPanelStates, number - first);
      product<1>(
          read, rows, panels.at(group, 0), depth * kBlock, depth, kBlock,
          [&](int64_t row, int64_t, __m512 left, __m512 right) {
            if (from + row >= end) return;
            float sums[kBlock + 16] = {};
            _mm512_storeu_ps(sums, left);
            _mm512_storeu_ps(sums + 16, right);
            __m512 lower = _mm512_add_ps(_mm512_loadu_ps(sums + 2 * kPanelStates), _mm512_loadu_ps(sums + kPanelStates));
            float *to = out + first * vocabulary + from + row;
            _mm512_mask_i32scatter_ps(to, (__mmask16)((1 << in_group) - 1), places, _mm512_add_ps(lower, left), 4);
          },
          [](int64_t, int64_t) {});
    }
  }
  return 0;
}
#else
// Four rows times N states; their sums stay in registers. Only `rows` of the four rows exist. Dot products, because
// panels would be nearly empty with few states: one state took twice as long.
template <int N>
inline void output_of_four(const bf16 *weight, int64_t rows, int64_t depth, const bf16 *states, float *out, int64_t stride) {
  __m512 sums[4][N][3];
#pragma GCC unroll 4
  for (int64_t row = 0; row < 4; row++)
#pragma GCC unroll 2
    for (int64_t state = 0; state < N; state++)
#pragma GCC unroll 3
      for (int64_t term = 0; term < 3; term++) sums[row][state][term] = _mm512_setzero_ps();
  for (int64_t at = 0; at < depth; at += 32) {
    __m512bh read[4];
#pragma GCC unroll 4
    for (int64_t row = 0; row < 4; row++)
      read[row] = (__m512bh)_mm512_loadu_si512(weight + (row < rows ? row : 0) * depth + at);
#pragma GCC unroll 2
    for (int64_t state = 0; state < N; state++)
#pragma GCC unroll 3
      for (int64_t term = 0; term < 3; term++) {
        __m512bh x = (__m512bh)_mm512_loadu_si512(states + (state * 3 + term) * depth + at);
#pragma GCC unroll 4
        for (int64_t row = 0; row < 4; row++)
          sums[row][state][term] = _mm512_dpbf16_ps(sums[row][state][term], read[row], x);
      }
  }
#pragma GCC unroll 4
  for (int64_t row = 0; row < 4; row++)
#pragma GCC unroll 2
    for (int64_t state = 0; state < N; state++) {
      __m512 lower = _mm512_add_ps(sums[row][state][2], sums[row][state][1]);
      if (row < rows) out[state * stride + row] = _mm512_reduce_add_ps(_mm512_add_ps(lower, sums[row][state][0]));
    }
}

int64_t output_rows(const bf16 *weight, int64_t vocabulary, int64_t depth, const bf16 *states, int64_t number, float *out,
                    int64_t from, int64_t end) {
  for (int64_t rows; from < end; from += rows) {
    rows = min(end - from, rows_in_l2(depth));
    for (int64_t state = 0; state < number; state += 2)
      for (int64_t row = from; row < from + rows; row += 4) {
        const bf16 *read = states + state * 3 * depth;
        float *to = out + state * vocabulary + row;
        (state + 1 < number ? output_of_four<2> : output_of_four<1>)(weight + row * depth, from + rows - row, depth, read,
                                                                     to, vocabulary);
      }
  }
  return 0;
}
#endif

}  // namespace

extern "C" {

// Asks the system for AMX, once in a process; 0 if it was granted or is not needed.
int64_t prefill_request_amx() {
#ifdef __AMX_BF16__
  return syscall(SYS_arch_prctl, 0x1023, 18);
#else
  return 0;
#endif
}

// The normed last hidden states of the batch's tokens `last`, into out, [lasts][hidden_size]. `terms`: how many bf16
// terms each activation is split into, 1 or 2. `embedded` is [tokens][hidden_size]. Returns 0, or 1 if memory runs out.
int64_t prefill(const Model *model, int64_t terms, const float *embedded, int64_t tokens, const Segment *segments,
                int64_t count, const int64_t *last, int64_t lasts, int64_t threads, float *out) {
  return (terms == 1 ? prefill_with<1> : prefill_with<2>)(*model, embedded, tokens, segments, count, last, lasts, threads,
                                                          out);
}

// Blocks [first, first + count) of 32 rows of the output layer, [vocabulary][depth] in rows (depth a multiple of 32),
// times states of three terms, [number][3][depth], into [number][vocabulary]. A state's numbers do not depend on the
// other states. Returns 0, or 1 if memory runs out.
int64_t output_layer(const bf16 *weight, int64_t vocabulary, int64_t depth, const bf16 *states, int64_t number, float *out,
                     int64_t first, int64_t count) {
  const int64_t end = min(vocabulary, (first + count) * kBlock);
  return output_rows(weight, vocabulary, depth, states, number, out, first * kBlock, end);
}
}
