// autodiff_rounding - values and gradients of rounding. See autodiff_rounding.h.
//
// With v = x / s, code = clamp(rint(v)) and y = s code, straight through the rint:
//   inside the range   dy/dx = 1    dy/ds = code - v
//   clipped            dy/dx = 0    dy/ds = code
// and s = f(m) clip for the element m that sets the scale, so m also gets ds/dm sum g dy/ds.
// Asymmetric codes have two such elements, the greatest and the least, and ends of the range that
// are whole steps, so there inside is what rounds into the range.
#include "cpu/autodiff_rounding.h"

#include <bit>
#include <cmath>

#include "cpu/autodiff_node.h"
#include "cpu/exp_constants.h"

namespace tq {
namespace {

// The element that sets the scale has v = +-qmax up to the rounding of inverse and product: it is
// inside.
constexpr float kSlack = 1.0f + 0x1.0p-20f;

struct Range {
  float low, high;
  float slack = 0;  // how far outside is still inside
  static Range symmetric(int bits) {
    const float qmax = static_cast<float>((1 << (bits - 1)) - 1);
    return {-qmax, qmax};
  }
  static Range full(int bits) {
    const float half = static_cast<float>(1 << (bits - 1));
    return {-half, half - 1.0f};
  }
  // As plain_round: bounded first, ties to even.
  float code(float v) const {
    const float above = v > low ? v : low;  // also the answer for NaN
    const float bounded = above < high ? above : high;
    return (bounded + kRoundMagic) - kRoundMagic;
  }
  bool inside(float v) const { return v >= (low - slack) * kSlack && v <= (high + slack) * kSlack; }
};

// An element that sets the scale.
struct Setter {
  int64_t index = 0;
  float per_x = 0;  // d scale / d x[index]
};

// One group: the operations of plain_round in their order.
struct GroupScale {
  Range range;
  float scale, inverse;
  float per_clip;  // d scale / d clip
  Setter setters[2];
};

GroupScale asymmetric_scale_of(const float* x, int64_t count, int bits, float clip) {
  float above = 0, below = 0;
  Setter most, least;
  for (int64_t i = 0; i < count; ++i) {
    if (x[i] > above || std::isnan(x[i])) above = x[i], most.index = i;  // NaN stays
    if (-x[i] > below) below = -x[i], least.index = i;
  }
  const float steps = static_cast<float>((1 << bits) - 1);
  const float sum = above * clip + below * clip, inverse = sum > 0 ? steps / sum : 0.0f;
  const float place = below * clip * inverse;
  const float zero = ((place < steps ? place : steps) + kRoundMagic) - kRoundMagic;
  if (above > 0) most.per_x = clip / steps;
  if (below > 0) least.per_x = -clip / steps;
  return {
      {-zero, steps - zero, 0.5f}, sum / steps, inverse, (above + below) / steps, {most, least}};
}

GroupScale scale_of(const float* x, int64_t count, const GroupRounding& rounding, float clip) {
  if (rounding.codes == ActCodes::kAsymmetric) {
    return asymmetric_scale_of(x, count, rounding.bits, clip);
  }
  GroupScale result = {};
  Setter& setter = result.setters[0];
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFFu;
    if (bits > largest) {
      largest = bits;
      setter.index = i;
    }
  }
  const float magnitude = std::bit_cast<float>(largest);
  const float sign = std::signbit(x[setter.index]) ? -1.0f : 1.0f;
  if (rounding.codes == ActCodes::kAll) {
    result.range = Range::full(rounding.bits);
    const float half = static_cast<float>(1 << (rounding.bits - 1));
    const float reach = -(sign * magnitude * clip);
    result.inverse = largest > 0 ? half / reach : 0.0f;
    result.scale = reach / half;
    result.per_clip = -sign * magnitude / half;
    setter.per_x = -clip / half;
  } else {
    result.range = Range::symmetric(rounding.bits);
    const float qmax = result.range.high;
    const float amax = magnitude * clip;
    result.inverse = amax > 0 ? qmax / amax : 0.0f;
    result.scale = amax / qmax;
    result.per_clip = magnitude / qmax;
    setter.per_x = sign * clip / qmax;
  }
  return result;
}

// The groups of a tensor, numbered row by row.
struct Groups {
  int64_t cols, group, n_groups, count;
  Groups(const Shape& shape, int64_t group)
      : cols(shape.cols),
        group(std::min(group, shape.cols)),
        n_groups((shape.cols + this->group - 1) / this->group),
        count(shape.batch * shape.rows * n_groups) {
    TQ_CHECK(group > 0);
  }
  int64_t begin(int64_t i) const { return i / n_groups * cols + i % n_groups * group; }
  int64_t size(int64_t i) const { return std::min(group, cols - i % n_groups * group); }
};

// Two-level scales: as token_unit (linear.h) and round_scale.h have them.
float unit_of_row(const float* x, int64_t cols, const GroupRounding& rounding, float clip) {
  return std::fabs(scale_of(x, cols, rounding, clip).scale) / static_cast<float>(kMostMultiple);
}
void restrict_to_multiples(float unit, GroupScale& s) {
  if (unit == 0.0f) return;
  const float wanted = s.scale / unit;
  const float nearest = (std::fabs(wanted) + kRoundMagic) - kRoundMagic;
  const float above = nearest > 1.0f ? nearest : 1.0f;  // also the answer for NaN
  const float multiple = std::fmin(above, static_cast<float>(kMostMultiple));
  s.scale = (wanted < 0 ? -multiple : multiple) * unit;
  s.inverse = 1.0f / s.scale;
}

// Adds the gradient of one group to dx; returns d loss / d scale.
double group_gradient(const float* x, const float* g, int64_t count, const GroupScale& s,
                      float* dx) {
  double scale_gradient = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float v = x[i] * s.inverse;
    const bool inside = s.range.inside(v);
    scale_gradient += double{g[i]} * (double{s.range.code(v)} - (inside ? double{v} : 0.0));
    if (inside && dx) dx[i] += g[i];
  }
  return scale_gradient;
}

