// weights - what prepare() makes of a model's weights: device copies, and the order in which the
// tensor-core kernels read 4-bit codes.
//
// Fragment order of a 4-bit matrix [rows, cols]: rows are padded to sets of 8 panels of 16, columns
// to blocks of 128, with code 0: [set, block, panel, half of 64 columns, lane]. A set's block is
// one piece of 8 KB, as the tiled products copy it. Of the 512 bytes of 64 columns lane l of a warp
// owns 16, exactly its A operands of two mma m16n8k32 (row l/4 and l/4 + 8). Codes are signed
// nibbles.
//
// Word w (0..3) of a lane, with t = l % 4:
//   w = 0   row l/4      columns 8t..8t+3 in the low nibbles of the 4 bytes, 8t+4..8t+7 in the high
//   w = 1   row l/4 + 8  the same columns
//   w = 2,3 the same 32 columns further on
// Scales: f16 [set, group, panel, 8 pairs of rows (r, r + 8)]: one 4-byte load a lane. Groups
// behind the last column have scale 0.
//
// Read next: kernels.h.
#pragma once

#include <cuda_fp16.h>

#include <memory>
#include <optional>
#include <vector>

#include "cuda/device.h"
#include "model/backend.h"

namespace tq::cuda {

constexpr int64_t kPanelRows = 16, kSetPanels = 8;
constexpr int64_t kBlockCols = 128;  // columns are padded to this

/// A matrix in the file's layout, on the device. Plain pointers, for kernels.
struct CanonicalView {
  Storage storage;
  int64_t rows, cols, group, n_groups, row_bytes;
  const uint8_t* data;
  const __half* scales;  // packed
};

/// log2 of a group that is a power of two; for a group that spans a row of padded_cols columns, a
/// shift that makes every column's group 0.
int32_t group_shift(int64_t group, int64_t padded_cols);

/// A matrix of 4-bit codes in fragment order. Where its scales are two-level (quant/rounding.h) a
/// scale is also unit * multiple, in the same order.
struct FragmentView {
  int64_t rows, cols, padded_cols;
  int64_t n_panels;               // of 16 rows; memory holds whole sets
  int32_t group_shift, n_groups;  // column >> group_shift is its group; of padded_cols
  const uint4* codes;             // [set, padded_cols / 128, 8 panels, 2, 32 lanes]
  const __half2* scales;          // [set, group, 8 panels, 8]
  const uchar2* multiples;        // like scales; null: not two-level, or nobody reads them
  const float2* units;            // [set, 8 panels, 8]
};
/// Groups of padded_cols columns.
int32_t padded_groups(int32_t group_shift, int64_t padded_cols);

class CudaMatrix {
 public:
  /// Uploads `matrix`; in fragment order if asked, and then with multiples if asked and possible.
  CudaMatrix(const Matrix& matrix, bool fragments, bool two_level, Uploader& uploader,
             const Gpu& gpu);
  bool has_fragments() const { return has_fragments_; }
  const CanonicalView& canonical() const { return canonical_; }
  const FragmentView& fragments() const { return fragments_; }

 private:
  bool has_fragments_;
  CanonicalView canonical_ = {};
  FragmentView fragments_ = {};
  void find_multiples(int64_t padded_rows, const Gpu& gpu);
  DeviceMemory data_, scales_, multiples_, units_;
};

/// A Hadamard transform, or a dense one as the two matrices M^T and M.
class CudaTransform : public PreparedTransform {
 public:
  CudaTransform(const Transform& transform, Uploader& uploader, const Gpu& gpu);
  bool same_as(const CudaTransform& other) const;

  Transform::Kind kind = Transform::Kind::kNone;
  int64_t size = 0, block = 0, base_order = 1;
  float scale = 1.0f;                  // 1 / sqrt(block)
  const int8_t* host_signs = nullptr;  // identity of the signs: linears of one site share them
  const int8_t* signs() const { return signs_.as<int8_t>(); }  // [size] or null
  const int8_t* base() const { return base_.as<int8_t>(); }    // [m, m] row-major
  std::optional<CudaMatrix> forward_matrix, inverse_matrix;    // dense: W of y = x W^T

 private:
  DeviceMemory signs_, base_;
};

/// A linear as the GPU runs it.
class CudaLinear : public PreparedLinear {
 public:
  CudaLinear(const Linear& linear, Uploader& uploader, const Gpu& gpu);
  int64_t out_dim() const { return out_dim_; }
  int64_t in_dim() const { return in_dim_; }
  int64_t rank() const { return branch_a ? branch_a_rows_ : 0; }
  bool rounds_input() const { return act.bits < 16; }

  ActQuant act;
  ActQuant branch_act;  // of x A^T, where the branch is packed
  CudaTransform transform;
  std::optional<CudaMatrix> weight, branch_a, branch_b;

 private:
  int64_t out_dim_, in_dim_, branch_a_rows_ = 0;
};

class CudaTable : public PreparedTable {
 public:
  CudaTable(const Matrix& table, Uploader& uploader, const Gpu& gpu)
      : matrix(table, false, false, uploader, gpu) {}
  CudaMatrix matrix;
};

}  // namespace tq::cuda
