// linear - see linear.h.
//
// A call is a few parallel loops: transform -> round -> products with W and A -> round x A^T ->
// product with B. Which arithmetic a product uses follows from the matrix and the rounding of its
// input:
//
//             input rounded (act.bits < 16)              input not rounded
//   packed    exact integers (packed_matmul.h)           rows expanded to f32, dense kernel
//   dense     W: dense kernel on scale * code            dense kernel
//             A, B (16-bit branch): dense, unrounded
#include "cpu/linear.h"

#include <algorithm>
#include <cmath>

#include "cpu/matmul.h"
#include "cpu/parallel.h"
#include "model/error.h"

namespace tq {
namespace {

// Below this many tokens a call is about reading weights: each thread gets one stretch of rows.
constexpr int64_t kFewTokens = 24;
// Products that one thread finishes in some ten microseconds: waking the others takes as long, and
// far longer on a machine that has other work to do.
constexpr int64_t kMacsForThreads = 200'000;
constexpr int64_t kFloatsForThreads = 8192;
// Rows of a packed matrix expanded to f32 at a time: two tiles of the dense kernels.
constexpr int64_t kExpandedRows = 8;

// Carves aligned arrays out of one buffer. Without a buffer it only counts; the pointers then are
// distinct (roundings are told apart by them) and must not be followed.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* data = reinterpret_cast<T*>(base_ + used_ + (base_ ? 0 : 64));
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return data;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

struct Offsets {
  int64_t inner, n_inner;
  int32_t* data;  // [rows, n_inner]
};

// One rounding of one input, shared by all products that want it.
struct Rounding {
  const float* input;  // [rows, cols]
  ActQuant act;
  RoundedTokens tokens;
  std::vector<Offsets> offsets;  // one for each inner group size
  float* expanded = nullptr;     // scale * code [rows, cols], where a dense W asks for it
};

struct Product {
  const Matrix* matrix;
  const PackedPanels* panels;  // null: f32 arithmetic
  const float* input;          // f32 arithmetic
  size_t rounding, offsets;    // integer arithmetic: indices
  float* out;                  // [rows, matrix->rows]
  bool accumulate;
  WorkGrid grid;
};

// The plan of one call. Built twice: once to count memory, once for real.
class Plan {
 public:
  Plan(std::span<const CpuLinear* const> weights, const float* x, int64_t rows,
       std::span<float* const> out, int n_threads, std::byte* memory)
      : rows_(rows), n_threads_(n_threads), arena_(memory) {
    const FastTransform& basis = weights[0]->transform();
    cols_ = weights[0]->linear().in_dim();
    input_ = x;
    if (basis.active()) {
      transform_ = &basis;
      transformed_ = arena_.take<float>(rows * cols_);
      transform_scratch_ = arena_.take<float>(n_threads * basis.block());
      input_ = transformed_;
    }
    for (size_t i = 0; i < weights.size(); ++i) plan_linear(*weights[i], out[i]);
    expand_scratch_ = arena_.take<float>(n_threads * kExpandedRows * expand_cols_);
    x_ = x;
  }
  size_t memory_bytes() const { return arena_.used(); }

  void run(const Kernels& kernels) {
    if (transform_) run_transform(kernels);
    run_roundings(kernels, first_);
    run_products(kernels, first_, wide_);
    run_roundings(kernels, second_);
    run_products(kernels, second_, narrow_);
  }

 private:
  // Rounding or transforming less than this takes a microsecond, and so does handing a loop over.
  int threads_for(int64_t n_floats) const { return n_floats < kFloatsForThreads ? 1 : n_threads_; }

  // Index of a rounding of `input` in `list`, made if it is not there.
  size_t rounding_of(std::vector<Rounding>& list, const float* input, int64_t cols,
                     const ActQuant& act) {
    for (size_t i = 0; i < list.size(); ++i) {
      const Rounding& known = list[i];
      if (known.input == input && known.tokens.cols == cols && known.act == act) return i;
    }
    Rounding rounding;
    rounding.input = input;
    rounding.act = act;
    RoundedTokens& tokens = rounding.tokens;
    tokens.cols = cols;
    tokens.padded_cols = (cols + 7) / 8 * 8;
    tokens.group = std::min(act.group, cols);
    tokens.n_groups = (cols + tokens.group - 1) / tokens.group;
    tokens.codes = arena_.take<int8_t>(rows_ * tokens.padded_cols);
    tokens.scales = arena_.take<float>(rows_ * tokens.n_groups);
    list.push_back(std::move(rounding));
    return list.size() - 1;
  }

