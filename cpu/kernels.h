// kernels - the table of CPU kernels, one table per instruction set, and the jobs they are given.
//
// A job is a rectangle of work for one thread: plain pointers and sizes, no ownership. Dividing the
// work among threads is cpu_backend.cpp; the arithmetic is in matmul*, gemm*, packed_matmul*,
// attention*, ops and hadamard. All tables give the same bits: wherever a sum needs an order, the
// order is defined on 16 lanes (element k belongs to lane k % 16), which two AVX2 registers, one
// AVX-512 register and an array of 16 floats can all follow. Read next: ops.h (the plain versions).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "model/act_codes.h"

namespace tq {

/// Lanes of every sum in f32.
constexpr int64_t kLanes = 16;
/// Rows of a packed panel: one 32-bit lane of an AVX-512 register a row.
constexpr int64_t kPanelRows = 16;
/// Keys scored together: four AVX-512 registers a query.
constexpr int64_t kKeyBlock = 64;
/// Keys of one work item of attention when few tokens are decoded.
constexpr int64_t kSpan = 512;

/// Element type of a dense matrix that a kernel reads.
enum class DenseType : uint8_t { kF32, kF16, kBF16 };

/// y[t, r] (+)= sum_k x[t, k] w[r, k] for a rectangle of tokens and rows.
struct DenseJob {
  DenseType type;
  const std::byte* w;  // [rows, cols] row-major, any alignment
  const float* x;      // [tokens, cols]
  float* y;            // [tokens, y_stride]
  int64_t cols, y_stride;
  int64_t row_begin, row_end, token_begin, token_end;
  bool accumulate;  // y += instead of y =
};

/// Same for packed weights and rounded tokens; see packed_matmul.h for the layouts.
struct PackedJob {
  int bits;                   // of the weight: 4 or 8
  const uint8_t* panels;      // codes of 16 rows a panel
  const uint16_t* w_scales;   // f16 [panel, n_w_groups, 16]
  const int32_t* w_group_of;  // [n_inner] weight group of an inner group
  const int32_t* x_group_of;  // [n_inner] token group of an inner group
  const int8_t* codes;        // [tokens, padded_cols]
  const float* x_scales;      // [tokens, n_x_groups]
  const int32_t* offsets;     // [tokens, n_inner]: -8 * sum of the token's codes in an inner group
  float* y;                   // [tokens, y_stride]
  int64_t padded_cols, inner, n_inner, n_w_groups, n_x_groups, y_stride;
  int64_t n_rows;                                      // of the matrix
  int64_t row_begin, row_end, token_begin, token_end;  // row_begin is a multiple of 16
  bool accumulate;
};

/// Rounding of one group of one token (model/weights.h, ActQuant).
struct RoundJob {
  const float* x;  // [count]
  int64_t count;
  int bits;
  float clip;
  ActCodes act_codes;
  int8_t* codes;  // [count]
  float* scale;   // one
  // Of a token with two-level scales (token_unit, ops.h): the scale becomes a whole multiple of it.
  float unit = 0;
};

/// Softmax attention of `n_queries` queries over the keys of one span and one key head; partial
/// results, to be merged in ascending order of spans. See attention.h.
struct SpanJob {
  const float* q;      // [n_queries, head_dim], already multiplied by 1 / sqrt(head_dim)
  int64_t n_queries;   // in ascending order of position
  int64_t group_size;  // query i is at position first_pos + i / group_size
  int64_t first_pos;
  int64_t head_dim, padded_dim;
  int64_t span_begin, span_end;  // keys; span_begin is a multiple of kSpan
  const std::byte* keys;         // of this head: [block, head_dim, kKeyBlock]
  const std::byte* values;       // [block, kKeyBlock, padded_dim]
  const uint16_t* scales;        // 8, 4 bits: f16 [block, 4, 64], scale and minimum of keys, values
  int bits;                      // of the cache: 32 (f32), 16 (f16), or codes of 8 or 4
  float* scratch;                // attention_scratch_floats()
  float* max;                    // [n_queries] largest score
  float* sum;                    // [n_queries] sum of exp(score - max)
  float* out;                    // [n_queries, padded_dim] sum of exp(score - max) * value
};

struct Kernels {
  CpuIsa isa;
  void (*dense)(const DenseJob&);
  void (*gemm)(const GemmJob&);
  void (*packed)(const PackedJob&);
  void (*round)(const RoundJob&);
  int32_t (*sum_codes)(const int8_t* codes, int64_t count);
  void (*span)(const SpanJob&);
  /// Total (max, sum, out) of one query <- total merged with a later span's.
  void (*merge)(float* max, float* sum, float* out, float span_max, float span_sum,
                const float* span_out, int64_t count);
  /// to[i] = f16(from[i]), round to nearest even.
  void (*store_half)(const float* from, uint16_t* to, int64_t count);
  /// codes (q4: nibbles, from an even column; q8: bytes) times a scale, as f32.
  void (*dequant)(int bits, const std::byte* codes, float scale, int64_t count, float* out);
  /// x[i] = exp_f32(x[i] - shift); the sum of the results, element i in lane i % 16.
  float (*exp_sum)(float* x, float shift, int64_t count);
  /// In place: v <- v (H_2 (x) ... (x) H_2), unscaled; count = 2^k.
  void (*butterflies)(float* v, int64_t count);
  /// out[a', :] = (sum over a of signs[a, a'] v[a, :]) * scale; v, out [m, inner], signs f32.
  void (*base_stage)(const float* v, const float* signs, int64_t m, int64_t inner, float scale,
                     float* out);
  void (*silu_mul)(float* gate, const float* up, int64_t count);
  void (*add)(float* x, const float* y, int64_t count);
  /// out = x * factor * gain
  void (*scale_gain)(const float* x, float factor, const float* gain, int64_t count, float* out);
  /// Largest of `count` values; and sums over i of exp(x[i] - shift), alone and times
  /// (x[i] - y[i]), in double. See softmax.h.
  float (*max)(const float* x, int64_t count);
  double (*sum_exp)(const float* x, float shift, int64_t count);
  double (*sum_exp_diff)(const float* x, const float* y, float shift, int64_t count);
  /// One head: pairs (i, i + half) turned by the angle whose cos and sin are given.
  void (*rope)(float* head, const float* cos, const float* sin, int64_t half);
};

/// The table of an instruction set; the caller checks isa_supported().
const Kernels& kernels_for(CpuIsa isa);

}  // namespace tq
