// executor - see executor.h.
#include "cuda/executor.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda/kv_cache.h"
#include "model/error.h"

namespace tq::cuda {
namespace {

// Blocks of 128 columns that the product of one row asks for at once: 4 of 64 by each of 8 warps.
constexpr int64_t kRowBlocks = 16;

RowsJob plain_rows(const float* x, int64_t rows, int64_t cols) {
  RowsJob job = {};
  job.x = x;
  job.n_parts = 1;
  job.rows = rows;
  job.cols = cols;
  return job;
}

void add_transform(RowsJob& job, const CudaTransform& transform, bool inverse, float* to) {
  job.signs = transform.signs();
  job.base = transform.base();
  job.block = transform.block;
  job.base_order = transform.base_order;
  job.hadamard_scale = transform.scale;
  job.inverse = inverse;
  job.transformed = to;
  job.keep_transformed = true;
}

void add_rounding(RowsJob& job, const ActQuant& act, const Gpu& gpu, Arena& arena) {
  job.bits = act.bits;
  job.clip = act.clip;
  job.act_codes = act.codes;
  RoundedRows& to = job.rounded;
  to.padded_cols = (job.cols + kBlockCols - 1) / kBlockCols * kBlockCols;
  const bool multiples = act.two_level && act.bits < 8;
  if (multiples) job.level_group = static_cast<int32_t>(std::min(act.group, job.cols));
  to.group = static_cast<int32_t>(multiples || act.group >= job.cols ? to.padded_cols : act.group);
  to.group_shift = group_shift(to.group, to.padded_cols);
  to.nibbles = act.bits <= 4 && act.codes != ActCodes::kAsymmetric && !multiples;
  // Codes times multiples fill a byte.
  to.order = code_order(job.rows, multiples ? 8 : act.bits, gpu);
  const int64_t padded_rows = (job.rows + kRowStep - 1) / kRowStep * kRowStep;
  to.n_groups = static_cast<int32_t>((to.padded_cols + to.group - 1) / to.group);
  to.codes = arena.take<uint8_t>(padded_rows * to.padded_cols);
  to.scales = arena.take<float>(padded_rows * to.n_groups);
}

// Whether one of the operations reads any of x[0, count) before another has written all of it. What
// comes after the last one reads.
bool is_read(std::span<const Op> ops, const float* x, int64_t count) {
  const auto inside = [&](const float* at) { return at >= x && at < x + count; };
  for (const Op& op : ops) {
    const bool in_place = op.kind == OpKind::kRope || op.kind == OpKind::kSiluMul ||
                          op.kind == OpKind::kAdd || op.kind == OpKind::kScaleColumns ||
                          op.kind == OpKind::kTransform;
    if (inside(op.x) || inside(op.y) || inside(op.z) || (in_place && inside(op.out))) return true;
    if (op.kind == OpKind::kRmsNorm && op.out == x && op.rows * op.cols >= count) return false;
    for (int i = 0; i < op.n_linears; ++i) {
      if (op.outs[i] == x && op.rows * op.linears[i]->out_dim() >= count) return false;
    }
  }
  return true;
}

// The linears of one operation, from their input on. Built once to count memory, once for real.
class LinearsPlan {
 public:
  /// stream: what the one output is added to, or null.
  LinearsPlan(const Op& op, const RowsJob& before, float* stream, const Gpu& gpu, Arena& arena)
      : op_(op), gpu_(gpu), arena_(arena), before_(before), stream_(stream) {}

