// attention - the plain span kernel and the division of work. See attention.h.
//
// span - out = sum_j exp(q.k_j - max) v_j over the keys j of one span, with max and sum
// Shapes    q [n, head_dim], keys [block, head_dim, 64], values [block, 64, padded_dim]
// Work      a block of 64 keys for all queries of the job, then the next block
// Memory    decode: every cached byte once; prefill: a block stays in the first-level cache
// Constants blocks of 64: the scores of six queries fill 24 AVX-512 registers
// Error     scores head_dim * 2^-24 relative to |q||k|; tests/test_cpu_attention.cpp
// Source    online softmax (Milakov and Gimelshein 2018), FlashAttention (Dao et al. 2022) for the
//           blocks, flash-decoding (Dao et al. 2023) for the spans
#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "model/error.h"

namespace tq {
namespace {

// Scores and sums that one thread finishes in some ten microseconds (linear.cpp has the same
// limit).
constexpr int64_t kMacsForThreads = 200'000;
// Storing less than this takes a microsecond.
constexpr int64_t kFloatsForThreads = 8192;

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

}  // namespace

int64_t span_scratch_floats(int64_t head_dim, int64_t padded_dim, int64_t n_queries) {
  // A block of keys and one of values as f32, scores of the queries, 16 partial sums of each.
  return kKeyBlock * (head_dim + padded_dim) + n_queries * (kKeyBlock + kLanes);
}

void plain_span(const SpanJob& job) {
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  for (int64_t query = 0; query < job.n_queries; ++query) {
    const int64_t pos = job.first_pos + query / job.group_size;
    const int64_t end = std::min(job.span_end, pos + 1);
    const float* q = job.q + query * job.head_dim;
    float* out = job.out + query * job.padded_dim;
    std::fill_n(out, job.padded_dim, 0.0f);
    float max = minus_infinity;
    float lanes[kLanes] = {};
    for (int64_t block = job.span_begin; block < end; block += kKeyBlock) {
      // Scores of the whole block; keys behind the query's own position weigh nothing.
      float p[kKeyBlock];
      float block_max = minus_infinity;
      for (int64_t j = 0; j < kKeyBlock; ++j) {
        p[j] = 0;
        for (int64_t i = 0; i < job.head_dim; ++i) {
          p[j] = std::fma(q[i], cached_key(job, block + j, i), p[j]);
        }
        if (block + j > pos) p[j] = minus_infinity;
        block_max = std::max(block_max, p[j]);
      }
      const float new_max = std::max(max, block_max);
      const float shrink = exp_f32(max - new_max);
      max = new_max;
      for (float& lane : lanes) lane *= shrink;
      for (int64_t j = 0; j < kKeyBlock; ++j) {
        p[j] = exp_f32(p[j] - max);
        lanes[j % kLanes] += p[j];
      }
      // Values behind `end` may be left over from a longer timeline: not even multiplied by zero.
      for (int64_t i = 0; i < job.padded_dim; ++i) {
        out[i] *= shrink;
        for (int64_t key = block; key < std::min(block + kKeyBlock, end); ++key) {
          out[i] = std::fma(p[key - block], cached_value(job, key, i), out[i]);
        }
      }
    }
    job.max[query] = max;
    job.sum[query] = sum_lanes(lanes);
  }
}

void plain_merge(float* max, float* sum, float* out, float span_max, float span_sum,
                 const float* span_out, int64_t count) {
  const float new_max = std::max(*max, span_max);
  const float keep = exp_f32(*max - new_max), take = exp_f32(span_max - new_max);
  *max = new_max;
  *sum = std::fma(span_sum, take, *sum * keep);
  for (int64_t i = 0; i < count; ++i) out[i] = std::fma(span_out[i], take, out[i] * keep);
}

namespace {

// Results of the queries of one item: total of the spans so far, or one span alone.
struct Partials {
  float *max, *sum, *out;  // [n_queries], [n_queries], [n_queries, padded_dim]
  Partials(float* memory, int64_t n_queries)
      : max(memory), sum(memory + n_queries), out(memory + 2 * n_queries) {}
  void clear(int64_t n_queries, int64_t padded_dim) {
    std::fill_n(max, n_queries, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, n_queries, 0.0f);
    std::fill_n(out, n_queries * padded_dim, 0.0f);
  }
};

// One call, cut in items of a few rows of one key head ("tile").
class Attention {
 public:
  Attention(const Kernels& kernels, CpuKvCache& cache, const AttentionCall& call)
      : kernels_(kernels),
        cache_(cache),
        call_(call),
        group_size_(call.n_heads / call.n_kv_heads),
        tile_rows_(std::max<int64_t>(1, kTileQueries / group_size_)),
        tile_queries_(tile_rows_ * group_size_),
        scale_(static_cast<float>(1.0 / std::sqrt(static_cast<double>(call.head_dim)))) {}