  size_t offsets_of(Rounding& rounding, const PackedPanels& panels) {
    for (size_t i = 0; i < rounding.offsets.size(); ++i) {
      if (rounding.offsets[i].inner == panels.inner) return i;
    }
    rounding.offsets.push_back(
        {panels.inner, panels.n_inner, arena_.take<int32_t>(rows_ * panels.n_inner)});
    return rounding.offsets.size() - 1;
  }

  void add_product(std::vector<Rounding>& roundings, std::vector<Product>& products,
                   const Matrix& matrix, const std::optional<PackedPanels>& panels,
                   const float* input, const ActQuant& act, float* out, bool accumulate) {
    Product product = {&matrix, panels ? &*panels : nullptr, input, 0, 0, out, accumulate, {}};
    int64_t row_step = 4, token_bytes = 4 * matrix.cols, row_bytes = 4 * matrix.cols;
    if (panels) {
      product.rounding = rounding_of(roundings, input, matrix.cols, act);
      product.offsets = offsets_of(roundings[product.rounding], *panels);
      row_step = 2 * kPanelRows;
      token_bytes = matrix.cols;
      row_bytes = matrix.row_bytes();
    } else if (matrix.packed()) {
      expand_cols_ = std::max(expand_cols_, matrix.cols);
      row_step = kExpandedRows;
    } else {
      row_bytes = matrix.row_bytes();
    }
    product.grid = plan_grid(rows_, matrix.rows, row_bytes, token_bytes, row_step, n_threads_);
    products.push_back(product);
  }

  void plan_linear(const CpuLinear& weight, float* out) {
    const Linear& linear = weight.linear();
    const float* input = input_;
    if (weight.rounds_input() && !linear.weight.packed()) {
      Rounding& rounding = first_[rounding_of(first_, input_, cols_, linear.act)];
      if (!rounding.expanded) rounding.expanded = arena_.take<float>(rows_ * cols_);
      input = rounding.expanded;
    }
    add_product(first_, wide_, linear.weight, weight.weight, input, linear.act, out, false);
    if (!linear.branch_a) return;
    float* h = arena_.take<float>(rows_ * linear.rank());
    add_product(first_, wide_, *linear.branch_a, weight.branch_a, input_, linear.act, h, false);
    const ActQuant act = linear.act.narrow(linear.rank(), linear.branch_b->group);
    add_product(second_, narrow_, *linear.branch_b, weight.branch_b, h, act, out, true);
  }

  void run_transform(const Kernels& kernels) {
    const int64_t n_blocks = transform_->n_blocks();
    const auto blocks = [&](int64_t begin, int64_t end, int worker) {
      float* scratch = transform_scratch_ + worker * transform_->block();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / n_blocks;
        transform_->apply_block(kernels, x_ + row * cols_, item % n_blocks, false, scratch,
                                transformed_ + row * cols_);
      }
    };
    parallel_ranges(threads_for(8 * rows_ * cols_), rows_ * n_blocks, blocks);
  }

  void run_roundings(const Kernels& kernels, std::vector<Rounding>& roundings) {
    for (Rounding& rounding : roundings) {
      const RoundedTokens& tokens = rounding.tokens;
      // Groups of one unit follow each other.
      const int64_t together = rounding.act.two_level ? tokens.n_groups : 1;
      const auto groups = [&](int64_t begin, int64_t end, int) {
        for (int64_t first = begin; first < end; first += together) {
          const int64_t row = first / tokens.n_groups;
          const float unit = token_unit(kernels, rounding.input + row * tokens.cols, tokens.cols,
                                        rounding.act, tokens.codes + row * tokens.padded_cols);
          for (int64_t item = first; item < first + together; ++item) {
            round_group(kernels, rounding, row, item % tokens.n_groups, unit);
          }
        }
      };
      parallel_ranges(threads_for(rows_ * tokens.cols), rows_ * tokens.n_groups, groups, together);
    }
  }

