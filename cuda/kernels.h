// kernels - the launch functions of cuda/*.cu and the plain values that they take.
//
// A job holds pointers to device memory and sizes, no ownership. launch_<name>() checks what the
// kernel requires and enqueues it on the GPU's stream. Read next: rows.cu, many_rows.cu, repack.cu,
// packed_matvec.cu, packed_gemm.cu, twin_gemm.cu, dense_linear.cu, dense_gemm.cu, heads.cu,
// attention_decode.cu, attention_wgmma.cu.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda/ops.h"
#include "cuda/weights.h"

namespace tq::cuda {

/// How codes of rounded rows stand in memory (code_offset, device.cuh): what a product reads.
enum class CodeOrder : int32_t {
  kLanes,    // few rows: packed_matvec.cu
  kTiles,    // many: packed_gemm.cu, twin_gemm.cu; 128 rows x 128 columns are one piece of 16 KB
  kTilesFp8  // the same as e4m3 numbers, for up to 4 bits: twin_gemm.cu
};

/// Rows rounded to integer codes. Rows are allocated to a multiple of kRowStep, so that kernels may
/// read whole tiles; what they compute from the surplus is not written anywhere.
struct RoundedRows {
  uint8_t* codes;  // padded_cols bytes a row
  CodeOrder order;
  bool nibbles;  // codes are in -8..7
  // [rows / kRowStep, n_groups, kRowStep]; kLanes: [n_groups, kMatvecRows] (scale_offset,
  // device.cuh)
  float* scales;
  int64_t padded_cols;  // multiple of kBlockCols; codes behind the last column are 0
  int32_t group;        // columns a scale; at least padded_cols if there is one group
  int32_t group_shift;  // of a power of two, or of one group (weights.h)
  int32_t n_groups;     // of padded_cols columns
};
constexpr int64_t kRowStep = 128;
constexpr int64_t kMatvecRows = 16;
/// The order that launch_packed() reads on this GPU.
CodeOrder code_order(int64_t rows, int bits, const Gpu& gpu);

/// What happens to every row x on its way into a linear, in this order; each part is optional.
struct RowsJob {
  int64_t rows, cols;
  const float* x;     // [n_parts, rows, cols]; x is their sum
  int64_t n_parts;    // at least 1
  const float* term;  // x += term
  const float* up;    // x = silu(x) * up
  float* sum;         // the result so far goes here (term, up)
  const float* gain;  // [cols] x = x / rms(x) * gain
  float eps;
  float* normed;  // the result so far goes here (gain)
  // Hadamard transform, block by block.
  const int8_t *signs, *base;  // null: all +1; base order 1
  int64_t block, base_order;   // block 0: no transform
  float hadamard_scale;
  bool inverse;
  float* transformed;     // [rows, cols] room for the result so far; needed with a transform
  bool keep_transformed;  // false: nobody reads it, so it may be left out
  // Rounding (model/weights.h, ActQuant).
  int bits = 16;  // 16: none
  float clip;
  ActCodes act_codes;
  // Two-level scales: columns of a group; `rounded` has one then, and codes times multiples.
  int32_t level_group;  // 0: none
  RoundedRows rounded;
  float* expanded;  // scale * code [rows, cols], where a dense matrix wants rounded input
};
void launch_rows(const RowsJob& job, const Gpu& gpu);
/// Its shortcut for more than kMatvecRows of usual widths; false: not one of those.
bool launch_many_rows(const RowsJob& job, const Gpu& gpu);

/// Two-level scales taken apart (weights.h); *failed: how many rows have scales that are not.
void launch_multiples(const FragmentView& from, uchar2* multiples, float2* units, int32_t* failed,
                      const Gpu& gpu);

/// canonical Q4 -> fragment order (weights.h).
void launch_repack(const CanonicalView& from, int64_t n_panels, int64_t padded_cols,
                   int64_t n_groups, uint4* codes, __half2* scales, const Gpu& gpu);

/// Bytes per second that the device reads; takes some milliseconds and 1 GiB.
double measure_read_bandwidth(const Gpu& gpu);

void launch_embed(const CanonicalView& table, const StepInput* input, int64_t rows, float* x,
                  const Gpu& gpu);
void launch_add(float* x, const float* y, int64_t count, const Gpu& gpu);
void launch_scale_columns(float* x, const float* factors, int64_t rows, int64_t cols,
                          const Gpu& gpu);
void launch_silu_mul(float* gate, const float* up, int64_t count, const Gpu& gpu);
void launch_copy(const float* from, float* to, int64_t count, const Gpu& gpu);

/// The count largest of x[0, n), as top_candidates() (model/sampler.h) orders them.
struct TopJob {
  const float* x;
  int64_t n, count;
  uint64_t* keys;     // [count] in 32 bits the order of the number, in 32 bits ~index
  uint64_t* scratch;  // top_scratch() keys
};
constexpr int64_t kMaxTop = 1024;
int64_t top_scratch(int64_t n, int64_t count);
void launch_top(const TopJob& job, const Gpu& gpu);

/// y_s[m, out_s] (+)= x[m, in] W_s^T in f32, any storage, but the same for all s.
struct DenseSegment {
  CanonicalView w;
  float* y;
};
struct DenseJob {
  const float* x;
  int64_t rows;
  bool accumulate;
  int32_t n_segments;
  DenseSegment segments[kMaxLinears];
};
/// By the number of rows and the GPU a matvec or one of the two below.
void launch_dense(const DenseJob& job, const Gpu& gpu);
void launch_dense_gemm(const DenseJob& job, const Gpu& gpu);
void launch_dense_wgmma(const DenseJob& job, const Gpu& gpu);

/// The same with packed weights in the file's layout and rounded rows: exact integers inside a
/// group, any group sizes. The fallback of the two kernels below.
struct PackedSimpleJob {
  CanonicalView w;
  RoundedRows x;
  float* y;
  int64_t rows;
  bool accumulate;
};
void launch_packed_simple(const PackedSimpleJob& job, const Gpu& gpu);

/// Several linears that read the same rounded rows, each perhaps with its low-rank component:
/// y = x' R^T + h' B^T.
struct PackedSegment {
  FragmentView w;
  FragmentView b;  // n_panels 0: no low-rank component
  RoundedRows h;
  RowsJob narrow;   // of one row, with bits below 16: h is made of this by the product itself;
                    // in launch_down_two_level(): how the outputs, h, are rounded
  float* y;         // null: only the stream is wanted
  bool accumulate;  // y +=
  float* stream;    // [m, out] += y, or null: the residual stream
  // Blocks of 128 columns of w that take part; n_blocks 0: all.
  int32_t first_block, n_blocks;
};
struct PackedJob {
  RoundedRows x;
  // Of one row, with bits below 16: x is made of this by the product itself, in every block of
  // threads, and only says how. matvec_rounds() says which norms and roundings.
  RowsJob before;
  int64_t rows;
  // Of one row: how many blocks of threads the kernel ahead has, if that one makes the parts of
  // every `narrow` and itself began when all else that is needed was there. Then only h waits for
  // it. 0: everything waits.
  int32_t blocks_ahead;
  int32_t n_segments;
  PackedSegment segments[kMaxLinears];
};
/// Where to cut the columns of x' A^T, in blocks of 128, begin to end: its rows of weights are few,
/// so that the columns are shared out too. At most `most` parts.
std::vector<int32_t> column_parts(int64_t n_blocks, int64_t most, int64_t rows);
/// log2 of the smallest group of either side of any segment.
int smallest_group_shift(const PackedJob& job);
/// By the order of the codes, the scales and the GPU one of the four below.
void launch_packed(const PackedJob& job, const Gpu& gpu);
void launch_packed_matvec(const PackedJob& job, const Gpu& gpu);
bool matvec_rounds(const RowsJob& before);
bool matvec_rounds_narrow(const RowsJob& narrow);
void launch_packed_gemm(const PackedJob& job, const Gpu& gpu);
void launch_twin_gemm(const PackedJob& job, const Gpu& gpu);
bool takes_two_level(const PackedJob& job, const Gpu& gpu);
void launch_twin_gemm_two_level(const PackedJob& job, const Gpu& gpu);
/// x' A^T of many rows and its rounding, w of every segment being A; no other field but narrow.
bool takes_down_two_level(const PackedJob& job, const Gpu& gpu);
void launch_down_two_level(const PackedJob& job, const Gpu& gpu);

/// cos and sin of positions [0, n): angles [n, half] of (cos, sin), as cpu/ops.h defines them.
void launch_rope_angles(const float* inv_freq, int64_t half, float factor, int64_t n,
                        float2* angles, const Gpu& gpu);

/// One layer of the cache.
struct CacheView {
  int32_t bits;  // 32, 16, or codes of 8 or 4
  int64_t ctx, n_kv_heads, head_dim, vector_bytes;
  uint8_t *keys, *values;              // [n_kv_heads, ctx, vector_bytes]
  __half2 *key_scales, *value_scales;  // [n_kv_heads, ctx] (scale, minimum); 8 and 4 bits
};

/// Heads of q, k and v on their way to attention: per-head norm, rotation, Hadamard, and k and v
/// into the cache; each optional.
struct HeadsJob {
  int64_t rows, head_dim;
  int64_t n_heads, n_kv_heads;  // of q; of k and v
  float *q, *k;                 // [rows, heads, head_dim], in place; null: none
  const float* v;
  const float *q_gain, *k_gain;  // [head_dim] or null
  float eps;
  const float2* angles;       // [positions, head_dim / 2] or null
  int64_t block, base_order;  // Hadamard; block 0: none
  const int8_t* base;
  float hadamard_scale;
  bool store;
  CacheView cache;
  const StepInput* input;
};
void launch_heads(const HeadsJob& job, const Gpu& gpu);

/// Causal attention of the step's rows over the cache.
struct AttentionJob {
  CacheView cache;
  const float* q;  // [rows, n_heads * head_dim]
  float* out;
  int64_t rows, n_heads;
  float scale;  // 1 / sqrt(head_dim)
  const StepInput* input;
  float* partials;    // attention_partials() floats
  int32_t* counters;  // kAttentionCounters zeros; zeros again afterwards
  int64_t n_splits;   // attention_splits()
  // What launch_heads() would have done before, if attention_takes_heads(); its q null: nothing.
  HeadsJob heads;
  bool heads_wanted;  // somebody else reads heads.q and heads.k
};
constexpr int64_t kAttentionCounters = 1 << 16;
constexpr int64_t kMostOfCluster = 16;
/// Blocks of threads that may share a row as a cluster: 8 wherever there are clusters, 16 on
/// Hopper.
inline int64_t most_of_cluster(const Gpu& gpu) {
  return gpu.facts.major < 9 ? 1 : gpu.facts.major == 9 ? kMostOfCluster : 8;
}
/// Stretches that the keys of a row are cut in, for a timeline of up to max_keys.
int64_t attention_splits(const CacheView& cache, int64_t rows, int64_t max_keys, const Gpu& gpu);
int64_t attention_partials(int64_t rows, int64_t n_heads, int64_t head_dim, int64_t n_splits);
void launch_attention_decode(const AttentionJob& job, const Gpu& gpu);
/// Its shortcut for 16-bit caches, which of one row does the work of launch_heads() too.
bool attention_f16_takes(const CacheView& cache);
bool attention_takes_heads(const HeadsJob& job);
void launch_attention_f16(const AttentionJob& job, const Gpu& gpu);
bool attention_prefill_takes(const CacheView& cache, int64_t rows);
/// By the GPU this kernel or the one below.
void launch_attention_prefill(const AttentionJob& job, const Gpu& gpu);
bool attention_wgmma_takes(const CacheView& cache, const Gpu& gpu);
void launch_attention_wgmma(const AttentionJob& job, const Gpu& gpu);

}  // namespace tq::cuda
