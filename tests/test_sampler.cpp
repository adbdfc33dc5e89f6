// Sampler: filters, ties, reproducibility.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "model/error.h"
#include "model/sampler.h"

namespace tq {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

int32_t sample(Sampler& sampler, const std::vector<float>& logits) {
  std::vector<Candidate> candidates;
  top_candidates(logits, sampler.n_candidates(), candidates);
  return sampler.sample(candidates);
}

std::map<int32_t, int> draw(SamplerOptions options, const std::vector<float>& logits, int count) {
  Sampler sampler(options);
  std::map<int32_t, int> seen;
  for (int i = 0; i < count; ++i) ++seen[sample(sampler, logits)];
  return seen;
}

TEST(Sampler, GreedyTakesTheLowestIdOnTies) {
  Sampler greedy({});
  EXPECT_EQ(sample(greedy, {1, 3, 3, 2}), 1);
}

// transformers: a positive score is divided, a negative one multiplied, before all else.
TEST(Sampler, RepetitionPenaltyLowersWhatOccurredInPromptAndAnswer) {
  SamplerOptions options;
  options.repetition_penalty = 2;
  Sampler greedy(options);
  greedy.begin(std::vector<int32_t>{0});
  EXPECT_EQ(greedy.n_candidates(), 2);
  const std::vector<float> logits = {3, 2, 1.75, 1};
  EXPECT_EQ(sample(greedy, logits), 1);  // 0 counts 1.5
  EXPECT_EQ(sample(greedy, logits), 2);  // 1 counts 1
  EXPECT_EQ(sample(greedy, logits), 0);
  greedy.begin({});
  EXPECT_EQ(sample(greedy, logits), 0);
  greedy.begin(std::vector<int32_t>{0});
  EXPECT_EQ(sample(greedy, {-1, -1.5}), 1);
  options.repetition_penalty = 0.5;  // rewards
  Sampler fond(options);
  fond.begin(std::vector<int32_t>{3});
  EXPECT_EQ(fond.n_candidates(), 0);
  EXPECT_EQ(sample(fond, {3, 2, 1, 2}), 3);
}

TEST(Sampler, FrequenciesFollowTheSoftmax) {
  SamplerOptions options;
  options.temperature = 1;
  // Probabilities 1/7, 2/7, 4/7. 70,000 draws: five standard deviations of a count are below 660.
  const auto seen = draw(options, {0, std::log(2.0f), std::log(4.0f)}, 70000);
  EXPECT_NEAR(seen.at(0), 10000, 660);
  EXPECT_NEAR(seen.at(1), 20000, 660);
  EXPECT_NEAR(seen.at(2), 40000, 660);
}

TEST(Sampler, TemperatureSharpens) {
  SamplerOptions options;
  options.temperature = 0.5;  // squares the odds: 1 : 4
  const auto seen = draw(options, {0, std::log(2.0f)}, 50000);
  EXPECT_NEAR(seen.at(0), 10000, 450);
}

TEST(Sampler, TopKKeepsTheLargest) {
  SamplerOptions options;
  options.temperature = 10;
  options.top_k = 2;
  const auto seen = draw(options, {1, 5, 2, 4}, 1000);
  EXPECT_EQ(seen.size(), 2u);
  EXPECT_TRUE(seen.count(1) && seen.count(3));
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesP) {
  SamplerOptions options;
  options.temperature = 1;
  options.top_p = 0.6;  // 4/7 is not enough, so the second is kept too
  EXPECT_EQ(draw(options, {0, std::log(2.0f), std::log(4.0f)}, 1000).size(), 2u);
  options.top_p = 0.5;
  EXPECT_EQ(draw(options, {0, std::log(2.0f), std::log(4.0f)}, 1000).size(), 1u);
}

TEST(Sampler, MinPIsRelativeToTheLargest) {
  SamplerOptions options;
  options.temperature = 1;
  options.min_p = 0.3;  // 1/4 of the largest goes, 2/4 stays
  const auto seen = draw(options, {0, std::log(2.0f), std::log(4.0f)}, 1000);
  EXPECT_EQ(seen.count(0), 0u);
  EXPECT_EQ(seen.size(), 2u);
}

TEST(Sampler, SameSeedSameDraws) {
  SamplerOptions options;
  options.temperature = 1;
  options.seed = 7;
  const std::vector<float> logits = {0, 0, 0, 0, 0, 0, 0, 0};
  Sampler a(options), b(options);
  options.seed = 8;
  Sampler c(options);
  int differ = 0;
  for (int i = 0; i < 100; ++i) {
    const int32_t id = sample(a, logits);
    EXPECT_EQ(id, sample(b, logits));
    differ += id != sample(c, logits);
  }
  EXPECT_GT(differ, 50);
}

TEST(Sampler, CandidatesAreSortedWithTiesByIdAndBrokenOnesFirst) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto ids = [](const std::vector<float>& logits, int64_t count) {
    std::vector<Candidate> candidates;
    top_candidates(logits, count, candidates);
    std::vector<int32_t> result;
    for (const Candidate& candidate : candidates) result.push_back(candidate.id);
    return result;
  };
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(ids({0.0f, 2, -0.0f, 2, 1}, 4), (Ids{1, 3, 4, 0}));
  EXPECT_EQ(ids({0.0f, 2, -0.0f, 2, 1}, 0), (Ids{1, 3, 4, 0, 2}));
  EXPECT_EQ(ids({5, 1, 7}, 9), (Ids{2, 0, 1}));
  EXPECT_EQ(ids({3, 1, nan, 2}, 2), (Ids{2, 0}));
  EXPECT_EQ(ids({3, kMinusInf, nan, -kMinusInf, 4}, 0), (Ids{1, 2, 3, 4, 0}));
}

TEST(Sampler, WhatIsNotFiniteIsNotSampled) {
  Sampler greedy({});
  for (float broken : {std::numeric_limits<float>::quiet_NaN(), kMinusInf, -kMinusInf}) {
    EXPECT_THROW(sample(greedy, {1, broken}), Error);
  }
}

}  // namespace
}  // namespace tq
