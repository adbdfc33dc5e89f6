// cuda_backend - see cuda_backend.h. Every operation is checked and recorded here, nothing is
// launched: that is queue.cpp (when) and executor.cpp (what).
#include "cuda/cuda_backend.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "cuda/kv_cache.h"
#include "cuda/queue.h"
#include "model/error.h"

namespace tq {
namespace cuda {
namespace {

// Rope angles are computed for at least this many positions.
constexpr int64_t kFirstPositions = 4096;
constexpr int64_t kDownloadBytes = 4 << 20;

class CudaBuffer : public DeviceBuffer {
 public:
  CudaBuffer(int64_t n_floats, std::shared_ptr<Queue> queue)
      : memory_(n_floats * 4, "activations"), size_(n_floats), lifetime_(std::move(queue)) {}
  float* data() const { return memory_.as<float>(); }
  int64_t size() const { return size_; }  // floats

 private:
  DeviceMemory memory_;
  int64_t size_;
  Lifetime lifetime_;
};

// A prepared thing that tells the queue when it goes.
template <typename Base>
class Tracked : public Base {
 public:
  template <typename Source>
  Tracked(const Source& source, const std::shared_ptr<Queue>& queue)
      : Base(source, queue->uploader(), queue->gpu()), lifetime_(queue) {}

 private:
  Lifetime lifetime_;
};

template <typename To, typename From>
To& cast(From& object) {
  auto* own = dynamic_cast<std::remove_reference_t<To>*>(&object);
  TQ_CHECK(own != nullptr, "prepared by another backend");
  return *own;
}

float* data_of(const DeviceBuffer& buffer, int64_t n_floats) {
  const CudaBuffer& own = cast<const CudaBuffer>(buffer);
  TQ_CHECK(n_floats >= 0 && n_floats <= own.size(), "buffer too small");
  return own.data();
}

Op make_op(OpKind kind, int64_t rows, int64_t cols) {
  Op op = {};
  op.kind = kind;
  op.rows = rows;
  op.cols = cols;
  return op;
}

// What a key of TopJob stands for.
Candidate candidate_of(uint64_t key) {
  const uint32_t order = static_cast<uint32_t>(key >> 32);
  const uint32_t bits = order >> 31 ? order ^ 0x80000000u : ~order;
  return {std::bit_cast<float>(bits), static_cast<int32_t>(~static_cast<uint32_t>(key))};
}

class CudaBackend : public Backend {
 public:
  CudaBackend(int index, bool portable) : queue_(std::make_shared<Queue>(index, portable)) {}

  std::string name() const override {
    const DeviceFacts& facts = queue_->gpu().facts;
    return "cuda (" + facts.name + ", sm_" + std::to_string(facts.major) +
           std::to_string(facts.minor) + ")";
  }

  int64_t step_rows() const override { return 2048; }

  BufferPtr alloc(int64_t n_floats) override {
    TQ_CHECK(n_floats >= 0);
    if (n_floats > std::numeric_limits<int64_t>::max() / 8) {
      throw Error(ErrorKind::kResource, "not enough GPU memory", "activations",
                  "needs " + std::to_string(n_floats) + " floats", "use a smaller --ctx");
    }
    return std::make_unique<CudaBuffer>(n_floats, queue_);
  }

  void upload(DeviceBuffer& dst, std::span<const float> src) override {
    float* to = data_of(dst, static_cast<int64_t>(src.size()));
    queue_->flush();
    queue_->uploader().copy(to, src.data(), static_cast<int64_t>(src.size_bytes()));
  }

  void download(const DeviceBuffer& src, int64_t offset, std::span<float> out) override {
    TQ_CHECK(offset >= 0);
    const float* from = data_of(src, offset + static_cast<int64_t>(out.size())) + offset;
    queue_->flush();
    if (download_.size() == 0) download_ = PinnedMemory(kDownloadBytes);
    for (size_t begin = 0; begin < out.size(); begin += kDownloadBytes / 4) {
      const size_t bytes = 4 * std::min<size_t>(kDownloadBytes / 4, out.size() - begin);
      cuda_check(cudaMemcpyAsync(download_.as<void>(), from + begin, bytes, cudaMemcpyDeviceToHost,
                                 queue_->gpu().stream),
                 "downloading");
      queue_->wait();
      std::memcpy(out.data() + begin, download_.as<void>(), bytes);
    }
  }