  /// input_wanted: later operations read op.x, which may be a result of `before`; output_wanted:
  /// they read the outputs, not only the stream.
  void run(bool input_wanted, bool output_wanted) {
    output_wanted_ = output_wanted;
    const CudaTransform& transform = op_.linears[0]->transform;
    input_ = before_.normed ? before_.normed : before_.sum ? before_.sum : before_.x;
    RowsJob first = before_;
    bool pending = first.term || first.up || first.gain;  // something to launch, rounding or not
    if (transform.kind != Transform::Kind::kNone) {
      add_transform(first, transform, false, arena_.take<float>(op_.rows * op_.cols));
      input_ = first.transformed;
      first.keep_transformed = reads_input() || op_.rows <= kMatvecRows;
      pending = true;
    }
    // Half of the traffic of many rows is results that nobody reads.
    if (!input_wanted && (first.transformed || !reads_input())) {
      (first.normed ? first.normed : first.sum) = nullptr;
    }
    for (int i = 0; i < op_.n_linears; ++i) {
      const CudaLinear& linear = *op_.linears[i];
      if (!linear.rounds_input() || rounding_of(linear.act)) continue;
      RowsJob job = roundings_.empty() ? first : plain_rows(input_, op_.rows, op_.cols);
      pending = false;
      add_rounding(job, linear.act, gpu_, arena_);
      for (int j = i; j < op_.n_linears; ++j) {
        const CudaLinear& other = *op_.linears[j];
        const bool dense = !is_integer(*other.weight);
        if (other.act == linear.act && dense) job.expanded = expanded(job.expanded);
      }
      Rounding rounding = {linear.act, job.rounded, job.expanded, {}};
      if (!reads_input() && matvec_rounds(job)) {
        rounding.before = job;
      } else if (launching()) {
        launch_rows(job, gpu_);
      }
      roundings_.push_back(rounding);
    }
    if (pending && launching()) launch_rows(first, gpu_);
    for (const Rounding& rounding : roundings_) run_packed(rounding);
    run_dense();
    for (int i = 0; i < op_.n_linears; ++i) run_general(i);
    if (stream_ && !all_fragments(*op_.linears[0]) && launching()) {
      launch_add(stream_, op_.outs[0], op_.rows * op_.linears[0]->out_dim(), gpu_);
    }
  }

 private:
  struct Rounding {
    ActQuant act;
    RoundedRows rows;
    float* expanded;
    RowsJob before;  // bits below 16: products make `rows` themselves
  };
  // Whether anything but one rounding reads the input in f32.
  bool reads_input() const {
    for (int i = 0; i < op_.n_linears; ++i) {
      const CudaLinear& linear = *op_.linears[i];
      if (!all_fragments(linear) || linear.act != op_.linears[0]->act) return true;
    }
    return false;
  }
  bool launching() const { return !arena_.counting(); }
  static bool is_integer(const CudaMatrix& matrix) {
    return matrix.has_fragments() || matrix.canonical().storage == Storage::kQ4 ||
           matrix.canonical().storage == Storage::kQ8;
  }
  float* expanded(float* known) { return known ? known : arena_.take<float>(op_.rows * op_.cols); }
  const Rounding* rounding_of(const ActQuant& act) const {
    for (const Rounding& known : roundings_) {
      if (known.act == act) return &known;
    }
    return nullptr;
  }
  // Both components in the order of the tensor-core kernels.
  static bool all_fragments(const CudaLinear& linear) {
    return linear.rounds_input() && linear.weight->has_fragments() &&
           (!linear.branch_a ||
            (linear.branch_a->has_fragments() && linear.branch_b->has_fragments()));
  }
  static bool takes(const CudaLinear& linear, const Rounding& rounding) {
    return all_fragments(linear) && linear.act == rounding.act;
  }
  void launch(const PackedJob& job) const {
    if (launching() && job.n_segments > 0) launch_packed(job, gpu_);
  }

  // All linears of one rounding that the tensor-core kernels take: first every x' A^T, then all.
  void run_packed(const Rounding& rounding) {
    PackedJob down = {}, main = {};
    down.x = main.x = rounding.rows;
    down.before = main.before = rounding.before;
    down.rows = main.rows = op_.rows;
    for (int i = 0; i < op_.n_linears; ++i) {
      const CudaLinear& linear = *op_.linears[i];
      if (!takes(linear, rounding)) continue;
      PackedSegment& segment = main.segments[main.n_segments++];
      segment.w = linear.weight->fragments();
      segment.y = stream_ && !output_wanted_ ? nullptr : op_.outs[i];
      segment.stream = stream_;
      if (!linear.branch_a) continue;
      PackedSegment& factor = down.segments[down.n_segments++];
      factor.w = linear.branch_a->fragments();
      factor.narrow = plain_rows(nullptr, op_.rows, linear.rank());
      add_rounding(factor.narrow, linear.branch_act, gpu_, arena_);
      segment.b = linear.branch_b->fragments();
      segment.h = factor.narrow.rounded;
    }
    if (takes_down_two_level(down, gpu_)) {
      if (launching()) launch_down_two_level(down, gpu_);
    } else if (down.n_segments > 0) {
      run_down(down, main);
    }
    launch(main);
  }

