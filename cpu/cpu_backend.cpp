// cpu_backend - see cpu_backend.h. Each operation divides rows or elements among threads and calls
// a kernel; the three large ones are in linear.cpp, attention.cpp and hadamard.cpp.
#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "cpu/attention.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "model/error.h"
#include "model/memory.h"

namespace tq {
namespace {

// Handing a loop over takes a microsecond or two; below this many floats one thread is faster.
constexpr int64_t kFloatsForThreads = 16384;
// Elements handed to a thread at a time by the flat operations.
constexpr int64_t kFlatChunk = 4096;

class CpuTable : public PreparedTable {
 public:
  explicit CpuTable(const Matrix& matrix) : matrix(matrix) {}
  Matrix matrix;
};

class CpuTransform : public PreparedTransform {
 public:
  explicit CpuTransform(const Transform& transform) {
    if (transform.kind == Transform::Kind::kDense) {
      prepare_dense(transform.matrix);
    } else {
      fast = FastTransform(transform);
    }
  }
  FastTransform fast;                         // Hadamard
  std::unique_ptr<CpuLinear> dense, inverse;  // dense: x -> x M, x -> x M^T

 private:
  // A linear computes x W^T: W = M for the inverse, where M is, and a copy of M^T.
  void prepare_dense(const Matrix& matrix) {
    TQ_CHECK(matrix.rows == matrix.cols && !matrix.packed());
    Linear linear;
    linear.weight = matrix;
    inverse = std::make_unique<CpuLinear>(linear, 1);
    const int64_t n = matrix.rows, bytes = matrix.row_bytes() / n;  // of an element
    transposed_ = AlignedBuffer(matrix.data_bytes());
    std::byte* to = transposed_.as<std::byte>();
    constexpr int64_t kTile = 16;  // a cache line of f32 either way
    for (int64_t row = 0; row < n; row += kTile) {
      for (int64_t col = 0; col < n; col += kTile) {
        for (int64_t i = row; i < std::min(row + kTile, n); ++i) {
          for (int64_t j = col; j < std::min(col + kTile, n); ++j) {
            std::memcpy(to + (j * n + i) * bytes, matrix.data + (i * n + j) * bytes,
                        static_cast<size_t>(bytes));
          }
        }
      }
    }
    linear.weight.data = to;
    dense = std::make_unique<CpuLinear>(linear, 1);
  }
  AlignedBuffer transposed_;
};

template <typename To, typename From>
To& cast(From& object) {
  auto* own = dynamic_cast<std::remove_reference_t<To>*>(&object);
  TQ_CHECK(own != nullptr, "prepared by another backend");
  return *own;
}

void check_size(const CpuBuffer& buffer, int64_t n_floats) {
  TQ_CHECK(n_floats >= 0 && n_floats <= buffer.size(), "buffer too small");
}

}  // namespace

CpuBackend::CpuBackend(int n_threads, CpuIsa isa)
    : n_threads_(n_threads > 0 ? n_threads : available_processors()), kernels_(kernels_for(isa)) {
  if (!isa_supported(isa)) {
    throw Error(ErrorKind::kUsage, "instruction set not available", isa_name(isa),
                "this processor does not have it");
  }
}

std::string CpuBackend::name() const {
  return std::string("cpu (") + isa_name(kernels_.isa) + ", " + std::to_string(n_threads_) +
         (n_threads_ == 1 ? " thread)" : " threads)");
}

int CpuBackend::threads_for(int64_t n_floats) const {
  return n_floats < kFloatsForThreads ? 1 : n_threads_;
}

template <typename Body>
void CpuBackend::for_rows(int64_t rows, int64_t floats_each, const Body& body) const {
  const auto range = [&](int64_t begin, int64_t end, int worker) {
    for (int64_t row = begin; row < end; ++row) body(row, worker);
  };
  parallel_ranges(threads_for(rows * floats_each), rows, range);
}

BufferPtr CpuBackend::alloc(int64_t n_floats) {
  TQ_CHECK(n_floats >= 0);
  if (n_floats <= std::numeric_limits<int64_t>::max() / 8) {
    try {
      return std::make_unique<CpuBuffer>(n_floats);
    } catch (const std::bad_alloc&) {
    }
  }
  throw Error(ErrorKind::kResource, "not enough memory", "activations",
              "needs " + std::to_string(n_floats) + " floats", "use a smaller --ctx");
}

void CpuBackend::upload(DeviceBuffer& dst, std::span<const float> src) {
  CpuBuffer& buffer = as_cpu(dst);
  check_size(buffer, static_cast<int64_t>(src.size()));
  if (!src.empty()) std::memcpy(buffer.data(), src.data(), src.size_bytes());
}

void CpuBackend::download(const DeviceBuffer& src, int64_t offset, std::span<float> out) {
  const CpuBuffer& buffer = as_cpu(src);
  TQ_CHECK(offset >= 0);
  check_size(buffer, offset + static_cast<int64_t>(out.size()));
  if (!out.empty()) std::memcpy(out.data(), buffer.data() + offset, out.size_bytes());
}

void CpuBackend::top(const DeviceBuffer& src, int64_t n, int64_t count,
                     std::vector<Candidate>& out) {
  const CpuBuffer& buffer = as_cpu(src);
  check_size(buffer, n);
  top_candidates({buffer.data(), static_cast<size_t>(n)}, count, out);
}

std::unique_ptr<PreparedLinear> CpuBackend::prepare(const Linear& linear) {
  return std::make_unique<CpuLinear>(linear, n_threads_);
}

std::unique_ptr<PreparedTable> CpuBackend::prepare_table(const Matrix& table) {
  return std::make_unique<CpuTable>(table);
}

std::unique_ptr<PreparedTransform> CpuBackend::prepare_transform(const Transform& transform) {
  return std::make_unique<CpuTransform>(transform);
}

std::unique_ptr<KvCache> CpuBackend::make_kv_cache(const Config& config, int64_t ctx, int kv_bits) {
  return std::make_unique<CpuKvCache>(config, ctx, kv_bits);
}

int64_t CpuBackend::kv_bytes(const Config& config, int64_t ctx, int kv_bits) const {
  return CpuKvCache::n_bytes(config, ctx, kv_bits);
}

// Of the widest linear: its transformed f32 inputs, their codes and scales, and a few rows of
// weights a thread.
double CpuBackend::scratch_bytes(const Config& config, int64_t rows) const {
  const double widest =
      static_cast<double>(std::max({config.dim, config.q_dim(), config.hidden_dim}));
  return widest * static_cast<double>(8 * rows + 64 * n_threads_);
}

uint64_t CpuBackend::available_bytes() const {
  return available_memory();
}

void CpuBackend::embed(const PreparedTable& table, std::span<const int32_t> tokens,
                       DeviceBuffer& x) {
  const Matrix& matrix = cast<const CpuTable>(table).matrix;
  CpuBuffer& out = as_cpu(x);
  const int64_t rows = static_cast<int64_t>(tokens.size());
  check_size(out, rows * matrix.cols);
  for (int32_t token : tokens) TQ_CHECK(token >= 0 && token < matrix.rows);
  const auto expand = [&](int64_t row, int) {
    expand_row(kernels_, matrix, tokens[static_cast<size_t>(row)], out.data() + row * matrix.cols);
  };
  for_rows(rows, matrix.cols, expand);
}

void CpuBackend::rms_norm(const DeviceBuffer& x, const DeviceBuffer& gain, float eps, int64_t rows,
                          int64_t cols, DeviceBuffer& out) {
  const float *from = as_cpu(x).data(), *gains = as_cpu(gain).data();
  float* to = as_cpu(out).data();
  check_size(as_cpu(x), rows * cols);
  check_size(as_cpu(gain), cols);
  check_size(as_cpu(out), rows * cols);
  for_rows(rows, cols, [&](int64_t row, int) {
    const float factor = inverse_rms(from + row * cols, cols, eps);
    kernels_.scale_gain(from + row * cols, factor, gains, cols, to + row * cols);
  });
}

void CpuBackend::linears(std::span<const PreparedLinear* const> weights, const DeviceBuffer& x,
                         int64_t rows, std::span<DeviceBuffer* const> out) {
  TQ_CHECK(!weights.empty() && weights.size() == out.size());
  std::vector<const CpuLinear*> linears;
  std::vector<float*> outputs;
  for (size_t i = 0; i < weights.size(); ++i) {
    linears.push_back(&cast<const CpuLinear>(*weights[i]));
    CpuBuffer& buffer = as_cpu(*out[i]);
    check_size(buffer, rows * linears[i]->linear().out_dim());
    outputs.push_back(buffer.data());
  }
  check_size(as_cpu(x), rows * linears[0]->linear().in_dim());
  run_linears(kernels_, linears, as_cpu(x).data(), rows, outputs, n_threads_, linear_scratch_);
}

void CpuBackend::prepare_angles(const RopeTable& table, int64_t half, int64_t pos0, int64_t rows) {
  if (angles_.pos0 == pos0 && angles_.rows == rows && angles_.inv_freq == table.inv_freq &&
      angles_.attention_factor == table.attention_factor) {
    return;
  }
  angles_.inv_freq = table.inv_freq;
  angles_.attention_factor = table.attention_factor;
  angles_.pos0 = pos0;
  angles_.rows = rows;
  angles_.cos.resize(static_cast<size_t>(rows * half));
  angles_.sin.resize(static_cast<size_t>(rows * half));
  for_rows(rows, half * 16, [&](int64_t row, int) {
    rope_angles(pos0 + row, angles_.inv_freq.data(), half, table.attention_factor,
                angles_.cos.data() + row * half, angles_.sin.data() + row * half);
  });
}

void CpuBackend::rope(DeviceBuffer& x, int64_t rows, int64_t n_heads, int64_t head_dim,
                      int64_t pos0, const RopeTable& table) {
  const int64_t half = head_dim / 2;
  TQ_CHECK(head_dim % 2 == 0 && static_cast<int64_t>(table.inv_freq.size()) == half);
  check_size(as_cpu(x), rows * n_heads * head_dim);
  prepare_angles(table, half, pos0, rows);
  float* data = as_cpu(x).data();
  for_rows(rows, n_heads * head_dim, [&](int64_t row, int) {
    for (int64_t head = 0; head < n_heads; ++head) {
      kernels_.rope(data + (row * n_heads + head) * head_dim, angles_.cos.data() + row * half,
                    angles_.sin.data() + row * half, half);
    }
  });
}

void CpuBackend::attention(const DeviceBuffer& q, const DeviceBuffer& k, const DeviceBuffer& v,
                           const Config& config, KvCache& cache, int64_t layer, int64_t pos0,
                           int64_t rows, DeviceBuffer& out) {
  check_size(as_cpu(q), rows * config.q_dim());
  check_size(as_cpu(k), rows * config.kv_dim());
  check_size(as_cpu(v), rows * config.kv_dim());
  check_size(as_cpu(out), rows * config.q_dim());
  const AttentionCall call = {as_cpu(q).data(),
                              as_cpu(k).data(),
                              as_cpu(v).data(),
                              as_cpu(out).data(),
                              config.n_heads,
                              config.n_kv_heads,
                              config.head_dim,
                              layer,
                              pos0,
                              rows};
  attend(kernels_, cast<CpuKvCache>(cache), call, n_threads_, attention_scratch_);
}

void CpuBackend::silu_mul(DeviceBuffer& gate, const DeviceBuffer& up, int64_t count) {
  check_size(as_cpu(gate), count);
  check_size(as_cpu(up), count);
  float* data = as_cpu(gate).data();
  const float* factors = as_cpu(up).data();
  const auto multiply = [&](int64_t begin, int64_t end, int) {
    kernels_.silu_mul(data + begin, factors + begin, end - begin);
  };
  parallel_ranges(threads_for(4 * count), count, multiply, kFlatChunk);
}

void CpuBackend::add(DeviceBuffer& x, const DeviceBuffer& y, int64_t count) {
  check_size(as_cpu(x), count);
  check_size(as_cpu(y), count);
  float* data = as_cpu(x).data();
  const float* terms = as_cpu(y).data();
  const auto sum = [&](int64_t begin, int64_t end, int) {
    kernels_.add(data + begin, terms + begin, end - begin);
  };
  parallel_ranges(threads_for(count), count, sum, kFlatChunk);
}

void CpuBackend::scale_columns(DeviceBuffer& x, int64_t rows, int64_t cols,
                               const DeviceBuffer& factors) {
  float* data = as_cpu(x).data();
  const float* by = as_cpu(factors).data();
  check_size(as_cpu(x), rows * cols);
  check_size(as_cpu(factors), cols);
  for_rows(rows, cols, [&](int64_t row, int) {
    kernels_.scale_gain(data + row * cols, 1.0f, by, cols, data + row * cols);
  });
}

void CpuBackend::transform(DeviceBuffer& x, int64_t rows, const PreparedTransform& basis,
                           bool inverse) {
  const CpuTransform& prepared = cast<const CpuTransform>(basis);
  if (prepared.dense) {
    const CpuLinear* linear = inverse ? prepared.inverse.get() : prepared.dense.get();
    const size_t count = static_cast<size_t>(rows * linear->linear().in_dim());
    check_size(as_cpu(x), static_cast<int64_t>(count));
    if (transform_scratch_.size() < count * sizeof(float)) {
      transform_scratch_ = AlignedBuffer(count * sizeof(float));
    }
    float* out = transform_scratch_.as<float>();
    run_linears(kernels_, {&linear, 1}, as_cpu(x).data(), rows, {&out, 1}, n_threads_,
                linear_scratch_);
    std::memcpy(as_cpu(x).data(), out, count * sizeof(float));
    return;
  }
  const FastTransform& transform = prepared.fast;
  if (!transform.active()) return;
  const int64_t size = transform.size(), n_blocks = transform.n_blocks();
  check_size(as_cpu(x), rows * size);
  const size_t bytes = static_cast<size_t>(n_threads_ * transform.block()) * sizeof(float);
  if (transform_scratch_.size() < bytes) transform_scratch_ = AlignedBuffer(bytes);
  float* data = as_cpu(x).data();
  for_rows(rows * n_blocks, 8 * transform.block(), [&](int64_t item, int worker) {
    float* row = data + item / n_blocks * size;
    float* scratch = transform_scratch_.as<float>() + worker * transform.block();
    transform.apply_block(kernels_, row, item % n_blocks, inverse, scratch, row);
  });
}

void CpuBackend::copy_rows(const DeviceBuffer& src, int64_t first_row, int64_t rows, int64_t cols,
                           DeviceBuffer& dst) {
  check_size(as_cpu(src), (first_row + rows) * cols);
  check_size(as_cpu(dst), rows * cols);
  std::memcpy(as_cpu(dst).data(), as_cpu(src).data() + first_row * cols,
              static_cast<size_t>(rows * cols) * sizeof(float));
}

}  // namespace tq