Var round_impl(const Var& x, const GroupRounding& rounding, const Var* clip, RoundGradient kind) {
  TQ_CHECK(rounding.bits >= 2 && rounding.bits <= 8);
  const Groups groups(x.shape(), rounding.group);
  const float factor = clip ? clip->item() : rounding.clip;
  std::vector<float> units;  // of each row
  if (rounding.two_level) {
    const Shape& shape = x.shape();
    units.resize(static_cast<size_t>(shape.batch * shape.rows));
    parallel_ranges(x.tape(), std::ssize(units), 2 * shape.cols, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        units[static_cast<size_t>(row)] =
            unit_of_row(x.data() + row * shape.cols, shape.cols, rounding, factor);
      }
    });
  }
  const auto group_scale = [groups, rounding, factor, units = std::move(units)](const float* data,
                                                                                int64_t i) {
    GroupScale s = scale_of(data + groups.begin(i), groups.size(i), rounding, factor);
    if (!units.empty()) restrict_to_multiples(units[static_cast<size_t>(i / groups.n_groups)], s);
    return s;
  };
  Tensor value = new_tensor(x.tape(), x.shape());
  parallel_ranges(x.tape(), groups.count, 8 * groups.group, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float* from = x.data() + groups.begin(i);
      float* to = value.own() + groups.begin(i);
      const GroupScale s = group_scale(x.data(), i);
      for (int64_t j = 0; j < groups.size(i); ++j)
        to[j] = s.scale * s.range.code(from[j] * s.inverse);
    }
  });
  const int32_t x_node = x.node(), clip_node = clip ? clip->node() : kNoNode;
  const Tensor kept = x.value();
  const bool with_scale = kind == RoundGradient::kWithScale;
  return new_var(std::move(value), {&x, clip ? clip : &x}, [=](Tensor gradient, Gradients& out) {
    float* dx = x_node == kNoNode ? nullptr : out.sum(x_node);
    const double clip_gradient =
        ordered_sum(out.tape(), groups.count, 8 * groups.group, [&](int64_t i) {
          const int64_t at = groups.begin(i), size = groups.size(i);
          const GroupScale s = group_scale(kept.data(), i);
          const double ds = group_gradient(kept.data() + at, gradient.data() + at, size, s,
                                           dx ? dx + at : nullptr);
          if (dx && with_scale) {
            for (const Setter& setter : s.setters) {
              if (setter.per_x == 0.0f) continue;
              dx[at + setter.index] += static_cast<float>(ds * double{setter.per_x});
            }
          }
          return ds * double{s.per_clip};
        });
    if (clip_node != kNoNode) *out.sum(clip_node) += static_cast<float>(clip_gradient);
  });
}

}  // namespace

