// SPDX-License-Identifier: Apache-2.0
// Rates of the fused kernel on the GPU at hand, each proved against fp64 on sampled rows first:
//   annulus_fused_rates [--duty] [--head-dims 128,64] [--seq-lens 2048,16384] [--rows dense,causal,fp16,gqa,dilated,carry,longnet,ranks]
// TFLOP/s count 4 head_dim for every (query, key) pair that is seen; "%" is the share of the tensor cores' 4096 FLOP a clock on every
// multiprocessor, from the clock cycles of the slowest one: it repeats where TFLOP/s follow the card's temperature. --duty times
// back-to-back launches: burst, the first 60 ms after half a second of idling, and sustained, the last third of 0.8 s. Exit code 1 if a
// check failed, 77 without a Hopper GPU.
#include "fused_problem.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace annulus {
namespace {

using fused_test::Device;
using fused_test::Problem;
namespace fused = kernels::cuda::fused;

constexpr std::int64_t kTokens = 16384;  // of a batch, where one sequence is shorter
constexpr int kRepetitions = 15;

struct Options {
  bool duty = false;
  std::vector<std::int64_t> head_dims{128, 64, 256, 96, 48, 32, 24, 16};
  std::vector<std::int64_t> seq_lens{2048, 4096, 16384};
  std::vector<std::string> rows{"dense", "causal", "fp16", "gqa", "dilated", "carry", "longnet", "ranks"};
};

int failures = 0;
int multiprocessors = 0;

struct Rate {
  double ms = 0.0;
  double tflops = 0.0;
  double percent = 0.0;
};

class Timer {
 public:
  Timer() : cycles_(64 * kLaunches * 8) { must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() { static_cast<void>(cudaStreamDestroy(stream_)); }
  cudaStream_t stream() const { return stream_; }

  /// Medians of single runs, back to back.
  Rate rate(Device& device, double flops) {
    for (int i = 0; i < 3; ++i) { device.run(stream_); }
    must(cudaMemsetAsync(cycles_.get(), 0, as_size(cycles_.bytes()), stream_), "clear");
    std::vector<cudaEvent_t> events(kRepetitions + 1);
    for (auto& event : events) { must(cudaEventCreate(&event), "event"); }
    must(cudaEventRecord(events[0], stream_), "record");
    for (int i = 0; i < kRepetitions; ++i) {
      device.run(stream_, cycles_.get<unsigned long long>() + as_size(i) * device.steps());
      must(cudaEventRecord(events[as_size(i + 1)], stream_), "record");
    }
    must(cudaStreamSynchronize(stream_), "synchronise");
    std::vector<double> ms;
    std::vector<double> cycles;
    const auto counted = cycles_.host<unsigned long long>();
    for (int i = 0; i < kRepetitions; ++i) {
      float elapsed = 0.0F;
      must(cudaEventElapsedTime(&elapsed, events[as_size(i)], events[as_size(i + 1)]), "elapsed");
      ms.push_back(static_cast<double>(elapsed));
      double sum = 0.0;
      for (std::size_t step = 0; step < device.steps(); ++step) { sum += static_cast<double>(counted[as_size(i) * device.steps() + step]); }
      cycles.push_back(sum);
    }
    for (auto& event : events) { must(cudaEventDestroy(event), "event"); }
    Rate rate;
    rate.ms = median(ms);
    rate.tflops = flops / rate.ms / 1e9;
    rate.percent = 100.0 * flops / median(cycles) / multiprocessors / fused::kFlopsPerCycle;
    return rate;
  }

  /// Median milliseconds of runs for `seconds` after half a second of idling; of the last third where that is longer than 0.1 s.
  double duty_ms(Device& device, double seconds) {
    device.run(stream_);
    must(cudaStreamSynchronize(stream_), "synchronise");
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    std::vector<cudaEvent_t> events(1);
    must(cudaEventCreate(&events[0]), "event");
    must(cudaEventRecord(events[0], stream_), "record");
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
      device.run(stream_);
      events.emplace_back();
      must(cudaEventCreate(&events.back()), "event");
      must(cudaEventRecord(events.back(), stream_), "record");
      if (events.size() > 8 && events.size() % 8 == 0) { must(cudaEventSynchronize(events[events.size() - 4]), "wait"); }
    }
    must(cudaStreamSynchronize(stream_), "synchronise");
    std::vector<double> ms;
    for (std::size_t i = 0; i + 1 < events.size(); ++i) {
      float elapsed = 0.0F;
      must(cudaEventElapsedTime(&elapsed, events[i], events[i + 1]), "elapsed");
      ms.push_back(static_cast<double>(elapsed));
    }
    for (auto& event : events) { must(cudaEventDestroy(event), "event"); }
    if (seconds > 0.1) { ms.erase(ms.begin(), ms.begin() + static_cast<std::ptrdiff_t>(ms.size() * 2 / 3)); }
    return median(ms);
  }