  int64_t n_tiles() const { return (call_.rows + tile_rows_ - 1) / tile_rows_ * call_.n_kv_heads; }
  int64_t n_spans() const { return (call_.pos0 + call_.rows + kSpan - 1) / kSpan; }
  // Of one thread: scaled queries, totals, one span's results, scratch of the kernel.
  int64_t thread_floats() const {
    return query_floats() + 2 * partial_floats() +
           round_up(span_scratch_floats(call_.head_dim, cache_.padded_dim(), tile_queries_),
                    kLanes);
  }
  int64_t partial_floats() const {
    return round_up(tile_queries_ * (cache_.padded_dim() + 2), kLanes);
  }

  void store(int64_t item) {
    const int64_t row = item / call_.n_kv_heads, head = item % call_.n_kv_heads;
    const int64_t at = item * call_.head_dim;
    cache_.store(kernels_, call_.layer, head, call_.pos0 + row, call_.k + at, call_.v + at);
  }

  // All spans of a tile, one thread.
  void run_tile(int64_t tile, float* memory) {
    Partials total(memory + query_floats(), tile_queries_);
    Partials part(memory + query_floats() + partial_floats(), tile_queries_);
    gather_queries(tile, memory);
    total.clear(tile_queries_, cache_.padded_dim());
    for (int64_t span = 0; span < n_spans(); ++span) {
      run_span(tile, span, memory, span_scratch(memory), part);
      merge(tile, span, part, total);
    }
    write(tile, total);
  }

  // One span of a tile into `part`; finish_tile() merges them.
  void run_part(int64_t tile, int64_t span, float* memory, float* part_memory) {
    gather_queries(tile, memory);
    Partials part(part_memory, tile_queries_);
    run_span(tile, span, memory, span_scratch(memory), part);
  }
  void finish_tile(int64_t tile, float* memory, float* parts) {
    Partials total(memory + query_floats(), tile_queries_);
    total.clear(tile_queries_, cache_.padded_dim());
    for (int64_t span = 0; span < n_spans(); ++span) {
      float* part = parts + (tile * n_spans() + span) * partial_floats();
      merge(tile, span, Partials(part, tile_queries_), total);
    }
    write(tile, total);
  }

 private:
  int64_t query_floats() const { return round_up(tile_queries_ * call_.head_dim, kLanes); }
  float* span_scratch(float* memory) const {
    return memory + query_floats() + 2 * partial_floats();
  }
  int64_t kv_head(int64_t tile) const { return tile % call_.n_kv_heads; }
  int64_t first_row(int64_t tile) const { return tile / call_.n_kv_heads * tile_rows_; }
  int64_t n_rows(int64_t tile) const { return std::min(tile_rows_, call_.rows - first_row(tile)); }
  // Queries of the tile before this one see no key of the span: their positions are below it.
  int64_t first_query(int64_t tile, int64_t span) const {
    const int64_t rows_before = span * kSpan - (call_.pos0 + first_row(tile));
    return std::clamp<int64_t>(rows_before, 0, n_rows(tile)) * group_size_;
  }
  int64_t q_offset(int64_t tile, int64_t query) const {
    const int64_t row = first_row(tile) + query / group_size_;
    const int64_t head = kv_head(tile) * group_size_ + query % group_size_;
    return (row * call_.n_heads + head) * call_.head_dim;
  }

  void gather_queries(int64_t tile, float* q) const {
    for (int64_t query = 0; query < n_rows(tile) * group_size_; ++query) {
      const float* from = call_.q + q_offset(tile, query);
      float* to = q + query * call_.head_dim;
      for (int64_t i = 0; i < call_.head_dim; ++i) to[i] = from[i] * scale_;
    }
  }