  void top(const DeviceBuffer& src, int64_t n, int64_t count,
           std::vector<Candidate>& out) override {
    const float* from = data_of(src, n);
    if (count == 0 || count > std::min(n, kMaxTop)) {
      std::vector<float> all(static_cast<size_t>(n));
      download(src, 0, all);
      return top_candidates(all, count, out);
    }
    if (top_.size() == 0) {
      top_ = DeviceMemory(kMaxTop * 8, "candidates");
      pinned_top_ = PinnedMemory(kMaxTop * 8);
    }
    Op op = make_op(OpKind::kTop, count, n);
    op.x = from;
    op.out = top_.as<float>();
    queue_->record(op);
    queue_->flush();
    cuda_check(
        cudaMemcpyAsync(pinned_top_.as<void>(), top_.as<void>(), static_cast<size_t>(count * 8),
                        cudaMemcpyDeviceToHost, queue_->gpu().stream),
        "downloading");
    queue_->wait();
    out.clear();
    for (int64_t i = 0; i < count; ++i) out.push_back(candidate_of(pinned_top_.as<uint64_t>()[i]));
  }

  std::unique_ptr<PreparedLinear> prepare(const Linear& linear) override {
    return std::make_unique<Tracked<CudaLinear>>(linear, queue_);
  }
  std::unique_ptr<PreparedTable> prepare_table(const Matrix& table) override {
    return std::make_unique<Tracked<CudaTable>>(table, queue_);
  }
  std::unique_ptr<PreparedTransform> prepare_transform(const Transform& transform) override {
    return std::make_unique<Tracked<CudaTransform>>(transform, queue_);
  }
  std::unique_ptr<KvCache> make_kv_cache(const Config& config, int64_t ctx, int kv_bits) override {
    return std::make_unique<CudaKvCache>(config, ctx, kv_bits, queue_);
  }
  int64_t kv_bytes(const Config& config, int64_t ctx, int kv_bits) const override {
    return CudaKvCache::n_bytes(config, ctx, kv_bits);
  }

  void embed(const PreparedTable& table, std::span<const int32_t> tokens,
             DeviceBuffer& x) override {
    const CudaTable& own = cast<const CudaTable>(table);
    const CanonicalView& matrix = own.matrix.canonical();
    for (int32_t token : tokens) TQ_CHECK(token >= 0 && token < matrix.rows);
    Op op = make_op(OpKind::kEmbed, static_cast<int64_t>(tokens.size()), matrix.cols);
    op.object = &own;
    op.out = data_of(x, op.rows * op.cols);
    if (op.rows > 0) queue_->record_tokens(op, tokens);
  }

  void rms_norm(const DeviceBuffer& x, const DeviceBuffer& gain, float eps, int64_t rows,
                int64_t cols, DeviceBuffer& out) override {
    Op op = make_op(OpKind::kRmsNorm, rows, cols);
    op.x = data_of(x, rows * cols);
    op.y = data_of(gain, cols);
    op.out = data_of(out, rows * cols);
    op.eps = eps;
    if (rows > 0) queue_->record(op);
  }

  void linears(std::span<const PreparedLinear* const> weights, const DeviceBuffer& x, int64_t rows,
               std::span<DeviceBuffer* const> out) override {
    TQ_CHECK(!weights.empty() && weights.size() == out.size());
    TQ_CHECK(weights.size() <= kMaxLinears);
    const CudaLinear& first = cast<const CudaLinear>(*weights[0]);
    Op op = make_op(OpKind::kLinears, rows, first.in_dim());
    op.n_linears = static_cast<int32_t>(weights.size());
    op.x = data_of(x, rows * op.cols);
    for (size_t i = 0; i < weights.size(); ++i) {
      const CudaLinear& linear = cast<const CudaLinear>(*weights[i]);
      TQ_CHECK(linear.in_dim() == op.cols && linear.transform.same_as(first.transform));
      op.linears[i] = &linear;
      op.outs[i] = data_of(*out[i], rows * linear.out_dim());
    }
    if (rows > 0) queue_->record(op);
  }

  void rope(DeviceBuffer& x, int64_t rows, int64_t n_heads, int64_t head_dim, int64_t pos0,
            const RopeTable& table) override {
    TQ_CHECK(head_dim % 2 == 0 && static_cast<int64_t>(table.inv_freq.size()) == head_dim / 2);
    prepare_angles(table, pos0 + rows);
    Op op = make_op(OpKind::kRope, rows, n_heads * head_dim);
    op.out = data_of(x, rows * op.cols);
    op.n_heads = n_heads;
    op.head_dim = head_dim;
    op.object = &angles_;
    if (rows > 0) queue_->record_at(op, pos0, rows);
  }