 private:
  static constexpr std::int64_t kLaunches = 64;
  cudaStream_t stream_ = nullptr;
  DeviceMemory cycles_;
};

/// One row of the table; returns its rate.
Rate row(const std::string& title, const Problem& problem, const Noise& noise, Timer& timer, const Options& options,
         double relative_to = 0.0) {
  Device device(problem, noise);
  device.poison(0xFF);
  device.run(timer.stream());
  must(cudaStreamSynchronize(timer.stream()), "run");
  const fused_test::Error error = fused_test::compare(problem, device, problem.seq_len > 100000 ? 16 : 48, kSeed);
  const double limit = problem.dtype == DType::fp16 ? 1e-3 : 5e-3;
  const bool good = error.relative_rms < limit && error.lse < 1e-3 && error.misplaced == 0;
  failures += good ? 0 : 1;
  const double flops = fused_test::flops_of(problem);
  const Rate rate = timer.rate(device, flops);
  std::printf("%-44s %9.3f ms %6.0f TF/s %5.1f%%", title.c_str(), rate.ms, rate.tflops, rate.percent);
  if (options.duty) {
    std::printf("  burst %4.0f sustained %4.0f", flops / timer.duty_ms(device, 0.06) / 1e9, flops / timer.duty_ms(device, 0.8) / 1e9);
  }
  if (relative_to > 0.0) { std::printf("  %.3f", rate.percent / relative_to); }
  std::printf("  rms %.1e lse %.0e %s\n", error.relative_rms, error.lse, good ? "ok" : "WRONG");
  std::fflush(stdout);
  return rate;
}

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> list;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) { list.push_back(item); }
  return list;
}
bool asked(const Options& options, std::string_view row) {
  return std::find(options.rows.begin(), options.rows.end(), row) != options.rows.end();
}

std::vector<std::int64_t> numbers(const std::string& text) {
  std::vector<std::int64_t> list;
  for (const std::string& word : words(text)) { list.push_back(std::stoll(word)); }
  return list;
}

void tables(const Options& options) {
  Timer timer;
  const Noise noise(DType::bf16, 1000003);
  const Noise noise16(DType::fp16, 1000003);
  for (const std::int64_t d : options.head_dims) {
    const std::int64_t heads = 2048 / d;
    const auto title = [&](const std::string& what, std::int64_t n) {
      std::ostringstream text;
      text << "d" << d << " h" << heads << " n" << n << " " << what;
      return text.str();
    };
    for (const std::int64_t n : options.seq_lens) {
      const std::int64_t batch = std::max<std::int64_t>(1, kTokens / n);
      double dense = 0.0;
      if (asked(options, "dense")) { dense = row(title("dense", n), fused_test::plain(batch, n, heads, d), noise, timer, options).percent; }
      if (asked(options, "fp16")) {
        Problem problem = fused_test::plain(batch, n, heads, d);
        problem.dtype = DType::fp16;
        row(title("fp16", n), problem, noise16, timer, options, dense);
      }
      if (asked(options, "gqa")) {
        Problem problem = fused_test::plain(batch, n, heads, d);
        problem.kv_heads = heads % 8 == 0 ? heads / 8 : 1;
        problem.branches[0].kv_heads = problem.kv_heads;
        row(title("gqa", n), problem, noise, timer, options, dense);
      }
      if (asked(options, "causal")) { row(title("causal", n), fused_test::plain(batch, n, heads, d, true), noise, timer, options); }
      if (asked(options, "dilated") && n <= 8192) {
        for (const std::int64_t r : {2, 4, 16}) {
          Problem problem = fused_test::plain(batch, n * r, heads, d);
          problem.branches[0].rate = r;
          row(title("rate " + std::to_string(r), n), problem, noise, timer, options, dense);
        }
      }
      if (asked(options, "carry") && n <= 8192) {
        // Calls of n keys each: two ranks of n tokens, whose first step makes partials, whose second takes them, whose third finishes.
        Problem problem = fused_test::plain(batch, 2 * n, heads, d);
        problem.ranks = 2;
        problem.order = fused::KeyOrder::arrival;
        row(title("carry, 2 calls", n), problem, noise, timer, options, dense);
      }
    }
    if (asked(options, "ranks")) {
      for (const bool causal : {false, true}) {
        for (const std::int64_t n : {65536L}) {
          Problem problem = fused_test::plain(1, n, heads, d, causal);
          const double one = row(title(causal ? "causal" : "dense", n), problem, noise, timer, options).percent;
          problem.ranks = 8;
          row(title(causal ? "causal, 8 ranks" : "dense, 8 ranks", n), problem, noise, timer, options, one);
        }
      }
    }
  }
  if (asked(options, "longnet")) {
    for (const std::int64_t n : {65536, 262144}) {
      Problem problem = fused_test::plain(1, n, 16, 128);
      problem.branches = {{2048, 1, 0, 4}, {4096, 2, 4, 4}, {8192, 4, 8, 4}, {16384, 8, 12, 4}};
      row("LongNet 16 x 128 n" + std::to_string(n), problem, noise, timer, options);
    }
  }
}

int run(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--duty") {
      options.duty = true;
    } else if (i + 1 < argc && flag == "--head-dims") {
      options.head_dims = numbers(argv[++i]);
    } else if (i + 1 < argc && flag == "--seq-lens") {
      options.seq_lens = numbers(argv[++i]);
    } else if (i + 1 < argc && flag == "--rows") {
      options.rows = words(argv[++i]);
    } else {
      std::fprintf(stderr, "annulus_fused_rates: unknown option %s\n", argv[i]);
      return 2;
    }
  }
  int count = 0;
  cudaDeviceProp properties{};
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0 || cudaGetDeviceProperties(&properties, 0) != cudaSuccess ||
      properties.major != 9) {
    std::printf("skipped: no Hopper GPU\n");
    return 77;
  }
  multiprocessors = properties.multiProcessorCount;
  std::printf("%s, %d multiprocessors\n", properties.name, multiprocessors);
  tables(options);
  std::printf("checks: %d failed\n", failures);
  return failures != 0 ? 1 : 0;
}

}  // namespace
}  // namespace annulus

int main(int argc, char** argv) {
  try {
    return annulus::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "annulus_fused_rates: %s\n", error.what());
    return 3;
  }
}
