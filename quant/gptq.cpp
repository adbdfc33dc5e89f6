// gptq - second moments of inputs, their factor, and output energies. See gptq.h.
//
// Read add() first: the Gram matrix is where calibration spends its time besides the forward pass.
#include "quant/gptq.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "cpu/parallel.h"
#include "model/error.h"
#include "quant/eigen.h"
#include "quant/strip.h"

namespace tq {
namespace {

// Rows per f32 partial sum. 256 products keep the relative error of a sum near 1e-6; longer sums
// would be faster by little, since the f64 addition is already 1/256 of the work.
constexpr int64_t kGramRows = 256;
constexpr int64_t kTile = kStripRows;
// Columns of L^-1 solved for together. Fixed, so that the result does not depend on threads.
constexpr int64_t kSolveColumns = 128;

// sum[16][16] = a^T b over rows; a and b are panels [rows][16]. Four output rows at a time keep
// their accumulators in registers.
TQ_CLONES void multiply_panels(const float* a, const float* b, int64_t rows, float* sum) {
  for (int64_t i = 0; i < kTile; i += 4) {
    Lanes acc0 = {}, acc1 = {}, acc2 = {}, acc3 = {};
    for (int64_t row = 0; row < rows; ++row) {
      const Lanes x = *reinterpret_cast<const Lanes*>(b + row * kTile);
      const float* factor = a + row * kTile + i;
      acc0 += x * factor[0];
      acc1 += x * factor[1];
      acc2 += x * factor[2];
      acc3 += x * factor[3];
    }
    Lanes* out = reinterpret_cast<Lanes*>(sum + i * kTile);
    out[0] = acc0;
    out[1] = acc1;
    out[2] = acc2;
    out[3] = acc3;
  }
}

void add_tile(const float* tile, int64_t first_row, int64_t first_col, int64_t n, double* sum) {
  const int64_t n_rows = std::min(kTile, n - first_row), n_cols = std::min(kTile, n - first_col);
  for (int64_t i = 0; i < n_rows; ++i) {
    double* out = sum + (first_row + i) * n + first_col;
    for (int64_t j = 0; j < n_cols; ++j) out[j] += static_cast<double>(tile[i * kTile + j]);
  }
}

// Energy of 8 rows: sum_i w_i (H_ii w_i + 2 sum_{j>i} H_ij w_j), lane by lane. w is [n][8], `h` is
// H with its upper triangle valid. Four rows of H at a time: one load of w_j serves them all.
TQ_CLONES void strip_energy(const double* w, const double* h, int64_t n, double* energy) {
  const WideLanes* cols = reinterpret_cast<const WideLanes*>(w);
  WideLanes total = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const double *h0 = h + i * n, *h1 = h0 + n, *h2 = h1 + n, *h3 = h2 + n;
    WideLanes acc0 = cols[i + 1] * h0[i + 1] + cols[i + 2] * h0[i + 2] + cols[i + 3] * h0[i + 3];
    WideLanes acc1 = cols[i + 2] * h1[i + 2] + cols[i + 3] * h1[i + 3];
    WideLanes acc2 = cols[i + 3] * h2[i + 3], acc3 = {};
    for (int64_t j = i + 4; j < n; ++j) {
      const WideLanes x = cols[j];
      acc0 += x * h0[j];
      acc1 += x * h1[j];
      acc2 += x * h2[j];
      acc3 += x * h3[j];
    }
    total += cols[i] * (cols[i] * h0[i] + 2.0 * acc0);
    total += cols[i + 1] * (cols[i + 1] * h1[i + 1] + 2.0 * acc1);
    total += cols[i + 2] * (cols[i + 2] * h2[i + 2] + 2.0 * acc2);
    total += cols[i + 3] * (cols[i + 3] * h3[i + 3] + 2.0 * acc3);
  }
  for (; i < n; ++i) {
    WideLanes acc = {};
    for (int64_t j = i + 1; j < n; ++j) acc += cols[j] * h[i * n + j];
    total += cols[i] * (cols[i] * h[i * n + i] + 2.0 * acc);
  }
  *reinterpret_cast<WideLanes*>(energy) = total;
}

}  // namespace

Gram::Gram(int64_t n) : n_(n), sum_(static_cast<size_t>(n * n)) {}

void Gram::add(const float* x, int64_t rows, int threads) {
  const int64_t n_tiles = n_strips(n_);
  AlignedBuffer panels(static_cast<size_t>(n_tiles * kGramRows * kTile) * sizeof(float));
  for (int64_t first = 0; first < rows; first += kGramRows) {
    const int64_t count = std::min(kGramRows, rows - first);
    const auto panel = [&](int64_t tile) { return panels.as<float>() + tile * kGramRows * kTile; };
    parallel_ranges(threads, n_tiles, [&](int64_t begin, int64_t end, int) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t width = std::min(kTile, n_ - tile * kTile);  // columns past n_ stay zero
        for (int64_t row = 0; row < count; ++row) {
          std::copy_n(x + (first + row) * n_ + tile * kTile, width, panel(tile) + row * kTile);
        }
      }
    });
    parallel_items(threads, n_tiles, [&](int64_t i, int) {
      alignas(64) float product[kTile * kTile];
      for (int64_t j = i; j < n_tiles; ++j) {
        multiply_panels(panel(i), panel(j), count, product);
        add_tile(product, i * kTile, j * kTile, n_, sum_.data());
      }
    });
  }
  n_rows_ += rows;
}

