// kv_range - bounds of keys and values, and what follows from them. See kv_range.h.
//
// A normalised row n has |n| <= sqrt(dim), so with gain g and a row w of a linear
//     |y| = |sum_j w_j g_j n_j| <= |w| max|g| sqrt(dim)        (a rotation of the input changes no
//     |w|)
// with a branch |w| is |R_i| + |B_i| |A|_F. RoPE and the Hadamard matrix of a head keep the length
// of a head's vector, which therefore bounds each of its elements. Qwen3's norms of heads bound q
// and k by themselves: max|gain| sqrt(head_dim).
#include "model/kv_range.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace tq {
namespace {

// Rounding of the input may lengthen it: by half a step an element, less than half of its group.
constexpr double kRoundedInput = 1.6;
// Bounds between these are left alone. What a bound allows is some hundred times what a layer puts
// out as a rule, so the lower ones are where ordinary numbers would be below f16's 2^-14.
constexpr double kLargest = 60000.0, kSmallestValue = 0x1p-4, kSmallestKey = 1.0;
// Of queries, which the GPU's f16 kernels multiply by log2(e) / sqrt(head_dim), below 0.6.
constexpr double kLargestQuery = 100000.0;
// How far a rough bound may be above the exact one, as a rule.
constexpr double kRoughness = 16.0;
// What the bound of a value becomes, and the largest that the bound of a key may.
constexpr int kValueExponent = 6, kMostKeyExponent = 15;

double largest_magnitude(const std::vector<float>& values) {
  float largest = 0;
  for (float value : values) largest = std::max(largest, std::fabs(value));
  return double{largest};
}

// The largest of `count` floating-point numbers without their signs: bits that order like integers.
template <typename Bits>
Bits largest_bits(const void* numbers, int64_t count) {
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  constexpr int64_t kLanes = 16 / sizeof(Bits);
  typedef Bits Lanes __attribute__((vector_size(16)));  // every x86-64 has these
  const std::byte* from = static_cast<const std::byte*>(numbers);
  Lanes lanes = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Lanes next;
    std::memcpy(&next, from + i * static_cast<int64_t>(sizeof(Bits)), sizeof next);
    next &= kMagnitude;
    lanes = next > lanes ? next : lanes;
  }
  Bits largest = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) largest = std::max(largest, lanes[lane]);
  for (; i < count; ++i) {
    Bits next;
    std::memcpy(&next, from + i * static_cast<int64_t>(sizeof next), sizeof next);
    largest = std::max(largest, static_cast<Bits>(next & kMagnitude));
  }
  return largest;
}
uint16_t largest_half(const void* numbers, int64_t count) {
  return static_cast<uint16_t>(largest_bits<int16_t>(numbers, count));
}

// At least |row|, at memory speed: from the largest element, which in a packed row is at most 8 or
// 127 of the largest scales.
double rough_norm(const Matrix& m, int64_t row) {
  const std::byte* data = m.data + row * m.row_bytes();
  double largest = 0;
  if (m.packed()) {
    const uint16_t scale = largest_half(m.scales + row * m.n_groups(), m.n_groups());
    largest = double{f16_to_f32(scale)} * (m.storage == Storage::kQ4 ? 8 : 127);
  } else if (m.storage == Storage::kF32) {
    largest = double{std::bit_cast<float>(largest_bits<int32_t>(data, m.cols))};
  } else {
    const uint16_t half = largest_half(data, m.cols);
    largest = double{m.storage == Storage::kF16 ? f16_to_f32(half) : bf16_to_f32(half)};
  }
  return largest * std::sqrt(static_cast<double>(m.cols));
}

double exact_norm(const Matrix& m, int64_t row, std::vector<float>& scratch) {
  scratch.resize(static_cast<size_t>(m.cols));
  matrix_row_f32(m, row, scratch.data());
  double sum = 0;
  for (float value : scratch) sum += double{value} * double{value};
  return std::sqrt(sum);
}

// Bounds of what a linear that reads a norm's output puts out.
class OutputBounds {
 public:
  OutputBounds(const Linear& linear, const std::vector<float>& gain)
      : linear_(linear),
        input_(std::sqrt(static_cast<double>(gain.size())) * largest_magnitude(gain) *
               (linear.act.bits < 16 ? kRoundedInput : 1.0)) {}

  double of_row(int64_t row, bool exact) {
    double norm = norm_of(linear_.weight, row, exact);
    if (linear_.branch_a) norm += norm_of(*linear_.branch_b, row, exact) * branch_norm(exact);
    const int exponent = linear_.exponents ? linear_.exponents[row] : 0;
    return std::ldexp(norm * input_, exponent);
  }
  /// Of the length of rows [first, first + count) of one token's output; exactly only where that
  /// may decide whether it is below `smallest` or above `largest`.
  double of_rows(int64_t first, int64_t count, double smallest, double largest) {
    double bound = 0;
    for (bool exact : {false, true}) {
      double sum = 0;
      for (int64_t row = first; row < first + count; ++row) {
        sum += std::pow(of_row(row, exact), 2);
      }
      bound = std::sqrt(sum);
      if (bound >= kRoughness * smallest && bound <= largest) break;
    }
    return bound;
  }

