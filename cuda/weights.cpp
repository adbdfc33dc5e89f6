// weights - see weights.h.
#include "cuda/weights.h"

#include <bit>
#include <cmath>

#include "cuda/kernels.h"
#include "model/error.h"
#include "model/hadamard.h"

namespace tq::cuda {
namespace {

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// Whether the tensor-core kernels can take this matrix for inputs rounded in groups of x_group:
// 4 bits, and groups of 32, 64, 128 or 256 columns, or whole rows.
bool fits_fragments(const Matrix& matrix, int64_t x_group) {
  if (matrix.storage != Storage::kQ4) return false;
  const int64_t padded = round_up(matrix.cols, kBlockCols);
  const int64_t w_group = matrix.group >= matrix.cols ? padded : matrix.group;
  const int64_t x = x_group >= matrix.cols ? padded : x_group;
  const auto fits = [&](int64_t group) {
    return group == padded || (group >= 32 && group <= 256 && std::has_single_bit<uint64_t>(group));
  };
  return fits(w_group) && fits(x);
}

// What the integer kernels promise for any storage (cpu/packed_matmul.h asks the same).
void check_groups(const Matrix& matrix, int64_t x_group) {
  const int64_t padded = round_up(matrix.cols, 8);
  const int64_t w = matrix.group >= matrix.cols ? padded : matrix.group;
  const int64_t x = x_group >= matrix.cols ? padded : x_group;
  const int64_t inner = std::min(w, x), outer = std::max(w, x);
  if (inner % 8 == 0 && (outer % inner == 0 || outer == padded)) return;
  throw Error(ErrorKind::kBadData, "group sizes do not fit each other", "quantized linear",
              "weight group " + std::to_string(w) + ", activation group " + std::to_string(x) +
                  ": one must divide the other, in multiples of 8");
}

}  // namespace

int32_t group_shift(int64_t group, int64_t padded_cols) {
  return group >= padded_cols ? 31 : std::countr_zero(static_cast<uint32_t>(group));
}

int32_t padded_groups(int32_t group_shift, int64_t padded_cols) {
  return static_cast<int32_t>((padded_cols - 1) >> group_shift) + 1;
}

CudaMatrix::CudaMatrix(const Matrix& matrix, bool fragments, bool two_level, Uploader& uploader,
                       const Gpu& gpu)
    : has_fragments_(fragments) {
  TQ_CHECK(matrix.rows > 0 && matrix.cols > 0);
  const int64_t n_bytes = static_cast<int64_t>(matrix.data_bytes());
  const int64_t scale_bytes = static_cast<int64_t>(matrix.scale_bytes());
  // Behind the end: kernels read whole words.
  data_ = DeviceMemory(round_up(n_bytes, 16) + 16, "weights");
  scales_ = DeviceMemory(scale_bytes, "weights");
  uploader.copy(data_.as<void>(), matrix.data, n_bytes);
  if (scale_bytes > 0) uploader.copy(scales_.as<void>(), matrix.scales, scale_bytes);
  canonical_ = {matrix.storage,    matrix.rows,        matrix.cols,         matrix.group,
                matrix.n_groups(), matrix.row_bytes(), data_.as<uint8_t>(), scales_.as<__half>()};
  if (!fragments) return;
  const int64_t n_panels = (matrix.rows + kPanelRows - 1) / kPanelRows;
  const int64_t padded_panels = round_up(n_panels, kSetPanels);
  const int64_t padded_cols = round_up(matrix.cols, kBlockCols);
  DeviceMemory codes(padded_panels * kPanelRows * padded_cols / 2, "weights");
  const int32_t shift =
      group_shift(matrix.group >= matrix.cols ? padded_cols : matrix.group, padded_cols);
  const int32_t n_groups = padded_groups(shift, padded_cols);
  DeviceMemory scales(padded_panels * kPanelRows * n_groups * 2, "weights");
  fragments_ = {matrix.rows, matrix.cols,       padded_cols,          n_panels, shift,
                n_groups,    codes.as<uint4>(), scales.as<__half2>(), nullptr,  nullptr};
  launch_repack(canonical_, padded_panels, padded_cols, n_groups, codes.as<uint4>(),
                scales.as<__half2>(), gpu);
  cuda_check(cudaStreamSynchronize(gpu.stream), "repacking weights");
  data_ = std::move(codes);
  scales_ = std::move(scales);
  canonical_.data = nullptr;
  canonical_.scales = nullptr;
  if (two_level) find_multiples(padded_panels * kPanelRows, gpu);
}

void CudaMatrix::find_multiples(int64_t padded_rows, const Gpu& gpu) {
  multiples_ = DeviceMemory(padded_rows * fragments_.n_groups, "weights");
  units_ = DeviceMemory(padded_rows * 4, "weights");
  DeviceMemory failed(4, "weights");
  launch_multiples(fragments_, multiples_.as<uchar2>(), units_.as<float2>(), failed.as<int32_t>(),
                   gpu);
  int32_t n_failed = 0;
  cuda_check(cudaMemcpyAsync(&n_failed, failed.as<void>(), 4, cudaMemcpyDeviceToHost, gpu.stream),
             "reading a count");
  cuda_check(cudaStreamSynchronize(gpu.stream), "multiples of scales");
  if (n_failed > 0) {
    multiples_ = DeviceMemory();
    units_ = DeviceMemory();
    return;
  }
  fragments_.multiples = multiples_.as<uchar2>();
  fragments_.units = units_.as<float2>();
}

CudaTransform::CudaTransform(const Transform& transform, Uploader& uploader, const Gpu& gpu)
    : kind(transform.kind),
      size(transform.size),
      block(transform.block),
      host_signs(transform.signs) {
  if (kind == Transform::Kind::kNone) return;
  if (kind == Transform::Kind::kDense) {
    const Matrix& m = transform.matrix;
    TQ_CHECK(m.rows == m.cols && !m.packed());
    // A linear computes x W^T: W = M for the inverse, M^T for x -> x M.
    inverse_matrix.emplace(m, false, false, uploader, gpu);
    const size_t n = static_cast<size_t>(m.rows);
    std::vector<float> row(n), transposed(n * n);
    for (size_t i = 0; i < n; ++i) {
      matrix_row_f32(m, static_cast<int64_t>(i), row.data());
      for (size_t j = 0; j < n; ++j) transposed[j * n + i] = row[j];
    }
    Matrix copy;
    copy.rows = copy.cols = m.rows;
    copy.data = reinterpret_cast<const std::byte*>(transposed.data());
    forward_matrix.emplace(copy, false, false, uploader, gpu);
    return;
  }
  TQ_CHECK(block > 0 && size % block == 0);
  base_order = hadamard_base_order(block);
  TQ_CHECK(base_order > 0, "no Hadamard matrix of this order");
  scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  if (base_order > 1) {
    const std::vector<int8_t>& base = hadamard_base(base_order);
    base_ = DeviceMemory(static_cast<int64_t>(base.size()), "transform");
    uploader.copy(base_.as<void>(), base.data(), static_cast<int64_t>(base.size()));
  }
  if (host_signs) {
    signs_ = DeviceMemory(size, "transform");
    uploader.copy(signs_.as<void>(), host_signs, size);
  }
}

bool CudaTransform::same_as(const CudaTransform& other) const {
  if (kind != other.kind) return false;
  return kind == Transform::Kind::kNone ||
         (size == other.size && block == other.block && host_signs == other.host_signs);
}

CudaLinear::CudaLinear(const Linear& linear, Uploader& uploader, const Gpu& gpu)
    : act(linear.act),
      transform(linear.input, uploader, gpu),
      out_dim_(linear.out_dim()),
      in_dim_(linear.in_dim()) {
  TQ_CHECK(act.bits == 3 || act.bits == 4 || act.bits == 8 || act.bits == 16);
  TQ_CHECK(act.group > 0 && linear.branch_a.has_value() == linear.branch_b.has_value());
  TQ_CHECK(transform.kind != Transform::Kind::kDense, "only the residual basis may be dense");
  const auto add = [&](std::optional<CudaMatrix>& to, const Matrix& matrix, int64_t x_group) {
    const bool integers = rounds_input() && matrix.packed();
    if (integers) check_groups(matrix, x_group);
    // Multiples are for twin_gemm_two_level.cu.
    const bool multiples = act.two_level && gpu.facts.major == 9;
    to.emplace(matrix, integers && fits_fragments(matrix, x_group), multiples, uploader, gpu);
  };
  add(weight, linear.weight, act.group);
  if (!linear.branch_a) return;
  branch_a_rows_ = linear.branch_a->rows;
  branch_act = act.narrow(linear.rank(), linear.branch_b->packed() ? linear.branch_b->group : 64);
  add(branch_a, *linear.branch_a, act.group);
  add(branch_b, *linear.branch_b, branch_act.group);
}

}  // namespace tq::cuda