  static void round_group(const Kernels& kernels, const Rounding& rounding, int64_t row,
                          int64_t group, float unit) {
    const RoundedTokens& tokens = rounding.tokens;
    const int64_t begin = group * tokens.group;
    const int64_t end = std::min(begin + tokens.group, tokens.cols);
    const int64_t padded_end = end == tokens.cols ? tokens.padded_cols : end;
    int8_t* codes = tokens.codes + row * tokens.padded_cols;
    float* scale = tokens.scales + row * tokens.n_groups + group;
    kernels.round({rounding.input + row * tokens.cols + begin, end - begin, rounding.act.bits,
                   rounding.act.clip, rounding.act.codes, codes + begin, scale, unit});
    for (int64_t col = end; col < padded_end; ++col) codes[col] = 0;
    for (const Offsets& offsets : rounding.offsets) {
      for (int64_t i = begin / offsets.inner; i * offsets.inner < padded_end; ++i) {
        const int64_t inner_end = std::min((i + 1) * offsets.inner, padded_end);
        const int32_t sum =
            kernels.sum_codes(codes + i * offsets.inner, inner_end - i * offsets.inner);
        offsets.data[row * offsets.n_inner + i] = -8 * sum;
      }
    }
    if (!rounding.expanded) return;
    for (int64_t col = begin; col < end; ++col) {
      rounding.expanded[row * tokens.cols + col] = *scale * static_cast<float>(codes[col]);
    }
  }

  void run_products(const Kernels& kernels, const std::vector<Rounding>& roundings,
                    const std::vector<Product>& products) {
    if (rows_ < kFewTokens) {
      int64_t total = 0;
      for (const Product& product : products) total += n_panels(product);
      const auto stretch = [&](int64_t begin, int64_t end, int worker) {
        run_row_stretch(kernels, roundings, products, begin, end, worker);
      };
      parallel_ranges(n_threads_, total, stretch);
      return;
    }
    int64_t n_items = 0;
    for (const Product& product : products) n_items += product.grid.n_items();
    parallel_items(n_threads_, n_items, [&](int64_t item, int worker) {
      size_t which = 0;
      while (item >= products[which].grid.n_items()) item -= products[which++].grid.n_items();
      run_product(kernels, roundings, products[which], products[which].grid.at(item), worker);
    });
  }

  static int64_t n_panels(const Product& product) {
    return (product.matrix->rows + kPanelRows - 1) / kPanelRows;
  }

  // Panels [begin, end) of all products, counted one product after the other.
  void run_row_stretch(const Kernels& kernels, const std::vector<Rounding>& roundings,
                       const std::vector<Product>& products, int64_t begin, int64_t end,
                       int worker) {
    for (const Product& product : products) {
      const int64_t count = n_panels(product);
      const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, count);
      if (first < last) {
        run_product(
            kernels, roundings, product,
            {0, rows_, first * kPanelRows, std::min(last * kPanelRows, product.matrix->rows)},
            worker);
      }
      begin -= count;
      end -= count;
    }
  }

  void run_product(const Kernels& kernels, const std::vector<Rounding>& roundings,
                   const Product& product, const WorkGrid::Rectangle& area, int worker) {
    if (product.panels) {
      const Rounding& rounding = roundings[product.rounding];
      PackedJob job = packed_job(*product.panels, rounding.tokens,
                                 rounding.offsets[product.offsets].data, product.out, rows_);
      job.accumulate = product.accumulate;
      area.limit(job);
      kernels.packed(job);
    } else if (product.matrix->packed()) {
      run_expanded(kernels, product, area, worker);
    } else {
      DenseJob job = dense_job(*product.matrix, product.input, product.out, rows_);
      job.accumulate = product.accumulate;
      area.limit(job);
      kernels.dense(job);
    }
  }