  // Every x' A^T in parts, which are added when h is rounded: by the product if it can.
  void run_down(const PackedJob& down, PackedJob& main) {
    PackedJob parts = down;
    parts.n_segments = 0;
    std::vector<RowsJob> narrow;
    int which = 0;
    for (int i = 0; i < main.n_segments; ++i) {
      if (main.segments[i].b.n_panels == 0) continue;
      const FragmentView& a = down.segments[which].w;
      RowsJob job = down.segments[which++].narrow;
      const std::vector<int32_t> cuts =
          column_parts(a.padded_cols / kBlockCols, kMaxLinears / down.n_segments, op_.rows);
      job.n_parts = std::ssize(cuts) - 1;
      float* h = arena_.take<float>(job.n_parts * op_.rows * job.cols);
      job.x = h;
      for (int64_t part = 0; part < job.n_parts; ++part) {
        PackedSegment& factor = parts.segments[parts.n_segments++];
        factor = {};
        factor.w = a;
        factor.y = h + part * op_.rows * job.cols;
        const size_t at = static_cast<size_t>(part);
        factor.first_block = cuts[at];
        factor.n_blocks = cuts[at + 1] - cuts[at];
      }
      if (matvec_rounds_narrow(job)) {
        main.segments[i].narrow = job;
      } else {
        narrow.push_back(job);
      }
    }
    launch(parts);
    if (op_.rows == 1 && narrow.empty()) {
      for (int i = 0; i < parts.n_segments; ++i) {
        main.blocks_ahead += static_cast<int32_t>(parts.segments[i].w.n_panels);
      }
    }
    for (const RowsJob& job : narrow) {
      if (launching()) launch_rows(job, gpu_);
    }
  }

  // One product with any matrix. `rounded` null: the input is f32.
  void product(const CudaMatrix& matrix, const RoundedRows* rounded, const float* x, float* y,
               bool accumulate) {
    if (!launching()) return;
    if (matrix.has_fragments()) {
      PackedJob job = {};
      job.x = *rounded;
      job.rows = op_.rows;
      job.n_segments = 1;
      job.segments[0].w = matrix.fragments();
      job.segments[0].y = y;
      job.segments[0].accumulate = accumulate;
      launch(job);
    } else if (rounded && is_integer(matrix)) {
      launch_packed_simple({matrix.canonical(), *rounded, y, op_.rows, accumulate}, gpu_);
    } else {
      launch_dense({x, op_.rows, accumulate, 1, {{matrix.canonical(), y}}}, gpu_);
    }
  }

  const Rounding* rounding_of(const CudaLinear& linear) const {
    return linear.rounds_input() ? rounding_of(linear.act) : nullptr;
  }
  // Whether the weight meets f32 inputs, rounded or not.
  bool meets_f32(const CudaLinear& linear) const {
    return !all_fragments(linear) && (!linear.rounds_input() || !is_integer(*linear.weight));
  }

  // The products in f32: those that share input and storage in one launch.
  void run_dense() {
    std::vector<bool> done(static_cast<size_t>(op_.n_linears));
    for (int i = 0; i < op_.n_linears; ++i) {
      DenseJob job = {nullptr, op_.rows, false, 0, {}};
      for (int j = i; j < op_.n_linears; ++j) {
        const CudaLinear& linear = *op_.linears[j];
        const size_t at = static_cast<size_t>(j);
        if (done[at] || !meets_f32(linear)) continue;
        const Rounding* rounding = rounding_of(linear);
        const float* x = rounding ? rounding->expanded : input_;
        const CanonicalView& w = linear.weight->canonical();
        if (job.n_segments > 0 && (x != job.x || w.storage != job.segments[0].w.storage)) continue;
        job.x = x;
        job.segments[job.n_segments++] = {w, op_.outs[j]};
        done[at] = true;
      }
      if (job.n_segments > 0 && launching()) launch_dense(job, gpu_);
    }
  }

  // What is left of a linear that run_packed() does not take, one product after the other.
  void run_general(int i) {
    const CudaLinear& linear = *op_.linears[i];
    if (all_fragments(linear)) return;
    const Rounding* rounding = rounding_of(linear);
    if (!meets_f32(linear)) product(*linear.weight, &rounding->rows, nullptr, op_.outs[i], false);
    if (!linear.branch_a) return;
    float* h = arena_.take<float>(op_.rows * linear.rank());
    // Packed factors read the rounded x and round x A^T, dense ones neither.
    const bool packed_a = rounding && is_integer(*linear.branch_a);
    product(*linear.branch_a, packed_a ? &rounding->rows : nullptr, input_, h, false);
    if (rounding && is_integer(*linear.branch_b)) {
      RowsJob job = plain_rows(h, op_.rows, linear.rank());
      add_rounding(job, linear.branch_act, gpu_, arena_);
      if (launching()) launch_rows(job, gpu_);
      product(*linear.branch_b, &job.rounded, nullptr, op_.outs[i], true);
    } else {
      product(*linear.branch_b, nullptr, h, op_.outs[i], true);
    }
  }

