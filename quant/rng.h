// rng - the quantizer's random numbers: splitmix64, fixed here so that files stay reproducible.
//
// The standard library's distributions differ between implementations; these do not.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

namespace tq {

/// Steele, Lea, Flood 2014. Independent streams come from mixing a stream number into the seed.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed, uint64_t stream = 0) : state_(seed) {
    state_ = next() ^ (stream * 0xD1B54A32D192ED03ull);
  }
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  /// In [0, 1), 53 bits.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  /// Standard normal, by Box and Muller.
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }
  /// Where the stream stands: a generator with this state goes on alike.
  uint64_t& state() { return state_; }
  int8_t sign() { return next() >> 63 ? int8_t{-1} : int8_t{1}; }

 private:
  uint64_t state_;
};

}  // namespace tq
