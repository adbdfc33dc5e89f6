// rounding - the column walk of RTN and GPTQ. See rounding.h; read round_strips() first.
#include "quant/rounding.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

#include "cpu/parallel.h"
#include "model/error.h"
#include "quant/gptq.h"
#include "quant/strip.h"

namespace tq {
namespace {

// Shrink factors of the range: 1.00, 0.9875 .. 0.4. Gaussian groups of 64 settle near 0.9; heavy
// tails without a rotation go lower. Below 0.4 nothing was ever chosen on real weights.
constexpr int kGridSteps = 49;
constexpr float kGridStep = 0.0125f;
// Columns updated one by one before the rest of the matrix catches up. A multiple of every group.
constexpr int64_t kBlock = 128;
// Strips that walk together, so that a piece of U (kBlock rows of kPiece columns, 32 KB) comes from
// memory once for both. One where threads would run out of turns.
constexpr int64_t kMostStrips = 2, kPiece = 64, kTurnsPerThread = 8;
// x + kRoundMagic - kRoundMagic rounds |x| < 2^22 to the nearest integer, ties to even, with two
// additions that exist in every instruction set.
constexpr float kRoundMagic = 12582912.0f;
constexpr float kSmallestScale = 0x1p-24f, kLargestScale = 65504.0f;  // positive f16

struct CodeRange {
  float low, high;
};

inline void clamp_and_round(Lanes& x, const CodeRange& range) {
  const Lanes low = Lanes{} + range.low, high = Lanes{} + range.high;
  x = x < low ? low : x;
  x = x > high ? high : x;
  x = (x + kRoundMagic) - kRoundMagic;
}

// Scale per lane for `width` columns: the least squared error over a grid: shrunken ranges, or
// whole multiples of `units`. The former are continuous; the caller rounds them to f16, which moves
// them by at most 2^-11 of themselves.
TQ_CLONES void search_scales(const float* columns, int64_t width, CodeRange range,
                             const float* units, float* scales) {
  const Lanes* w = reinterpret_cast<const Lanes*>(columns);
  Lanes largest = {};
  for (int64_t col = 0; col < width; ++col) {
    const Lanes x = w[col], negated = -x;
    largest = x > largest ? x : largest;
    largest = negated > largest ? negated : largest;
  }
  Lanes best_scale = largest / range.high, best_error = Lanes{} + INFINITY;
  const Lanes unit = units ? *reinterpret_cast<const Lanes*>(units) : Lanes{};
  const int n_steps = units ? kMostMultiple : kGridSteps;
  for (int step = 0; step < n_steps; ++step) {
    const Lanes scale =
        units ? unit * static_cast<float>(step + 1)
              : largest * ((1.0f - kGridStep * static_cast<float>(step)) / range.high);
    const Lanes inverse = 1.0f / scale;
    Lanes error = {};
    for (int64_t col = 0; col < width; ++col) {
      Lanes code = w[col] * inverse;
      clamp_and_round(code, range);
      const Lanes difference = w[col] - scale * code;
      error += difference * difference;
    }
    const LaneInts better = error < best_error;  // false for the NaN of an all-zero group
    best_scale = better ? scale : best_scale;
    best_error = better ? error : best_error;
  }
  *reinterpret_cast<Lanes*>(scales) = best_scale;
}

// Codes of one column and what they leave over: columns are overwritten by w - scale * code.
TQ_CLONES void round_column(float* column, const float* scales, CodeRange range, float* codes) {
  Lanes& w = *reinterpret_cast<Lanes*>(column);
  const Lanes& scale = *reinterpret_cast<const Lanes*>(scales);
  Lanes code = w / scale;
  clamp_and_round(code, range);
  *reinterpret_cast<Lanes*>(codes) = code;
  w -= scale * code;
}

// columns[j] -= sum_i errors[i] * u[i][j] for j in [first, last): i over n_errors rows of U.
TQ_CLONES void propagate(float* columns, int64_t first, int64_t last, const float* errors,
                         int64_t n_errors, const float* u, int64_t u_stride) {
  Lanes* w = reinterpret_cast<Lanes*>(columns);
  const Lanes* error = reinterpret_cast<const Lanes*>(errors);
  int64_t j = first;
  for (; j + 4 <= last; j += 4) {
    Lanes w0 = w[j], w1 = w[j + 1], w2 = w[j + 2], w3 = w[j + 3];
    for (int64_t i = 0; i < n_errors; ++i) {
      const float* factor = u + i * u_stride + j;
      w0 -= error[i] * factor[0];
      w1 -= error[i] * factor[1];
      w2 -= error[i] * factor[2];
      w3 -= error[i] * factor[3];
    }
    w[j] = w0;
    w[j + 1] = w1;
    w[j + 2] = w2;
    w[j + 3] = w3;
  }
  for (; j < last; ++j) {
    for (int64_t i = 0; i < n_errors; ++i) w[j] -= error[i] * u[i * u_stride + j];
  }
}

struct StripBuffers {
  explicit StripBuffers(int64_t cols, int64_t n_groups)
      : columns(bytes(cols)),
        codes(bytes(cols)),
        scales(bytes(n_groups)),
        errors(bytes(kBlock)),
        units(bytes(1)) {}
  static size_t bytes(int64_t n) { return static_cast<size_t>(n * kStripRows) * sizeof(float); }
  AlignedBuffer columns;  // [cols][16] weights; rounding errors once a column is done
  AlignedBuffer codes;    // [cols][16] integers as f32
  AlignedBuffer scales;   // [n_groups][16] f16 values as f32
  AlignedBuffer errors;   // [kBlock][16] rounding error / U_ii of the current block
  AlignedBuffer units;    // [16] what two-level scales are multiples of
};

// units: null where any scale will do.
void find_group_scales(const float* columns, int64_t width, CodeRange range, const float* units,
                       float* scales) {
  search_scales(columns, width, range, units, scales);
  if (units) return;
  for (int64_t lane = 0; lane < kStripRows; ++lane) {
    float& scale = scales[lane];
    // An all-zero group has no scale of its own; any positive one represents it exactly.
    if (!(scale > 0)) scale = 1.0f;
    scale = f16_to_f32(f32_to_f16(std::clamp(scale, kSmallestScale, kLargestScale)));
  }
}

// A unit for each row of the strip, from the scales that its groups would have as they stand.
void find_units(const RoundingSpec& spec, CodeRange range, int64_t cols, StripBuffers& buffers) {
  float* units = buffers.units.as<float>();
  alignas(sizeof(Lanes)) float scales[kStripRows];
  std::fill_n(units, kStripRows, 0.0f);
  for (int64_t col = 0; col < cols; col += spec.group) {
    search_scales(buffers.columns.as<float>() + col * kStripRows, std::min(spec.group, cols - col),
                  range, nullptr, scales);  // 0 for a group of zeros
    for (int64_t lane = 0; lane < kStripRows; ++lane) {
      units[lane] = std::max(units[lane], scales[lane]);
    }
  }
  for (int64_t lane = 0; lane < kStripRows; ++lane) {
    units[lane] = round_unit(units[lane] / kMostMultiple);
  }
}

// Rounds columns [begin, end) of the strip in `buffers` one by one and leaves their errors there.
// Returns how many weights were clipped in the first `n_lanes` rows.
int64_t round_block(int64_t begin, int64_t end, int64_t cols, int64_t n_lanes,
                    const RoundingSpec& spec, CodeRange range, const GptqFactor* factor,
                    StripBuffers& buffers) {
  float* columns = buffers.columns.as<float>();
  int64_t n_clipped = 0;
  for (int64_t col = begin; col < end; ++col) {
    float* scales = buffers.scales.as<float>() + col / spec.group * kStripRows;
    float* column = columns + col * kStripRows;
    if (col % spec.group == 0) {
      find_group_scales(column, std::min(spec.group, cols - col), range,
                        spec.two_level ? buffers.units.as<float>() : nullptr, scales);
    }
    round_column(column, scales, range, buffers.codes.as<float>() + col * kStripRows);
    for (int64_t lane = 0; lane < n_lanes; ++lane) {
      // A touch over half a step: w - scale * code may round up.
      if (std::fabs(column[lane]) > 0.5001f * scales[lane]) ++n_clipped;
    }
    if (!factor) continue;
    const float* u_row = factor->u.data() + col * factor->n;
    float* error = buffers.errors.as<float>() + (col - begin) * kStripRows;
    for (int64_t lane = 0; lane < kStripRows; ++lane) error[lane] = column[lane] / u_row[col];
    propagate(columns, col + 1, end, error, 1, u_row, factor->n);
  }
  return n_clipped;
}

// Rounds the strips in `strips`, `n_rows` rows in all, in the order of the factor. Returns how many
// weights were clipped. No strip sees another, so how many walk together changes nothing.
int64_t round_strips(int64_t cols, int64_t n_rows, const RoundingSpec& spec, CodeRange range,
                     const GptqFactor* factor, std::span<StripBuffers> strips) {
  int64_t n_clipped = 0;
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    const int64_t end = std::min(cols, begin + kBlock);
    for (size_t i = 0; i < strips.size(); ++i) {
      const int64_t left = n_rows - static_cast<int64_t>(i) * kStripRows;
      n_clipped +=
          round_block(begin, end, cols, std::min(kStripRows, left), spec, range, factor, strips[i]);
    }
    for (int64_t piece = end; factor && piece < cols; piece += kPiece) {
      for (StripBuffers& strip : strips) {
        propagate(strip.columns.as<float>(), piece, std::min(cols, piece + kPiece),
                  strip.errors.as<float>(), end - begin, factor->u.data() + begin * factor->n,
                  factor->n);
      }
    }
  }
  return n_clipped;
}

// position(col): where the walk found a column.
void store_strip(const StripBuffers& buffers, const std::vector<int64_t>& position, int64_t strip,
                 const RoundingSpec& spec, OwnedMatrix& out) {
  const float* codes = buffers.codes.as<float>();
  const float* scales = buffers.scales.as<float>();
  const int64_t row_bytes = out.view().row_bytes(), n_groups = out.view().n_groups();
  const int64_t first = strip * kStripRows, last = std::min(out.rows, first + kStripRows);
  for (int64_t row = first; row < last; ++row) {
    const int64_t lane = row - first;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(out.data.data()) + row * row_bytes;
    for (int64_t col = 0; col < out.cols; ++col) {
      const int64_t at = position[static_cast<size_t>(col)];
      const int code = static_cast<int>(codes[at * kStripRows + lane]);
      if (spec.bits == 8) {
        bytes[col] = static_cast<uint8_t>(static_cast<int8_t>(code));
      } else if (col % 2 == 0) {
        bytes[col / 2] = static_cast<uint8_t>(code + 8);
      } else {
        bytes[col / 2] = static_cast<uint8_t>(bytes[col / 2] | ((code + 8) << 4));
      }
    }
    for (int64_t group = 0; group < n_groups; ++group) {
      const int64_t walked = position[static_cast<size_t>(group * spec.group)] / spec.group;
      out.scales[static_cast<size_t>(row * n_groups + group)] =
          f32_to_f16(scales[walked * kStripRows + lane]);
    }
  }
}

}  // namespace