  void run_expanded(const Kernels& kernels, const Product& product, const WorkGrid::Rectangle& area,
                    int worker) {
    const Matrix& w = *product.matrix;
    float* expanded = expand_scratch_ + worker * kExpandedRows * expand_cols_;
    for (int64_t row = area.row_begin; row < area.row_end; row += kExpandedRows) {
      const int64_t count = std::min(kExpandedRows, area.row_end - row);
      for (int64_t i = 0; i < count; ++i) expand_row(kernels, w, row + i, expanded + i * w.cols);
      DenseJob job = {};
      job.type = DenseType::kF32;
      job.w = reinterpret_cast<const std::byte*>(expanded);
      job.x = product.input;
      job.y = product.out + row;
      job.cols = w.cols;
      job.y_stride = w.rows;
      job.row_end = count;
      job.token_begin = area.token_begin;
      job.token_end = area.token_end;
      job.accumulate = product.accumulate;
      kernels.dense(job);
    }
  }

  int64_t rows_, cols_ = 0;
  int n_threads_;
  Arena arena_;
  const float* x_ = nullptr;      // as given
  const float* input_ = nullptr;  // transformed, if there is a transform
  const FastTransform* transform_ = nullptr;
  float *transformed_ = nullptr, *transform_scratch_ = nullptr, *expand_scratch_ = nullptr;
  int64_t expand_cols_ = 0;
  std::vector<Rounding> first_, second_;  // of x, of x A^T
  std::vector<Product> wide_, narrow_;    // with W and A, with B
};

}  // namespace

float token_unit(const Kernels& kernels, const float* x, int64_t cols, const ActQuant& act,
                 int8_t* codes) {
  if (!act.two_level || act.bits == 8) return 0;
  float largest = 0;
  kernels.round({x, cols, act.bits, act.clip, act.codes, codes, &largest});
  return std::fabs(largest) / static_cast<float>(kMostMultiple);
}

void expand_row(const Kernels& kernels, const Matrix& w, int64_t row, float* out) {
  if (!w.packed()) {
    matrix_row_f32(w, row, out);
    return;
  }
  const int bits = w.storage == Storage::kQ4 ? 4 : 8;
  const std::byte* codes = w.data + row * w.row_bytes();
  if (bits == 4 && w.group % 2 != 0 && w.group < w.cols) {  // a group may begin inside a byte
    matrix_row_f32(w, row, out);
    return;
  }
  for (int64_t group = 0; group < w.n_groups(); ++group) {
    const int64_t begin = group * w.group, count = std::min(w.group, w.cols - begin);
    kernels.dequant(bits, codes + begin * bits / 8,
                    f16_to_f32(w.scales[row * w.n_groups() + group]), count, out + begin);
  }
}

CpuLinear::CpuLinear(const Linear& linear, int n_threads)
    : linear_(linear), transform_(linear.input) {
  const ActQuant& act = linear_.act;
  TQ_CHECK(act.bits == 3 || act.bits == 4 || act.bits == 8 || act.bits == 16);
  TQ_CHECK(act.group > 0 && linear_.branch_a.has_value() == linear_.branch_b.has_value());
  if (!rounds_input()) return;
  if (linear_.weight.packed()) weight = pack_panels(linear_.weight, act.group, n_threads);
  if (!linear_.branch_a) return;
  if (linear_.branch_a->packed()) branch_a = pack_panels(*linear_.branch_a, act.group, n_threads);
  if (linear_.branch_b->packed()) {
    branch_b = pack_panels(*linear_.branch_b,
                           act.narrow(linear_.rank(), linear_.branch_b->group).group, n_threads);
  }
}

void run_linears(const Kernels& kernels, std::span<const CpuLinear* const> weights, const float* x,
                 int64_t rows, std::span<float* const> out, int n_threads, LinearScratch& scratch) {
  TQ_CHECK(!weights.empty() && weights.size() == out.size());
  int64_t macs = 0;
  for (const CpuLinear* weight : weights) {
    const Linear& linear = weight->linear();
    TQ_CHECK(linear.in_dim() == weights[0]->linear().in_dim());
    TQ_CHECK(weight->transform().same_as(weights[0]->transform()));
    macs += rows * linear.in_dim() * (linear.out_dim() + linear.rank());
  }
  if (macs < kMacsForThreads) n_threads = 1;
  const size_t bytes = Plan(weights, x, rows, out, n_threads, nullptr).memory_bytes();
  if (scratch.memory.size() < bytes) scratch.memory = AlignedBuffer(bytes);
  Plan(weights, x, rows, out, n_threads, scratch.memory.as<std::byte>()).run(kernels);
}

}  // namespace tq