Var round_groups(const Var& x, const GroupRounding& rounding, RoundGradient kind) {
  return round_impl(x, rounding, nullptr, kind);
}
Var round_groups(const Var& x, const GroupRounding& rounding, const Var& clip, RoundGradient kind) {
  return round_impl(x, rounding, &clip, kind);
}

Var round_with_scales(const Var& w, const Var& scales, int bits, int64_t group) {
  TQ_CHECK(bits >= 2 && bits <= 8);
  const Groups groups(w.shape(), group);
  TQ_CHECK(scales.shape() == (Shape{w.shape().batch, w.shape().rows, groups.n_groups}));
  const Range range = Range::full(bits);
  const auto quotient = [](float x, float s) { return s == 0.0f ? 0.0f : x / s; };
  Tensor value = new_tensor(w.tape(), w.shape());
  parallel_ranges(w.tape(), groups.count, 8 * groups.group, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float s = scales.data()[i];
      for (int64_t j = groups.begin(i); j < groups.begin(i) + groups.size(i); ++j) {
        value.own()[j] = s * range.code(quotient(w.data()[j], s));
      }
    }
  });
  const int32_t w_node = w.node(), s_node = scales.node();
  const Tensor kept_w = w.value(), kept_s = scales.value();
  return new_var(std::move(value), {&w, &scales}, [=](Tensor gradient, Gradients& out) {
    float* dw = w_node == kNoNode ? nullptr : out.sum(w_node);
    float* ds = s_node == kNoNode ? nullptr : out.sum(s_node);
    const float* g = gradient.data();
    parallel_ranges(out.tape(), groups.count, 8 * groups.group, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const float s = kept_s.data()[i];
        double sum = 0;
        for (int64_t j = groups.begin(i); j < groups.begin(i) + groups.size(i); ++j) {
          const float v = quotient(kept_w.data()[j], s);
          const bool inside = range.inside(v);
          sum += double{g[j]} * (double{range.code(v)} - (inside ? double{v} : 0.0));
          if (inside && dw) dw[j] += g[j];
        }
        if (ds) ds[i] += static_cast<float>(sum);
      }
    });
  });
}

Var scale_codes(const Matrix& packed, const Var& scales) {
  const int64_t n_groups = packed.n_groups();
  TQ_CHECK(packed.packed() && packed.group % 2 == 0);
  TQ_CHECK(scales.shape() == (Shape{1, packed.rows, n_groups}));
  const Shape shape{1, packed.rows, packed.cols};
  // The codes of one group as f32.
  const auto expand = [packed](const Kernels& kernels, int64_t row, int64_t group, float* out) {
    const int bits = packed.storage == Storage::kQ4 ? 4 : 8;
    const int64_t begin = group * packed.group, count = std::min(packed.group, packed.cols - begin);
    kernels.dequant(bits, packed.data + row * packed.row_bytes() + begin * bits / 8, 1.0f, count,
                    out);
    return count;
  };
  Tensor value = new_tensor(scales.tape(), shape);
  parallel_ranges(scales.tape(), packed.rows, packed.cols, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      for (int64_t group = 0; group < n_groups; ++group) {
        float* out = value.own() + row * packed.cols + group * packed.group;
        const int64_t count = expand(scales.tape().kernels(), row, group, out);
        const float s = scales.data()[row * n_groups + group];
        for (int64_t i = 0; i < count; ++i) out[i] *= s;
      }
    }
  });
  const int32_t node = scales.node();
  return new_var(std::move(value), {&scales}, [=](Tensor gradient, Gradients& out) {
    float* ds = out.sum(node);
    parallel_ranges(out.tape(), packed.rows, packed.cols, [&](int64_t first, int64_t last) {
      std::vector<float> codes(static_cast<size_t>(packed.group));
      for (int64_t row = first; row < last; ++row) {
        for (int64_t group = 0; group < n_groups; ++group) {
          const int64_t count = expand(out.tape().kernels(), row, group, codes.data());
          const float* g = gradient.data() + row * packed.cols + group * packed.group;
          float sum = 0;
          for (int64_t i = 0; i < count; ++i) sum += g[i] * codes[static_cast<size_t>(i)];
          ds[row * n_groups + group] += sum;
        }
      }
    });
  });
}

}  // namespace tq