float round_unit(float unit) {
  unit = std::clamp(unit, kSmallestScale, kLargestScale / (kMostMultiple + 1));
  int exponent;
  const float fraction = std::frexp(unit, &exponent);  // 0.5 <= fraction < 1
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(fraction, 7)), exponent - 7);
  return f16_to_f32(f32_to_f16(rounded));  // below 2^-14 f16 is coarser
}

float common_unit(std::span<const float> scales) {
  int64_t unit = 0;  // in steps of 2^-24, whose whole multiples all f16 numbers are
  for (float scale : scales) unit = std::gcd(unit, static_cast<int64_t>(std::ldexp(scale, 24)));
  return std::ldexp(static_cast<float>(unit), -24);
}

Rounded round_matrix(const FloatMatrix& w, const RoundingSpec& spec, const GptqFactor* factor,
                     int threads) {
  TQ_CHECK(spec.bits == 3 || spec.bits == 4 || (spec.bits == 8 && !spec.two_level));
  TQ_CHECK(spec.group > 0 && kBlock % spec.group == 0);
  TQ_CHECK(!factor || factor->n == w.cols);
  const float half = static_cast<float>(1 << (spec.bits - 1));
  const CodeRange range = {spec.bits == 8 ? 1 - half : -half, half - 1};
  Rounded result;
  OwnedMatrix& out = result.matrix;
  out.storage = spec.bits == 8 ? Storage::kQ8 : Storage::kQ4;
  out.rows = w.rows;
  out.cols = w.cols;
  out.group = spec.group;
  out.data.resize(out.view().data_bytes());
  out.scales.resize(out.view().scale_bytes() / 2);
  const auto column = [&](int64_t at) { return factor ? factor->column(at) : at; };
  std::vector<int64_t> position(static_cast<size_t>(w.cols));
  for (int64_t at = 0; at < w.cols; ++at) position[static_cast<size_t>(column(at))] = at;
  const int64_t all = n_strips(w.rows);
  const int64_t together =
      factor ? std::clamp<int64_t>(all / (kTurnsPerThread * threads), 1, kMostStrips) : 1;
  PerWorker<std::vector<StripBuffers>> scratch(threads);
  std::atomic<int64_t> n_clipped = 0;
  parallel_items(threads, (all + together - 1) / together, [&](int64_t item, int worker) {
    std::vector<StripBuffers>& buffers = scratch.get(worker);
    while (std::ssize(buffers) < together) buffers.emplace_back(w.cols, out.view().n_groups());
    const int64_t first = item * together;
    const std::span strips(buffers.data(), static_cast<size_t>(std::min(together, all - first)));
    for (size_t i = 0; i < strips.size(); ++i) {
      load_strip(w, first + static_cast<int64_t>(i), column, strips[i].columns.as<float>());
      if (spec.two_level) find_units(spec, range, w.cols, strips[i]);
    }
    n_clipped += round_strips(w.cols, w.rows - first * kStripRows, spec, range, factor, strips);
    for (size_t i = 0; i < strips.size(); ++i) {
      store_strip(strips[i], position, first + static_cast<int64_t>(i), spec, out);
    }
  });
  result.n_clipped = n_clipped;
  return result;
}

}  // namespace tq