  const Op& op_;
  const Gpu& gpu_;
  Arena& arena_;
  const RowsJob& before_;
  float* stream_;
  bool output_wanted_ = true;
  const float* input_ = nullptr;  // f32, transformed if there is a transform
  std::vector<Rounding> roundings_;
};

}  // namespace

CodeOrder code_order(int64_t rows, int bits, const Gpu& gpu) {
  if (rows <= kMatvecRows) return CodeOrder::kLanes;
  return gpu.facts.major == 9 && bits <= 4 ? CodeOrder::kTilesFp8 : CodeOrder::kTiles;
}

std::vector<int32_t> column_parts(int64_t n_blocks, int64_t most, int64_t rows) {
  const int64_t unit = rows == 1 ? kRowBlocks : 1, n_units = (n_blocks + unit - 1) / unit;
  const int64_t n_parts = std::min(most, n_units);
  std::vector<int32_t> cuts;
  for (int64_t i = 0; i <= n_parts; ++i) {
    cuts.push_back(static_cast<int32_t>(std::min(i * n_units / n_parts * unit, n_blocks)));
  }
  return cuts;
}

int smallest_group_shift(const PackedJob& job) {
  int shift = job.x.group_shift;
  for (int i = 0; i < job.n_segments; ++i) {
    const PackedSegment& segment = job.segments[i];
    shift = std::min(shift, segment.w.group_shift);
    if (segment.b.n_panels == 0) continue;
    shift = std::min({shift, segment.b.group_shift, segment.h.group_shift});
  }
  return shift;
}

void launch_packed(const PackedJob& job, const Gpu& gpu) {
  if (job.x.order == CodeOrder::kLanes) return launch_packed_matvec(job, gpu);
  if (takes_two_level(job, gpu)) return launch_twin_gemm_two_level(job, gpu);
  gpu.facts.major == 9 ? launch_twin_gemm(job, gpu) : launch_packed_gemm(job, gpu);
}

bool Executor::reserve(std::span<const Op> ops, int64_t max_keys) {
  counted_ = 0;
  max_keys_ = max_keys;
  for (size_t i = 0; i < ops.size();) i += run(ops.subspan(i), Arena(nullptr));
  if (counted_ <= memory_.size()) return false;
  cuda_check(cudaStreamSynchronize(gpu_.stream), "waiting for the GPU");
  memory_ = DeviceMemory();
  memory_ = DeviceMemory(counted_, "working memory");
  return true;
}

void Executor::launch(std::span<const Op> ops, const StepInput* input, int64_t max_keys) {
  input_ = input;
  max_keys_ = max_keys;
  if (counters_.size() == 0) counters_ = DeviceMemory(kAttentionCounters * 4, "working memory");
  // Something to point at, also where nothing is needed: null means counting.
  if (memory_.size() == 0) memory_ = DeviceMemory(256, "working memory");
  for (size_t i = 0; i < ops.size();) i += run(ops.subspan(i), Arena(memory_.as<uint8_t>()));
}

size_t Executor::run(std::span<const Op> ops, Arena arena) {
  const bool launching = !arena.counting();
  const Op& op = ops[0];
  size_t done = run_heads(ops, arena);  // first: a norm may be one of heads
  if (done == 0) done = run_rows(ops, arena);
  if (done == 0) {
    done = 1;
    switch (op.kind) {
      case OpKind::kEmbed: {
        const auto* table = static_cast<const CudaTable*>(op.object);
        if (launching) {
          launch_embed(table->matrix.canonical(), input_, op.rows, op.out, gpu_);
        }
        break;
      }
      case OpKind::kSiluMul:
        if (launching) launch_silu_mul(op.out, op.y, op.cols, gpu_);
        break;
      case OpKind::kAdd:
        if (launching) launch_add(op.out, op.y, op.cols, gpu_);
        break;
      case OpKind::kScaleColumns:
        if (launching) launch_scale_columns(op.out, op.y, op.rows, op.cols, gpu_);
        break;
      case OpKind::kCopyRows:
        if (launching) launch_copy(op.x, op.out, op.rows * op.cols, gpu_);
        break;
      case OpKind::kTransform:
        run_transform(op, arena);
        break;
      case OpKind::kTop: {
        uint64_t* scratch = arena.take<uint64_t>(top_scratch(op.cols, op.rows));
        uint64_t* keys = reinterpret_cast<uint64_t*>(op.out);
        if (launching) launch_top({op.x, op.cols, op.rows, keys, scratch}, gpu_);
        break;
      }
      default:
        TQ_CHECK(false, "an operation without a kernel");
    }
  }
  counted_ = std::max(counted_, arena.used());
  return done;
}

size_t Executor::run_rows(std::span<const Op> ops, Arena& arena) {
  size_t i = 0;
  RowsJob job = {};
  if (ops[0].kind == OpKind::kAdd && ops.size() > 1 && ops[1].kind == OpKind::kRmsNorm &&
      ops[1].x == ops[0].out && ops[1].rows * ops[1].cols == ops[0].cols) {
    job = plain_rows(ops[0].out, ops[1].rows, ops[1].cols);
    job.term = ops[0].y;
    job.sum = ops[0].out;
    i = 1;
  }
  if (ops[i].kind == OpKind::kRmsNorm) {
    if (i == 0) job = plain_rows(ops[i].x, ops[i].rows, ops[i].cols);
    job.gain = ops[i].y;
    job.eps = ops[i].eps;
    job.normed = ops[i].out;
    ++i;
  } else if (ops[0].kind == OpKind::kSiluMul && ops.size() > 1 && ops[1].kind == OpKind::kLinears &&
             ops[1].x == ops[0].out && ops[1].rows * ops[1].cols == ops[0].cols) {
    job = plain_rows(ops[0].out, ops[1].rows, ops[1].cols);
    job.up = ops[0].y;
    job.sum = ops[0].out;
    i = 1;
  } else if (ops[0].kind == OpKind::kLinears) {
    job = plain_rows(ops[0].x, ops[0].rows, ops[0].cols);
  } else {
    return 0;
  }
  const float* ready = job.normed ? job.normed : job.sum ? job.sum : job.x;
  if (i < ops.size() && ops[i].kind == OpKind::kLinears && ops[i].x == ready &&
      ops[i].rows == job.rows && ops[i].cols == job.cols) {
    float* stream = nullptr;
    size_t done = i + 1;
    if (done < ops.size() && ops[done].kind == OpKind::kAdd && ops[i].n_linears == 1 &&
        ops[done].y == ops[i].outs[0] &&
        ops[done].cols == ops[i].rows * ops[i].linears[0]->out_dim()) {
      stream = ops[done++].out;
    }
    const std::span<const Op> later = ops.subspan(done);
    const bool output_wanted =
        !stream || is_read(later, ops[i].outs[0], ops[i].rows * ops[i].linears[0]->out_dim());
    LinearsPlan(ops[i], job, stream, gpu_, arena)
        .run(is_read(later, ready, job.rows * job.cols), output_wanted);
    return done;
  }
  if (!arena.counting()) launch_rows(job, gpu_);
  return i;
}

size_t Executor::run_heads(std::span<const Op> ops, Arena& arena) {
  size_t end = 0;
  while (end < ops.size() && ops[end].kind != OpKind::kAttention) {
    const OpKind kind = ops[end].kind;
    if (kind != OpKind::kRmsNorm && kind != OpKind::kRope && kind != OpKind::kTransform) break;
    ++end;
  }
  if (ops[0].kind == OpKind::kRope && (end == ops.size() || ops[end].kind != OpKind::kAttention)) {
    end = 0;  // alone
  }
  HeadsJob job = {};
  job.input = input_;
  if (ops[0].kind == OpKind::kRope && end == 0) {
    const Op& op = ops[0];
    job.rows = op.rows;
    job.head_dim = op.head_dim;
    job.n_heads = op.n_heads;
    job.q = op.out;
    job.angles = static_cast<const RopeAngles*>(op.object)->memory.as<float2>();
    if (!arena.counting()) launch_heads(job, gpu_);
    return 1;
  }
  if (end == ops.size() || ops[end].kind != OpKind::kAttention) return 0;
  const Op& attention = ops[end];
  job.rows = attention.rows;
  job.head_dim = attention.head_dim;
  job.n_heads = attention.n_heads;
  job.n_kv_heads = attention.n_kv_heads;
  job.q = const_cast<float*>(attention.x);
  job.k = const_cast<float*>(attention.y);
  job.v = attention.z;
  job.store = true;
  job.cache = static_cast<const CudaKvCache*>(attention.object)->view(attention.layer);
  // In the order norm, rotation, Hadamard, for q and k alike, or not at all.
  const CudaTransform* basis = nullptr;
  int stage[2] = {0, 0};
  bool turned[2] = {false, false}, based[2] = {false, false};
  for (size_t i = 0; i < end; ++i) {
    const Op& op = ops[i];
    const bool is_q = op.out == job.q;
    if (!is_q && op.out != job.k) return 0;
    const int64_t n_vectors = job.rows * (is_q ? job.n_heads : job.n_kv_heads);
    const int kind = op.kind == OpKind::kRmsNorm ? 1 : op.kind == OpKind::kRope ? 2 : 3;
    if (stage[is_q] >= kind) return 0;
    stage[is_q] = kind;
    if (kind == 1) {
      if (op.x != op.out || op.cols != job.head_dim || op.rows != n_vectors) return 0;
      if ((job.q_gain || job.k_gain) && job.eps != op.eps) return 0;
      (is_q ? job.q_gain : job.k_gain) = op.y;
      job.eps = op.eps;
    } else if (kind == 2) {
      if (op.rows * op.n_heads != n_vectors || op.head_dim != job.head_dim) return 0;
      job.angles = static_cast<const RopeAngles*>(op.object)->memory.as<float2>();
      turned[is_q] = true;
    } else {
      basis = static_cast<const CudaTransform*>(op.object);
      if (op.rows != n_vectors || op.inverse || basis->kind != Transform::Kind::kHadamard ||
          basis->signs() || basis->size != job.head_dim) {
        return 0;
      }
      based[is_q] = true;
    }
  }
  if (turned[0] != turned[1] || based[0] != based[1]) return 0;
  if (basis) {
    job.block = basis->block;
    job.base_order = basis->base_order;
    job.base = basis->base();
    job.hadamard_scale = basis->scale;
  }
  const std::span<const Op> later = ops.subspan(end + 1);
  const int64_t n_vectors = job.rows * job.head_dim;
  const bool wanted = is_read(later, job.q, n_vectors * job.n_heads) ||
                      is_read(later, job.k, n_vectors * job.n_kv_heads);
  run_attention(attention, job, wanted, arena);
  return end + 1;
}

void Executor::run_attention(const Op& op, const HeadsJob& heads, bool heads_wanted, Arena& arena) {
  AttentionJob job = {};
  job.heads_wanted = heads_wanted;
  if (attention_takes_heads(heads)) {
    job.heads = heads;
  } else if (!arena.counting()) {
    launch_heads(heads, gpu_);
  }
  job.cache = static_cast<const CudaKvCache*>(op.object)->view(op.layer);
  job.q = op.x;
  job.out = op.out;
  job.rows = op.rows;
  job.n_heads = op.n_heads;
  job.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(op.head_dim)));
  job.input = input_;
  if (attention_prefill_takes(job.cache, op.rows)) {
    if (!arena.counting()) launch_attention_prefill(job, gpu_);
    return;
  }
  job.n_splits = attention_splits(job.cache, op.rows, max_keys_, gpu_);
  job.partials =
      arena.take<float>(attention_partials(op.rows, op.n_heads, op.head_dim, job.n_splits));
  job.counters = counters_.as<int32_t>();
  if (!arena.counting()) launch_attention_decode(job, gpu_);
}

void Executor::run_transform(const Op& op, Arena& arena) {
  const auto& transform = *static_cast<const CudaTransform*>(op.object);
  if (transform.kind == Transform::Kind::kNone) return;
  if (transform.kind == Transform::Kind::kDense) {
    float* copy = arena.take<float>(op.rows * op.cols);
    if (arena.counting()) return;
    const auto& matrix = op.inverse ? transform.inverse_matrix : transform.forward_matrix;
    launch_copy(op.out, copy, op.rows * op.cols, gpu_);
    launch_dense({copy, op.rows, false, 1, {{matrix->canonical(), op.out}}}, gpu_);
    return;
  }
  RowsJob job = plain_rows(op.out, op.rows, op.cols);
  add_transform(job, transform, op.inverse != 0, op.out);
  if (!arena.counting()) launch_rows(job, gpu_);
}

}  // namespace tq::cuda
