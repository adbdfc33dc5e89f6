// Matrix products for training: a double reference, and the same bits everywhere.
#include <gtest/gtest.h>

#include "cpu/gemm.h"
#include "tests/cpu_cases.h"

namespace tq {
namespace {

struct GemmCase {
  int64_t rows, cols, depth;
};
// Around every tile: 6 rows, 16 and 64 columns, 8 x 8 transposes, 256 products, 512 columns.
const GemmCase kCases[] = {{1, 1, 1},    {5, 3, 7},     {6, 64, 256},  {7, 65, 257},
                           {13, 31, 30}, {64, 96, 300}, {97, 530, 20}, {50, 48, 515}};
enum class Order { kNT, kNN, kTN };

GemmJob job_of(const GemmCase& shape, Order order, const std::vector<float>& a,
               const std::vector<float>& b, std::vector<float>& c, bool accumulate) {
  GemmJob job = {};
  job.a = a.data();
  job.a_row = order == Order::kTN ? 1 : shape.depth;
  job.a_depth = order == Order::kTN ? shape.rows : 1;
  job.b = b.data();
  job.b_depth = order == Order::kNT ? 1 : shape.cols;
  job.b_col = order == Order::kNT ? shape.depth : 1;
  job.c = c.data();
  job.c_row = shape.cols;
  job.rows = shape.rows;
  job.cols = shape.cols;
  job.depth = shape.depth;
  job.accumulate = accumulate;
  return job;
}

TEST(Gemm, AllOrdersAreWithinTheBoundOfADoubleReference) {
  for (const GemmCase& shape : kCases) {
    const std::vector<float> a = random_floats(shape.rows * shape.depth, 1);
    const std::vector<float> b = random_floats(shape.depth * shape.cols, 2);
    const std::vector<float> before = random_floats(shape.rows * shape.cols, 3);
    for (Order order : {Order::kNT, Order::kNN, Order::kTN}) {
      for (bool accumulate : {false, true}) {
        std::vector<float> c = before;
        const GemmJob job = job_of(shape, order, a, b, c, accumulate);
        run_gemms(kernels_for(best_isa()), 2, {&job, 1});
        for (int64_t i = 0; i < shape.rows; ++i) {
          for (int64_t j = 0; j < shape.cols; ++j) {
            const size_t at = static_cast<size_t>(i * shape.cols + j);
            double exact = accumulate ? double{before[at]} : 0.0, size = std::fabs(exact);
            for (int64_t k = 0; k < shape.depth; ++k) {
              const double term = double{job.a[i * job.a_row + k * job.a_depth]} *
                                  double{job.b[k * job.b_depth + j * job.b_col]};
              exact += term;
              size += std::fabs(term);
            }
            // min(depth, 256) fma a chain, then one addition a block of 256.
            const double roundings = std::min<double>(static_cast<double>(shape.depth), 256) + 4;
            ASSERT_NEAR(c[at], exact, roundings * 0x1.0p-24 * size) << i << " " << j;
          }
        }
      }
    }
  }
}

TEST(Gemm, BitsDependNeitherOnInstructionSetNorOnThreads) {
  for (const GemmCase& shape : kCases) {
    const std::vector<float> a = random_floats(shape.rows * shape.depth, 4);
    const std::vector<float> b = random_floats(shape.depth * shape.cols, 5);
    for (Order order : {Order::kNT, Order::kNN, Order::kTN}) {
      for (bool accumulate : {false, true}) {
        std::vector<float> plain = random_floats(shape.rows * shape.cols, 6);
        const std::vector<float> before = plain;
        plain_gemm(job_of(shape, order, a, b, plain, accumulate));
        for (CpuIsa isa : supported_isas()) {
          for (int threads : {1, 2, 5}) {
            std::vector<float> c = before;
            const GemmJob job = job_of(shape, order, a, b, c, accumulate);
            run_gemms(kernels_for(isa), threads, {&job, 1});
            ASSERT_TRUE(same_numbers(c, plain)) << isa_name(isa) << " threads " << threads;
          }
        }
      }
    }
  }
}

TEST(Gemm, ManyJobsInOneCallAreTheSameAsOneByOne) {
  const GemmCase shape = {70, 40, 90};
  const std::vector<float> a = random_floats(shape.rows * shape.depth, 7);
  const std::vector<float> b = random_floats(shape.depth * shape.cols, 8);
  std::vector<std::vector<float>> c(3, std::vector<float>(70 * 40));
  std::vector<GemmJob> jobs;
  for (std::vector<float>& out : c) jobs.push_back(job_of(shape, Order::kNT, a, b, out, false));
  run_gemms(kernels_for(best_isa()), 2, jobs);
  std::vector<float> alone(70 * 40);
  const GemmJob job = job_of(shape, Order::kNT, a, b, alone, false);
  run_gemms(kernels_for(best_isa()), 1, {&job, 1});
  for (const std::vector<float>& out : c) EXPECT_TRUE(same_numbers(out, alone));
}

}  // namespace
}  // namespace tq