ColumnOrder activation_order(const Gram& gram, int64_t group) {
  const int64_t n = gram.size(), n_whole = n / group;
  const auto louder = [&](int64_t a, int64_t b) { return gram.at(a, a) > gram.at(b, b); };
  std::vector<ColumnOrder> groups;
  for (int64_t first = 0; first < n; first += group) {
    groups.emplace_back(static_cast<size_t>(std::min(group, n - first)));
    std::iota(groups.back().begin(), groups.back().end(), first);
    std::stable_sort(groups.back().begin(), groups.back().end(), louder);
  }
  std::stable_sort(groups.begin(), groups.begin() + n_whole,
                   [&](const ColumnOrder& a, const ColumnOrder& b) { return louder(a[0], b[0]); });
  ColumnOrder order;
  for (const ColumnOrder& columns : groups)
    order.insert(order.end(), columns.begin(), columns.end());
  return order;
}

// With J the reversal of the order of columns, J (H + d I) J = L L^T gives
// (H + d I)^-1 = U^T U for U = J L^-1 J, which is upper triangular: one Cholesky factorisation and
// one triangular inverse, where the textbook route takes two factorisations and a full inverse.
GptqFactor factorize(const Gram& gram, int threads, const char* where, ColumnOrder order) {
  const int64_t n = gram.size();
  GptqFactor factor;
  factor.n = n;
  factor.order = std::move(order);
  double mean = 0;
  for (int64_t i = 0; i < n; ++i) mean += gram.at(i, i) / static_cast<double>(n);
  if (!std::isfinite(mean)) {
    throw Error(ErrorKind::kBadData, "calibration failed", where, "activations are not finite");
  }
  MatrixRM lower(n, n);
  double relative = mean > 0 ? 0.01 : 0.0;
  for (;; relative *= 10) {
    factor.damping = mean * relative;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = factor.column(n - 1 - i);
      for (int64_t j = 0; j <= i; ++j) lower(i, j) = gram.at(row, factor.column(n - 1 - j));
      lower(i, i) += mean > 0 ? factor.damping : 1.0;
    }
    Eigen::LLT<Eigen::Ref<MatrixRM>> cholesky(lower);
    if (cholesky.info() == Eigen::Success) break;
    if (relative > 1e3) {
      throw Error(ErrorKind::kBadData, "calibration failed", where,
                  "the second moments of the inputs cannot be factorised");
    }
  }
  factor.u.assign(static_cast<size_t>(n * n), 0.0f);
  const int64_t n_blocks = (n + kSolveColumns - 1) / kSolveColumns;
  parallel_items(threads, n_blocks, [&](int64_t block, int) {
    // Columns c0.. of L^-1 are zero above row c0: only the trailing corner is solved.
    const int64_t c0 = block * kSolveColumns, width = std::min(kSolveColumns, n - c0);
    MatrixRM inverse = MatrixRM::Identity(n - c0, width);
    lower.bottomRightCorner(n - c0, n - c0).triangularView<Eigen::Lower>().solveInPlace(inverse);
    for (int64_t i = 0; i < n - c0; ++i) {
      for (int64_t j = 0; j < std::min(width, i + 1); ++j) {
        factor.u[static_cast<size_t>((n - 1 - c0 - i) * n + (n - 1 - c0 - j))] =
            static_cast<float>(inverse(i, j));
      }
    }
  });
  return factor;
}

double output_energy(const FloatMatrix& w, const Gram& gram, int threads) {
  constexpr int64_t kHalf = kStripRows / 2;
  const int64_t n = w.cols, strips = n_strips(w.rows);
  TQ_CHECK(n == gram.size());
  std::vector<double> energy(static_cast<size_t>(strips * kStripRows));
  PerWorker<AlignedBuffer> narrows(threads), wides(threads);
  parallel_items(threads, strips, [&](int64_t strip, int worker) {
    AlignedBuffer& narrow =
        narrows.get(worker, static_cast<size_t>(n * kStripRows) * sizeof(float));
    AlignedBuffer& wide = wides.get(worker, static_cast<size_t>(n * kHalf) * sizeof(double));
    alignas(64) double lanes[kHalf];
    load_strip(w, strip, narrow.as<float>());
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t col = 0; col < n; ++col) {
        const float* from = narrow.as<float>() + col * kStripRows + half * kHalf;
        std::copy_n(from, kHalf, wide.as<double>() + col * kHalf);
      }
      strip_energy(wide.as<double>(), gram.data(), n, lanes);
      std::copy_n(lanes, kHalf, energy.data() + strip * kStripRows + half * kHalf);
    }
  });
  double total = 0;
  for (double value : energy) total += value;
  return total;
}

}  // namespace tq
