// standalone - runs a fuzz target without libFuzzer, the same on every machine: each file of its
// corpus, then simple mutations of them. Fails where the target takes more memory than 10 times the
// input and 100 MB, or more than ten seconds.
//
//   fuzz_config CORPUS_FOLDER MUTATIONS
#include <malloc.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <iterator>
#include <random>
#include <vector>

#include "tests/fuzz/fuzz.h"

namespace {

std::atomic<size_t> g_bytes{0}, g_peak{0};

void* counted(void* memory) {
  if (!memory) return memory;
  const size_t now = g_bytes += malloc_usable_size(memory);
  if (now > g_peak) g_peak = now;
  return memory;
}
void uncounted(void* memory) {
  if (memory) g_bytes -= malloc_usable_size(memory);
}

}  // namespace

#if !defined(__SANITIZE_ADDRESS__)
// The heap of this program, counted. Under AddressSanitizer the heap is its own.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

void* malloc(size_t bytes) {
  return counted(__libc_malloc(bytes));
}
void* calloc(size_t n, size_t bytes) {
  return counted(__libc_calloc(n, bytes));
}
void* realloc(void* old, size_t bytes) {
  uncounted(old);
  void* memory = __libc_realloc(old, bytes);
  return counted(memory ? memory : bytes > 0 ? old : nullptr), memory;
}
void* memalign(size_t alignment, size_t bytes) {
  return counted(__libc_memalign(alignment, bytes));
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  return memalign(alignment, bytes);
}
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  void* memory = memalign(alignment, bytes);
  if (!memory) return 12;  // ENOMEM
  *out = memory;
  return 0;
}
void free(void* memory) {
  uncounted(memory);
  __libc_free(memory);
}
}
#endif

namespace {

constexpr size_t kFreeBytes = 100 << 20;
constexpr double kMaxSeconds = 10;

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// A few changes of bytes and of stretches; pieces of other inputs.
std::string mutated(std::string text, const std::vector<std::string>& inputs, std::mt19937& rng) {
  const auto below = [&](size_t n) { return n ? rng() % n : 0; };
  for (size_t change = 0, n = 1 + below(4); change < n; ++change) {
    const size_t at = below(text.size() + 1),
                 length = below(std::min<size_t>(text.size() - at, 40) + 1);
    switch (below(7)) {
      case 0:
        if (at < text.size()) text[at] = static_cast<char>(rng());
        break;
      case 1:
        if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      case 2:
        text.erase(at, length);
        break;
      case 3:
        text.insert(at, text.substr(at, length));
        break;
      case 4: {
        const std::string& other = inputs[below(inputs.size())];
        const size_t from = below(other.size() + 1);
        text.insert(at, other.substr(from, below(60)));
        break;
      }
      case 5: {
        const char* const words[] = {
            "0",  "-1",   "18446744073709551616", "1e400", "null",         "[]",
            "{}", "\"\"", "9007199254740993",     "\xff",  "\xe2\x80\xae", "\\u0000"};
        text.replace(at, length, words[below(std::size(words))]);
        break;
      }
      default:
        text.resize(below(64) ? text.size() : at);
    }
  }
  return text;
}

bool run_one(const std::string& input) {
  const auto start = std::chrono::steady_clock::now();
  const size_t before = g_bytes;
  g_peak = before;
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const size_t taken = g_peak - before;
  if (taken <= 10 * input.size() + kFreeBytes && seconds <= kMaxSeconds) return true;
  std::fprintf(stderr, "an input of %zu bytes took %zu bytes and %.1f s\n", input.size(), taken,
               seconds);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) paths.push_back(entry);
  std::sort(paths.begin(), paths.end());
  std::vector<std::string> inputs;
  for (const auto& path : paths) inputs.push_back(read_file(path));
  if (inputs.empty()) return 2;
  inputs.emplace_back();
  // What is made once, in the first run, does not count.
  LLVMFuzzerTestOneInput(nullptr, 0);
  for (const std::string& input : inputs) {
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  }
  std::mt19937 rng(1);
  const long n = std::atol(argv[2]);
  bool good = true;
  for (const std::string& input : inputs) good &= run_one(input);
  for (long i = 0; i < n; ++i) {
    const std::string input = mutated(inputs[rng() % inputs.size()], inputs, rng);
    // What crashes or hangs is found under this name.
    tq::write_file("input", input);
    good &= run_one(input);
  }
  if (good) std::filesystem::remove_all(tq::fuzz_folder());
  std::printf("%zu inputs, %ld mutations: %s\n", inputs.size(), n, good ? "ok" : "failed");
  return good ? 0 : 1;
}