 private:
  double norm_of(const Matrix& m, int64_t row, bool exact) {
    return exact ? exact_norm(m, row, scratch_) : rough_norm(m, row);
  }
  double branch_norm(bool exact) {
    double& known = branch_norms_[exact];
    if (known >= 0) return known;
    double sum = 0;
    for (int64_t row = 0; row < linear_.rank(); ++row) {
      sum += std::pow(norm_of(*linear_.branch_a, row, exact), 2);
    }
    return known = std::sqrt(sum);
  }

  const Linear& linear_;
  double input_;
  double branch_norms_[2] = {-1, -1};
  std::vector<float> scratch_;
};

int exponent_of(double bound) {
  return bound > 0 ? static_cast<int>(std::ceil(std::log2(bound))) : 0;
}

// The e with which keys times 2^-e and queries times 2^e are both of ordinary size.
int key_exponent(double key, double query) {
  const int e = query > 0 ? (exponent_of(key) - exponent_of(query)) / 2 : exponent_of(key);
  return std::clamp(std::max(e, exponent_of(key) - kMostKeyExponent), kMinExponent, -kMinExponent);
}

bool fit(double key, double query) {
  return (key == 0 || !(key < kSmallestKey || key > kLargest)) && !(query > kLargestQuery);
}

void key_exponents(const Config& c, const Layer& layer, KvExponents& result) {
  const auto set = [](std::vector<int>& to, int64_t size, int64_t first, int64_t count, int e) {
    to.resize(static_cast<size_t>(size));
    std::fill_n(to.begin() + first, count, e);
  };
  const double turn = std::fabs(c.rope.attention_factor);
  if (c.has_qk_norm()) {
    const double length = std::sqrt(static_cast<double>(c.head_dim)) * turn;
    const double key = largest_magnitude(layer.k_norm) * length;
    const double query = largest_magnitude(layer.q_norm) * length;
    if (fit(key, query)) return;
    const int e = key_exponent(key, query);
    set(result.k, c.kv_dim(), 0, c.kv_dim(), -e);
    set(result.q, c.q_dim(), 0, c.q_dim(), e);
    return;
  }
  OutputBounds keys(layer.wk, layer.attn_norm), queries(layer.wq, layer.attn_norm);
  const int64_t shared =
      c.n_heads / c.n_kv_heads * c.head_dim;  // columns of q that read a key head
  for (int64_t head = 0; head < c.n_kv_heads; ++head) {
    const double key =
        turn * keys.of_rows(head * c.head_dim, c.head_dim, kSmallestKey / turn, kLargest / turn);
    double query = 0;
    for (int64_t first = head * shared; first < (head + 1) * shared; first += c.head_dim) {
      query = std::max(query, turn * queries.of_rows(first, c.head_dim, 0, kLargestQuery / turn));
    }
    if (fit(key, query)) continue;
    const int e = key_exponent(key, query);
    set(result.k, c.kv_dim(), head * c.head_dim, c.head_dim, -e);
    set(result.q, c.q_dim(), head * shared, shared, e);
  }
}

bool value_fits(double bound) {
  return bound == 0 || !(bound < kSmallestValue || bound > kLargest);
}

// One exponent a head, so that its elements keep their proportions for codes; an element that is
// still out of range has its own.
void value_exponents(const Config& c, const Layer& layer, KvExponents& result) {
  OutputBounds values(layer.wv, layer.attn_norm);
  const int64_t n_shared = c.n_heads / c.n_kv_heads;
  std::vector<double> bounds(static_cast<size_t>(c.head_dim));
  for (int64_t head = 0; head < c.n_kv_heads; ++head) {
    for (int64_t i = 0; i < c.head_dim; ++i) {
      bounds[static_cast<size_t>(i)] =
          values.of_rows(head * c.head_dim + i, 1, kSmallestValue, kLargest);
    }
    if (std::all_of(bounds.begin(), bounds.end(), value_fits)) continue;
    const int common = exponent_of(*std::max_element(bounds.begin(), bounds.end()));
    result.v.resize(static_cast<size_t>(c.kv_dim()));
    result.out.resize(static_cast<size_t>(c.q_dim()));
    for (int64_t i = 0; i < c.head_dim; ++i) {
      const double bound = bounds[static_cast<size_t>(i)];
      const bool fits = value_fits(std::ldexp(bound, kValueExponent - common));
      const int e = std::clamp((fits ? common : exponent_of(bound)) - kValueExponent, kMinExponent,
                               -kMinExponent);
      result.v[static_cast<size_t>(head * c.head_dim + i)] = -e;
      for (int64_t reader = head * n_shared; reader < (head + 1) * n_shared; ++reader) {
        result.out[static_cast<size_t>(reader * c.head_dim + i)] = e;
      }
    }
  }
}

}  // namespace

KvExponents kv_exponents(const Config& config, const Layer& layer) {
  KvExponents result;
  key_exponents(config, layer, result);
  value_exponents(config, layer, result);
  return result;
}

}  // namespace tq