  void attention(const DeviceBuffer& q, const DeviceBuffer& k, const DeviceBuffer& v,
                 const Config& config, KvCache& cache, int64_t layer, int64_t pos0, int64_t rows,
                 DeviceBuffer& out) override {
    CudaKvCache& own = cast<CudaKvCache>(cache);
    TQ_CHECK(pos0 >= 0 && pos0 + rows <= own.view(layer).ctx);
    Op op = make_op(OpKind::kAttention, rows, config.q_dim());
    op.x = data_of(q, rows * config.q_dim());
    op.y = data_of(k, rows * config.kv_dim());
    op.z = data_of(v, rows * config.kv_dim());
    op.out = data_of(out, rows * config.q_dim());
    op.object = &own;
    op.n_heads = config.n_heads;
    op.n_kv_heads = config.n_kv_heads;
    op.head_dim = config.head_dim;
    op.layer = layer;
    if (rows > 0) queue_->record_at(op, pos0, rows);
  }

  void silu_mul(DeviceBuffer& gate, const DeviceBuffer& up, int64_t count) override {
    record_flat(OpKind::kSiluMul, gate, up, count);
  }
  void add(DeviceBuffer& x, const DeviceBuffer& y, int64_t count) override {
    record_flat(OpKind::kAdd, x, y, count);
  }

  void scale_columns(DeviceBuffer& x, int64_t rows, int64_t cols,
                     const DeviceBuffer& factors) override {
    Op op = make_op(OpKind::kScaleColumns, rows, cols);
    op.out = data_of(x, rows * cols);
    op.y = data_of(factors, cols);
    if (rows > 0) queue_->record(op);
  }

  void transform(DeviceBuffer& x, int64_t rows, const PreparedTransform& basis,
                 bool inverse) override {
    const CudaTransform& own = cast<const CudaTransform>(basis);
    Op op = make_op(OpKind::kTransform, rows, own.size);
    op.out = data_of(x, rows * op.cols);
    op.object = &own;
    op.inverse = inverse;
    if (rows > 0 && own.kind != Transform::Kind::kNone) queue_->record(op);
  }

  void copy_rows(const DeviceBuffer& src, int64_t first_row, int64_t rows, int64_t cols,
                 DeviceBuffer& dst) override {
    Op op = make_op(OpKind::kCopyRows, rows, cols);
    op.x = data_of(src, (first_row + rows) * cols) + first_row * cols;
    op.out = data_of(dst, rows * cols);
    if (rows > 0) queue_->record(op);
  }

  // A decode step is launched with the head behind it, at the download: one graph. Of a long one
  // the GPU may as well begin.
  void begin_step(int64_t rows) override { step_rows_ = rows; }
  void end_step() override {
    if (step_rows_ > kMatvecRows) queue_->flush();
  }
  void synchronize() override { queue_->wait(); }

 private:
  void record_flat(OpKind kind, DeviceBuffer& x, const DeviceBuffer& y, int64_t count) {
    Op op = make_op(kind, 1, count);
    op.out = data_of(x, count);
    op.y = data_of(y, count);
    if (count > 0) queue_->record(op);
  }

  void prepare_angles(const RopeTable& table, int64_t n_positions) {
    const bool known = table.inv_freq == angles_.table.inv_freq &&
                       table.attention_factor == angles_.table.attention_factor;
    if (known && n_positions <= angles_.n_positions) return;
    queue_->wait();
    queue_->forget();
    angles_.table = table;
    angles_.n_positions =
        std::max({kFirstPositions, n_positions, known ? 2 * angles_.n_positions : 0});
    const int64_t half = static_cast<int64_t>(table.inv_freq.size());
    angles_.memory = DeviceMemory(angles_.n_positions * half * 8, "rope angles");
    DeviceMemory frequencies(half * 4, "rope angles");
    queue_->uploader().copy(frequencies.as<void>(), table.inv_freq.data(), half * 4);
    launch_rope_angles(frequencies.as<float>(), half, table.attention_factor, angles_.n_positions,
                       angles_.memory.as<float2>(), queue_->gpu());
    queue_->wait();
  }

  std::shared_ptr<Queue> queue_;
  RopeAngles angles_;
  PinnedMemory download_, pinned_top_;
  DeviceMemory top_;  // keys of TopJob
  int64_t step_rows_ = 0;
};

}  // namespace
}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(int index, bool portable) {
  return std::make_unique<cuda::CudaBackend>(index, portable);
}

double cuda_read_bandwidth(int index) {
  cuda::Gpu gpu;
  gpu.facts = cuda::open_device(index);
  cuda::cuda_check(cudaStreamCreate(&gpu.stream), "creating a stream");
  const double best = cuda::measure_read_bandwidth(gpu);
  cudaStreamDestroy(gpu.stream);
  return best;
}

bool cuda_usable(std::string& why, int index) {
  try {
    cuda::open_device(index);
    return true;
  } catch (const Error& error) {
    why = error.what();
    return false;
  }
}

}  // namespace tq