  void run_span(int64_t tile, int64_t span, const float* q, float* scratch, Partials part) {
    const int64_t first = first_query(tile, span);
    SpanJob job = {};
    job.q = q + first * call_.head_dim;
    job.n_queries = n_rows(tile) * group_size_ - first;
    if (job.n_queries == 0) return;
    job.group_size = group_size_;
    job.first_pos = call_.pos0 + first_row(tile) + first / group_size_;
    job.head_dim = call_.head_dim;
    job.padded_dim = cache_.padded_dim();
    job.span_begin = span * kSpan;
    job.span_end = job.span_begin + kSpan;
    cache_.show(call_.layer, kv_head(tile), job);
    job.scratch = scratch;
    job.max = part.max + first;
    job.sum = part.sum + first;
    job.out = part.out + first * job.padded_dim;
    kernels_.span(job);
  }

  void merge(int64_t tile, int64_t span, Partials part, Partials total) {
    const int64_t dim = cache_.padded_dim();
    for (int64_t i = first_query(tile, span); i < n_rows(tile) * group_size_; ++i) {
      kernels_.merge(total.max + i, total.sum + i, total.out + i * dim, part.max[i], part.sum[i],
                     part.out + i * dim, dim);
    }
  }

  void write(int64_t tile, Partials total) {
    for (int64_t query = 0; query < n_rows(tile) * group_size_; ++query) {
      const float* from = total.out + query * cache_.padded_dim();
      float* to = call_.out + q_offset(tile, query);
      const float inverse = 1.0f / total.sum[query];
      for (int64_t i = 0; i < call_.head_dim; ++i) to[i] = from[i] * inverse;
    }
  }

  const Kernels& kernels_;
  CpuKvCache& cache_;
  const AttentionCall& call_;
  int64_t group_size_, tile_rows_, tile_queries_;
  float scale_;
};

}  // namespace

void attend(const Kernels& kernels, CpuKvCache& cache, const AttentionCall& call, int n_threads,
            AlignedBuffer& scratch) {
  TQ_CHECK(call.n_heads % call.n_kv_heads == 0);
  TQ_CHECK(call.pos0 >= 0 && call.pos0 + call.rows <= cache.ctx());
  const int64_t macs =
      2 * call.rows * call.n_heads * call.head_dim * (call.pos0 + (call.rows + 1) / 2);
  if (macs < kMacsForThreads) n_threads = 1;
  Attention attention(kernels, cache, call);
  const int64_t n_tiles = attention.n_tiles(), n_spans = attention.n_spans();
  // With few tiles (decode), threads share the spans of a tile.
  const bool split = n_threads > 1 && n_tiles < 4 * n_threads && n_spans > 1;
  const int64_t n_parts = split ? n_tiles * n_spans : 0;
  const int64_t floats =
      n_threads * attention.thread_floats() + n_parts * attention.partial_floats();
  if (static_cast<int64_t>(scratch.size()) < 4 * floats) {
    scratch = AlignedBuffer(static_cast<size_t>(4 * floats));
  }
  float* memory = scratch.as<float>();
  float* parts = memory + n_threads * attention.thread_floats();
  const auto own = [&](int worker) { return memory + worker * attention.thread_floats(); };
  const int64_t n_stored = call.rows * call.n_kv_heads;
  parallel_ranges(n_stored * call.head_dim < kFloatsForThreads ? 1 : n_threads, n_stored,
                  [&](int64_t begin, int64_t end, int) {
                    for (int64_t item = begin; item < end; ++item) attention.store(item);
                  });
  if (!split) {  // later tiles see more keys: they are taken one by one
    parallel_items(n_threads, n_tiles,
                   [&](int64_t tile, int worker) { attention.run_tile(tile, own(worker)); });
    return;
  }
  parallel_items(n_threads, n_parts, [&](int64_t item, int worker) {
    attention.run_part(item / n_spans, item % n_spans, own(worker),
                       parts + item * attention.partial_floats());
  });
  parallel_items(n_threads, n_tiles, [&](int64_t tile, int worker) {
    attention.finish_tile(tile, own(worker), parts);
  });
}

}  // namespace tq
