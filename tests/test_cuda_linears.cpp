// test_cuda_linears - the linears of the CUDA backend against the CPU's, on odd shapes: every
// storage, group, rounding of inputs, low-rank branch and transform, for few rows and many.
//
// Not here: all other operations (test_cuda_ops.cpp). Read next: cuda_fixture.h, then
// cuda/executor.cpp, which decides what is launched.
#include "tests/cuda_fixture.h"

namespace tq {
namespace {

struct LinearCase {
  std::string name;
  Storage weight = Storage::kQ4;
  int64_t out = 48, in = 128, weight_group = 64;
  ActQuant act = {4, 64, 1.0f, ActCodes::kSymmetric};
  int64_t rank = 0, branch_group = 32;
  Storage branch = Storage::kQ4;
  int64_t block = 0;  // Hadamard
  bool two_level_weights = false;
};

// Every row's scales become multiples of a number of its own.
void make_two_level(CaseMatrix& matrix, uint32_t seed) {
  const int64_t n_groups = matrix.view.n_groups();
  for (size_t i = 0; i < matrix.scales.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / n_groups;
    const uint32_t noise = (static_cast<uint32_t>(i) + seed) * 2654435761u >> 16;
    const float unit = static_cast<float>(64 + row * 37 % 64) * 0x1p-16f;  // 7 bits
    matrix.scales[i] = f32_to_f16(static_cast<float>(1 + noise % kMostMultiple) * unit);
  }
}

// Two-level scales: groups, ends of codes, clips; branches of one and more stages, and of more than
// the kernel takes; weights whose scales are ordinary.
void add_two_level_cases(std::vector<LinearCase>& cases) {
  const auto add = [&](LinearCase c) {
    c.two_level_weights = true;
    c.act.two_level = true;
    cases.push_back(c);
  };
  for (int64_t group : {32, 64, 128}) {
    add({"two-level", Storage::kQ4, 272, 704, group, {4, group, 1.0f, ActCodes::kAll}});
    add({"two-level", Storage::kQ4, 272, 672, group, {3, 64, 0.9f, ActCodes::kSymmetric}});
  }
  add({"two-level, 8 bits", Storage::kQ4, 272, 704, 64, {8, 704, 1.0f, ActCodes::kAll}});
  add({"two-level, 8 bits", Storage::kQ4, 96, 200, 64, {8, 200, 1.0f, ActCodes::kSymmetric}, 32});
  add({"two-level, one group", Storage::kQ4, 96, 200, 200, {4, 200, 1.0f, ActCodes::kAll}});
  add({"two-level, wide", Storage::kQ4, 48, 4224, 64, {4, 64, 1.0f, ActCodes::kAll}});
  add({"two-level, wide", Storage::kQ4, 48, 5120, 128, {4, 128, 0.9f, ActCodes::kSymmetric}});
  for (int64_t rank : {8, 32, 128, 144, 300}) {
    const ActQuant act = {4, 64, 1.0f, ActCodes::kAll};
    add({"two-level branch", Storage::kQ4, 312, 320, 64, act, rank, 64});
  }
  for (int64_t in : {1100, 4224}) {  // x A^T shared out among blocks of threads
    for (int64_t rank : {36, 100, 128}) {
      const ActQuant act = {4, 64, 1.0f, ActCodes::kAll};
      add({"two-level branch, wide", Storage::kQ4, 48, in, 64, act, rank, 64});
    }
  }
  const ActQuant wide = {8, 320, 1.0f, ActCodes::kAll};
  add({"two-level branch, 8 bits", Storage::kQ4, 112, 320, 64, wide, 128, 64});
  LinearCase rotated = {"two-level, Hadamard",        Storage::kQ4, 40, 576, 64,
                        {4, 64, 1.0f, ActCodes::kAll}};
  rotated.block = 576;
  add(rotated);
  cases.push_back(
      {"two-level inputs", Storage::kQ4, 96, 704, 64, {4, 64, 1.0f, ActCodes::kAll, true}, 32, 32});
}

std::vector<LinearCase> linear_cases() {
  std::vector<LinearCase> cases;
  for (Storage storage : {Storage::kF32, Storage::kF16, Storage::kBF16}) {
    cases.push_back({"dense", storage, 70, 136, 0, {16, 64, 1.0f, ActCodes::kSymmetric}});
    cases.push_back(
        {"dense, odd columns", storage, 33, 75, 0, {16, 64, 1.0f, ActCodes::kSymmetric}});
    for (int64_t in : {2080, 2075}) {  // shared out among blocks of threads
      cases.push_back({"dense, wide", storage, 70, in, 0, {16, 64, 1.0f, ActCodes::kSymmetric}});
    }
    cases.push_back({"dense, rounded input", storage, 33, 160, 0, {4, 64, 0.9f, ActCodes::kAll}});
  }
  for (Storage storage : {Storage::kQ4, Storage::kQ8}) {
    cases.push_back(
        {"packed, input not rounded", storage, 100, 200, 64, {16, 64, 1.0f, ActCodes::kSymmetric}});
    cases.push_back(
        {"packed, short groups", storage, 21, 56, 8, {8, 32, 1.0f, ActCodes::kSymmetric}});
  }
  for (int bits : {3, 4, 8}) {
    for (ActCodes codes : {ActCodes::kSymmetric, ActCodes::kAll, ActCodes::kAsymmetric}) {
      if (codes == ActCodes::kAsymmetric && bits == 8) continue;
      cases.push_back({"fragments", Storage::kQ4, 96, 576, 64, {bits, 64, 1.0f, codes}});
      cases.push_back({"clip", Storage::kQ4, 50, 300, 64, {bits, 64, 0.9f, codes}});
      cases.push_back({"whole rows", Storage::kQ4, 96, 704, 128, {bits, 704, 1.0f, codes}});
    }
  }
  for (const auto& [w, x] : {std::pair<int64_t, int64_t>{32, 32},
                             {128, 32},
                             {128, 128},
                             {64, 128},
                             {32, 64},
                             {128, 64},
                             {1000, 64},
                             {64, 1000},
                             {1000, 1000}}) {
    cases.push_back({"groups", Storage::kQ4, 272, 704, w, {4, x, 1.0f, ActCodes::kAll}});
  }
  cases.push_back(
      {"one wide", Storage::kQ4, 1000, 2080, 128, {8, 128, 1.0f, ActCodes::kSymmetric}});
  for (int64_t rank : {8, 32, 128, 144}) {
    cases.push_back(
        {"branch", Storage::kQ4, 112, 320, 64, {4, 64, 1.0f, ActCodes::kSymmetric}, rank, 32});
    cases.push_back(
        {"branch", Storage::kQ4, 112, 320, 64, {8, 64, 1.0f, ActCodes::kAll}, rank, 64});
  }
  const ActQuant all = {4, 64, 1.0f, ActCodes::kAll};
  cases.push_back({"16-bit branch", Storage::kQ4, 80, 256, 64, all, 32, 0, Storage::kBF16});
  cases.push_back({"8-bit branch", Storage::kQ4, 80, 256, 64, all, 32, 32, Storage::kQ8});
  cases.push_back(
      {"asymmetric branch", Storage::kQ4, 112, 320, 64, {4, 320, 1.0f, ActCodes::kAsymmetric}, 32});
  cases.push_back(
      {"8-bit weight", Storage::kQ8, 80, 256, 64, {4, 64, 1.0f, ActCodes::kAsymmetric}});
  for (int64_t block : {256, 576, 384, 1536, 2304}) {  // 2^8, 36 2^4, 12 2^5, 12 2^7, 36 2^6
    cases.push_back({"Hadamard",
                     Storage::kQ4,
                     40,
                     block == 256 || block == 1536 ? 2 * block : block,
                     64,
                     {4, 64, 1.0f, ActCodes::kAll},
                     0,
                     32,
                     Storage::kQ4,
                     block});
  }
  cases.push_back({"Hadamard, f32",
                   Storage::kF32,
                   40,
                   172,
                   64,
                   {16, 64, 1.0f, ActCodes::kSymmetric},
                   0,
                   32,
                   Storage::kQ4,
                   172});
  add_two_level_cases(cases);
  return cases;
}

// Who reads the input: two linears and a third with another rounding, or the two. `normed`: it
// comes out of a norm and nobody else reads it, so that a kernel may keep it to itself.
struct Readers {
  size_t count = 3;
  bool normed = false;
};

// The same call on both backends.
void compare_linears(Backend& cpu, Backend& gpu, const LinearCase& c, int64_t rows, uint32_t seed,
                     Readers readers = {}) {
  SCOPED_TRACE(testing::Message() << c.name << ", storage " << static_cast<int>(c.weight) << ", "
                                  << c.out << " x " << c.in << ", groups " << c.weight_group << " "
                                  << c.act.group << ", " << c.act.bits << " bits, rank " << c.rank
                                  << ", " << rows << " rows, seed " << seed << ", " << readers.count
                                  << " linears" << (readers.normed ? ", norm" : ""));
  std::vector<int8_t> signs(static_cast<size_t>(c.in));
  for (size_t i = 0; i < signs.size(); ++i) signs[i] = (i * 2654435761u >> 7 & 1) ? 1 : -1;
  std::vector<CaseMatrix> matrices;
  matrices.reserve(9);
  std::vector<Linear> linears;
  for (int64_t i = 0; i < 3; ++i) {
    Linear linear;
    const int64_t out = c.out + 3 * i;
    matrices.emplace_back(c.weight, out, c.in, c.weight_group, seed + static_cast<uint32_t>(i));
    if (c.two_level_weights) make_two_level(matrices.back(), seed);
    linear.weight = matrices.back().view;
    linear.act = c.act;
    if (i == 2) linear.act.bits = 16;
    if (c.rank > 0 && i != 1) {
      matrices.emplace_back(c.branch, c.rank, c.in, c.weight_group, seed + 10);
      if (c.two_level_weights) make_two_level(matrices.back(), seed);
      linear.branch_a = matrices.back().view;
      matrices.emplace_back(c.branch, out, c.rank, c.branch_group, seed + 11);
      if (c.two_level_weights) make_two_level(matrices.back(), seed);
      linear.branch_b = matrices.back().view;
    }
    if (c.block > 0) {
      linear.input.kind = Transform::Kind::kHadamard;
      linear.input.size = c.in;
      linear.input.block = c.block;
      linear.input.signs = signs.data();
    }
    linears.push_back(linear);
  }
  linears.resize(readers.count);
  std::vector<float> x = random_floats(rows * c.in, seed + 20);
  const std::vector<float> raw = x, gain = random_floats(c.in, seed + 21);
  constexpr float kNormEps = 1e-5f;
  if (readers.normed) {
    const BufferPtr in = to_device(cpu, raw), gains = to_device(cpu, gain);
    const BufferPtr out = cpu.alloc(rows * c.in);
    cpu.rms_norm(*in, *gains, kNormEps, rows, c.in, *out);
    x = to_host(cpu, *out, rows * c.in);
  }
  std::vector<std::vector<float>> results[2];
  for (Backend* backend : {&cpu, &gpu}) {
    std::vector<std::unique_ptr<PreparedLinear>> prepared;
    std::vector<BufferPtr> outs;
    std::vector<const PreparedLinear*> weights;
    std::vector<DeviceBuffer*> out_pointers;
    for (const Linear& linear : linears) {
      prepared.push_back(backend->prepare(linear));
      const std::vector<float> empty(static_cast<size_t>(rows * linear.out_dim() + kGuard),
                                     kSentinel);
      outs.push_back(to_device(*backend, empty));
      weights.push_back(prepared.back().get());
      out_pointers.push_back(outs.back().get());
    }
    const BufferPtr in = to_device(*backend, raw), gains = to_device(*backend, gain);
    const BufferPtr normed = backend->alloc(rows * c.in);
    const auto norm = [&] { backend->rms_norm(*in, *gains, kNormEps, rows, c.in, *normed); };
    if (readers.normed) norm();
    backend->linears(weights, readers.normed ? *normed : *in, rows, out_pointers);
    if (readers.normed) norm();  // the result before this one is lost
    for (size_t i = 0; i < linears.size(); ++i) {
      results[backend == &gpu].push_back(
          to_host(*backend, *outs[i], rows * linears[i].out_dim() + kGuard));
    }
  }
  for (size_t which = 0; which < linears.size(); ++which) {
    const Linear& linear = linears[which];
    const int64_t out = linear.out_dim();
    std::vector<double> row_norms;
    double a_norm = 0;
    std::vector<float> row(static_cast<size_t>(std::max(c.in, c.rank)));
    for (int64_t i = 0; i < c.rank && linear.branch_a; ++i) {
      matrix_row_f32(*linear.branch_a, i, row.data());
      a_norm = std::hypot(a_norm, norm(row.data(), c.in));
    }
    for (int64_t i = 0; i < out; ++i) {
      matrix_row_f32(linear.weight, i, row.data());
      double total = norm(row.data(), c.in);
      if (linear.branch_b) {
        matrix_row_f32(*linear.branch_b, i, row.data());
        total += a_norm * norm(row.data(), c.rank);
      }
      row_norms.push_back(total);
    }
    // Both sides add at most in + rank products in f32, in different orders: each is within
    // gamma_(in + rank) |x'||w| of the truth. Rounding x to 3 bits or more adds less than half of
    // its norm to x'; the factor 4 covers that, both sides, and the steps of h.
    double gamma = static_cast<double>(c.in + c.rank) * kEps * 4;
    // More than 4 rows in f32 are multiplied as two bf16 parts, and so are most weights they meet.
    const auto meets_f32 = [&](const Matrix& w) {
      return linear.act.bits == 16 || (w.storage != Storage::kQ4 && w.storage != Storage::kQ8);
    };
    if (rows > 4 &&
        (meets_f32(linear.weight) || (linear.branch_a && meets_f32(*linear.branch_a)))) {
      gamma += 3 * 0x1p-18;
    }
    for (size_t i = static_cast<size_t>(rows * out); i < results[1][which].size(); ++i) {
      ASSERT_EQ(results[1][which][i], kSentinel) << "sentinel";
    }
    results[0][which].resize(static_cast<size_t>(rows * out));
    results[1][which].resize(static_cast<size_t>(rows * out));
    expect_near(results[1][which], results[0][which], [&](size_t i) {
      const int64_t token = static_cast<int64_t>(i) / out;
      return gamma * norm(x.data() + token * c.in, c.in) * row_norms[i % static_cast<size_t>(out)];
    });
  }
}

TEST_F(Cuda, LinearsAgreeWithTheCpu) {
  for (const LinearCase& c : linear_cases()) {
    for (int64_t rows : {1, 2, 7, 8, 9, 16, 17, 65, 150}) {
      compare_linears(cpu(), gpu(), c, rows, kSeeds[rows % 5]);
      if (HasFatalFailure()) return;
    }
  }
}

// One row that the product rounds itself, in every block of threads: few panels and more than the
// device has room for at once.
TEST_F(Cuda, OneRowRoundedByTheProductAgreesWithTheCpu) {
  std::vector<LinearCase> cases = linear_cases();
  const ActQuant all = {4, 64, 1.0f, ActCodes::kAll};
  for (int64_t rank : {0, 32, 200, 300}) {
    cases.push_back({"many panels", Storage::kQ4, 2300, 4096, 64, all, rank, 64});
    cases.push_back(
        {"many panels", Storage::kQ4, 2300, 2080, 32, {8, 32, 1.0f, ActCodes::kAll}, rank, 32});
    LinearCase two_level = {"many panels, two-level",
                            Storage::kQ4,
                            2300,
                            4000,
                            128,
                            {4, 128, 1.0f, ActCodes::kAll, true},
                            rank,
                            64};
    two_level.two_level_weights = true;
    cases.push_back(two_level);
  }
  for (const LinearCase& c : cases) {
    for (bool normed : {false, true}) {
      compare_linears(cpu(), gpu(), c, 1, kSeeds[cases.size() % 5], {2, normed});
      if (HasFatalFailure()) return;
    }
  }
}

// Enough tiles that the larger ones are chosen, for the products of all kinds of inputs.
TEST_F(Cuda, ManyTilesAgreeWithTheCpu) {
  for (const ActQuant& act :
       {ActQuant{4, 64, 1.0f, ActCodes::kAll}, ActQuant{8, 64, 1.0f, ActCodes::kAll},
        ActQuant{4, 64, 1.0f, ActCodes::kAll, true},
        ActQuant{8, 320, 1.0f, ActCodes::kAll, true}}) {
    for (int64_t out : {2100, 4100}) {
      LinearCase c = {"many tiles", Storage::kQ4, out, 320, 64, act, 128, 64};
      c.two_level_weights = act.two_level;
      compare_linears(cpu(), gpu(), c, 1000, kSeeds[0]);
      if (HasFatalFailure()) return;
    }
  }
}

// The same of f32 inputs, whose rows end inside a tile, and columns inside a stage or not.
TEST_F(Cuda, ManyTilesOfFloatsAgreeWithTheCpu) {
  const ActQuant none = {16, 64, 1.0f, ActCodes::kSymmetric};
  for (Storage storage :
       {Storage::kF32, Storage::kF16, Storage::kBF16, Storage::kQ4, Storage::kQ8}) {
    for (const auto& [out, in] : {std::pair<int64_t, int64_t>{2100, 320}, {4100, 328}}) {
      compare_linears(cpu(), gpu(), {"many tiles", storage, out, in, 64, none}, 1000, kSeeds[0]);
      if (HasFatalFailure()) return;
    }
  }
}

// The kernels of older GPUs, where this one has its own.
TEST_F(Cuda, PortableLinearsAgreeWithTheCpu) {
  const std::unique_ptr<Backend> portable = make_cuda_backend(0, true);
  for (const LinearCase& c : linear_cases()) {
    for (int64_t rows : {5, 8, 17, 150}) {
      compare_linears(cpu(), *portable, c, rows, kSeeds[rows % 5]);
      if (HasFatalFailure()) return;
    }
  }
}

// e4m3 sums must be whole numbers to the last bit: all codes and inputs at the end of their range.
TEST_F(Cuda, LargestSumsOfCodesAreExact) {
  for (int64_t group : {64, 128}) {
    for (float sign : {1.0f, -1.0f}) {
      CaseMatrix w(Storage::kQ4, 256, 512, group, 1);
      std::fill(w.data.begin(), w.data.end(), std::byte{0});  // codes -8
      Linear linear;
      linear.weight = w.view;
      linear.act = {4, group, 1.0f, ActCodes::kAll};
      std::vector<float> x(static_cast<size_t>(128 * 512));
      for (size_t i = 0; i < x.size(); ++i) x[i] = i % 512 % 2 ? -8.0f * sign : -7.0f * sign;
      std::vector<float> results[2];
      for (Backend* backend : {&cpu(), &gpu()}) {
        const auto prepared = backend->prepare(linear);
        const PreparedLinear* weights[] = {prepared.get()};
        const BufferPtr in = to_device(*backend, x), out = guarded(*backend, 128 * 256);
        DeviceBuffer* outs[] = {out.get()};
        backend->linears(weights, *in, 128, outs);
        results[backend == &gpu()] = taken(*backend, *out, 128 * 256);
      }
      EXPECT_EQ(results[0], results[1]) << "groups of " << group;
    }
  }
}

TEST_F(Cuda, LargeLinearsAgreeWithTheCpu) {
  LinearCase c = {"large", Storage::kQ4, 520, 1536, 64, {4, 64, 1.0f, ActCodes::kAll}, 64, 64};
  for (int64_t rows : {1, 16, 257, 512}) compare_linears(cpu(), gpu(), c, rows, 77);
  c.weight_group = c.act.group = 128;
  c.branch_group = 128;
  for (int64_t rows : {4, 300}) compare_linears(cpu(), gpu(), c, rows, 78);
}

}  // namespace
}  // namespace tq
